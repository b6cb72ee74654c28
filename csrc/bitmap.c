// SPDX-License-Identifier: MIT
/*
 * Bitmaps, one bit per page of a slot, in the layout of KVM_GET_DIRTY_LOG:
 * 64-bit words, little-endian bits, length rounded up to whole words.  Bits past
 * the last page are zero, and every function here keeps them so.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

/* KVM allows 2^31 - 1 pages in a slot; views that merge slots may be larger. */
#define MAX_PAGES (UINT64_C(1) << 40)

/* From this size on, words are mapped by ourselves: calloc() may take them from its
 * heap and write zeros, and a large sparse bitmap shall cost what is touched of it. */
#define MAP_BYTES (256 << 10)

static uint64_t *words_new(uint64_t num)
{
	void *words;

	if (num * sizeof(uint64_t) < MAP_BYTES)
		return calloc(num ? num : 1, sizeof(uint64_t));
	words = mmap(NULL, num * sizeof(uint64_t), PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return words == MAP_FAILED ? NULL : words;
}

static void words_free(uint64_t *words, uint64_t num)
{
	if (num * sizeof(uint64_t) < MAP_BYTES)
		free(words);
	else
		munmap(words, num * sizeof(uint64_t));
}

int kvr_bitmap_new(uint64_t num_pages, struct kvr_bitmap **out)
{
	struct kvr_bitmap *bm;

	if (num_pages > MAX_PAGES)
		return -EINVAL;
	bm = malloc(sizeof(*bm));
	if (!bm)
		return -ENOMEM;
	bm->num_pages = num_pages;
	bm->num_words = (num_pages + 63) / 64;
	bm->words = words_new(bm->num_words);
	if (!bm->words) {
		free(bm);
		return -ENOMEM;
	}
	*out = bm;
	return 0;
}

void kvr_bitmap_free(struct kvr_bitmap *bm)
{
	if (bm)
		words_free(bm->words, bm->num_words);
	free(bm);
}

uint64_t kvr_bitmap_pages_total(const struct kvr_bitmap *bm)
{
	return bm->num_pages;
}

uint64_t *kvr_bitmap_words(struct kvr_bitmap *bm)
{
	return bm->words;
}

uint64_t kvr_bitmap_count(const struct kvr_bitmap *bm)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < bm->num_words; i++)
		n += (uint64_t)__builtin_popcountll(bm->words[i]);
	return n;
}

int kvr_bitmap_test(const struct kvr_bitmap *bm, uint64_t page)
{
	return page < bm->num_pages && (bm->words[page / 64] >> (page % 64) & 1);
}

int kvr_bitmap_set_range(struct kvr_bitmap *bm, uint64_t first, uint64_t num, int value)
{
	uint64_t page = first, end = first + num;

	if (first > bm->num_pages || num > bm->num_pages - first)
		return -EINVAL;
	while (page < end) {
		uint64_t bit = page % 64, span = 64 - bit;
		uint64_t word = page / 64, mask;

		if (span > end - page)
			span = end - page;
		mask = (span == 64 ? ~UINT64_C(0) : (UINT64_C(1) << span) - 1) << bit;
		if (value)
			bm->words[word] |= mask;
		else
			bm->words[word] &= ~mask;
		page += span;
	}
	return 0;
}

int kvr_bitmap_set_pages(struct kvr_bitmap *bm, const uint64_t *pages, uint64_t num)
{
	for (uint64_t i = 0; i < num; i++)
		if (pages[i] >= bm->num_pages)
			return -EINVAL;
	/* Looked at again, and read once: another thread may change the list. */
	for (uint64_t i = 0; i < num; i++) {
		uint64_t page = *(const volatile uint64_t *)&pages[i];

		if (page < bm->num_pages)
			bm->words[page / 64] |= UINT64_C(1) << (page % 64);
	}
	return 0;
}

int kvr_bitmap_merge(struct kvr_bitmap *dst, int op, const struct kvr_bitmap *src)
{
	uint64_t *d = dst->words;
	const uint64_t *s = src->words;
	uint64_t n = dst->num_words;

	if (dst->num_pages != src->num_pages)
		return -KVR_ESIZE;
	switch (op) {
	case '|':
		for (uint64_t i = 0; i < n; i++)
			d[i] |= s[i];
		return 0;
	case '&':
		for (uint64_t i = 0; i < n; i++)
			d[i] &= s[i];
		return 0;
	case '-':
		for (uint64_t i = 0; i < n; i++)
			d[i] &= ~s[i];
		return 0;
	case '=':
		memmove(d, s, n * sizeof(*d));
		return 0;
	default:
		return -EINVAL;
	}
}

int kvr_bitmap_equal(const struct kvr_bitmap *a, const struct kvr_bitmap *b)
{
	return a->num_pages == b->num_pages &&
	       memcmp(a->words, b->words, a->num_words * sizeof(uint64_t)) == 0;
}

uint64_t kvr_bitmap_page_numbers(const struct kvr_bitmap *bm, uint64_t *next, uint64_t base,
				 uint64_t scale, uint64_t *out, uint64_t max)
{
	uint64_t n = 0, word = *next / 64, bits;

	if (*next >= bm->num_pages)
		return 0;
	bits = bm->words[word] & ~UINT64_C(0) << (*next % 64);
	for (;;) {
		while (bits) {
			uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(bits);

			if (n == max) {
				*next = page;
				return n;
			}
			out[n++] = base + page * scale;
			bits &= bits - 1;
		}
		if (++word == bm->num_words)
			break;
		bits = bm->words[word];
	}
	*next = bm->num_pages;
	return n;
}

/* First page at or after page whose bit is not flip's; num_pages without one. */
static uint64_t find_next(const struct kvr_bitmap *bm, uint64_t page, uint64_t flip)
{
	uint64_t word = page / 64, bits;

	if (page >= bm->num_pages)
		return bm->num_pages;
	bits = (bm->words[word] ^ flip) & ~UINT64_C(0) << (page % 64);
	while (!bits) {
		if (++word == bm->num_words)
			return bm->num_pages;
		bits = bm->words[word] ^ flip;
	}
	page = word * 64 + (uint64_t)__builtin_ctzll(bits);
	return page < bm->num_pages ? page : bm->num_pages;
}

uint64_t kvr_bitmap_runs(const struct kvr_bitmap *bm, uint64_t *next, uint64_t *out, uint64_t max)
{
	uint64_t n = 0;

	while (n < max) {
		uint64_t first = find_next(bm, *next, 0);
		uint64_t end;

		if (first == bm->num_pages) {
			*next = first;
			break;
		}
		end = find_next(bm, first, ~UINT64_C(0));
		out[2 * n] = first;
		out[2 * n + 1] = end - first;
		n++;
		*next = end;
	}
	return n;
}

int kvr_set_new(uint32_t n, struct kvr_set **out)
{
	struct kvr_set *set = calloc(1, sizeof(*set) + n * sizeof(set->slots[0]));

	if (!set)
		return -ENOMEM;
	set->room = n;
	*out = set;
	return 0;
}

void kvr_set_free(struct kvr_set *set)
{
	free(set);
}

int kvr_set_put(struct kvr_set *set, uint32_t slot, struct kvr_bitmap *bm)
{
	if (set->num == set->room || (set->num && set->slots[set->num - 1].slot >= slot))
		return -EINVAL;
	set->slots[set->num++] = (struct kvr_set_slot){ slot, bm };
	return 0;
}

uint64_t kvr_set_strays(const struct kvr_set *set)
{
	return set->strays;
}

uint64_t kvr_set_fresh(const struct kvr_set *set)
{
	return set->fresh;
}
