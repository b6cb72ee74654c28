// SPDX-License-Identifier: MIT
/*
 * Bitmaps against an array with a byte per page, and the slot lookup against a
 * linear search, on random input.  Every function of bitmap.c is called, at
 * sizes around whole words; the address sanitizer watches the words' ends.
 */
#include <errno.h>
#include <string.h>

#include "../../csrc/internal.h"
#include "check.h"

#define MOST 1800

static const uint32_t edges[] = { 0,   1,   2,	 63,  64,   65,	  127,	128,
				  129, 191, 640, 700, 1087, 1088, 1089, 1800 };

/* A bitmap, and what it should hold. */
struct pair {
	struct kvr_bitmap *bm;
	uint32_t size;
	unsigned char model[MOST];
};

static void begin(struct pair *pair, uint32_t size)
{
	memset(pair->model, 0, sizeof(pair->model));
	pair->size = size;
	SAME(kvr_bitmap_new(size, &pair->bm), 0);
}

static void look_at_words(const struct pair *pair)
{
	const uint64_t *words = kvr_bitmap_words(pair->bm);

	for (uint32_t i = 0; i < (pair->size + 63) / 64 * 64; i++) {
		int want = i < pair->size && pair->model[i];

		SAME(words[i / 64] >> (i % 64) & 1, want); /* the tail's too */
		SAME(kvr_bitmap_test(pair->bm, i), want);
	}
	SAME(kvr_bitmap_test(pair->bm, pair->size), 0);
	SAME(kvr_bitmap_test(pair->bm, UINT64_MAX), 0);
}

static void look_at_numbers(const struct pair *pair, uint32_t chunk)
{
	uint64_t next = 0, out[MOST], n = 0, got;
	uint32_t page = 0;

	do {
		got = kvr_bitmap_page_numbers(pair->bm, &next, 1000, 4096, out, chunk);
		for (uint64_t i = 0; i < got; i++) {
			while (!pair->model[page])
				page++;
			SAME(out[i], 1000 + (uint64_t)page * 4096);
			page++;
		}
		n += got;
	} while (got == chunk);
	SAME(n, kvr_bitmap_count(pair->bm));
	SAME(kvr_bitmap_page_numbers(pair->bm, &next, 0, 1, out, chunk), 0);
}

static void look_at_runs(const struct pair *pair, uint32_t chunk)
{
	uint64_t next = 0, out[2 * MOST], got;
	uint32_t page = 0, end;

	do {
		got = kvr_bitmap_runs(pair->bm, &next, out, chunk);
		for (uint64_t i = 0; i < got; i++) {
			while (!pair->model[page])
				page++;
			for (end = page; end < pair->size && pair->model[end];)
				end++;
			SAME(out[2 * i], page);
			SAME(out[2 * i + 1], end - page);
			page = end;
		}
	} while (got == chunk);
	while (page < pair->size)
		SAME(pair->model[page++], 0);
}

static void look(const struct pair *pair, uint64_t *random)
{
	uint64_t count = 0;

	for (uint32_t i = 0; i < pair->size; i++)
		count += pair->model[i];
	SAME(kvr_bitmap_count(pair->bm), count);
	SAME(kvr_bitmap_pages_total(pair->bm), pair->size);
	look_at_words(pair);
	look_at_numbers(pair, 1 + below(random, 400));
	look_at_runs(pair, 1 + below(random, 20));
}

static void change_range(struct pair *pair, uint64_t *random)
{
	uint32_t first = below(random, pair->size + 1);
	uint32_t num = below(random, pair->size - first + 1);
	int value = (int)below(random, 2);

	SAME(kvr_bitmap_set_range(pair->bm, first, num, value), 0);
	memset(pair->model + first, value, num);
	SAME(kvr_bitmap_set_range(pair->bm, first, pair->size - first + 1, 1), -EINVAL);
	SAME(kvr_bitmap_set_range(pair->bm, pair->size + UINT64_C(1), 0, 1), -EINVAL);
	SAME(kvr_bitmap_set_range(pair->bm, 1, UINT64_MAX, 1), -EINVAL);
	SAME(kvr_bitmap_set_range(pair->bm, UINT64_MAX, 2, 1), -EINVAL);
}

static void change_list(struct pair *pair, uint64_t *random)
{
	uint64_t pages[50];
	uint32_t num = pair->size ? below(random, 50) : 0;

	for (uint32_t i = 0; i < num; i++)
		pages[i] = below(random, pair->size);
	SAME(kvr_bitmap_set_pages(pair->bm, pages, num), 0);
	for (uint32_t i = 0; i < num; i++)
		pair->model[pages[i]] = 1;
	pages[num ? num - 1 : 0] = pair->size + (below(random, 2) ? 0 : UINT64_C(1) << 60);
	SAME(kvr_bitmap_set_pages(pair->bm, pages, num ? num : 1), -EINVAL);
}

static void merge(struct pair *dst, const struct pair *src, uint64_t *random)
{
	static const char ops[] = "|&-=";
	char op = ops[below(random, 4)];
	int equal = memcmp(dst->model, src->model, dst->size) == 0;

	SAME(kvr_bitmap_equal(dst->bm, src->bm), equal);
	SAME(kvr_bitmap_merge(dst->bm, op, src->bm), 0);
	for (uint32_t i = 0; i < dst->size; i++) {
		unsigned char d = dst->model[i], s = src->model[i];

		dst->model[i] = op == '|' ? d | s : op == '&' ? d & s : op == '-' ? d & !s : s;
	}
	SAME(kvr_bitmap_merge(dst->bm, '+', src->bm), -EINVAL);
}

static void test_bitmaps(uint64_t *random)
{
	for (uint32_t round = 0; round < 60; round++) {
		uint32_t edge = below(random, 2 * sizeof(edges) / sizeof(edges[0]));
		uint32_t size =
			edge < sizeof(edges) / sizeof(edges[0]) ? edges[edge] : below(random, MOST);
		struct pair pairs[2], other;

		begin(&pairs[0], size);
		begin(&pairs[1], size);
		begin(&other, size == MOST ? 0 : size + 1);
		for (uint32_t step = 0; step < 30; step++) {
			struct pair *pair = &pairs[below(random, 2)];

			switch (below(random, 3)) {
			case 0:
				change_range(pair, random);
				break;
			case 1:
				change_list(pair, random);
				break;
			default:
				merge(pair, &pairs[below(random, 2)], random);
			}
			look(&pairs[0], random);
			look(&pairs[1], random);
		}
		SAME(kvr_bitmap_merge(pairs[0].bm, '|', other.bm), -KVR_ESIZE);
		SAME(kvr_bitmap_equal(pairs[0].bm, other.bm), 0);
		kvr_bitmap_free(pairs[0].bm);
		kvr_bitmap_free(pairs[1].bm);
		kvr_bitmap_free(other.bm);
	}
	kvr_bitmap_free(NULL);
}

/* Marks by kvr_set_mark() against a search through all slots. */
static void test_set(uint64_t *random)
{
	for (uint32_t round = 0; round < 200; round++) {
		uint32_t num = below(random, 12), slots[12], slot = 0, hint = below(random, 20);
		struct kvr_bitmap *bms[12];
		unsigned char model[12][MOST] = { { 0 } };
		uint64_t strays = 0;
		struct kvr_set *set;

		SAME(kvr_set_new(num, &set), 0);
		for (uint32_t i = 0; i < num; i++) {
			slot += 1 + below(random, 3) + (below(random, 5) ? 0 : 1 << 16);
			slots[i] = slot;
			SAME(kvr_bitmap_new(below(random, MOST), &bms[i]), 0);
			SAME(kvr_set_put(set, slot, bms[i]), 0);
			SAME(kvr_set_put(set, slot, bms[i]), -EINVAL); /* twice, or no room */
		}
		for (uint32_t mark = 0; mark < 300; mark++) {
			uint32_t want = below(random, slot + 3), i = 0;
			uint64_t page =
				below(random, 4) ? below(random, MOST) : next_random(random);

			if (num && below(random, 3))
				want = slots[below(random, num)];
			kvr_set_mark(set, &hint, want, page);
			while (i < num && slots[i] != want)
				i++;
			if (i < num && page < kvr_bitmap_pages_total(bms[i]))
				model[i][page] = 1;
			else
				strays++;
		}
		SAME(kvr_set_strays(set), strays);
		for (uint32_t i = 0; i < num; i++) {
			for (uint32_t page = 0; page < kvr_bitmap_pages_total(bms[i]); page++)
				SAME(kvr_bitmap_test(bms[i], page), model[i][page]);
			kvr_bitmap_free(bms[i]);
		}
		kvr_set_free(set);
	}
	kvr_set_free(NULL);
}

int main(int argc, char **argv)
{
	uint64_t random = seed_from(argc, argv);
	struct kvr_bitmap *bm = NULL;

	SAME(kvr_bitmap_new((UINT64_C(1) << 40) + 1, &bm), -EINVAL);
	CHECK(!bm);
	for (kvr_paths = KVR_PATHS_BEST; kvr_paths <= KVR_PATHS_ONE_BY_ONE; kvr_paths++) {
		test_bitmaps(&random);
		test_set(&random);
	}
	return 0;
}
