// SPDX-License-Identifier: MIT
/*
 * The fast part of the harvest, a cache line of four dirty entries at a time; and
 * the buffer that entries go to.
 *
 * KVM dirties entries in order, with a write barrier before each one's flags
 * (kvm_dirty_ring_push(), virt/kvm/dirty_ring.c), so one acquire-load of the last
 * entry's flags covers the line.  The other flags are looked at all the same: what
 * is not as it should be is left to the loop that takes one entry at a time, and
 * says what is wrong with it.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

/* Flags and slot are the first eight bytes of an entry. */
typedef bool are_t(const struct kvm_dirty_gfn *line, uint64_t head);

static inline uint64_t head_of(uint32_t slot)
{
	return KVM_DIRTY_GFN_F_DIRTY | (uint64_t)slot << 32;
}

/* Are the heads of all four entries these? */
static inline bool are(const struct kvm_dirty_gfn *line, uint64_t head)
{
	uint64_t heads[KVR_LINE];

	for (int i = 0; i < KVR_LINE; i++)
		memcpy(&heads[i], &line[i], sizeof(heads[i]));
	return !((heads[0] ^ head) | (heads[1] ^ head) | (heads[2] ^ head) | (heads[3] ^ head));
}

static inline void mark_reset(struct kvm_dirty_gfn *line)
{
	for (int i = 0; i < KVR_LINE; i++)
		kvr_store_release(&line[i].flags, KVM_DIRTY_GFN_F_RESET);
}

static inline bool is_dirty(const struct kvm_dirty_gfn *line)
{
	return kvr_load_acquire(&line[KVR_LINE - 1].flags) == KVM_DIRTY_GFN_F_DIRTY;
}

/* Lines from the fetch index to the end of the array, at most max / KVR_LINE. */
static inline uint64_t lines_ahead(const struct kvr_ring *ring, uint64_t max)
{
	uint64_t entries = ring->entries - (ring->fetch & (ring->entries - 1));

	return (max < entries ? max : entries) / KVR_LINE;
}

static inline struct kvm_dirty_gfn *first_line(const struct kvr_ring *ring)
{
	return &ring->gfns[ring->fetch & (ring->entries - 1)];
}

/* These take at most num lines, and return how many. */

static inline __attribute__((always_inline)) uint64_t to_slot(struct kvm_dirty_gfn *line,
							      uint64_t num,
							      const struct kvr_set_slot *slot,
							      are_t *heads_are)
{
	const struct kvr_bitmap bm = *slot->bm; /* a copy, which no store can change */
	uint64_t head = head_of(slot->slot), n;

	for (n = 0; n < num; n++, line += KVR_LINE) {
		uint64_t a, b, c, d;

		if (!is_dirty(line) || !heads_are(line, head))
			break;
		a = line[0].offset;
		b = line[1].offset;
		c = line[2].offset;
		d = line[3].offset;
		if ((a >= bm.num_pages) | (b >= bm.num_pages) | (c >= bm.num_pages) |
		    (d >= bm.num_pages))
			break;
		kvr_mark(&bm, a);
		kvr_mark(&bm, b);
		kvr_mark(&bm, c);
		kvr_mark(&bm, d);
		mark_reset(line);
	}
	return n;
}

static uint64_t to_slot_any(struct kvm_dirty_gfn *line, uint64_t num,
			    const struct kvr_set_slot *slot)
{
	return to_slot(line, num, slot, are);
}

static uint64_t to_gfns_any(struct kvm_dirty_gfn *line, uint64_t num, uint32_t vcpu,
			    struct kvr_gfn *gfns)
{
	uint64_t n;

	for (n = 0; n < num; n++, line += KVR_LINE, gfns += KVR_LINE) {
		if (!is_dirty(line) || ((line[0].flags ^ KVM_DIRTY_GFN_F_DIRTY) |
					(line[1].flags ^ KVM_DIRTY_GFN_F_DIRTY) |
					(line[2].flags ^ KVM_DIRTY_GFN_F_DIRTY)))
			break;
		for (int i = 0; i < KVR_LINE; i++)
			gfns[i] = (struct kvr_gfn){ line[i].slot, vcpu, line[i].offset };
		mark_reset(line);
	}
	return n;
}

#ifdef __x86_64__

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i two_entries(const struct kvm_dirty_gfn *first)
{
	return _mm256_loadu_si256((const __m256i *)first);
}

AVX2 static inline bool are_avx2(const struct kvm_dirty_gfn *line, uint64_t head)
{
	__m256i want = _mm256_set_epi64x(0, (long long)head, 0, (long long)head);
	__m256i heads = _mm256_set_epi64x(0, -1, 0, -1);
	__m256i low = _mm256_xor_si256(two_entries(line), want);
	__m256i high = _mm256_xor_si256(two_entries(line + 2), want);

	return _mm256_testz_si256(_mm256_or_si256(low, high), heads);
}

AVX2 static uint64_t to_slot_avx2(struct kvm_dirty_gfn *line, uint64_t num,
				  const struct kvr_set_slot *slot)
{
	return to_slot(line, num, slot, are_avx2);
}

/* (flags, slot, offset) to (slot, vCPU, offset), two at a time */
AVX2 static inline void convert(const struct kvm_dirty_gfn *from, __m256i vcpu, struct kvr_gfn *to)
{
	__m256i moved = _mm256_shuffle_epi32(two_entries(from), _MM_SHUFFLE(3, 2, 1, 1));

	_mm256_storeu_si256((__m256i *)to, _mm256_blend_epi32(moved, vcpu, 0x22));
}

AVX2 static uint64_t to_gfns_avx2(struct kvm_dirty_gfn *line, uint64_t num, uint32_t vcpu_id,
				  struct kvr_gfn *gfns)
{
	__m256i vcpu = _mm256_set1_epi32((int)vcpu_id);
	__m256i dirty = _mm256_set1_epi32(KVM_DIRTY_GFN_F_DIRTY);
	__m256i flags = _mm256_set_epi32(0, 0, 0, -1, 0, 0, 0, -1);
	uint64_t n;

	for (n = 0; n < num; n++, line += KVR_LINE, gfns += KVR_LINE) {
		__m256i low, high;

		if (!is_dirty(line))
			break;
		low = _mm256_xor_si256(two_entries(line), dirty);
		high = _mm256_xor_si256(two_entries(line + 2), dirty);
		if (!_mm256_testz_si256(_mm256_or_si256(low, high), flags))
			break;
		convert(line, vcpu, gfns);
		convert(line + 2, vcpu, gfns + 2);
		mark_reset(line);
	}
	return n;
}

#endif

int kvr_paths = KVR_PATHS_BEST;

uint64_t kvr_lines_to_set(struct kvr_ring *ring, struct kvr_set *set, uint32_t *hint, uint64_t max)
{
	struct kvm_dirty_gfn *line = first_line(ring);
	uint64_t num = lines_ahead(ring, max), taken;
	struct kvr_set_slot *slot;

	if (!num || kvr_paths == KVR_PATHS_ONE_BY_ONE || !is_dirty(line))
		return 0;
	slot = kvr_set_find(set, hint, line->slot);
	if (!slot)
		return 0;
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx2") && kvr_paths == KVR_PATHS_BEST)
		taken = to_slot_avx2(line, num, slot);
	else
#endif
		taken = to_slot_any(line, num, slot);
	kvr_advance(ring, (uint32_t)taken * KVR_LINE);
	return taken * KVR_LINE;
}

uint64_t kvr_lines_to_gfns(struct kvr_ring *ring, struct kvr_gfn *gfns, uint64_t max)
{
	struct kvm_dirty_gfn *line = first_line(ring);
	uint64_t num = lines_ahead(ring, max), taken;

	if (!num || kvr_paths == KVR_PATHS_ONE_BY_ONE)
		return 0;
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx2") && kvr_paths == KVR_PATHS_BEST)
		taken = to_gfns_avx2(line, num, ring->vcpu, gfns);
	else
#endif
		taken = to_gfns_any(line, num, ring->vcpu, gfns);
	kvr_advance(ring, (uint32_t)taken * KVR_LINE);
	return taken * KVR_LINE;
}

/* A buffer for entries.  A harvest comes right after a guest, which leaves nothing
 * in the TLB: in huge pages there is one miss where 4 KiB pages have hundreds. */
#define HUGE_BYTES ((size_t)2 << 20)

static size_t gfns_bytes(uint64_t capacity)
{
	size_t bytes = capacity * sizeof(struct kvr_gfn);

	return bytes < HUGE_BYTES / 4 ? bytes : (bytes + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
}

int kvr_gfns_new(uint64_t capacity, struct kvr_gfn **out)
{
	size_t bytes = gfns_bytes(capacity);
	void *gfns = bytes < HUGE_BYTES ? malloc(bytes) : aligned_alloc(HUGE_BYTES, bytes);

	if (!gfns)
		return -ENOMEM;
	if (bytes >= HUGE_BYTES)
		madvise(gfns, bytes, MADV_HUGEPAGE);
	*out = gfns;
	return 0;
}

void kvr_gfns_free(struct kvr_gfn *gfns)
{
	free(gfns);
}
