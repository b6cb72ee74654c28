// SPDX-License-Identifier: MIT
/*
 * Full rings, served without leaving C: run, and at KVM_EXIT_DIRTY_RING_FULL
 * harvest, reset and run again.  A vCPU stands still meanwhile, and what it
 * would wait for on the way through Python is mostly cold caches.
 *
 * The set that entries go into is lent by one who reads it when he has it back.
 * It is lent and taken back under the server's lock, which a service holds from
 * its harvest to the end of its reset: whoever has the set knows that each page
 * in it is protected again.  What a service cannot do whole, it leaves: the run
 * ends with the exit, and the caller serves it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

struct kvr_server {
	pthread_mutex_t lock;
	unsigned int generation;
	struct kvr_set *set; /* NULL: not lent, nothing is served */
	struct kvr_served served;
	struct kvr_gfn suspects[KVR_SUSPECTS];
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

int kvr_server_new(struct kvr_server **out)
{
	struct kvr_server *server = calloc(1, sizeof(*server));

	if (!server)
		return -ENOMEM;
	server->generation = atomic_load(&kvr_generation);
	pthread_mutex_init(&server->lock, NULL);
	*out = server;
	return 0;
}

void kvr_server_free(struct kvr_server *server)
{
	if (!kvr_foreign(server->generation)) /* a foreign lock may be held for ever */
		pthread_mutex_destroy(&server->lock);
	free(server);
}

int kvr_server_lend(struct kvr_server *server, struct kvr_set *set)
{
	int ret = 0;

	if (kvr_foreign(server->generation))
		return -KVR_EFORKED;
	pthread_mutex_lock(&server->lock);
	if (server->set)
		ret = -KVR_EINUSE;
	else
		server->set = set;
	pthread_mutex_unlock(&server->lock);
	return ret;
}

int kvr_server_take_back(struct kvr_server *server, struct kvr_served *out,
			 struct kvr_gfn *suspects, uint32_t room)
{
	uint64_t named;

	if (kvr_foreign(server->generation))
		return -KVR_EFORKED;
	pthread_mutex_lock(&server->lock);
	server->set = NULL;
	named = server->served.last.suspects;
	if (named > room) { /* never with room for KVR_SUSPECTS */
		server->served.last.unknown += (uint32_t)(named - room);
		server->served.last.suspects = named = room;
	}
	if (named)
		memcpy(suspects, server->suspects, named * sizeof(*suspects));
	*out = server->served;
	memset(&server->served, 0, sizeof(server->served));
	pthread_mutex_unlock(&server->lock);
	return 0;
}

/* Is there nothing about the reset that the caller must hear of? */
static bool is_whole(const struct kvr_served *served)
{
	const struct kvr_reset_result *last = &served->last;

	return !served->error && last->reset == last->expected && !last->suspects && !last->unknown;
}

/* Called with the lock held and the set lent. */
static bool serve_locked(struct kvr_server *server, struct kvr_vcpu *vcpu, uint64_t since)
{
	struct kvr_served *served = &server->served;
	struct kvr_fault fault = { 0 };
	long n = kvr_ring_harvest(vcpu->ring, NULL, server->set, UINT64_MAX, &fault);

	/* Whatever is wrong with the ring, the caller's own harvest says it again. */
	served->entries += n < 0 ? fault.taken : (uint64_t)n;
	if (n <= 0)
		return false;
	served->error = kvr_reset_dirty_rings(vcpu->obj.parent, 1, server->suspects, KVR_SUSPECTS,
					      &served->last);
	served->resets++;
	served->short_resets += served->last.calls > 1;
	if (!is_whole(served))
		return false;
	served->fulls++;
	served->full_ns += now_ns() - since;
	return true;
}

static bool serve(struct kvr_server *server, struct kvr_vcpu *vcpu, uint64_t since)
{
	bool done = false;

	if (!vcpu->ring)
		return false;
	pthread_mutex_lock(&server->lock);
	if (server->set && is_whole(&server->served))
		done = serve_locked(server, vcpu, since);
	pthread_mutex_unlock(&server->lock);
	return done;
}

int kvr_run_serving(struct kvr_obj *vcpu, struct kvr_server *server, struct kvm_run *out)
{
	if (kvr_foreign(server->generation))
		return -KVR_EFORKED;
	for (;;) {
		int ret = kvr_run(vcpu, out);

		if (ret || vcpu->kind != KVR_VCPU || out->exit_reason != KVM_EXIT_DIRTY_RING_FULL ||
		    !serve(server, kvr_vcpu(vcpu), now_ns()))
			return ret;
	}
}
