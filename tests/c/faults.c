// SPDX-License-Identifier: MIT
/*
 * A library to preload (LD_PRELOAD) between kvmring and the kernel, which
 * then seems to break its rules: the checks of `kvmring check` must see it.
 * Test equipment; it is built by tests/kvm/test_check_faults.py and by nothing
 * else.
 *
 * KVMRING_FAULT holds faults, separated by ';', each a name and settings:
 *
 *   ioctl:request=0xaec7:when=22:result=0    EINVAL of this ioctl becomes 0
 *   ioctl:request=0xaea3:first=168:nth=2:error=1:instead   KVM is not asked
 *   ioctl:request=0x4020ae46:at=4:width=4:set=0    flags are 0 when KVM sees them
 *   mmap:page=64:when=-1:mode=allow          a mapping that KVM refuses succeeds, with other
 *                                            memory; mode=other: which is not zero
 *   get:mode=drop                            see faults_bitmap.c
 *   ring:mode=twice:nth=3                    see faults_ring.c
 *   reset:mode=skip:nth=1
 *   run:when=31:reason=17                    another exit reason
 *
 * Numbers are C's, decimal or hexadecimal; settings are those of struct fault.
 * The library follows no pointer that the kernel has not accepted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "faults.h"

struct vm vms[32];
struct vcpu vcpus[64];
int num_vcpus;

static int system_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

size_t page_bytes(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

int real_ioctl(int fd, unsigned long request, void *arg)
{
	return (int)syscall(SYS_ioctl, fd, request, arg);
}

void *real_mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
	return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}

static bool when_fits(const struct fault *fault, long answer)
{
	int64_t error = answer < 0 ? errno : 0;

	return fault->when == UNSET || fault->when == error ||
	       (fault->when == ANY_ERROR && error != 0);
}

/* Put the fault's answer in place of the kernel's. */
static long answer_of(const struct fault *fault, long answer)
{
	if (fault->error != UNSET) {
		errno = (int)fault->error;
		return -1;
	}
	if (fault->result != UNSET)
		return (long)fault->result;
	return fault->add == UNSET ? answer : answer + (long)fault->add;
}

/* Read what may not be there. */
bool peek(void *into, const void *from, size_t len)
{
	struct iovec here = { into, len }, there = { (void *)from, len };

	return process_vm_readv(getpid(), &here, 1, &there, 1, 0) == (ssize_t)len;
}

/* What there is */

struct vm *vm_of(int fd)
{
	for (size_t i = 0; i < sizeof(vms) / sizeof(vms[0]); i++)
		if (vms[i].fd == fd + 1) /* 0: free */
			return &vms[i];
	return NULL;
}

static struct vcpu *vcpu_of(int fd)
{
	for (int i = 0; i < num_vcpus; i++)
		if (fd >= 0 && vcpus[i].fd == fd)
			return &vcpus[i];
	return NULL;
}

static void forget_vm(struct vm *vm)
{
	for (size_t i = 0; i < 64; i++)
		free(vm->slots[i].before);
	memset(vm, 0, sizeof(*vm));
}

static void made_vm(int fd)
{
	struct vm *vm = vm_of(fd);

	if (vm)
		forget_vm(vm);
	fault_checker();
	vm = vm_of(-1);
	if (vm)
		vm->fd = fd + 1;
}

static void made_vcpu(int fd, int vm_fd)
{
	struct vm *vm = vm_of(vm_fd);
	struct vcpu *vcpu;
	void *run;

	if (num_vcpus == sizeof(vcpus) / sizeof(vcpus[0]))
		return;
	vcpu = &vcpus[num_vcpus++];
	*vcpu = (struct vcpu){ .fd = fd, .vm_fd = vm_fd, .memfd = -1 };
	run = real_mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	vcpu->run = run == MAP_FAILED ? NULL : run;
	if (vm && vm->ring_bytes && (fault_of("ring", NULL) || fault_of("reset", NULL)))
		shadow_open(vcpu, vm->ring_bytes);
}

static void closed(int fd)
{
	struct vcpu *vcpu = vcpu_of(fd);
	struct vm *vm = vm_of(fd);

	if (vcpu) {
		/* KVM resets its ring as long as the VM lives */
		if (vcpu->run)
			munmap(vcpu->run, page_bytes());
		vcpu->run = NULL;
		vcpu->fd = -1;
	}
	if (!vm)
		return;
	forget_vm(vm);
	for (int i = num_vcpus - 1; i >= 0; i--)
		if (vcpus[i].vm_fd == fd) {
			if (vcpus[i].run)
				munmap(vcpus[i].run, page_bytes());
			shadow_close(&vcpus[i]);
			for (int j = i; j < num_vcpus - 1; j++)
				vcpus[j] = vcpus[j + 1];
			num_vcpus--;
		}
}

struct slot *slot_of(struct vm *vm, uint32_t id)
{
	for (size_t i = 0; vm && i < 64; i++)
		if (vm->slots[i].used && vm->slots[i].id == id)
			return &vm->slots[i];
	return NULL;
}

static void made_slot(int vm_fd, const void *arg)
{
	struct kvm_userspace_memory_region region;
	struct vm *vm = vm_of(vm_fd);
	struct slot *slot;

	if (!vm || !peek(&region, arg, sizeof(region)))
		return;
	slot = slot_of(vm, region.slot);
	if (slot && (!region.memory_size || !(region.flags & KVM_MEM_LOG_DIRTY_PAGES))) {
		free(slot->before);
		slot->before = NULL;
		slot->answered = false;
		slot->used = region.memory_size != 0;
	}
	for (size_t i = 0; !slot && region.memory_size && i < 64; i++)
		if (!vm->slots[i].used)
			slot = &vm->slots[i];
	if (!slot || !region.memory_size)
		return;
	slot->used = true;
	slot->id = region.slot;
	slot->num_pages = region.memory_size / page_bytes();
	slot->hva = region.userspace_addr;
}

/* What is called */

static void after_run(struct vcpu *vcpu)
{
	struct fault *fault = fault_of("run", NULL);

	if (!fault || !vcpu->run || fault->reason == UNSET)
		return;
	if (fault->when != UNSET && vcpu->run->exit_reason != (uint32_t)fault->when)
		return;
	if (fault_turn(fault))
		vcpu->run->exit_reason = (uint32_t)fault->reason;
}

/* Let the kernel do it, and see what it means. */
static int ask(int fd, unsigned long request, void *arg)
{
	struct vcpu *vcpu = vcpu_of(fd);
	uint64_t before = 0;
	int ret, error;

	if (request == KVM_RESET_DIRTY_RINGS) {
		pthread_mutex_lock(&lock);
		ret = shadow_reset(fd, arg);
		error = errno;
		pthread_mutex_unlock(&lock);
		errno = error;
		return ret;
	}
	if (request == KVM_GET_DIRTY_LOG)
		before = last_word(fd, arg);
	ret = real_ioctl(fd, request, arg);
	error = errno;
	pthread_mutex_lock(&lock);
	if (ret >= 0) {
		struct kvm_enable_cap cap;
		struct vm *vm = vm_of(fd);

		if (request == KVM_CREATE_VM) {
			system_fd = fd;
			made_vm(ret);
		}
		if (request == KVM_CREATE_VCPU)
			made_vcpu(ret, fd);
		if (request == KVM_SET_USER_MEMORY_REGION || request == KVM_SET_USER_MEMORY_REGION2)
			made_slot(fd, arg);
		if (request == KVM_GET_DIRTY_LOG)
			got_bitmap(fd, arg, before);
		if (request == KVM_ENABLE_CAP && vm && peek(&cap, arg, sizeof(cap)) &&
		    (cap.cap == KVM_CAP_DIRTY_LOG_RING ||
		     cap.cap == KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
			vm->ring_bytes = (uint32_t)cap.args[0];
		if (request == KVM_RUN && vcpu)
			after_run(vcpu);
	}
	if (vcpu && _IOC_TYPE(request) == KVMIO)
		shadow_pull(vcpu);
	pthread_mutex_unlock(&lock);
	errno = error;
	return ret;
}

static bool request_fits(const struct fault *fault, unsigned long request, const void *arg)
{
	uint32_t first;

	if (strcmp(fault->name, "ioctl") || (uint32_t)fault->request != (uint32_t)request)
		return false;
	if (fault->arg != UNSET && fault->arg != (int64_t)(intptr_t)arg)
		return false;
	return fault->first == UNSET || (peek(&first, arg, 4) && first == (uint32_t)fault->first);
}

/* Change what the argument points to; in a copy, which only the kernel sees. */
static bool patch(const struct fault *fault, unsigned long request, const void *arg, void *copy)
{
	size_t size = _IOC_SIZE(request);
	uint64_t value = 0;

	if (fault->at == UNSET || size == 0 || !peek(copy, arg, size))
		return false;
	memcpy(&value, (char *)copy + fault->at, (size_t)fault->width);
	if (fault->set != UNSET)
		value = (uint64_t)fault->set;
	if (fault->xor != UNSET)
		value ^= (uint64_t)fault->xor;
	memcpy((char *)copy + fault->at, &value, (size_t)fault->width);
	return true;
}

int ioctl(int fd, unsigned long request, ...)
{
	_Alignas(16) char copy[4096];
	struct fault *fault = NULL;
	va_list list;
	void *arg;
	int ret;

	va_start(list, request);
	arg = va_arg(list, void *);
	va_end(list);
	request = (uint32_t)request; /* Python's comes sign-extended */
	if (_IOC_TYPE(request) != KVMIO)
		return real_ioctl(fd, request, arg);
	for (int i = 0; i < num_faults && !fault; i++)
		if (request_fits(&faults[i], request, arg))
			fault = &faults[i];
	if (fault && fault->at != UNSET) {
		bool turn = fault_turn(fault);

		return ask(fd, request, turn && patch(fault, request, arg, copy) ? copy : arg);
	}
	if (fault && fault->instead)
		return fault_turn(fault) ? (int)answer_of(fault, 0) : ask(fd, request, arg);
	ret = ask(fd, request, arg);
	if (fault && when_fits(fault, ret) && fault_turn(fault))
		return (int)answer_of(fault, ret);
	return ret;
}

static bool mapping_fits(const struct fault *fault, int prot, int flags, int64_t offset)
{
	if (fault->page != UNSET && offset != fault->page * (int64_t)page_bytes())
		return false;
	if (fault->prot != UNSET && !(prot & fault->prot))
		return false;
	return fault->flags == UNSET || (flags & fault->flags);
}

void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	struct fault *fault = fault_of("mmap", NULL);
	struct vcpu *vcpu = vcpu_of(fd);
	void *map = real_mmap(addr, len, prot, flags, fd, offset);
	int64_t ring = KVM_DIRTY_LOG_PAGE_OFFSET * (int64_t)page_bytes();

	if (fd < 0 || (!vcpu && !vm_of(fd) && fd != system_fd))
		return map;
	if (map != MAP_FAILED && vcpu && vcpu->shadow && offset >= ring && !(flags & MAP_FIXED)) {
		munmap(map, len);
		map = real_mmap(addr, len, prot, flags, vcpu->memfd, offset - ring);
	}
	if (!fault || !mapping_fits(fault, prot, flags, offset) ||
	    !when_fits(fault, map == MAP_FAILED ? -1 : 0) || !fault_turn(fault))
		return map;
	if (map != MAP_FAILED)
		munmap(map, len);
	if (!strcmp(fault->mode, "allow") || !strcmp(fault->mode, "other")) {
		map = real_mmap(NULL, len, PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (map != MAP_FAILED && *fault->mode == 'o')
			memset(map, 0xa5, len);
		syscall(SYS_mprotect, map, len, prot);
		return map;
	}
	errno = (int)fault->error;
	return MAP_FAILED;
}

void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	return mmap(addr, len, prot, flags, fd, offset);
}

int mprotect(void *addr, size_t len, int prot)
{
	struct fault *fault = fault_of("mprotect", NULL);
	int ret = (int)syscall(SYS_mprotect, addr, len, prot);

	if (fault && mapping_fits(fault, prot, 0, 0) && when_fits(fault, ret) && fault_turn(fault))
		return (int)answer_of(fault, ret);
	return ret;
}

int close(int fd)
{
	pthread_mutex_lock(&lock);
	closed(fd);
	pthread_mutex_unlock(&lock);
	return (int)syscall(SYS_close, fd);
}
