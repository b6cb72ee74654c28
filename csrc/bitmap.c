// SPDX-License-Identifier: MIT
/*
 * Bitmaps, one bit per page of a slot, in the layout of KVM_GET_DIRTY_LOG:
 * 64-bit words, little-endian bits, length rounded up to whole words.  Bits past
 * the last page are zero, and every function here keeps them so.
 *
 * Beside the words stands a byte per chunk of 512 of them: 0 where no word of the
 * chunk can be other than zero.  What reads a bitmap passes over such chunks, and
 * so takes the time that the dirty pages take, not all pages.  Who sets a bit must
 * set its chunk's byte: here, in kvr_mark(), and in kvr_get_dirty_log().
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

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

/* Words in a chunk: the last one may be short. */
static uint64_t chunk_words(const struct kvr_bitmap *bm, uint64_t chunk)
{
	uint64_t left = bm->num_words - chunk * KVR_CHUNK_WORDS;

	return left < KVR_CHUNK_WORDS ? left : KVR_CHUNK_WORDS;
}

static uint64_t *chunk_of(const struct kvr_bitmap *bm, uint64_t chunk)
{
	return bm->words + chunk * KVR_CHUNK_WORDS;
}

void kvr_bitmap_touch_all(struct kvr_bitmap *bm)
{
	memset(bm->touched, 1, kvr_chunks(bm));
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
	bm->touched = calloc(kvr_chunks(bm) + 1, 1);
	if (!bm->words || !bm->touched) {
		kvr_bitmap_free(bm);
		return -ENOMEM;
	}
	*out = bm;
	return 0;
}

void kvr_bitmap_free(struct kvr_bitmap *bm)
{
	if (!bm)
		return;
	if (bm->words)
		words_free(bm->words, bm->num_words);
	free(bm->touched);
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

static inline __attribute__((always_inline)) uint64_t count_words(const uint64_t *words,
								  uint64_t num)
{
	uint64_t a = 0, b = 0, c = 0, d = 0, i;

	for (i = 0; i + 4 <= num; i += 4) {
		a += (uint64_t)__builtin_popcountll(words[i]);
		b += (uint64_t)__builtin_popcountll(words[i + 1]);
		c += (uint64_t)__builtin_popcountll(words[i + 2]);
		d += (uint64_t)__builtin_popcountll(words[i + 3]);
	}
	for (; i < num; i++)
		a += (uint64_t)__builtin_popcountll(words[i]);
	return a + b + c + d;
}

static uint64_t count_any(const uint64_t *words, uint64_t num)
{
	return count_words(words, num);
}

#ifdef __x86_64__
__attribute__((target("popcnt"))) static uint64_t count_popcnt(const uint64_t *words, uint64_t num)
{
	return count_words(words, num);
}

__attribute__((target("avx512f,avx512vpopcntdq,popcnt"))) static uint64_t
count_avx512(const uint64_t *words, uint64_t num)
{
	__m512i a = _mm512_setzero_si512(), b = a;
	uint64_t i;

	for (i = 0; i + 16 <= num; i += 16) {
		a = _mm512_add_epi64(a, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i)));
		b = _mm512_add_epi64(b, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i + 8)));
	}
	return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(a, b)) +
	       count_words(words + i, num - i);
}
#endif

typedef uint64_t count_t(const uint64_t *words, uint64_t num);

static count_t *best_count(void)
{
#ifdef __x86_64__
	if (kvr_paths == KVR_PATHS_BEST && __builtin_cpu_supports("avx512vpopcntdq"))
		return count_avx512;
	if (kvr_paths != KVR_PATHS_ONE_BY_ONE && __builtin_cpu_supports("popcnt"))
		return count_popcnt;
#endif
	return count_any;
}

uint64_t kvr_bitmap_count(const struct kvr_bitmap *bm)
{
	count_t *count = best_count();
	uint64_t n = 0;

	for (uint64_t i = 0; i < kvr_chunks(bm); i++)
		if (bm->touched[i])
			n += count(chunk_of(bm, i), chunk_words(bm, i));
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
		if (value) {
			bm->words[word] |= mask;
			bm->touched[word / KVR_CHUNK_WORDS] = 1;
		} else if (bm->touched[word / KVR_CHUNK_WORDS]) {
			bm->words[word] &= ~mask;
		}
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
			kvr_mark(bm, page);
	}
	return 0;
}

/* One chunk; the source's may be untouched. */
static void merge_chunk(struct kvr_bitmap *dst, int op, const struct kvr_bitmap *src,
			uint64_t chunk)
{
	uint64_t *d = chunk_of(dst, chunk), n = chunk_words(dst, chunk);
	const uint64_t *s = chunk_of(src, chunk);

	switch (op) {
	case '|':
		for (uint64_t i = 0; i < n; i++)
			d[i] |= s[i];
		dst->touched[chunk] = 1;
		break;
	case '&':
		for (uint64_t i = 0; i < n; i++)
			d[i] &= s[i];
		break;
	case '-':
		for (uint64_t i = 0; i < n; i++)
			d[i] &= ~s[i];
		break;
	case '=':
		memmove(d, s, n * sizeof(*d));
		dst->touched[chunk] = 1;
		break;
	}
}

int kvr_bitmap_merge(struct kvr_bitmap *dst, int op, const struct kvr_bitmap *src)
{
	if (dst->num_pages != src->num_pages)
		return -KVR_ESIZE;
	if (!op || !strchr("|&-=", op))
		return -EINVAL;
	for (uint64_t i = 0; i < kvr_chunks(dst); i++) {
		if (src->touched[i]) {
			if (dst->touched[i] || op == '|' || op == '=')
				merge_chunk(dst, op, src, i);
		} else if (dst->touched[i] && (op == '&' || op == '=')) {
			memset(chunk_of(dst, i), 0, chunk_words(dst, i) * sizeof(uint64_t));
			dst->touched[i] = 0;
		}
	}
	return 0;
}

int kvr_bitmap_equal(const struct kvr_bitmap *a, const struct kvr_bitmap *b)
{
	if (a->num_pages != b->num_pages)
		return 0;
	for (uint64_t i = 0; i < kvr_chunks(a); i++)
		if ((a->touched[i] || b->touched[i]) &&
		    memcmp(chunk_of(a, i), chunk_of(b, i), chunk_words(a, i) * sizeof(uint64_t)))
			return 0;
	return 1;
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
