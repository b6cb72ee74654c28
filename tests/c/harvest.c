// SPDX-License-Identifier: MIT
/*
 * The harvest of one thread: random pushes, harvests and resets against a
 * queue, for many turns of the ring; and the states in which an entry may not be.
 */
#include <errno.h>

#include "../../csrc/internal.h"
#include "check.h"

#define ENTRIES 128
#define SOFT (ENTRIES - 64)
#define PAGES (1 << 16)

static struct kvr_ring *new_ring(void)
{
	struct kvr_ring *ring = NULL;

	SAME(kvr_ring_synthetic(ENTRIES, &ring), 0);
	SAME(kvr_ring_entries(ring), ENTRIES);
	return ring;
}

/* What the ring should be: three counters that only grow. */
struct model {
	uint32_t pushed, fetched, reset;
};

static void look(struct kvr_ring *ring, const struct model *model)
{
	uint32_t fetch, reset, fill;

	SAME(kvr_ring_indices(ring, &fetch, &reset), 0);
	SAME(fetch, model->fetched);
	SAME(reset, model->reset);
	SAME(kvr_ring_fill(ring, &fill), 0);
	SAME(fill, model->pushed - model->fetched);
}

static void push(struct kvr_ring *ring, struct model *model, uint64_t *random)
{
	uint32_t num = below(random, 2 * SOFT);
	uint32_t room = SOFT - (model->pushed - model->reset);
	uint32_t want = num < room ? num : room;

	SAME(kvr_synthetic_push(ring, 7, model->pushed, num), want);
	model->pushed += want;
}

static void harvest(struct kvr_ring *ring, struct model *model, uint64_t *random)
{
	struct kvr_gfn gfns[2 * SOFT] = { { 0 } };
	uint32_t max = below(random, 2 * SOFT), there = model->pushed - model->fetched;
	uint32_t want = max < there ? max : there;
	struct kvr_fault fault;

	SAME(kvr_ring_harvest(ring, gfns, NULL, max, &fault), want);
	for (uint32_t i = 0; i < want; i++) {
		SAME(gfns[i].slot, 7);
		SAME(gfns[i].vcpu, 0);
		SAME((uint32_t)gfns[i].offset, model->fetched + i);
	}
	for (uint32_t i = want; i < 2 * SOFT; i++)
		SAME(gfns[i].slot, 0); /* not a word beyond */
	model->fetched += want;
}

static void test_against_a_queue(uint64_t *random)
{
	struct kvr_ring *ring = new_ring();
	struct model model = { 0 };

	while (model.reset < 1000 * ENTRIES) {
		switch (below(random, 3)) {
		case 0:
			push(ring, &model, random);
			break;
		case 1:
			harvest(ring, &model, random);
			break;
		default:
			SAME(kvr_synthetic_reset(ring), model.fetched - model.reset);
			model.reset = model.fetched;
		}
		look(ring, &model);
	}
	kvr_ring_put(ring);
}

/* The 32-bit counters wrap; positions and differences must not notice. */
static void test_counters_wrap(uint64_t *random)
{
	struct kvr_ring *ring = new_ring();
	struct model model;

	ring->pushed = ring->fetch = ring->reset = (uint32_t)-300;
	model = (struct model){ ring->pushed, ring->fetch, ring->reset };
	for (uint32_t i = 0; i < 3000; i++) {
		push(ring, &model, random);
		look(ring, &model);
		harvest(ring, &model, random);
		SAME(kvr_synthetic_reset(ring), model.fetched - model.reset);
		model.reset = model.fetched;
	}
	CHECK(model.reset > 300 && model.reset < UINT32_MAX - 300);
	kvr_ring_put(ring);
}

static void test_into_a_set(uint64_t *random)
{
	struct kvr_ring *ring = new_ring();
	struct kvr_bitmap *bm;
	struct kvr_set *set;
	struct kvr_fault fault;
	uint64_t taken = 0;

	SAME(kvr_bitmap_new(PAGES, &bm), 0);
	SAME(kvr_set_new(1, &set), 0);
	SAME(kvr_set_put(set, 7, bm), 0);
	while (taken < PAGES + 50) {
		long pushed = kvr_synthetic_push(ring, 7, taken, 1 + below(random, SOFT));

		SAME(kvr_ring_harvest(ring, NULL, set, UINT64_MAX, &fault), pushed);
		SAME(kvr_synthetic_reset(ring), pushed);
		taken += (uint64_t)pushed;
	}
	SAME(kvr_bitmap_count(bm), PAGES);
	SAME(kvr_set_strays(set), taken - PAGES);
	kvr_set_free(set);
	kvr_bitmap_free(bm);
	kvr_ring_put(ring);
}

/* Runs of entries of a few slots, some of them unknown, pages anywhere and beyond:
 * every path must do what one mark after the other does. */
static void test_slots_and_strays(uint64_t *random)
{
	struct kvr_bitmap *bms[3], *want[3];
	struct kvr_ring *ring = new_ring();
	struct kvr_set *set;
	struct kvr_fault fault;
	uint64_t strays = 0;

	SAME(kvr_set_new(3, &set), 0);
	for (uint32_t i = 0; i < 3; i++) {
		SAME(kvr_bitmap_new(500, &bms[i]), 0);
		SAME(kvr_bitmap_new(500, &want[i]), 0);
		SAME(kvr_set_put(set, 2 * i, bms[i]), 0);
	}
	for (uint32_t round = 0; round < 2000; round++) {
		uint32_t there = 0, slot = 0;

		while (there < SOFT - 1) {
			uint64_t page = below(random, below(random, 30) ? 500 : 600);

			if (!below(random, 12))
				slot = below(random, 6);
			there += (uint32_t)kvr_synthetic_push(ring, slot, page, 1);
			if (slot % 2 || page >= 500)
				strays++;
			else
				SAME(kvr_bitmap_set_range(want[slot / 2], page, 1, 1), 0);
		}
		while (there) {
			uint32_t max = 1 + below(random, SOFT);
			uint32_t now = max < there ? max : there;

			SAME(kvr_ring_harvest(ring, NULL, set, max, &fault), now);
			there -= now;
		}
		SAME(kvr_synthetic_reset(ring), SOFT - 1);
		SAME(kvr_set_strays(set), strays);
		for (uint32_t i = 0; i < 3; i++) {
			CHECK(kvr_bitmap_equal(bms[i], want[i]));
			if (below(random, 4) == 0) {
				SAME(kvr_bitmap_set_range(bms[i], 0, 500, 0), 0);
				SAME(kvr_bitmap_set_range(want[i], 0, 500, 0), 0);
			}
		}
	}
	for (uint32_t i = 0; i < 3; i++) {
		kvr_bitmap_free(bms[i]);
		kvr_bitmap_free(want[i]);
	}
	kvr_set_free(set);
	kvr_ring_put(ring);
}

static void test_illegal(uint32_t flags)
{
	for (uint32_t at = 0; at < 20; at++) {
		struct kvr_ring *ring = new_ring();
		struct kvr_gfn gfns[SOFT];
		struct kvr_fault fault = { 0 };

		for (uint32_t i = 0; i < 7; i++) { /* the index is not the count */
			SAME(kvr_synthetic_push(ring, 1, 0, 20), 20);
			SAME(kvr_ring_harvest(ring, gfns, NULL, SOFT, &fault), 20);
			SAME(kvr_synthetic_reset(ring), 20);
		}
		SAME(kvr_synthetic_push(ring, 3, 100, 20), 20);
		SAME(kvr_synthetic_poke(ring, (140 + at) % ENTRIES, flags), 0);
		SAME(kvr_ring_harvest(ring, gfns, NULL, at, &fault), at); /* ends before it */
		SAME(kvr_ring_harvest(ring, gfns, NULL, SOFT, &fault), -EPROTO);
		SAME(fault.taken, 0);
		SAME(fault.index, (140 + at) % ENTRIES);
		SAME(fault.flags, flags);
		SAME(fault.slot, 3);
		SAME(fault.offset, 100 + at);
		SAME(kvr_synthetic_poke(ring, (140 + at) % ENTRIES, KVM_DIRTY_GFN_F_DIRTY), 0);
		SAME(kvr_ring_harvest(ring, gfns, NULL, SOFT, &fault), 20 - at);
		kvr_ring_put(ring);
	}
}

static void test_taken_before_a_fault(void)
{
	for (uint32_t at = 0; at < 20; at++) {
		struct kvr_ring *ring = new_ring();
		struct kvr_gfn gfns[SOFT] = { { 0 } };
		struct kvr_fault fault;

		SAME(kvr_synthetic_push(ring, 3, 100, 20), 20);
		SAME(kvr_synthetic_poke(ring, at, 3), 0);
		SAME(kvr_ring_harvest(ring, gfns, NULL, SOFT, &fault), -EPROTO);
		SAME(fault.taken, at);
		for (uint32_t i = 0; i < at; i++)
			SAME(gfns[i].offset, 100 + i);
		SAME(gfns[at].offset, 0);
		kvr_ring_put(ring);
	}
}

static void test_reset_ends_only_when_all_is_ours(void)
{
	struct kvr_ring *ring = new_ring();
	struct kvr_gfn gfns[ENTRIES];
	struct kvr_fault fault;

	SAME(kvr_synthetic_push(ring, 0, 0, ENTRIES), SOFT);
	for (uint32_t i = SOFT; i < ENTRIES; i++) /* what PML may add beyond the limit */
		SAME(kvr_synthetic_poke(ring, i, KVM_DIRTY_GFN_F_DIRTY), 0);
	SAME(kvr_ring_harvest(ring, gfns, NULL, ENTRIES - 1, &fault), ENTRIES - 1);
	SAME(kvr_ring_harvest(ring, gfns, NULL, ENTRIES, &fault), 1);
	SAME(kvr_ring_harvest(ring, gfns, NULL, ENTRIES, &fault), 0);
	kvr_ring_put(ring);

	ring = new_ring();
	SAME(kvr_synthetic_poke(ring, 0, KVM_DIRTY_GFN_F_RESET), 0);
	SAME(kvr_ring_harvest(ring, gfns, NULL, ENTRIES, &fault), -EPROTO);
	kvr_ring_put(ring);
}

/* What a second harvester meets; that two threads do meet is in threads.c. */
static void test_in_use(void)
{
	struct kvr_ring *ring = new_ring();
	struct kvr_gfn gfns[SOFT];
	struct kvr_fault fault;

	SAME(kvr_synthetic_push(ring, 0, 0, 5), 5);
	atomic_store(&ring->harvesting, 1);
	SAME(kvr_ring_harvest(ring, gfns, NULL, SOFT, &fault), -KVR_EINUSE);
	SAME(kvr_ring_harvest(ring, gfns, NULL, 0, &fault), -KVR_EINUSE);
	atomic_store(&ring->harvesting, 0);
	SAME(kvr_ring_harvest(ring, gfns, NULL, SOFT, &fault), 5);
	SAME(atomic_load(&ring->harvesting), 0);
	kvr_ring_put(ring);
}

static void test_refusals(void)
{
	static const uint32_t bad[] = {
		0, 1, 32, 64, 100, 129, (1U << 24) + 1, 1U << 25, 1U << 31
	};
	struct kvr_ring *ring = NULL;
	struct kvr_live live;

	for (uint32_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		SAME(kvr_ring_synthetic(bad[i], &ring), -EINVAL);
	CHECK(!ring);
	ring = new_ring();
	SAME(kvr_synthetic_poke(ring, ENTRIES, 0), -EINVAL);
	kvr_live(&live);
	SAME(live.rings, 1);
	kvr_ring_put(ring);
	kvr_ring_put(NULL);
	kvr_live(&live);
	SAME(live.rings, 0);
}

int main(int argc, char **argv)
{
	uint64_t random = seed_from(argc, argv);

	for (kvr_paths = KVR_PATHS_BEST; kvr_paths <= KVR_PATHS_ONE_BY_ONE; kvr_paths++) {
		test_against_a_queue(&random);
		test_counters_wrap(&random);
		test_into_a_set(&random);
		test_slots_and_strays(&random);
		test_illegal(KVM_DIRTY_GFN_F_RESET);
		test_illegal(KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET);
		test_illegal(4);
		test_illegal(UINT32_MAX);
		test_taken_before_a_fault();
		test_reset_ends_only_when_all_is_ours();
		test_in_use();
		test_refusals();
	}
	return 0;
}
