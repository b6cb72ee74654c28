// SPDX-License-Identifier: MIT
/*
 * What `kvmring bench` compares with: the same work in plain C, on VMs of its own.
 *
 * Written from KVM's documentation as a VMM would write it, and of nothing but the
 * kernel's header: no code of csrc/ is used.  The bench compiles this file with
 * gcc -O2 when it runs and loads it with ctypes; each function times itself, so
 * that the call through ctypes is in no figure.  Times are nanoseconds.  What fails
 * returns -errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../../csrc/kvm_compat.h"

#define MAX_VCPUS 64
#define MAX_SLOTS 8
#define WORD_BITS 64

struct vcpu {
	int fd;
	struct kvm_run *run;
	struct kvm_dirty_gfn *ring;
	uint32_t fetch;
};

struct slot {
	uint64_t pages;
	uint64_t *bitmap;
};

struct base {
	int vm;
	size_t run_bytes;
	size_t ring_bytes; /* 0: the VM has no rings */
	uint32_t entries;
	uint32_t vcpus;
	struct vcpu vcpu[MAX_VCPUS];
	struct slot slot[MAX_SLOTS];
};

static uint64_t at(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now(void)
{
	return at(CLOCK_MONOTONIC);
}

static size_t bitmap_bytes(uint64_t pages)
{
	return (pages + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t);
}

/* What KVM and we share */

void base_free(struct base *b)
{
	if (!b)
		return;
	for (uint32_t i = 0; i < b->vcpus; i++) {
		munmap(b->vcpu[i].run, b->run_bytes);
		if (b->ring_bytes)
			munmap(b->vcpu[i].ring, b->ring_bytes);
	}
	for (uint32_t i = 0; i < MAX_SLOTS; i++)
		free(b->slot[i].bitmap);
	free(b);
}

struct base *base_new(int kvm, int vm, uint64_t ring_entries)
{
	struct base *b = calloc(1, sizeof(*b));
	int bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	if (!b || bytes < 0) {
		free(b);
		return NULL;
	}
	b->vm = vm;
	b->run_bytes = (size_t)bytes;
	b->entries = (uint32_t)ring_entries;
	b->ring_bytes = ring_entries * sizeof(struct kvm_dirty_gfn);
	return b;
}

long base_vcpu(struct base *b, int fd)
{
	struct vcpu *v = &b->vcpu[b->vcpus];
	off_t offset = KVM_DIRTY_LOG_PAGE_OFFSET * sysconf(_SC_PAGESIZE);

	if (b->vcpus == MAX_VCPUS)
		return -E2BIG;
	*v = (struct vcpu){ .fd = fd };
	v->run = mmap(NULL, b->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (v->run == MAP_FAILED)
		return -errno;
	if (b->ring_bytes) {
		v->ring = mmap(NULL, b->ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
		if (v->ring == MAP_FAILED) {
			int error = errno;

			munmap(v->run, b->run_bytes);
			return -error;
		}
	}
	b->vcpus++;
	return 0;
}

long base_slot(struct base *b, uint32_t slot, uint64_t pages)
{
	if (slot >= MAX_SLOTS || b->slot[slot].bitmap)
		return -EINVAL;
	b->slot[slot].bitmap = malloc(bitmap_bytes(pages));
	if (!b->slot[slot].bitmap)
		return -ENOMEM;
	memset(b->slot[slot].bitmap, 0, bitmap_bytes(pages));
	b->slot[slot].pages = pages;
	return 0;
}

/* Make every page clean, and tell how many were dirty. */
long base_clean(struct base *b)
{
	long dirty = 0;

	for (uint32_t i = 0; i < MAX_SLOTS; i++) {
		struct slot *s = &b->slot[i];

		for (uint64_t w = 0; w < bitmap_bytes(s->pages) / sizeof(uint64_t); w++) {
			dirty += __builtin_popcountll(s->bitmap[w]);
			s->bitmap[w] = 0;
		}
	}
	return dirty;
}

/* The harvest as VMMs have it: one entry at a time, into the slot's bitmap. */
static uint64_t harvest(struct base *b, struct vcpu *v)
{
	uint32_t fetch = v->fetch, mask = b->entries - 1, n;

	for (n = 0;; n++, fetch++) {
		struct kvm_dirty_gfn *gfn = &v->ring[fetch & mask];
		uint32_t slot;
		uint64_t page;

		if (__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		slot = gfn->slot;
		page = gfn->offset;
		if (slot < MAX_SLOTS && page < b->slot[slot].pages)
			b->slot[slot].bitmap[page / WORD_BITS] |= 1ull << page % WORD_BITS;
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
	v->fetch = fetch;
	return n;
}

static uint64_t harvest_all(struct base *b)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < b->vcpus; i++)
		n += harvest(b, &b->vcpu[i]);
	return n;
}

long base_harvest(struct base *b, uint64_t times, uint64_t *ns)
{
	uint64_t begin = now(), n = 0;

	while (times--)
		n += harvest_all(b);
	*ns = now() - begin;
	return (long)n;
}

/* The floor: no less can be done for an entry than to see that it is dirty and to
 * mark it.  The pages are lost. */
long base_mark(struct base *b, uint64_t *ns)
{
	struct vcpu *v = &b->vcpu[0];
	uint32_t fetch = v->fetch, mask = b->entries - 1, n;
	uint64_t begin = now();

	for (n = 0;; n++, fetch++) {
		struct kvm_dirty_gfn *gfn = &v->ring[fetch & mask];

		if (__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
	*ns = now() - begin;
	v->fetch = fetch;
	return (long)n;
}

/* What one program counts while it runs, over calls that a signal cuts in two. */
struct cycle {
	uint64_t ns;
	uint64_t entries;
	uint64_t resets;
};

/* Run, harvest and reset until the guest writes to its doorbell.  A long job: its
 * time is this thread's, guest included, without that of neighbours. */
long base_cycle(struct base *b, struct cycle *c)
{
	struct vcpu *v = &b->vcpu[0];
	uint64_t begin = at(CLOCK_THREAD_CPUTIME_ID);
	long ret = 0;
	int done = 0;

	while (!done) {
		if (ioctl(v->fd, KVM_RUN, 0) < 0) {
			ret = -errno; /* EINTR: call again */
			break;
		}
		done = v->run->exit_reason == KVM_EXIT_MMIO;
		if (!done && v->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL) {
			ret = -EIO;
			break;
		}
		c->entries += harvest_all(b);
		if (ioctl(b->vm, KVM_RESET_DIRTY_RINGS, 0) < 0) {
			ret = -errno;
			break;
		}
		c->resets++;
	}
	c->ns += at(CLOCK_THREAD_CPUTIME_ID) - begin;
	if (done) { /* the write to the doorbell is completed by the next entry */
		v->run->immediate_exit = 1;
		ioctl(v->fd, KVM_RUN, 0);
		v->run->immediate_exit = 0;
	}
	return ret;
}

/* The ioctls alone */

/* KVM_RUN until the ring is full, or to the next exit of whatever kind. */
long base_run(struct base *b, int immediate, uint64_t times, uint64_t *ns)
{
	struct vcpu *v = &b->vcpu[0];
	uint64_t begin = now();
	long ret = 0;

	for (uint64_t i = 0; i < times; i++) {
		v->run->immediate_exit = (uint8_t)immediate;
		if (ioctl(v->fd, KVM_RUN, 0) < 0 && !(immediate && errno == EINTR)) {
			ret = -errno;
			break;
		}
	}
	*ns = now() - begin;
	v->run->immediate_exit = 0;
	return ret ? ret : (long)v->run->exit_reason;
}

long base_reset(struct base *b, uint64_t times, uint64_t *ns)
{
	uint64_t begin = now();
	long n = 0;

	for (uint64_t i = 0; i < times; i++) {
		int ret = ioctl(b->vm, KVM_RESET_DIRTY_RINGS, 0);

		if (ret < 0)
			return -errno;
		n += ret;
	}
	*ns = now() - begin;
	return n;
}

long base_get_log(struct base *b, uint32_t slot, uint64_t times, uint64_t *ns)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = b->slot[slot].bitmap };
	uint64_t begin = now();

	for (uint64_t i = 0; i < times; i++)
		if (ioctl(b->vm, KVM_GET_DIRTY_LOG, &log) < 0)
			return -errno;
	*ns = now() - begin;
	return 0;
}

long base_clear_log(struct base *b, uint32_t slot, uint64_t times, uint64_t *ns)
{
	struct kvm_clear_dirty_log clear = {
		.slot = slot,
		.num_pages = (uint32_t)b->slot[slot].pages,
		.dirty_bitmap = b->slot[slot].bitmap,
	};
	uint64_t begin = now();

	for (uint64_t i = 0; i < times; i++)
		if (ioctl(b->vm, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
			return -errno;
	*ns = now() - begin;
	return 0;
}

/* Memory */

#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define WIDEST __attribute__((optimize("O3")))
#endif

/* How fast memory can be read at all: lanes that do not wait for each other. */
WIDEST uint64_t base_sum(const uint64_t *words, uint64_t count)
{
	uint64_t lane[32] = { 0 }, sum = 0;

	for (uint64_t i = 0; i + 32 <= count; i += 32)
		for (int k = 0; k < 32; k++)
			lane[k] += words[i + (uint64_t)k];
	for (int k = 0; k < 32; k++)
		sum += lane[k];
	return sum;
}

void *base_memory(uint64_t bytes)
{
	void *words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (words == MAP_FAILED)
		return NULL;
	memset(words, 0x5a, bytes); /* pages of its own, not the shared zero page */
	return words;
}

void base_forget(void *words, uint64_t bytes)
{
	munmap(words, bytes);
}

uint64_t base_read(const uint64_t *words, uint64_t bytes, uint64_t times, uint64_t *ns)
{
	uint64_t begin = at(CLOCK_THREAD_CPUTIME_ID), sum = 0;

	while (times--)
		sum += base_sum(words, bytes / sizeof(*words));
	*ns = at(CLOCK_THREAD_CPUTIME_ID) - begin;
	return sum;
}

#if defined(__x86_64__)
#include <cpuid.h>

/* The name that a hypervisor gives itself, 12 letters; returns whether there is one. */
long base_hypervisor(char *name)
{
	unsigned int a, b, c, d;

	__cpuid(1, a, b, c, d);
	if (!(c & 1u << 31))
		return 0;
	__cpuid(0x40000000, a, b, c, d);
	memcpy(name, &b, 4);
	memcpy(name + 4, &c, 4);
	memcpy(name + 8, &d, 4);
	return 1;
}
#else
long base_hypervisor(char *name)
{
	(void)name;
	return 0;
}
#endif
