// SPDX-License-Identifier: MIT
/*
 * A bitmap's dirty pages as lists: page numbers, and runs.  Chunks that nobody
 * touched are passed over (bitmap.c).
 */
#include "internal.h"

/* The first word at or after this one that may be other than zero; num_words
 * without one. */
static uint64_t skip_untouched(const struct kvr_bitmap *bm, uint64_t word)
{
	uint64_t chunk = word / KVR_CHUNK_WORDS;

	if (word >= bm->num_words || bm->touched[chunk])
		return word;
	do
		chunk++;
	while (chunk < kvr_chunks(bm) && !bm->touched[chunk]);
	word = chunk * KVR_CHUNK_WORDS;
	return word < bm->num_words ? word : bm->num_words;
}

/* The set bits of a word as numbers, in order.  Eight places are written at a
 * time, whatever the word holds: a branch per bit costs more than stores that go
 * nowhere.  out has room for 64 at least. */
static inline __attribute__((always_inline)) uint64_t numbers_of(uint64_t bits, uint64_t first,
								 uint64_t scale, uint64_t *out)
{
	uint64_t n = (uint64_t)__builtin_popcountll(bits);

	for (uint64_t done = 0; done < n; done += 8) {
		for (uint64_t i = done; i < done + 8; i++) {
			/* no bit left: any number will do */
			out[i] =
				first + (uint64_t)__builtin_ctzll(bits | UINT64_C(1) << 63) * scale;
			bits &= bits - 1;
		}
	}
	return n;
}

/* Whole words from *word on, while 64 places are left; moves *word. */
static inline __attribute__((always_inline)) uint64_t numbers(const struct kvr_bitmap *bm,
							      uint64_t *word, uint64_t base,
							      uint64_t scale, uint64_t *out,
							      uint64_t max)
{
	uint64_t i = *word, n = 0;

	while (max - n >= 64) {
		uint64_t bits, end;

		i = skip_untouched(bm, i);
		if (i == bm->num_words)
			break;
		end = (i / KVR_CHUNK_WORDS + 1) * KVR_CHUNK_WORDS;
		if (end > bm->num_words)
			end = bm->num_words;
		for (; i < end && max - n >= 64; i++) {
			bits = bm->words[i];
			if (bits)
				n += numbers_of(bits, base + i * 64 * scale, scale, out + n);
		}
	}
	*word = i;
	return n;
}

static uint64_t numbers_any(const struct kvr_bitmap *bm, uint64_t *word, uint64_t base,
			    uint64_t scale, uint64_t *out, uint64_t max)
{
	return numbers(bm, word, base, scale, out, max);
}

#ifdef __x86_64__
__attribute__((target("popcnt,bmi"))) static uint64_t numbers_bmi(const struct kvr_bitmap *bm,
								  uint64_t *word, uint64_t base,
								  uint64_t scale, uint64_t *out,
								  uint64_t max)
{
	return numbers(bm, word, base, scale, out, max);
}
#endif

/* First page at or after page whose bit is not flip's; num_pages without one. */
static uint64_t find_next(const struct kvr_bitmap *bm, uint64_t page, uint64_t flip)
{
	uint64_t word = page / 64, bits;

	if (page >= bm->num_pages)
		return bm->num_pages;
	if (!flip && !bm->touched[word / KVR_CHUNK_WORDS]) {
		word = skip_untouched(bm, word);
		if (word == bm->num_words)
			return bm->num_pages;
		page = word * 64;
	}
	bits = (bm->words[word] ^ flip) & ~UINT64_C(0) << (page % 64);
	while (!bits) {
		word++;
		if (!flip)
			word = skip_untouched(bm, word);
		if (word >= bm->num_words)
			return bm->num_pages;
		bits = bm->words[word] ^ flip;
	}
	page = word * 64 + (uint64_t)__builtin_ctzll(bits);
	return page < bm->num_pages ? page : bm->num_pages;
}

uint64_t kvr_bitmap_page_numbers(const struct kvr_bitmap *bm, uint64_t *next, uint64_t base,
				 uint64_t scale, uint64_t *out, uint64_t max)
{
	uint64_t n = 0, page = *next, word;

	/* To the next whole word one by one, then words, then the last few one by one. */
	for (;;) {
		if (page % 64 == 0) {
			word = page / 64;
#ifdef __x86_64__
			if (__builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt") &&
			    kvr_paths == KVR_PATHS_BEST)
				n += numbers_bmi(bm, &word, base, scale, out + n, max - n);
			else
#endif
				n += numbers_any(bm, &word, base, scale, out + n, max - n);
			page = word * 64;
		}
		page = find_next(bm, page, 0);
		if (page >= bm->num_pages || n == max)
			break;
		out[n++] = base + page * scale;
		page++;
	}
	*next = page < bm->num_pages ? page : bm->num_pages;
	return n;
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
