/* SPDX-License-Identifier: MIT */
/*
 * What the C files share with each other and with nobody else: the insides of
 * the owners, and the two that order the ring.
 *
 * Locks, in the order they may be taken: server->lock (serve.c), vm->rings_lock,
 * ring->lock; and, apart from those, vm->slots_lock.  No lock is held across KVM_RUN.
 */
#ifndef KVMRING_INTERNAL_H
#define KVMRING_INTERNAL_H

#include "kvmring.h"
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

enum kvr_kind { KVR_SYSTEM, KVR_VM, KVR_VCPU, KVR_DEVICE, KVR_STATS };

struct kvr_obj {
	enum kvr_kind kind;
	int fd;
	atomic_int refs;
	unsigned int generation;
	struct kvr_obj *parent;
};

struct kvr_map {
	atomic_int refs;
	unsigned int generation;
	uint64_t bytes;
	unsigned char *addr;
};

struct kvr_ring {
	atomic_int refs;
	unsigned int generation;
	uint32_t vcpu;
	uint32_t entries; /* a power of two */
	struct kvm_dirty_gfn *gfns;
	size_t bytes;
	uint32_t fetch;	       /* next entry to take */
	uint32_t reset;	       /* first entry that KVM has not reset yet */
	atomic_int harvesting; /* one harvester at a time */
	pthread_mutex_t lock;  /* a reset keeps harvesters out */
	uint32_t most;	       /* entries that one harvest took */
	uint32_t pushed;       /* synthetic only: the kernel's dirty_index */
	bool synthetic;
};

struct kvr_slot {
	uint32_t slot;
	uint64_t num_pages;
	struct kvr_map *map;
};

struct kvr_vm {
	struct kvr_obj obj;
	pthread_mutex_t rings_lock;
	uint32_t ring_bytes;
	struct kvr_ring **rings; /* outlive their vCPUs' owners: an unread entry must not vanish */
	uint32_t num_rings;
	pthread_mutex_t slots_lock;
	struct kvr_slot *slots;
	uint32_t num_slots;
	atomic_int frozen; /* enum kvr_freeze */
};

struct kvr_vcpu {
	struct kvr_obj obj;
	struct kvm_run *run;
	size_t run_bytes;
	struct kvr_ring *ring; /* NULL without */
	atomic_int tid;	       /* the thread inside KVM_RUN, or 0 */
	pthread_mutex_t lock;  /* of what follows; never held across KVM_RUN */
	pthread_cond_t left;   /* told at the end of every run */
	uint64_t runs;	       /* runs that have ended */
};

struct kvr_bitmap {
	uint64_t num_pages;
	uint64_t num_words;
	uint64_t *words;
};

struct kvr_set_slot {
	uint32_t slot;
	struct kvr_bitmap *bm;
};

struct kvr_set {
	uint32_t room, num;
	uint64_t strays; /* entries that named nothing of the set */
	uint64_t fresh;	 /* entries whose page was not marked before */
	struct kvr_set_slot slots[];
};

extern atomic_uint kvr_generation;
extern atomic_int kvr_live_rings;

static inline bool kvr_foreign(unsigned int generation)
{
	return generation != atomic_load_explicit(&kvr_generation, memory_order_relaxed);
}

/* Pairs with smp_wmb() before the flags store in kvm_dirty_gfn_set_dirtied():
 * who sees DIRTY sees slot and offset. */
static inline uint32_t kvr_load_acquire(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

/* Pairs with smp_load_acquire() in kvm_dirty_gfn_harvested(): who sees RESET
 * knows that we have read the entry. */
static inline void kvr_store_release(uint32_t *p, uint32_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static inline struct kvr_vm *kvr_vm(struct kvr_obj *obj)
{
	return (struct kvr_vm *)obj;
}

static inline struct kvr_vcpu *kvr_vcpu(struct kvr_obj *obj)
{
	return (struct kvr_vcpu *)obj;
}

/* The kind is checked the way the kernel does it: a wrong one is ENOTTY. */
static inline int kvr_expect(const struct kvr_obj *obj, enum kvr_kind kind)
{
	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	return obj->kind == kind ? 0 : -ENOTTY;
}

struct kvr_ring *kvr_ring_new(uint32_t vcpu, uint32_t bytes);
/* Is what may dirty memory refused at this level?  obj: a VM, or what belongs to one. */
static inline bool kvr_frozen(struct kvr_obj *obj, int level)
{
	struct kvr_obj *vm = obj->kind == KVR_VM ? obj : obj->parent;

	return vm && vm->kind == KVR_VM && atomic_load(&kvr_vm(vm)->frozen) >= level;
}

int kvr_ring_map(int vcpu_fd, uint32_t vcpu, uint32_t bytes, struct kvr_ring **out);
struct kvr_ring *kvr_ring_get(struct kvr_ring *ring);
struct kvr_map *kvr_map_get(struct kvr_map *map);
size_t kvr_page_size(void);
int kvr_kick_signal(void);

/*
 * Keep every signal from this thread.  By the bare system call: the C library's
 * keeps two signals for itself, and those interrupt an ioctl as well as any.
 */
static inline uint64_t kvr_block_signals(void)
{
	uint64_t all = ~UINT64_C(0), before = 0;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof(all));
	return before;
}

static inline void kvr_restore_signals(uint64_t before)
{
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof(before));
}

/* Mark one page in the set, or count it as a stray.  hint: where the last one
 * was found; runs of entries are of one slot. */
static inline void kvr_set_mark(struct kvr_set *set, uint32_t *hint, uint32_t slot, uint64_t page)
{
	uint32_t low = 0, high = set->num, i = *hint;
	uint64_t *word;

	if (i >= set->num || set->slots[i].slot != slot) {
		while (low < high) {
			uint32_t mid = low + (high - low) / 2;

			if (set->slots[mid].slot < slot)
				low = mid + 1;
			else
				high = mid;
		}
		i = low;
		if (i >= set->num || set->slots[i].slot != slot) {
			set->strays++;
			return;
		}
		*hint = i;
	}
	if (page >= set->slots[i].bm->num_pages) {
		set->strays++;
		return;
	}
	word = &set->slots[i].bm->words[page / 64];
	set->fresh += ~*word >> (page % 64) & 1;
	*word |= UINT64_C(1) << (page % 64);
}

#endif
