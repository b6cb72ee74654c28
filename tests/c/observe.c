// SPDX-License-Identifier: MIT
/*
 * The observer on a ring in this process's own memory, which is pushed to,
 * harvested and reset at random; and the owners of events and descriptors on
 * what needs neither KVM nor tracefs.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "../../csrc/internal.h"
#include "check.h"

#define MOST 4096

static struct kvm_dirty_gfn ring[MOST];
static uint32_t dirty, harvested, reset; /* as KVM and the harvester count */

static void push(uint32_t entries, uint64_t page)
{
	ring[dirty++ % entries] = (struct kvm_dirty_gfn){ KVM_DIRTY_GFN_F_DIRTY, 5, page };
}

static void harvest(uint32_t entries)
{
	while (harvested != dirty)
		ring[harvested++ % entries].flags = KVM_DIRTY_GFN_F_RESET;
}

static void give_back(uint32_t entries)
{
	while (reset != harvested)
		ring[reset++ % entries].flags = 0;
}

static void follow(uint64_t *state, uint32_t entries)
{
	struct kvr_observer *obs;
	struct kvr_ring_view view;
	struct kvr_gfn fresh[300];
	uint64_t page = 0;

	memset(ring, 0, sizeof(ring));
	dirty = harvested = reset = below(state, 100000);
	SAME(kvr_observer_new((uint32_t)getpid(), (uint64_t)(uintptr_t)ring, entries, &obs), 0);
	/* a ring that looks unused is taken to stand at 0 */
	dirty = harvested = reset = reset / entries * entries;
	SAME(kvr_observer_poll(obs, 1, fresh, 300, &view), 0);
	for (int i = 0; i < 3000; i++) {
		uint32_t room = entries - (dirty - reset), n = below(state, entries / 4);
		uint32_t max = below(state, 300), before = dirty;
		long listed;

		n = n < room ? n : room;
		while (n--)
			push(entries, ++page);
		if (below(state, 3))
			harvest(entries);
		if (below(state, 3))
			give_back(entries);
		listed = kvr_observer_poll(obs, 1, fresh, max, &view);
		CHECK(listed >= 0 && listed <= (long)max);
		SAME(view.lapped, 0);
		SAME(view.pushed, dirty - before);
		SAME(view.dirty, dirty - harvested);
		SAME(view.harvested, harvested - reset);
		SAME(listed, view.pushed < max ? view.pushed : max);
		/* all of them, where there was room: the newest first */
		for (long k = 0; k < listed && listed == view.pushed; k++)
			SAME(fresh[k].offset, page - (uint64_t)k);
		SAME(view.known ? view.write : dirty % entries, dirty % entries);
	}
	kvr_observer_free(obs);
}

static void descriptors(void)
{
	struct kvr_kvm_fd found[4];
	int fds[2], again;

	SAME(kvr_kvm_fds((uint32_t)getpid(), found, 4), 0);
	SAME(kvr_kvm_fds(0x7fffffff, found, 4), -ENOENT);
	SAME(pipe(fds), 0);
	again = dup(fds[0]);
	if (kvr_same_file((uint32_t)getpid(), (uint32_t)fds[0], (uint32_t)again) >= 0) {
		SAME(kvr_same_file((uint32_t)getpid(), (uint32_t)fds[0], (uint32_t)again), 1);
		SAME(kvr_same_file((uint32_t)getpid(), (uint32_t)fds[0], (uint32_t)fds[1]), 0);
	}
	close(fds[0]);
	close(fds[1]);
	close(again);
}

static void events(void)
{
	struct kvr_tracepoint point = { .id = 1, .kind = KVR_ON_PUSH, .period = 1 };
	struct kvr_event out[2];
	struct kvr_events *ev;
	uint64_t lost = 0;

	SAME(kvr_events_new(&point, 0, &ev), -EINVAL);
	point.period = 0;
	SAME(kvr_events_new(&point, 1, &ev), -EINVAL);
	point.period = 1;
	SAME(kvr_events_new(&point, 1, &ev), 0);
	SAME(kvr_events_attach(ev, (uint32_t)getpid(), 3), -EINVAL);
	CHECK(kvr_events_attach(ev, 0x7fffffff, 1) < 0);
	SAME(kvr_events_detach(ev, 1), -ESRCH);
	SAME(kvr_events_read(ev, out, 2, &lost), 0);
	SAME(kvr_events_wait(ev, 1), 0);
	kvr_events_free(ev);
}

int main(int argc, char **argv)
{
	static const uint32_t sizes[] = { 256, 1024, MOST };
	uint64_t state = seed_from(argc, argv);
	struct kvr_observer *obs;
	struct kvr_live live;

	SAME(kvr_observer_new(1, 0, 0, &obs), -EINVAL);
	SAME(kvr_observer_new(1, 0, 300, &obs), -EINVAL);
	for (unsigned int i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		follow(&state, sizes[i]);
	descriptors();
	events();
	kvr_live(&live);
	SAME(live.fds + live.maps, 0);
	return 0;
}
