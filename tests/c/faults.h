/* SPDX-License-Identifier: MIT */
/*
 * What the parts of the fault-injecting preload library share; faults.c says
 * what it is and how a fault is written.
 */
#ifndef FAULTS_H
#define FAULTS_H

#include "../../csrc/kvm_compat.h"
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define UNSET INT64_MIN

/* One fault as it was asked for.  A number that was not given is UNSET. */
struct fault {
	char name[16];		     /* ioctl, mmap, mprotect, get, ring, reset, run */
	char mode[16];		     /* what of it */
	int64_t request;	     /* ioctl: its request */
	int64_t first;		     /* ioctl: the first 32 bits that the argument points to */
	int64_t arg;		     /* ioctl: the argument itself */
	int64_t when;		     /* only for this answer: 0 is success, ANY_ERROR any error */
	int64_t nth;		     /* only the n-th of those that fit, from 1 */
	int64_t from;		     /* only from the n-th on */
	int64_t error;		     /* the answer: this errno */
	int64_t result;		     /* the answer: this value */
	int64_t add;		     /* the answer: so much more */
	int64_t at, set, width, xor; /* the argument: at this byte, this value */
	int64_t page;		     /* mmap: at this page of the file; ring: this page */
	int64_t prot, flags;	     /* mmap: with one of these bits */
	int64_t reason;		     /* run: this exit reason */
	bool instead;		     /* the kernel is not asked */
	bool child;		     /* only in processes that were forked by a check */
	uint64_t seen;		     /* how many fitted so far */
};

#define ANY_ERROR (-1)

extern struct fault faults[16];
extern int num_faults;

/* The fault of this name and mode; mode NULL: any.  NULL when there is none. */
struct fault *fault_of(const char *name, const char *mode);
/* Count it, and tell whether it is its turn. */
bool fault_turn(struct fault *fault);
/* This process tries a check, unless one that forked it does. */
void fault_checker(void);

struct slot {
	uint32_t id;
	uint64_t num_pages;
	uint64_t hva;
	uint64_t *before; /* what GET answered before */
	bool used, answered;
};

struct vm {
	int fd;
	uint32_t ring_bytes;
	struct slot slots[64];
};

/* A vCPU, and the ring that its user is given in place of KVM's. */
struct vcpu {
	int fd, vm_fd;
	struct kvm_run *run;
	struct kvm_dirty_gfn *real, *shadow;
	int memfd;
	uint32_t size;	 /* entries */
	uint32_t seen;	 /* next of KVM's entries to look at */
	uint32_t marked; /* next of KVM's entries to give back */
	uint32_t done;	 /* next of KVM's entries that it has not reset */
	uint32_t put;	 /* next entry of the shadow to fill */
	uint32_t freed;	 /* next entry of the shadow that is not reset */
	uint64_t count;	 /* entries that KVM made in all */
	uint32_t *end;	 /* per entry of the shadow: KVM's index behind what it stands for */
	struct kvm_dirty_gfn *as_put;
	struct kvm_dirty_gfn held; /* ring=late: not shown yet */
	bool holding;
};

extern struct vm vms[32];
extern struct vcpu vcpus[64];
extern int num_vcpus;

size_t page_bytes(void);
void *real_mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset);
int real_ioctl(int fd, unsigned long request, void *arg);

struct vm *vm_of(int fd);
struct slot *slot_of(struct vm *vm, uint32_t id);
/* Read what may not be there. */
bool peek(void *into, const void *from, size_t len);

/* What the last word of the bitmap holds before KVM_GET_DIRTY_LOG; and its answer. */
uint64_t last_word(int vm_fd, const void *arg);
void got_bitmap(int vm_fd, const void *arg, uint64_t last_before);

/* The shadow; NULL members where there is none. */
void shadow_open(struct vcpu *vcpu, uint32_t bytes);
void shadow_close(struct vcpu *vcpu);
void shadow_pull(struct vcpu *vcpu);
int shadow_reset(int vm_fd, void *arg);

#endif
