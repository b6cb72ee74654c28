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
#include <errno.h>
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
	bool entered;	       /* by a harvest of the whole VM */
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
	uint8_t *touched; /* by chunk: may a word of it be other than zero? */
};

#ifndef KVR_CHUNK_WORDS /* the tests make it small */
#define KVR_CHUNK_WORDS 512
#endif

static inline uint64_t kvr_chunks(const struct kvr_bitmap *bm)
{
	return (bm->num_words + KVR_CHUNK_WORDS - 1) / KVR_CHUNK_WORDS;
}

struct kvr_set_slot {
	uint32_t slot;
	struct kvr_bitmap *bm;
};

struct kvr_set {
	uint32_t room, num;
	uint64_t strays; /* entries that named nothing of the set */
	struct kvr_set_slot slots[];
};

extern atomic_uint kvr_generation;
extern atomic_int kvr_live_rings, kvr_live_fds, kvr_live_maps;

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

/* The fetch index moves under the ring's lock, and is looked at without it too. */
static inline void kvr_advance(struct kvr_ring *ring, uint32_t n)
{
	__atomic_store_n(&ring->fetch, ring->fetch + n, __ATOMIC_RELAXED);
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

/* lines.c: whole cache lines of dirty entries, from a fetch index that begins one.
 * They return how many entries they took; less than max means that the next line
 * is not whole, or not of one known slot, and says nothing about its entries. */
#define KVR_LINE 4
/* For tests, which compare the paths: what the CPU can do best, the next best, or
 * one by one in portable C.  To be changed only while nobody harvests. */
enum kvr_paths { KVR_PATHS_BEST, KVR_PATHS_NEXT, KVR_PATHS_ONE_BY_ONE };
extern int kvr_paths;
uint64_t kvr_lines_to_set(struct kvr_ring *ring, struct kvr_set *set, uint32_t *hint, uint64_t max);
uint64_t kvr_lines_to_gfns(struct kvr_ring *ring, struct kvr_gfn *gfns, uint64_t max);

struct kvr_ring *kvr_ring_new(uint32_t vcpu, uint32_t bytes);
/* Is what may dirty memory refused at this level?  obj: a VM, or what belongs to one. */
static inline bool kvr_frozen(struct kvr_obj *obj, int level)
{
	struct kvr_obj *vm = obj->kind == KVR_VM ? obj : obj->parent;

	return vm && vm->kind == KVR_VM && atomic_load(&kvr_vm(vm)->frozen) >= level;
}

int kvr_ring_map(int vcpu_fd, uint32_t vcpu, uint32_t bytes, struct kvr_ring **out);
struct kvr_ring *kvr_ring_get(struct kvr_ring *ring);
void kvr_bitmap_touch_all(struct kvr_bitmap *bm);
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

/* The set's slot of that number, or NULL.  hint: where the last one was found;
 * runs of entries are of one slot. */
static inline struct kvr_set_slot *kvr_set_find(struct kvr_set *set, uint32_t *hint, uint32_t slot)
{
	uint32_t low = 0, high = set->num;

	if (*hint < set->num && set->slots[*hint].slot == slot)
		return &set->slots[*hint];
	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (set->slots[mid].slot < slot)
			low = mid + 1;
		else
			high = mid;
	}
	if (low >= set->num || set->slots[low].slot != slot)
		return NULL;
	*hint = low;
	return &set->slots[low];
}

static inline void kvr_mark(const struct kvr_bitmap *bm, uint64_t page)
{
	bm->words[page / 64] |= UINT64_C(1) << (page % 64);
	bm->touched[page / 64 / KVR_CHUNK_WORDS] = 1;
}

/* Mark one page in the set, or count it as a stray. */
static inline void kvr_set_mark(struct kvr_set *set, uint32_t *hint, uint32_t slot, uint64_t page)
{
	struct kvr_set_slot *found = kvr_set_find(set, hint, slot);

	if (found && page < found->bm->num_pages)
		kvr_mark(found->bm, page);
	else
		set->strays++;
}

#endif
