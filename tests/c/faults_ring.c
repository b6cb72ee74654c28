// SPDX-License-Identifier: MIT
/*
 * The shadow ring: memory of our own that the user of a vCPU gets where he maps
 * KVM's ring.  What KVM logs is copied into it after each ioctl of the vCPU;
 * what the user marks there goes to KVM's ring when he resets, and comes back
 * free.  Between the two, entries can be withheld, doubled, and so on.
 *
 * ring:mode=
 *   none      as it is; the checks must all pass
 *   withhold  an entry is not shown, and its page protected again as if it were
 *   twice     an entry is shown two times
 *   extra     an entry for the page after it as well
 *   offset    the page after it instead
 *   slot      another slot's number
 *   index     everything one place further on
 *   stale     DIRTY is to be seen before slot and offset are: the old ones stand there
 *   flags     flags 3 instead of 1
 *   late      the last entry of a run is shown after the next run only
 *   swap      two entries change places
 *   keep      a reset leaves the flags of the entries as they were
 * With page=N only entries of this page in its slot.
 *
 * reset:mode=
 *   skip      KVM is not asked; the count is what it would have been
 *   late      the last page of a reset stays writable until the next one
 *   extra     entries that were not harvested are reset as well
 *   one       one entry is reset, whatever was harvested
 *   any       what is marked is reset, also behind a gap
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "faults.h"

void shadow_open(struct vcpu *vcpu, uint32_t bytes)
{
	int64_t offset = KVM_DIRTY_LOG_PAGE_OFFSET * (int64_t)page_bytes();
	int memfd = memfd_create("shadow", MFD_CLOEXEC);

	if (memfd < 0 || ftruncate(memfd, bytes))
		abort();
	vcpu->real = real_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, offset);
	vcpu->shadow = real_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (vcpu->real == MAP_FAILED || vcpu->shadow == MAP_FAILED)
		abort();
	vcpu->memfd = memfd;
	vcpu->size = bytes / (uint32_t)sizeof(struct kvm_dirty_gfn);
	vcpu->end = calloc(vcpu->size, sizeof(*vcpu->end));
	vcpu->as_put = calloc(vcpu->size, sizeof(*vcpu->as_put));
	if (fault_of("ring", "index"))
		vcpu->put = vcpu->freed = 1;
}

void shadow_close(struct vcpu *vcpu)
{
	size_t bytes = vcpu->size * sizeof(struct kvm_dirty_gfn);

	if (!vcpu->shadow)
		return;
	munmap(vcpu->real, bytes);
	munmap(vcpu->shadow, bytes);
	syscall(SYS_close, vcpu->memfd); /* not our own, which takes the lock */
	free(vcpu->end);
	free(vcpu->as_put);
	vcpu->shadow = NULL;
}

static uint32_t flags_of(const struct kvm_dirty_gfn *gfn)
{
	return __atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE);
}

static void set_flags(struct kvm_dirty_gfn *gfn, uint32_t flags)
{
	__atomic_store_n(&gfn->flags, flags, __ATOMIC_RELEASE);
}

static uint32_t place(const struct vcpu *vcpu, uint32_t index)
{
	return index & (vcpu->size - 1);
}

/* Show an entry that stands for what KVM logged up to its index `end`. */
static void show(struct vcpu *vcpu, struct kvm_dirty_gfn gfn, uint32_t end, bool stale)
{
	uint32_t at = place(vcpu, vcpu->put);
	struct kvm_dirty_gfn *shown = &vcpu->shadow[at];

	if (vcpu->put - vcpu->freed >= vcpu->size)
		return;
	if (!stale) {
		shown->slot = gfn.slot;
		shown->offset = gfn.offset;
	}
	vcpu->as_put[at] = *shown;
	vcpu->end[at] = end;
	set_flags(shown, fault_of("ring", "flags") ? 3 : KVM_DIRTY_GFN_F_DIRTY);
	vcpu->put++;
}

/* Take one of KVM's entries back out of sight: the one shown before it answers for it. */
static void hide(struct vcpu *vcpu, uint32_t end)
{
	if (vcpu->put != vcpu->freed)
		vcpu->end[place(vcpu, vcpu->put - 1)] = end;
}

static void take(struct vcpu *vcpu, struct kvm_dirty_gfn gfn, uint32_t end)
{
	struct fault *fault = fault_of("ring", NULL);
	const char *mode = fault ? fault->mode : "none";
	struct kvm_dirty_gfn next = gfn;

	next.offset++;
	if (!strcmp(mode, "late")) {
		if (vcpu->holding)
			show(vcpu, vcpu->held, end - 1, false);
		vcpu->held = gfn;
		vcpu->holding = true;
		return;
	}
	if (!fault || (fault->page != UNSET && gfn.offset != (uint64_t)fault->page) ||
	    !fault_turn(fault))
		mode = "none";
	if (!strcmp(mode, "withhold")) {
		hide(vcpu, end);
		return;
	}
	if (!strcmp(mode, "swap")) {
		uint32_t before = place(vcpu, vcpu->put - 1);

		if (vcpu->put != vcpu->freed) {
			show(vcpu, vcpu->as_put[before], end, false);
			vcpu->shadow[before].slot = vcpu->as_put[before].slot = gfn.slot;
			vcpu->shadow[before].offset = vcpu->as_put[before].offset = gfn.offset;
			return;
		}
	}
	if (!strcmp(mode, "slot"))
		gfn.slot ^= 1;
	show(vcpu, !strcmp(mode, "offset") ? next : gfn, end, !strcmp(mode, "stale"));
	if (!strcmp(mode, "twice"))
		show(vcpu, gfn, end, false);
	if (!strcmp(mode, "extra"))
		show(vcpu, next, end, false);
}

/* Copy what KVM has logged since the last time. */
void shadow_pull(struct vcpu *vcpu)
{
	if (!vcpu->shadow)
		return;
	if (vcpu->holding && fault_of("ring", "late")) {
		show(vcpu, vcpu->held, vcpu->seen, false);
		vcpu->holding = false;
	}
	while (vcpu->seen - vcpu->done < vcpu->size) {
		const struct kvm_dirty_gfn *gfn = &vcpu->real[place(vcpu, vcpu->seen)];

		if (flags_of(gfn) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		vcpu->seen++;
		vcpu->count++;
		take(vcpu, *gfn, vcpu->seen);
	}
}

/* How far the user has harvested: the shadow's index behind it. */
static uint32_t harvested(const struct vcpu *vcpu)
{
	bool gaps = fault_of("reset", "any"), all = fault_of("reset", "extra");
	uint32_t end = vcpu->freed;

	for (uint32_t i = vcpu->freed; i - vcpu->freed < vcpu->size; i++) {
		if (flags_of(&vcpu->shadow[place(vcpu, i)]) & KVM_DIRTY_GFN_F_RESET ||
		    (all && (int32_t)(vcpu->put - i) > 0))
			end = i + 1;
		else if (!gaps)
			break;
	}
	if (fault_of("reset", "one") && end - vcpu->freed > 1)
		end = vcpu->freed + 1;
	return end;
}

/* Mark KVM's entries as the user marked ours, and write into them what he wrote. */
static void give_back(struct vcpu *vcpu, uint32_t end, bool late)
{
	for (uint32_t i = vcpu->freed; i != end; i++) {
		uint32_t at = place(vcpu, i), upto;
		const struct kvm_dirty_gfn *ours = &vcpu->shadow[at], *put = &vcpu->as_put[at];
		uint32_t flags = flags_of(ours);

		if ((int32_t)(vcpu->put - i) <= 0) { /* marked, and never logged */
			vcpu->put = i + 1;
			vcpu->end[at] = ++vcpu->seen;
			put = ours;
		}
		upto = vcpu->end[at] - (late && i == end - 1);
		while ((int32_t)(upto - vcpu->marked) > 0) {
			struct kvm_dirty_gfn *kvms = &vcpu->real[place(vcpu, vcpu->marked++)];

			if (ours->slot != put->slot || ours->offset != put->offset) {
				kvms->slot = ours->slot;
				kvms->offset = ours->offset;
			}
			set_flags(kvms, flags | KVM_DIRTY_GFN_F_RESET);
		}
	}
}

/* Free our entries whose own KVM has reset, all of them up to `end` where it is pretended. */
static int32_t settle(struct vcpu *vcpu, uint32_t end, bool pretend)
{
	int32_t ours = 0, kvms = 0;

	while (vcpu->done != vcpu->marked && flags_of(&vcpu->real[place(vcpu, vcpu->done)]) == 0) {
		vcpu->done++;
		kvms++;
	}
	while (vcpu->freed != end) {
		uint32_t at = place(vcpu, vcpu->freed);

		if (!pretend && (int32_t)(vcpu->end[at] - vcpu->done) > 0)
			break;
		if (!fault_of("ring", "keep"))
			set_flags(&vcpu->shadow[at], 0);
		vcpu->freed++;
		ours++;
	}
	return ours - kvms;
}

/* KVM_RESET_DIRTY_RINGS of a VM whose vCPUs have shadows, or have none. */
int shadow_reset(int vm_fd, void *arg)
{
	struct fault *fault = fault_of("reset", NULL);
	uint32_t ends[64] = { 0 };
	int32_t differ = 0, ret = 0;
	bool skip, late;

	if (fault && !fault_turn(fault))
		fault = NULL;
	skip = fault && !strcmp(fault->mode, "skip");
	late = fault && !strcmp(fault->mode, "late");
	for (int i = 0; i < num_vcpus; i++) {
		struct vcpu *vcpu = &vcpus[i];

		if (!vcpu->shadow || vcpu->vm_fd != vm_fd)
			continue;
		ends[i] = harvested(vcpu);
		if (!skip)
			give_back(vcpu, ends[i], late);
	}
	if (!skip)
		ret = real_ioctl(vm_fd, KVM_RESET_DIRTY_RINGS, arg);
	if (ret < 0)
		return ret;
	for (int i = 0; i < num_vcpus; i++)
		if (vcpus[i].shadow && vcpus[i].vm_fd == vm_fd)
			differ += settle(&vcpus[i], ends[i], skip || late);
	return ret + differ;
}
