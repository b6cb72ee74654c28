// SPDX-License-Identifier: MIT
/*
 * The harvest of many threads: a producer, harvesters, a resetter and one that
 * only looks, all on one ring.  Every page must come exactly once, and in order
 * within each harvest; the thread sanitizer must have nothing to say.
 */
#include <errno.h>
#include <sched.h>

#include "../../csrc/internal.h"
#include "check.h"

#define ENTRIES 1024
#define TOTAL 100000
#define HARVESTERS 3

static struct kvr_ring *ring;
static atomic_long taken;
static atomic_long resets;
static atomic_long refused;
static atomic_uchar seen[TOTAL];

static void *produce(void *unused)
{
	uint64_t pushed = 0;

	while (pushed < TOTAL) {
		long n = kvr_synthetic_push(ring, 5, pushed, (uint32_t)(TOTAL - pushed));

		CHECK(n >= 0);
		pushed += (uint64_t)n;
		if (!n)
			sched_yield();
	}
	return unused;
}

static void *reset(void *unused)
{
	while (atomic_load(&resets) < TOTAL) {
		long n = kvr_synthetic_reset(ring);

		CHECK(n >= 0);
		atomic_fetch_add(&resets, n);
		if (!n)
			sched_yield();
	}
	return unused;
}

static void *look(void *unused)
{
	while (atomic_load(&taken) < TOTAL) {
		uint32_t fetch, done, fill;

		SAME(kvr_ring_indices(ring, &fetch, &done), 0);
		CHECK(fetch - done <= ENTRIES);
		SAME(kvr_ring_fill(ring, &fill), 0);
		CHECK(fill <= ENTRIES);
		sched_yield();
	}
	return unused;
}

/* One of several: whoever comes second is refused, and tries again. */
static void *harvest(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;
	struct kvr_gfn gfns[ENTRIES];
	struct kvr_fault fault;
	uint64_t last = 0;

	while (atomic_load(&taken) < TOTAL) {
		long n = kvr_ring_harvest(ring, gfns, NULL, 1 + below(&random, ENTRIES), &fault);

		if (n == -KVR_EINUSE) {
			atomic_fetch_add(&refused, 1);
			sched_yield();
			continue;
		}
		CHECK(n >= 0);
		for (long i = 0; i < n; i++) {
			SAME(gfns[i].slot, 5);
			CHECK(gfns[i].offset < TOTAL);
			CHECK(last == 0 || gfns[i].offset > last);
			last = gfns[i].offset;
			SAME(atomic_fetch_add(&seen[last], 1), 0);
		}
		atomic_fetch_add(&taken, n);
		if (!n)
			sched_yield();
	}
	return NULL;
}

/* The only one, into a set. */
static void *harvest_into_set(void *argument)
{
	struct kvr_set *set = argument;
	struct kvr_fault fault;

	while (atomic_load(&taken) < TOTAL) {
		long n = kvr_ring_harvest(ring, NULL, set, UINT64_MAX, &fault);

		CHECK(n >= 0);
		atomic_fetch_add(&taken, n);
		if (!n)
			sched_yield();
	}
	return NULL;
}

/*
 * The kernel's side as virt/kvm/dirty_ring.c has it, on the ring's memory alone:
 * its own indices, and none of our locks.  Only the flags order it against the
 * harvest, so a missing acquire or release there is a race that TSan sees.
 */
static atomic_uint kernel_reset_index;

static void *kernel_push(void *unused)
{
	for (uint32_t i = 0; i < TOTAL; i++) {
		struct kvm_dirty_gfn *gfn = &ring->gfns[i & (ENTRIES - 1)];

		while (i - atomic_load_explicit(&kernel_reset_index, memory_order_acquire) >=
		       ENTRIES - 64)
			sched_yield();
		gfn->slot = 5;
		gfn->offset = i;
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
	}
	return unused;
}

static void *kernel_reset(void *unused)
{
	uint32_t i = 0;

	while (i < TOTAL) {
		struct kvm_dirty_gfn *gfn = &ring->gfns[i & (ENTRIES - 1)];

		if (!(__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET)) {
			sched_yield();
			continue;
		}
		SAME(gfn->slot, 5); /* the kernel reads what it wrote once more */
		SAME(gfn->offset, i);
		__atomic_store_n(&gfn->flags, 0, __ATOMIC_RELEASE);
		atomic_store_explicit(&kernel_reset_index, ++i, memory_order_release);
	}
	return unused;
}

static void begin(void)
{
	atomic_store(&taken, 0);
	atomic_store(&resets, 0);
	SAME(kvr_ring_synthetic(ENTRIES, &ring), 0);
}

static void test_many_harvesters(uint64_t *random)
{
	pthread_t threads[HARVESTERS + 3];

	begin();
	for (int i = 0; i < HARVESTERS; i++)
		SAME(pthread_create(&threads[i], NULL, harvest,
				    (void *)(uintptr_t)(next_random(random) | 1)),
		     0);
	SAME(pthread_create(&threads[HARVESTERS], NULL, reset, NULL), 0);
	SAME(pthread_create(&threads[HARVESTERS + 1], NULL, look, NULL), 0);
	SAME(pthread_create(&threads[HARVESTERS + 2], NULL, produce, NULL), 0);
	for (int i = 0; i < HARVESTERS + 3; i++)
		pthread_join(threads[i], NULL);
	SAME(atomic_load(&taken), TOTAL);
	SAME(atomic_load(&resets), TOTAL);
	for (uint32_t i = 0; i < TOTAL; i++)
		SAME(atomic_load(&seen[i]), 1);
	kvr_ring_put(ring);
	printf("%ld harvests were refused\n", atomic_load(&refused));
}

static void test_a_set(void)
{
	pthread_t threads[4];
	struct kvr_bitmap *bm;
	struct kvr_set *set;

	begin();
	SAME(kvr_bitmap_new(TOTAL, &bm), 0);
	SAME(kvr_set_new(1, &set), 0);
	SAME(kvr_set_put(set, 5, bm), 0);
	SAME(pthread_create(&threads[0], NULL, harvest_into_set, set), 0);
	SAME(pthread_create(&threads[1], NULL, reset, NULL), 0);
	SAME(pthread_create(&threads[2], NULL, look, NULL), 0);
	SAME(pthread_create(&threads[3], NULL, produce, NULL), 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	SAME(kvr_bitmap_count(bm), TOTAL);
	SAME(kvr_set_strays(set), 0);
	kvr_set_free(set);
	kvr_bitmap_free(bm);
	kvr_ring_put(ring);
}

static void test_only_the_flags_order(void)
{
	pthread_t threads[3];
	struct kvr_bitmap *bm;
	struct kvr_set *set;

	begin();
	SAME(kvr_bitmap_new(TOTAL, &bm), 0);
	SAME(kvr_set_new(1, &set), 0);
	SAME(kvr_set_put(set, 5, bm), 0);
	SAME(pthread_create(&threads[0], NULL, harvest_into_set, set), 0);
	SAME(pthread_create(&threads[1], NULL, kernel_push, NULL), 0);
	SAME(pthread_create(&threads[2], NULL, kernel_reset, NULL), 0);
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	SAME(kvr_bitmap_count(bm), TOTAL);
	SAME(kvr_set_strays(set), 0);
	kvr_set_free(set);
	kvr_bitmap_free(bm);
	kvr_ring_put(ring);
}

int main(int argc, char **argv)
{
	uint64_t random = seed_from(argc, argv);

	test_many_harvesters(&random);
	test_a_set();
	test_only_the_flags_order();
	return 0;
}
