// SPDX-License-Identifier: MIT
/*
 * Faults of KVM_GET_DIRTY_LOG's answer.
 *
 * get:mode=
 *   drop    the first set bit is not set     add     the first clear bit is set
 *   late    the answer before this one       keep    the answer before is still in it
 *   empty   no bit                           tail    a bit behind the slot's last page
 *   shift   every bit one page higher        beyond  a word is written behind the bitmap
 *   short   the last word is not written     full    every bit
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "faults.h"

static void bitmap_fault(const struct fault *fault, struct slot *slot, uint64_t *words)
{
	uint64_t pages = slot->num_pages, num = (pages + 63) / 64, *now;
	const char *mode = fault->mode;

	now = calloc(num + 1, 8);
	memcpy(now, words, num * 8);
	if (!slot->before)
		slot->before = calloc(num + 1, 8);
	if (!strcmp(mode, "drop") || !strcmp(mode, "add")) {
		bool add = *mode == 'a';

		for (uint64_t i = 0; i < pages; i++) {
			if ((words[i / 64] >> i % 64 & 1) == add)
				continue;
			words[i / 64] ^= UINT64_C(1) << i % 64;
			break;
		}
	}
	for (uint64_t i = 0; i < num; i++) {
		if (!strcmp(mode, "late"))
			words[i] = slot->before[i];
		if (!strcmp(mode, "keep"))
			words[i] |= slot->before[i];
		if (!strcmp(mode, "empty"))
			words[i] = 0;
		if (!strcmp(mode, "full"))
			words[i] = i == num - 1 && pages % 64 ? (UINT64_C(1) << pages % 64) - 1
							      : UINT64_MAX;
		if (!strcmp(mode, "shift"))
			words[i] = now[i] << 1 | (i ? now[i - 1] >> 63 : 0);
	}
	if (!strcmp(mode, "tail") && pages % 64)
		words[num - 1] |= UINT64_C(1) << pages % 64;
	if (!strcmp(mode, "beyond"))
		words[num] = UINT64_MAX;
	memcpy(slot->before, now, num * 8);
	free(now);
}

void got_bitmap(int vm_fd, const void *arg, uint64_t last_before)
{
	struct fault *fault = fault_of("get", NULL);
	struct kvm_dirty_log log;
	struct slot *slot;

	if (!fault || !peek(&log, arg, sizeof(log)))
		return;
	slot = slot_of(vm_of(vm_fd), log.slot);
	if (!slot)
		return;
	if (!strcmp(fault->mode, "short")) {
		if (fault_turn(fault))
			((uint64_t *)log.dirty_bitmap)[(slot->num_pages - 1) / 64] = last_before;
		return;
	}
	/* what is told late must be kept also when it is not told yet */
	if (fault_turn(fault)) {
		bitmap_fault(fault, slot, log.dirty_bitmap);
	} else {
		uint64_t num = (slot->num_pages + 63) / 64;

		if (!slot->before)
			slot->before = calloc(num + 1, 8);
		memcpy(slot->before, log.dirty_bitmap, num * 8);
	}
}

uint64_t last_word(int vm_fd, const void *arg)
{
	struct kvm_dirty_log log;
	uint64_t word = 0;
	struct slot *slot;

	if (!peek(&log, arg, sizeof(log)))
		return 0;
	slot = slot_of(vm_of(vm_fd), log.slot);
	if (slot)
		peek(&word, (uint64_t *)log.dirty_bitmap + (slot->num_pages - 1) / 64, 8);
	return word;
}
