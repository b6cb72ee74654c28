// SPDX-License-Identifier: MIT
/*
 * Another process's dirty ring, followed from outside.
 *
 * The ring is copied out of the other process's mapping with
 * process_vm_readv(2), so nothing of that process is touched or kept.  What was
 * pushed between two copies is found by comparing them: KVM writes entries in
 * order, and slot and offset stay in place when an entry is reset.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

/* Entries just behind the last write index that a copy may have caught half
 * written, or read before and after it: their late change is no sign of a lap. */
#define TORN 64
/* A copy takes microseconds; a step this close to the whole ring may be more. */
#define NEAR_A_LAP 128

struct kvr_observer {
	pid_t pid;
	unsigned int generation;
	uint64_t there; /* where the ring stands in the other process */
	uint32_t entries;
	uint32_t write; /* the entry that KVM writes next */
	bool copied;	/* there is a copy to compare with */
	bool known;	/* write is known */
	struct kvm_dirty_gfn *now, *before;
	uint64_t *used, *fresh; /* one bit per entry */
};

int kvr_observer_new(uint32_t pid, uint64_t there, uint32_t entries, struct kvr_observer **out)
{
	struct kvr_observer *obs;

	if (!entries || entries & (entries - 1) || entries > (1U << 24))
		return -EINVAL;
	obs = calloc(1, sizeof(*obs));
	if (!obs)
		return -ENOMEM;
	obs->pid = (pid_t)pid;
	obs->generation = atomic_load(&kvr_generation);
	obs->there = there;
	obs->entries = entries;
	obs->now = calloc(entries, sizeof(*obs->now));
	obs->before = calloc(entries, sizeof(*obs->before));
	obs->used = calloc(entries / 64 + 1, sizeof(*obs->used));
	obs->fresh = calloc(entries / 64 + 1, sizeof(*obs->fresh));
	if (!obs->now || !obs->before || !obs->used || !obs->fresh) {
		kvr_observer_free(obs);
		return -ENOMEM;
	}
	*out = obs;
	return 0;
}

void kvr_observer_free(struct kvr_observer *obs)
{
	free(obs->now);
	free(obs->before);
	free(obs->used);
	free(obs->fresh);
	free(obs);
}

static int copy_ring(struct kvr_observer *obs)
{
	size_t bytes = obs->entries * sizeof(*obs->now);
	struct iovec here = { obs->now, bytes };
	struct iovec there = { (void *)(uintptr_t)obs->there, bytes };
	ssize_t got = process_vm_readv(obs->pid, &here, 1, &there, 1, 0);

	if (got < 0)
		return -errno;
	return (size_t)got == bytes ? 0 : -EFAULT;
}

/* Was this entry certainly pushed between the two copies? */
static inline bool pushed(const struct kvm_dirty_gfn *now, const struct kvm_dirty_gfn *before)
{
	return now->slot != before->slot || now->offset != before->offset ||
	       (now->flags && !before->flags) ||
	       ((now->flags & KVM_DIRTY_GFN_F_DIRTY) && (before->flags & KVM_DIRTY_GFN_F_RESET));
}

/* Two bits per entry, one array each: in use, and pushed since the copy before. */
static void mark(struct kvr_observer *obs, struct kvr_ring_view *view)
{
	for (uint32_t i = 0; i < obs->entries; i += 64) {
		uint64_t used = 0, fresh = 0;

		for (uint32_t k = 0; k < 64 && i + k < obs->entries; k++) {
			const struct kvm_dirty_gfn *now = &obs->now[i + k];

			view->dirty += now->flags == KVM_DIRTY_GFN_F_DIRTY;
			view->harvested += !!(now->flags & KVM_DIRTY_GFN_F_RESET);
			used |= (uint64_t)!!now->flags << k;
			fresh |= (uint64_t)pushed(now, &obs->before[i + k]) << k;
		}
		obs->used[i / 64] = used;
		obs->fresh[i / 64] = fresh;
	}
}

/* The first bit in [from, to) that is value; to: there is none. */
static uint32_t find_bit(const uint64_t *bits, uint32_t from, uint32_t to, bool value)
{
	while (from < to) {
		uint64_t word = (value ? bits[from / 64] : ~bits[from / 64]) >> (from % 64);

		if (word) {
			from += (uint32_t)__builtin_ctzll(word);
			return from < to ? from : to;
		}
		from = (from / 64 + 1) * 64;
	}
	return to;
}

/* One past the last bit set in [from, to); from: there is none. */
static uint32_t end_of_bits(const uint64_t *bits, uint32_t from, uint32_t to)
{
	while (to > from) {
		uint32_t high = (to - 1) % 64;
		uint64_t word = bits[(to - 1) / 64] << (63 - high);

		if (word) {
			to -= (uint32_t)__builtin_clzll(word);
			return to > from ? to : from;
		}
		to = to - 1 - high;
	}
	return from;
}

/*
 * The set bits form one run round the ring, but for holes where the copy was
 * overtaken.  Find the longest gap: the run ends where it begins, and begins
 * where it ends.  Returns the length of the gap: all, or none, may be set.
 */
static uint32_t longest_gap(const uint64_t *bits, uint32_t n, uint32_t *begin)
{
	uint32_t first = find_bit(bits, 0, n, true), best = 0, at = first;

	*begin = 0;
	if (first == n)
		return n;
	while (at < n) {
		uint32_t gap = find_bit(bits, at, n, false);
		uint32_t next = find_bit(bits, gap, n, true);
		uint32_t length = next - gap + (next == n ? first : 0);

		if (length > best) {
			best = length;
			*begin = gap & (n - 1);
		}
		at = next;
	}
	return best;
}

/* Where KVM writes next, from one copy: behind the last entry in use.  In a ring
 * that was never used that is the first entry. */
static bool locate(struct kvr_observer *obs, uint32_t *write)
{
	static const struct kvm_dirty_gfn unused;
	uint32_t gap = longest_gap(obs->used, obs->entries, write);

	if (gap < obs->entries)
		return gap > 0;
	*write = 0;
	for (uint32_t i = 0; i < obs->entries; i++)
		if (memcmp(&obs->now[i], &unused, sizeof(unused)))
			return false;
	return true;
}

/* How far behind obs->write the last new entry stands. */
static uint32_t reach(const struct kvr_observer *obs)
{
	uint32_t n = obs->entries, room = n > TORN ? n - TORN : 0, first = obs->write, end;

	if (first + room > n) {
		end = end_of_bits(obs->fresh, 0, first + room - n);
		if (end)
			return n - first + end;
		room = n - first;
	}
	end = end_of_bits(obs->fresh, first, first + room);
	return end - first;
}

static void compare(struct kvr_observer *obs, bool sure, uint32_t write, struct kvr_ring_view *view)
{
	uint32_t n = obs->entries, mask = n - 1, used = view->dirty + view->harvested;
	uint32_t near = n / 4 < NEAR_A_LAP ? n / 4 : NEAR_A_LAP, far, step;

	if (!obs->known) {
		/* the run of what is new begins where its gap ends */
		uint32_t begin, gap = longest_gap(obs->fresh, n, &begin);

		if (gap == n && !sure)
			return;
		obs->write = gap == n ? write : (begin + gap) & mask;
		obs->known = true;
	}
	far = reach(obs);
	/* Where the copy cannot tell, all is free or all in use: as far as it is new. */
	step = sure ? (write - obs->write) & mask : far;
	view->pushed = step;
	if (sure && far > step && far - step > TORN) {
		view->lapped = 1;
		view->pushed = step + n;
	} else if (step >= n - near && used < step) {
		view->lapped = 1;
		obs->known = sure; /* else it stands anywhere by now */
	}
	obs->write = (obs->write + step) & mask;
}

static uint32_t list_new(const struct kvr_observer *obs, uint32_t vcpu, uint32_t count,
			 struct kvr_gfn *fresh, uint32_t max)
{
	uint32_t n, mask = obs->entries - 1;

	if (count > obs->entries)
		count = obs->entries;
	n = count < max ? count : max;
	/* Where there is no room for all: one out of each of n even parts, not always
	 * at the same place of it, because guests write in patterns. */
	for (uint32_t k = 0; k < n; k++) {
		uint32_t back = (uint32_t)((uint64_t)k * count / n);
		uint32_t next = (uint32_t)((uint64_t)(k + 1) * count / n);
		const struct kvm_dirty_gfn *gfn;

		back += (k * 2654435761U >> 16) % (next - back);
		gfn = &obs->now[(obs->write - 1 - back) & mask];

		fresh[k] = (struct kvr_gfn){ gfn->slot, vcpu, gfn->offset };
	}
	return n;
}

long kvr_observer_poll(struct kvr_observer *obs, uint32_t vcpu, struct kvr_gfn *fresh, uint32_t max,
		       struct kvr_ring_view *view)
{
	struct kvm_dirty_gfn *spare;
	struct timespec at;
	uint32_t write;
	int ret;

	*view = (struct kvr_ring_view){ 0 };
	if (kvr_foreign(obs->generation))
		return -KVR_EFORKED;
	ret = copy_ring(obs);
	if (ret)
		return ret;
	clock_gettime(CLOCK_MONOTONIC, &at);
	view->time_ns = (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
	mark(obs, view);
	view->known = locate(obs, &write);
	if (obs->copied) {
		compare(obs, view->known, write, view);
	} else {
		obs->known = view->known;
		obs->write = write;
	}
	obs->copied = true;
	view->write = write;
	ret = (int)list_new(obs, vcpu, view->pushed, fresh, max);
	spare = obs->before;
	obs->before = obs->now;
	obs->now = spare;
	return ret;
}
