// SPDX-License-Identifier: MIT
/*
 * The dirty ring: map, harvest, reset.
 *
 * A ring is an array of kvm_dirty_gfn that KVM fills in order.  We may do one
 * thing to an entry: turn DIRTY into RESET, in order.  Slot and offset are KVM's
 * and read again by KVM_RESET_DIRTY_RINGS; writing them loses the page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "internal.h"

/* As in virt/kvm/dirty_ring.c: how many pages one batch protects. */
#define RESET_BATCH_PAGES 64
/* Calls in a row without progress after which a reset is given up. */
#define RESET_STALLS 64

struct kvr_ring *kvr_ring_new(uint32_t vcpu, uint32_t bytes)
{
	struct kvr_ring *ring = calloc(1, sizeof(*ring));

	if (!ring)
		return NULL;
	atomic_init(&ring->refs, 1);
	pthread_mutex_init(&ring->lock, NULL);
	ring->generation = atomic_load(&kvr_generation);
	ring->vcpu = vcpu;
	ring->bytes = bytes;
	ring->entries = bytes / (uint32_t)sizeof(struct kvm_dirty_gfn);
	atomic_fetch_add(&kvr_live_rings, 1);
	return ring;
}

int kvr_ring_map(int vcpu_fd, uint32_t vcpu, uint32_t bytes, struct kvr_ring **out)
{
	struct kvr_ring *ring = kvr_ring_new(vcpu, bytes);
	void *addr;

	if (!ring)
		return -ENOMEM;
	/* The offset counts pages of the running kernel, not of the build. */
	addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd,
		    (off_t)(KVM_DIRTY_LOG_PAGE_OFFSET * kvr_page_size()));
	if (addr == MAP_FAILED) {
		int ret = -errno;

		kvr_ring_put(ring);
		return ret;
	}
	/* A child that harvests would steal its parent's pages. */
	madvise(addr, bytes, MADV_DONTFORK);
	ring->gfns = addr;
	*out = ring;
	return 0;
}

struct kvr_ring *kvr_ring_get(struct kvr_ring *ring)
{
	atomic_fetch_add(&ring->refs, 1);
	return ring;
}

void kvr_ring_put(struct kvr_ring *ring)
{
	bool foreign;

	if (!ring || atomic_fetch_sub(&ring->refs, 1) != 1)
		return;
	foreign = kvr_foreign(ring->generation);
	if (ring->gfns && !foreign)
		munmap(ring->gfns, ring->bytes);
	if (!foreign)
		pthread_mutex_destroy(&ring->lock);
	atomic_fetch_sub(&kvr_live_rings, 1);
	free(ring);
}

int kvr_vcpu_ring(struct kvr_obj *vcpu, struct kvr_ring **out)
{
	int ret = kvr_expect(vcpu, KVR_VCPU);

	if (ret)
		return ret;
	if (!kvr_vcpu(vcpu)->ring)
		return -KVR_ENORING;
	*out = kvr_ring_get(kvr_vcpu(vcpu)->ring);
	return 0;
}

uint32_t kvr_ring_entries(const struct kvr_ring *ring)
{
	return ring->entries;
}

/* One harvester at a time, and none while a reset counts. */
static int ring_enter(struct kvr_ring *ring)
{
	if (atomic_exchange_explicit(&ring->harvesting, 1, memory_order_acquire))
		return -KVR_EINUSE;
	pthread_mutex_lock(&ring->lock);
	return 0;
}

static void ring_leave(struct kvr_ring *ring)
{
	pthread_mutex_unlock(&ring->lock);
	atomic_store_explicit(&ring->harvesting, 0, memory_order_release);
}

int kvr_ring_indices(struct kvr_ring *ring, uint32_t *fetch, uint32_t *reset)
{
	if (kvr_foreign(ring->generation))
		return -KVR_EFORKED;
	pthread_mutex_lock(&ring->lock);
	*fetch = ring->fetch;
	*reset = ring->reset;
	pthread_mutex_unlock(&ring->lock);
	return 0;
}

int kvr_ring_fill(struct kvr_ring *ring, uint32_t *out)
{
	uint32_t n = 0;

	if (kvr_foreign(ring->generation))
		return -KVR_EFORKED;
	pthread_mutex_lock(&ring->lock);
	while (n < ring->entries) {
		const struct kvm_dirty_gfn *gfn =
			&ring->gfns[(ring->fetch + n) & (ring->entries - 1)];

		if (kvr_load_acquire(&gfn->flags) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		n++;
	}
	pthread_mutex_unlock(&ring->lock);
	*out = n;
	return 0;
}

/* Does the entry at the fetch index end the harvest in a legal way?  Free ends
 * it.  RESET ends it only when all entries are ours: otherwise somebody else
 * has harvested, and the page went to him. */
static bool ends_legally(const struct kvr_ring *ring, uint32_t flags)
{
	if (flags == 0)
		return true;
	return flags == KVM_DIRTY_GFN_F_RESET && ring->fetch - ring->reset == ring->entries;
}

static void note_fault(const struct kvr_ring *ring, uint32_t flags, uint64_t taken,
		       struct kvr_fault *fault)
{
	uint32_t index = ring->fetch & (ring->entries - 1);

	*fault = (struct kvr_fault){
		.taken = taken,
		.vcpu = ring->vcpu,
		.index = index,
		.flags = flags,
		.slot = ring->gfns[index].slot,
		.offset = ring->gfns[index].offset,
	};
}

static bool take_one(struct kvr_ring *ring, struct kvr_gfn *gfns, struct kvr_set *set,
		     uint32_t *hint, uint32_t *flags)
{
	struct kvm_dirty_gfn *gfn = &ring->gfns[ring->fetch & (ring->entries - 1)];

	*flags = kvr_load_acquire(&gfn->flags);
	if (*flags != KVM_DIRTY_GFN_F_DIRTY)
		return false;
	if (set)
		kvr_set_mark(set, hint, gfn->slot, gfn->offset);
	else
		*gfns = (struct kvr_gfn){ gfn->slot, ring->vcpu, gfn->offset };
	kvr_store_release(&gfn->flags, KVM_DIRTY_GFN_F_RESET);
	kvr_advance(ring, 1);
	return true;
}

/* Take at most max entries; one of gfns and set is NULL.  Returns how many;
 * *faulty tells whether it ended at an illegal one, and *fault, which is written
 * only then, where. */
static uint64_t harvest(struct kvr_ring *ring, struct kvr_gfn *gfns, struct kvr_set *set,
			uint64_t max, bool *faulty, struct kvr_fault *fault)
{
	uint32_t hint = 0, flags;
	uint64_t n = 0;

	while (n < max) {
		if (ring->fetch % KVR_LINE == 0 && max - n >= KVR_LINE) {
			uint64_t took = set ? kvr_lines_to_set(ring, set, &hint, max - n)
					    : kvr_lines_to_gfns(ring, gfns + n, max - n);

			n += took;
			if (took) /* there may be more behind the array's end */
				continue;
		}
		if (!take_one(ring, set ? NULL : gfns + n, set, &hint, &flags)) {
			*faulty = !ends_legally(ring, flags);
			if (*faulty)
				note_fault(ring, flags, n, fault);
			break;
		}
		n++;
	}
	if (n > ring->most)
		ring->most = (uint32_t)n;
	return n;
}

long kvr_ring_harvest(struct kvr_ring *ring, struct kvr_gfn *gfns, struct kvr_set *set,
		      uint64_t max, struct kvr_fault *fault)
{
	bool faulty = false;
	uint64_t n;
	int ret;

	if (kvr_foreign(ring->generation))
		return -KVR_EFORKED;
	ret = ring_enter(ring);
	if (ret)
		return ret;
	n = harvest(ring, gfns, set, max, &faulty, fault);
	ring_leave(ring);
	return faulty ? -EPROTO : (long)n;
}

/* Has the ring nothing to take, by a look that needs no lock?  Only a free entry
 * says yes.  While another thread harvests, the index may be old; what comes to
 * light behind it then is left to the next harvest. */
static bool looks_empty(const struct kvr_ring *ring)
{
	uint32_t fetch = __atomic_load_n(&ring->fetch, __ATOMIC_RELAXED);

	return kvr_load_acquire(&ring->gfns[fetch & (ring->entries - 1)].flags) == 0;
}

/* Enter every ring that may have something, or none. */
static int enter_all(struct kvr_vm *vm)
{
	int ret = 0;

	for (uint32_t i = 0; i < vm->num_rings && !ret; i++) {
		struct kvr_ring *ring = vm->rings[i];

		if (looks_empty(ring))
			continue;
		ret = ring_enter(ring);
		ring->entered = !ret;
	}
	return ret;
}

static void leave_all(struct kvr_vm *vm)
{
	for (uint32_t i = 0; i < vm->num_rings; i++) {
		if (!vm->rings[i]->entered)
			continue;
		vm->rings[i]->entered = false;
		ring_leave(vm->rings[i]);
	}
}

long kvr_vm_harvest(struct kvr_obj *obj, struct kvr_gfn *gfns, struct kvr_set *set, uint64_t max,
		    struct kvr_fault *fault)
{
	int ret = kvr_expect(obj, KVR_VM);
	struct kvr_vm *vm = kvr_vm(obj);
	uint64_t taken = 0;
	bool faulty = false;

	if (ret)
		return ret;
	pthread_mutex_lock(&vm->rings_lock);
	ret = enter_all(vm);
	/* A broken ring does not keep the others from being read. */
	for (uint32_t i = 0; !ret && i < vm->num_rings; i++) {
		struct kvr_fault here;
		bool broken = false;

		if (!vm->rings[i]->entered)
			continue;
		taken += harvest(vm->rings[i], set ? NULL : gfns + taken, set, max - taken, &broken,
				 &here);
		if (broken && !faulty)
			*fault = here;
		faulty |= broken;
	}
	if (faulty)
		fault->taken = taken;
	leave_all(vm);
	pthread_mutex_unlock(&vm->rings_lock);
	if (ret)
		return ret;
	return faulty ? -EPROTO : (long)taken;
}

long kvr_vm_high_water(struct kvr_obj *obj, struct kvr_high_water *out, uint32_t room, int clear)
{
	struct kvr_vm *vm = kvr_vm(obj);
	int ret = kvr_expect(obj, KVR_VM);
	uint32_t rings;

	if (ret)
		return ret;
	pthread_mutex_lock(&vm->rings_lock);
	rings = vm->num_rings;
	for (uint32_t i = 0; i < rings; i++) {
		struct kvr_ring *ring = vm->rings[i];

		pthread_mutex_lock(&ring->lock);
		if (i < room)
			out[i] = (struct kvr_high_water){ ring->vcpu, ring->most };
		if (clear)
			ring->most = 0;
		pthread_mutex_unlock(&ring->lock);
	}
	pthread_mutex_unlock(&vm->rings_lock);
	return rings;
}

struct suspects {
	struct kvr_gfn *gfns;
	uint32_t used, room;
};

/*
 * The last batch of a short reset: KVM had counted it and freed its entries
 * when it saw a signal, but had not yet taken write access away.  A batch is a
 * run of entries of one slot within 64 pages, so the longest such run that ends
 * with the last counted entry covers it.  The entries are still in the ring:
 * they are the ones that KVM will write over last.  first, last: ring indices,
 * [first, last) was counted by the short call.
 */
static uint64_t mark_suspects(struct kvr_ring *ring, uint32_t first, uint32_t last,
			      struct suspects *suspects, uint32_t *unknown)
{
	uint32_t mask = ring->entries - 1, slot = 0;
	uint64_t low = 0, high = 0, n = 0;

	for (uint32_t i = last; i != first; i--) {
		const struct kvm_dirty_gfn *gfn = &ring->gfns[(i - 1) & mask];

		if (kvr_load_acquire(&gfn->flags) != 0) { /* written over already */
			*unknown += 1;
			break;
		}
		if (n == 0) {
			slot = gfn->slot;
			low = high = gfn->offset;
		}
		if (gfn->slot != slot)
			break;
		low = gfn->offset < low ? gfn->offset : low;
		high = gfn->offset > high ? gfn->offset : high;
		if (high - low >= RESET_BATCH_PAGES)
			break;
		if (suspects->used == suspects->room) {
			*unknown += 1;
			break;
		}
		suspects->gfns[suspects->used++] =
			(struct kvr_gfn){ slot, ring->vcpu, gfn->offset };
		n++;
	}
	return n;
}

/* Account for n entries that one call reset, in KVM's order: vCPU by vCPU. */
static void account(struct kvr_vm *vm, uint64_t n, bool is_short, struct suspects *suspects,
		    struct kvr_reset_result *out)
{
	struct kvr_ring *last = NULL;
	uint32_t first = 0;

	for (uint32_t i = 0; i < vm->num_rings && n; i++) {
		struct kvr_ring *ring = vm->rings[i];
		uint32_t pending = ring->fetch - ring->reset;
		uint32_t done = n < pending ? (uint32_t)n : pending;

		if (!done)
			continue;
		last = ring;
		first = ring->reset;
		ring->reset += done;
		n -= done;
	}
	if (is_short && last)
		out->suspects += mark_suspects(last, first, last->reset, suspects, &out->unknown);
}

static int reset_all(struct kvr_vm *vm, bool guarded, struct suspects *suspects,
		     struct kvr_reset_result *out)
{
	uint32_t stalls = 0;

	do {
		int n = ioctl(vm->obj.fd, KVM_RESET_DIRTY_RINGS, 0);

		if (n < 0)
			return -errno;
		out->calls++;
		out->reset += (uint64_t)n;
		account(vm, (uint64_t)n, out->reset < out->expected, suspects, out);
		stalls = n ? 0 : stalls + 1;
	} while (guarded && out->reset < out->expected && stalls < RESET_STALLS);
	return 0;
}

int kvr_reset_dirty_rings(struct kvr_obj *obj, int guarded, struct kvr_gfn *gfns, uint32_t room,
			  struct kvr_reset_result *out)
{
	struct suspects suspects = { gfns, 0, room };
	struct kvr_vm *vm = kvr_vm(obj);
	uint64_t before = 0;
	int ret;

	*out = (struct kvr_reset_result){ 0 };
	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	if (obj->kind != KVR_VM)
		return kvr_ioctl_int(obj, KVM_RESET_DIRTY_RINGS, 0);
	pthread_mutex_lock(&vm->rings_lock);
	for (uint32_t i = 0; i < vm->num_rings; i++) {
		pthread_mutex_lock(&vm->rings[i]->lock);
		out->expected += vm->rings[i]->fetch - vm->rings[i]->reset;
	}
	if (guarded)
		before = kvr_block_signals();
	ret = reset_all(vm, guarded, &suspects, out);
	if (guarded)
		kvr_restore_signals(before);
	for (uint32_t i = 0; i < vm->num_rings; i++)
		pthread_mutex_unlock(&vm->rings[i]->lock);
	pthread_mutex_unlock(&vm->rings_lock);
	return ret;
}
