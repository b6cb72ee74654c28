/* SPDX-License-Identifier: MIT */
/*
 * kvmring's C API: what Python calls, and each function's contract.
 *
 * Every function returns a count or 0, or a negative error: -errno as the
 * kernel gave it, or one of the -KVR_E* below for what only we can know.  A new
 * owner comes back through the last parameter.  Functions take owners, never an
 * fd or an address.  Any function may be called from any thread without the
 * GIL; what must not run twice at once answers -KVR_EINUSE.  Nothing here
 * allocates per page, logs, or calls back.
 */
#ifndef KVMRING_H
#define KVMRING_H

#include "kvm_compat.h"
#include <stdint.h>

/* Ours; above the range of errno, so neither can be taken for the other. */
#define KVR_EFORKED 5001 /* the owner was made by another process */
#define KVR_ESIZE 5002	 /* a bitmap is not of its slot's size */
#define KVR_EINUSE 5003	 /* another thread is doing just this */
#define KVR_EFROZEN 5005 /* the VM's dirty state was declared final */
#define KVR_ENORING 5004 /* the vCPU was made without a dirty ring */

struct kvr_obj;	     /* one KVM fd: system, VM, vCPU, device or statistics */
struct kvr_map;	     /* guest RAM */
struct kvr_ring;     /* one vCPU's dirty ring, or a synthetic one */
struct kvr_bitmap;   /* one bit per page of a slot */
struct kvr_set;	     /* slot -> bitmap; borrows the bitmaps */
struct kvr_server;   /* serves full rings */
struct kvr_observer; /* copies of another process's ring; no fd, no mapping */
struct kvr_events;   /* tracepoint events of another process's threads */

/* One harvested entry.  Sixteen bytes, like the kernel's, with the vCPU that
 * logged it in the place of the flags. */
struct kvr_gfn {
	uint32_t slot;
	uint32_t vcpu;
	uint64_t offset;
};

/* Where a ring broke the protocol. */
struct kvr_fault {
	uint64_t taken; /* entries that the failing call had taken before */
	uint32_t vcpu;
	uint32_t index; /* position in the ring */
	uint32_t flags; /* what stood there */
	uint32_t slot;
	uint64_t offset;
};

struct kvr_reset_result {
	uint64_t reset;	   /* entries that KVM said it reset */
	uint64_t expected; /* entries that were harvested and not yet reset */
	uint64_t suspects; /* entries listed, whose pages may have stayed writable */
	uint32_t calls;	   /* ioctls made */
	uint32_t unknown;  /* suspects that could not be named any more */
};

struct kvr_high_water {
	uint32_t vcpu;
	uint32_t entries;
};

struct kvr_live {
	int32_t fds, maps, rings;
};

/* own.c: owners ------------------------------------------------------- */

/* Open a KVM device.  -ENOTTY: not KVM.  -EPROTO: an API version other than 12. */
int kvr_open(const char *path, struct kvr_obj **out);
int kvr_create_vm(struct kvr_obj *sys, unsigned long type, struct kvr_obj **out);
/* Creates the vCPU, maps kvm_run and, where the VM has one, its dirty ring. */
int kvr_create_vcpu(struct kvr_obj *vm, unsigned long id, struct kvr_obj **out);
/* With KVM_CREATE_DEVICE_TEST in flags, *out stays NULL. */
int kvr_create_device(struct kvr_obj *vm, uint32_t type, uint32_t flags, struct kvr_obj **out);
int kvr_stats_open(struct kvr_obj *vm_or_vcpu, struct kvr_obj **out);
/* Bytes read, which may be fewer than len at the end of the file. */
long kvr_pread(struct kvr_obj *obj, void *buf, size_t len, uint64_t offset);
void kvr_obj_put(struct kvr_obj *obj);
/* The number itself, to be polled or looked up in /proc; never to be closed. */
int kvr_fileno(struct kvr_obj *obj);
/* Any ioctl with a pointer or an integer argument; the caller knows its size. */
int kvr_ioctl(struct kvr_obj *obj, unsigned long request, void *arg);
int kvr_ioctl_int(struct kvr_obj *obj, unsigned long request, unsigned long arg);

int kvr_map_new(uint64_t bytes, struct kvr_map **out);
void kvr_map_put(struct kvr_map *map);
uint64_t kvr_map_bytes(const struct kvr_map *map);
/* -EFAULT where the range leaves the mapping. */
int kvr_map_read(struct kvr_map *map, uint64_t offset, void *buf, uint64_t len);
int kvr_map_write(struct kvr_map *map, uint64_t offset, const void *buf, uint64_t len);
/* The 64-bit words at offset, offset + stride, ...; all of them 8-byte aligned. */
int kvr_map_gather(struct kvr_map *map, uint64_t offset, uint64_t stride, uint64_t count,
		   uint64_t *out);

void kvr_live(struct kvr_live *out);
void kvr_kernel_page_size(uint64_t *out);

/* vm.c: capabilities, memory slots, the bitmap log, attributes --------- */

/* Remembers the size when it is a ring's; later vCPUs map it. */
int kvr_enable_cap(struct kvr_obj *obj, uint32_t cap, uint32_t flags, const uint64_t args[4]);
/* Bytes per ring; 0 without one. */
int kvr_ring_bytes(struct kvr_obj *vm, uint64_t *out);
/* version 1 or 2: which of the two ioctls.  The VM keeps the mapping until the
 * slot is deleted (bytes == 0) or the VM and all its vCPUs are gone. */
int kvr_set_memory(struct kvr_obj *vm, int version, uint32_t slot, uint32_t flags, uint64_t gpa,
		   uint64_t bytes, struct kvr_map *map, uint64_t map_offset);
/* -KVR_ESIZE before anything happens when the bitmap is not of the slot's size. */
int kvr_get_dirty_log(struct kvr_obj *vm, uint32_t slot, struct kvr_bitmap *into);
/* Clears pages [first, first + num) that are set in the bitmap of the whole slot. */
int kvr_clear_dirty_log(struct kvr_obj *vm, uint32_t slot, const struct kvr_bitmap *bits,
			uint64_t first, uint32_t num);
/* request: KVM_{SET,GET,HAS}_DEVICE_ATTR.  The kernel sees a zeroed buffer of
 * KVR_ATTR_BYTES that begins with the caller's len bytes, so that a size that
 * the caller got wrong cannot hurt. */
#define KVR_ATTR_BYTES 4096
int kvr_device_attr(struct kvr_obj *obj, unsigned long request, uint32_t group, uint64_t attr,
		    void *buf, uint32_t len);
/* request: KVM_{SET,GET}_ONE_REG; len must be what the id says, else -EINVAL. */
int kvr_one_reg(struct kvr_obj *vcpu, unsigned long request, uint64_t id, void *buf, uint32_t len);

/* ring.c: harvest and reset ------------------------------------------- */

/* The vCPU's ring: a reference of its own.  -KVR_ENORING without one. */
int kvr_vcpu_ring(struct kvr_obj *vcpu, struct kvr_ring **out);
void kvr_ring_put(struct kvr_ring *ring);
uint32_t kvr_ring_entries(const struct kvr_ring *ring);
/* Our fetch index and the reset index as we know it; both count without end. */
int kvr_ring_indices(struct kvr_ring *ring, uint32_t *fetch, uint32_t *reset);
/* Room for that many entries, not cleared. */
int kvr_gfns_new(uint64_t capacity, struct kvr_gfn **out);
void kvr_gfns_free(struct kvr_gfn *gfns);
/* Entries that are dirty now and not yet harvested; takes none. */
int kvr_ring_fill(struct kvr_ring *ring, uint32_t *out);
/*
 * Take at most max dirty entries, in order, into exactly one of the two sinks.
 * Returns how many.  -EPROTO: an entry is in no legal state; what was taken
 * before is in the sink, and *fault says how much that is, and where the entry
 * stands.  -KVR_EINUSE: another thread harvests this ring.
 */
long kvr_ring_harvest(struct kvr_ring *ring, struct kvr_gfn *gfns, struct kvr_set *set,
		      uint64_t max, struct kvr_fault *fault);
/* The same over every ring of the VM, in the order of vCPU creation; takes
 * nothing when one of them that has entries is in use.  *fault is the first broken ring's, its
 * count that of the whole call. */
long kvr_vm_harvest(struct kvr_obj *vm, struct kvr_gfn *gfns, struct kvr_set *set, uint64_t max,
		    struct kvr_fault *fault);
/* Of each ring of the VM, in the order of vCPU creation, the most entries that one
 * harvest took from it since this was last cleared; of closed vCPUs too.  Fills at
 * most room; returns how many rings there are. */
long kvr_vm_high_water(struct kvr_obj *vm, struct kvr_high_water *out, uint32_t room, int clear);
/*
 * KVM_RESET_DIRTY_RINGS.  guarded: with every signal of the thread blocked, a
 * short count completed, and the pages that it may have left writable listed in
 * suspects; those that found no room there are counted as unknown.  Not guarded:
 * the bare ioctl, once.  Harvesters wait meanwhile.
 *
 * What stays open: a task interrupted by what no mask keeps off (ptrace, the
 * cgroup freezer) just after the last entry returns a full count all the same.
 */
#define KVR_SUSPECTS 1024 /* room enough: sixteen short calls' worth */
int kvr_reset_dirty_rings(struct kvr_obj *vm, int guarded, struct kvr_gfn *suspects, uint32_t room,
			  struct kvr_reset_result *out);

/* synthetic.c: a ring without KVM, for tests of the harvest ------------- */

int kvr_ring_synthetic(uint32_t entries, struct kvr_ring **out);
/* As KVM pushes: num entries (slot, first ...); stops at the soft limit.  Returns how many. */
long kvr_synthetic_push(struct kvr_ring *ring, uint32_t slot, uint64_t first, uint32_t num);
/* As KVM resets: frees harvested entries in order.  Returns how many. */
long kvr_synthetic_reset(struct kvr_ring *ring);
/* Break it: put any flags at a position. */
int kvr_synthetic_poke(struct kvr_ring *ring, uint32_t index, uint32_t flags);

/* bitmap.c: bits ------------------------------------------------------- */

int kvr_bitmap_new(uint64_t num_pages, struct kvr_bitmap **out);
void kvr_bitmap_free(struct kvr_bitmap *bm);
uint64_t kvr_bitmap_pages_total(const struct kvr_bitmap *bm);
/* The words themselves: ceil(num_pages / 64) of them, bits past the end zero. */
uint64_t *kvr_bitmap_words(struct kvr_bitmap *bm);
uint64_t kvr_bitmap_count(const struct kvr_bitmap *bm);
int kvr_bitmap_test(const struct kvr_bitmap *bm, uint64_t page);
/* Clip nothing: -EINVAL where [first, first + num) leaves the bitmap. */
int kvr_bitmap_set_range(struct kvr_bitmap *bm, uint64_t first, uint64_t num, int value);
/* Mark the pages of a list.  -EINVAL, and none marked, where one is past the end. */
int kvr_bitmap_set_pages(struct kvr_bitmap *bm, const uint64_t *pages, uint64_t num);
/* op: '|', '&', '-', '='.  -KVR_ESIZE when the sizes differ. */
int kvr_bitmap_merge(struct kvr_bitmap *dst, int op, const struct kvr_bitmap *src);
/* 1 when equal, 0 when not. */
int kvr_bitmap_equal(const struct kvr_bitmap *a, const struct kvr_bitmap *b);
/* base + page * scale of set pages from *next on; at most max.  Moves *next. */
uint64_t kvr_bitmap_page_numbers(const struct kvr_bitmap *bm, uint64_t *next, uint64_t base,
				 uint64_t scale, uint64_t *out, uint64_t max);
/* Pairs (first, length) of runs from *next on; at most max pairs.  Moves *next. */
uint64_t kvr_bitmap_runs(const struct kvr_bitmap *bm, uint64_t *next, uint64_t *out, uint64_t max);

/* Room for n slots; slots are put in ascending order, each once. */
int kvr_set_new(uint32_t n, struct kvr_set **out);
void kvr_set_free(struct kvr_set *set);
int kvr_set_put(struct kvr_set *set, uint32_t slot, struct kvr_bitmap *bm);
/* Entries that named no slot, or no page, of the set. */
uint64_t kvr_set_strays(const struct kvr_set *set);

/* run.c: KVM_RUN ------------------------------------------------------- */

/*
 * KVM_RUN, then a copy of the exit's part of kvm_run.  -EINTR: a signal or a
 * kick; the copy's exit_reason is KVM_EXIT_INTR then, whatever an earlier exit
 * left there.  -KVR_EINUSE: the vCPU runs in another thread.  -EFAULT with
 * exit_reason KVM_EXIT_MEMORY_FAULT is an exit too, and returns 0.
 */
int kvr_run(struct kvr_obj *vcpu, struct kvm_run *out);
/* Make the vCPU leave the guest: a KVM_RUN that is under way, or the next one,
 * ends with -EINTR after this call.  Several kicks may share one exit. */
int kvr_kick(struct kvr_obj *vcpu);
/* Make the vCPU leave the guest if it is inside, and wait until it has: what the
 * hardware buffered is in the ring then.  -ETIMEDOUT. */
int kvr_leave(struct kvr_obj *vcpu, uint32_t timeout_ms);
/* Refuse what may dirty memory with -KVR_EFROZEN: nothing, KVM_RUN, or also
 * device commands and changes of slots.  A run under way is not ended. */
enum kvr_freeze { KVR_THAWED, KVR_FROZEN_VCPUS, KVR_FROZEN };
int kvr_freeze(struct kvr_obj *vm, int level);
/* 1 while a thread is inside kvr_run. */
int kvr_running(struct kvr_obj *vcpu);
/* The bytes of the last KVM_EXIT_IO; returns how many there are. */
long kvr_io_data(struct kvr_obj *vcpu, void *buf, uint32_t max);
/* Answer a read (KVM_EXIT_MMIO or KVM_EXIT_IO in); the next kvr_run carries it
 * into the guest.  -EINVAL: no such exit pending, or not of its length. */
int kvr_respond(struct kvr_obj *vcpu, const void *buf, uint32_t len);

/* serve.c: full rings, served without leaving C ------------------------- */

/* What a server did since it was last asked. */
struct kvr_served {
	uint64_t fulls;	       /* full rings served whole */
	uint64_t full_ns;      /* that their vCPUs stood still, from exit to re-entry */
	uint64_t entries;      /* harvested */
	uint32_t resets;       /* made for them */
	uint32_t short_resets; /* of these, such as KVM did not finish at once */
	int32_t error;	       /* of the last reset, as kvr_reset_dirty_rings() returns it */
	uint32_t pad;
	struct kvr_reset_result last; /* the last reset; see there */
};

int kvr_server_new(struct kvr_server **out);
void kvr_server_free(struct kvr_server *server);
/* Have full rings served into the set, until it is taken back.  -KVR_EINUSE: one is
 * lent already. */
int kvr_server_lend(struct kvr_server *server, struct kvr_set *set);
/* Wait for a service under way; after it the set is the caller's, each page in it
 * is protected again but for the suspects (room: KVR_SUSPECTS), and nothing
 * is served.  Also without a set lent. */
int kvr_server_take_back(struct kvr_server *server, struct kvr_served *out,
			 struct kvr_gfn *suspects, uint32_t room);
/* kvr_run(), and again after each full ring that could be served whole. */
int kvr_run_serving(struct kvr_obj *vcpu, struct kvr_server *server, struct kvm_run *out);

/* observe.c: another process's ring ------------------------------------ */

/* What one copy shows, and what was pushed since the copy before it. */
struct kvr_ring_view {
	uint64_t time_ns;   /* CLOCK_MONOTONIC, just after the copy */
	uint32_t write;	    /* the position that KVM writes next */
	uint32_t known;	    /* 0: all entries are free, or none: nothing tells where that is */
	uint32_t pushed;    /* entries since the copy before */
	uint32_t lapped;    /* 1: they may be more */
	uint32_t dirty;	    /* entries that wait for a harvest */
	uint32_t harvested; /* entries that wait for a reset */
};

/* there: the ring's address in that process.  -EINVAL: entries is no power of two. */
int kvr_observer_new(uint32_t pid, uint64_t there, uint32_t entries, struct kvr_observer **out);
void kvr_observer_free(struct kvr_observer *obs);
/*
 * Copy the ring with process_vm_readv(2), compare, and list at most max of the
 * entries pushed since, spread evenly when there is no room for all.  Returns how
 * many were listed.  -ESRCH: no such process.  -EPERM: not ours to read.
 * -EFAULT: there is no ring any more.  One thread at a time.
 *
 * An entry that is pushed again with the same slot and page, between two copies
 * that both find it free, leaves no trace: pushed is a lower bound then.
 */
long kvr_observer_poll(struct kvr_observer *obs, uint32_t vcpu, struct kvr_gfn *fresh, uint32_t max,
		       struct kvr_ring_view *view);

/* proc.c: another process's descriptors --------------------------------- */

struct kvr_kvm_fd {
	uint32_t number;
	uint32_t is_vm;
	uint32_t vcpu; /* its id, unless it is a VM */
};

/* List at most max of the process's VM and vCPU descriptors; returns how many there
 * are.  -ENOENT: no such process.  -EACCES: not ours to look into. */
long kvr_kvm_fds(uint32_t pid, struct kvr_kvm_fd *out, uint32_t max);
/* kcmp(2): 1 when two descriptors of a process are one open file, 0 when not. */
int kvr_same_file(uint32_t pid, uint32_t one, uint32_t other);

/* events.c: tracepoints of another process's threads -------------------- */

enum kvr_event_kind { KVR_ON_PUSH, KVR_ON_RESET, KVR_ON_EXIT, KVR_ON_KINDS };

/* Where a field stands in an event; size 0: the event has none. */
struct kvr_event_field {
	uint16_t offset, size;
};

/* One tracepoint, as its format file in tracefs describes it. */
struct kvr_tracepoint {
	uint32_t id;
	uint32_t kind;
	uint64_t period; /* one event in so many is recorded */
	struct kvr_event_field vcpu, dirty, reset, slot, page;
};

struct kvr_event {
	uint64_t time_ns; /* CLOCK_MONOTONIC */
	uint64_t page;
	uint32_t tid;
	uint32_t kind;
	uint32_t vcpu;
	uint32_t slot;
	uint32_t dirty_index;
	uint32_t reset_index;
};

int kvr_events_new(const struct kvr_tracepoint *points, uint32_t n, struct kvr_events **out);
void kvr_events_free(struct kvr_events *ev);
/*
 * Record a thread's events from now on, into a buffer of that many pages, a power
 * of two.  -ESRCH: no such thread.  -EACCES, -EPERM: perf_event_open(2) is not
 * allowed.  -EEXIST: it is recorded already.  -KVR_EINUSE: another thread uses ev.
 */
int kvr_events_attach(struct kvr_events *ev, uint32_t tid, uint32_t pages);
/* Stop recording a thread; its unread events are gone. */
int kvr_events_detach(struct kvr_events *ev, uint32_t tid);
/* Take recorded events, thread by thread, at most max; adds to *lost those that
 * found no room.  Returns how many. */
long kvr_events_read(struct kvr_events *ev, struct kvr_event *out, uint32_t max, uint64_t *lost);
/* Wait until a buffer is a quarter full: 1, or 0 when the time is up.  -EINTR. */
int kvr_events_wait(struct kvr_events *ev, uint32_t timeout_ms);

/* guest_*.S: the built-in guest ---------------------------------------- */

/* What the guest reads and writes; one per vCPU, its address in the first
 * argument register.  The order is the assembler's too. */
struct kvr_guest_block {
	uint64_t list;	   /* gpa of an array of gpas, to be written in order */
	uint64_t count;	   /* how many of them */
	uint64_t rounds;   /* how often; 0: until told to stop */
	uint64_t stop;	   /* told to stop: looked at after each store */
	uint64_t at;	   /* byte offset inside each page */
	uint64_t stores;   /* out: stores so far, over all commands; the last value stored */
	uint64_t round;	   /* out: whole rounds of this command */
	uint64_t doorbell; /* gpa without memory: written when a command is done */
	uint64_t values;   /* gpa of an array of what to store; 0: the number of stores so far */
};
_Static_assert(offsetof(struct kvr_guest_block, values) == 64, "guest_*.S know the offsets");

extern const unsigned char kvr_guest_code[] __attribute__((visibility("hidden")));
extern const unsigned char kvr_guest_code_end[] __attribute__((visibility("hidden")));
uint32_t kvr_guest_code_bytes(void);

#endif
