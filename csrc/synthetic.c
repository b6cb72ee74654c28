// SPDX-License-Identifier: MIT
/*
 * A ring without KVM, for tests of the harvest: plain shared memory that is
 * filled as virt/kvm/dirty_ring.c fills a ring, and harvested by the same code.
 * It stands in for a ring's memory, never for KVM.
 */
#include <errno.h>
#include <sys/mman.h>

#include "internal.h"

/* KVM_DIRTY_RING_RSVD_ENTRIES: what KVM keeps back. */
#define RESERVED_ENTRIES 64

int kvr_ring_synthetic(uint32_t entries, struct kvr_ring **out)
{
	struct kvr_ring *ring;
	void *addr;

	if (entries <= RESERVED_ENTRIES || (entries & (entries - 1)) || entries > 1U << 24)
		return -EINVAL;
	ring = kvr_ring_new(0, entries * (uint32_t)sizeof(struct kvm_dirty_gfn));
	if (!ring)
		return -ENOMEM;
	addr = mmap(NULL, ring->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (addr == MAP_FAILED) {
		kvr_ring_put(ring);
		return -ENOMEM;
	}
	ring->gfns = addr;
	ring->synthetic = true;
	*out = ring;
	return 0;
}

long kvr_synthetic_push(struct kvr_ring *ring, uint32_t slot, uint64_t first, uint32_t num)
{
	uint32_t n;

	if (!ring->synthetic)
		return -EINVAL;
	for (n = 0; n < num; n++) {
		struct kvm_dirty_gfn *gfn = &ring->gfns[ring->pushed & (ring->entries - 1)];
		/* reset moves under the producer, as reset_index does in KVM */
		uint32_t used = ring->pushed - __atomic_load_n(&ring->reset, __ATOMIC_ACQUIRE);

		if (used >= ring->entries - RESERVED_ENTRIES)
			break;
		gfn->slot = slot;
		gfn->offset = first + n;
		kvr_store_release(&gfn->flags, KVM_DIRTY_GFN_F_DIRTY);
		ring->pushed++;
	}
	return n;
}

long kvr_synthetic_reset(struct kvr_ring *ring)
{
	long n = 0;

	if (!ring->synthetic)
		return -EINVAL;
	pthread_mutex_lock(&ring->lock);
	while (ring->reset != ring->fetch) {
		struct kvm_dirty_gfn *gfn = &ring->gfns[ring->reset & (ring->entries - 1)];

		if (!(kvr_load_acquire(&gfn->flags) & KVM_DIRTY_GFN_F_RESET))
			break;
		kvr_store_release(&gfn->flags, 0);
		__atomic_store_n(&ring->reset, ring->reset + 1, __ATOMIC_RELEASE);
		n++;
	}
	pthread_mutex_unlock(&ring->lock);
	return n;
}

int kvr_synthetic_poke(struct kvr_ring *ring, uint32_t index, uint32_t flags)
{
	if (!ring->synthetic || index >= ring->entries)
		return -EINVAL;
	kvr_store_release(&ring->gfns[index].flags, flags);
	return 0;
}
