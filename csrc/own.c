// SPDX-License-Identifier: MIT
/*
 * Owners: one per fd and one per mapping.
 *
 * close(2) and munmap(2) happen here, when the last reference goes; a ring's
 * mapping goes in ring.c, perf's descriptors and buffers in events.c.  A child keeps its parent:
 * vCPU -> VM -> guest RAM, so any order of dropping is safe.  After fork() the child's copies are
 * foreign: mappings are not there (MADV_DONTFORK), every call answers -KVR_EFORKED, and dropping
 * them closes the inherited fd only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

atomic_uint kvr_generation;
atomic_int kvr_live_rings, kvr_live_fds, kvr_live_maps;

static void after_fork_in_child(void)
{
	atomic_fetch_add(&kvr_generation, 1);
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(NULL, NULL, after_fork_in_child);
}

size_t kvr_page_size(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

void kvr_kernel_page_size(uint64_t *out)
{
	*out = kvr_page_size();
}

void kvr_live(struct kvr_live *out)
{
	out->fds = atomic_load(&kvr_live_fds);
	out->maps = atomic_load(&kvr_live_maps);
	out->rings = atomic_load(&kvr_live_rings);
}

static struct kvr_obj *obj_get(struct kvr_obj *obj)
{
	atomic_fetch_add(&obj->refs, 1);
	return obj;
}

/* Allocate an owner before there is anything to own, so that a new fd never
 * has to wait for memory. */
static struct kvr_obj *obj_new(enum kvr_kind kind, struct kvr_obj *parent)
{
	size_t size = kind == KVR_VM	 ? sizeof(struct kvr_vm)
		      : kind == KVR_VCPU ? sizeof(struct kvr_vcpu)
					 : sizeof(struct kvr_obj);
	struct kvr_obj *obj = calloc(1, size);

	if (!obj)
		return NULL;
	obj->kind = kind;
	obj->fd = -1;
	atomic_init(&obj->refs, 1);
	obj->generation = atomic_load(&kvr_generation);
	if (parent)
		obj->parent = obj_get(parent);
	if (kind == KVR_VCPU) {
		pthread_condattr_t attr;

		pthread_condattr_init(&attr);
		pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
		pthread_cond_init(&kvr_vcpu(obj)->left, &attr);
		pthread_condattr_destroy(&attr);
		pthread_mutex_init(&kvr_vcpu(obj)->lock, NULL);
	}
	if (kind == KVR_VM) {
		pthread_mutex_init(&kvr_vm(obj)->rings_lock, NULL);
		pthread_mutex_init(&kvr_vm(obj)->slots_lock, NULL);
	}
	return obj;
}

static void obj_own(struct kvr_obj *obj, int fd)
{
	obj->fd = fd;
	atomic_fetch_add(&kvr_live_fds, 1);
}

static void vcpu_unmap(struct kvr_vcpu *vcpu, bool foreign)
{
	if (!foreign) {
		pthread_mutex_destroy(&vcpu->lock);
		pthread_cond_destroy(&vcpu->left);
	}
	if (vcpu->ring)
		kvr_ring_put(vcpu->ring);
	if (vcpu->run && !foreign)
		munmap(vcpu->run, vcpu->run_bytes);
	if (vcpu->run)
		atomic_fetch_sub(&kvr_live_maps, 1);
}

static void vm_drop_rings(struct kvr_vm *vm)
{
	for (uint32_t i = 0; i < vm->num_rings; i++)
		kvr_ring_put(vm->rings[i]);
	free(vm->rings);
}

static void vm_drop_slots(struct kvr_vm *vm)
{
	for (uint32_t i = 0; i < vm->num_slots; i++)
		kvr_map_put(vm->slots[i].map);
	free(vm->slots);
}

void kvr_obj_put(struct kvr_obj *obj)
{
	while (obj && atomic_fetch_sub(&obj->refs, 1) == 1) {
		struct kvr_obj *parent = obj->parent;
		bool foreign = kvr_foreign(obj->generation);

		/* Mappings keep the vCPU's file alive, so they go first; RAM goes
		 * last, when nothing can run on it any more. */
		if (obj->kind == KVR_VCPU)
			vcpu_unmap(kvr_vcpu(obj), foreign);
		if (obj->kind == KVR_VM)
			vm_drop_rings(kvr_vm(obj));
		if (obj->fd >= 0) {
			close(obj->fd);
			atomic_fetch_sub(&kvr_live_fds, 1);
		}
		if (obj->kind == KVR_VM) {
			vm_drop_slots(kvr_vm(obj));
			if (!foreign) { /* a foreign lock may be held for ever */
				pthread_mutex_destroy(&kvr_vm(obj)->rings_lock);
				pthread_mutex_destroy(&kvr_vm(obj)->slots_lock);
			}
		}
		free(obj);
		obj = parent;
	}
}

int kvr_fileno(struct kvr_obj *obj)
{
	return obj->fd;
}

int kvr_ioctl(struct kvr_obj *obj, unsigned long request, void *arg)
{
	int ret;

	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	ret = ioctl(obj->fd, request, arg);
	return ret < 0 ? -errno : ret;
}

int kvr_ioctl_int(struct kvr_obj *obj, unsigned long request, unsigned long arg)
{
	int ret;

	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	ret = ioctl(obj->fd, request, arg);
	return ret < 0 ? -errno : ret;
}

int kvr_open(const char *path, struct kvr_obj **out)
{
	struct kvr_obj *obj = obj_new(KVR_SYSTEM, NULL);
	int fd, ret;

	if (!obj)
		return -ENOMEM;
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		ret = -errno;
		kvr_obj_put(obj);
		return ret;
	}
	obj_own(obj, fd);
	ret = kvr_ioctl_int(obj, KVM_GET_API_VERSION, 0);
	if (ret != KVM_API_VERSION) {
		kvr_obj_put(obj);
		return ret < 0 ? -ENOTTY : -EPROTO;
	}
	*out = obj;
	return 0;
}

/* KVM makes kernel threads for a VM, and gives up with EINTR when a signal is
 * pending just then: under a profiler's timer, say, for ever. */
static int create_ioctl(struct kvr_obj *parent, unsigned long request, unsigned long arg)
{
	uint64_t before = kvr_block_signals();
	int ret = kvr_ioctl_int(parent, request, arg);

	kvr_restore_signals(before);
	return ret;
}

int kvr_create_vm(struct kvr_obj *sys, unsigned long type, struct kvr_obj **out)
{
	struct kvr_obj *obj;
	int fd;

	if (kvr_foreign(sys->generation))
		return -KVR_EFORKED;
	/* No reference to sys: the kernel needs none either. */
	obj = obj_new(KVR_VM, NULL);
	if (!obj)
		return -ENOMEM;
	fd = create_ioctl(sys, KVM_CREATE_VM, type);
	if (fd < 0) {
		kvr_obj_put(obj);
		return fd;
	}
	obj_own(obj, fd);
	*out = obj;
	return 0;
}

static int vcpu_map_run(struct kvr_vcpu *vcpu)
{
	/* KVM_GET_VCPU_MMAP_SIZE belongs to /dev/kvm, which may be closed by now.
	 * The first page is all that we use: exit data lies within it, and port
	 * I/O data on the page after, where the architecture has ports. */
#if defined(__x86_64__)
	size_t bytes = (KVM_PIO_PAGE_OFFSET + 1) * kvr_page_size();
#else
	size_t bytes = kvr_page_size();
#endif
	void *addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->obj.fd, 0);

	if (addr == MAP_FAILED)
		return -errno;
	madvise(addr, bytes, MADV_DONTFORK);
	vcpu->run = addr;
	vcpu->run_bytes = bytes;
	atomic_fetch_add(&kvr_live_maps, 1);
	return 0;
}

static int vcpu_map_ring(struct kvr_vm *vm, struct kvr_vcpu *vcpu, uint32_t id)
{
	struct kvr_ring **rings;
	int ret;

	if (!vm->ring_bytes)
		return 0;
	rings = realloc(vm->rings, (vm->num_rings + 1) * sizeof(struct kvr_ring *));
	if (!rings)
		return -ENOMEM;
	vm->rings = rings;
	ret = kvr_ring_map(vcpu->obj.fd, id, vm->ring_bytes, &vcpu->ring);
	if (ret)
		return ret;
	vm->rings[vm->num_rings++] = kvr_ring_get(vcpu->ring);
	return 0;
}

int kvr_create_vcpu(struct kvr_obj *vm, unsigned long id, struct kvr_obj **out)
{
	struct kvr_obj *obj;
	int ret = kvr_kick_signal(); /* the handler must be there before a run */

	if (kvr_foreign(vm->generation))
		return -KVR_EFORKED;
	if (vm->kind != KVR_VM)
		return kvr_ioctl_int(vm, KVM_CREATE_VCPU, id); /* the kernel's own no */
	if (ret < 0)
		return ret;
	obj = obj_new(KVR_VCPU, vm);
	if (!obj)
		return -ENOMEM;
	/* Rings are listed in the order in which KVM made the vCPUs, which is the
	 * order in which it resets them: so creation is serialised. */
	pthread_mutex_lock(&kvr_vm(vm)->rings_lock);
	ret = create_ioctl(vm, KVM_CREATE_VCPU, id);
	if (ret >= 0) {
		obj_own(obj, ret);
		ret = vcpu_map_run(kvr_vcpu(obj));
		if (!ret)
			ret = vcpu_map_ring(kvr_vm(vm), kvr_vcpu(obj), (uint32_t)id);
	}
	pthread_mutex_unlock(&kvr_vm(vm)->rings_lock);
	if (ret < 0) {
		kvr_obj_put(obj);
		return ret;
	}
	*out = obj;
	return 0;
}

int kvr_create_device(struct kvr_obj *vm, uint32_t type, uint32_t flags, struct kvr_obj **out)
{
	struct kvm_create_device device = { .type = type, .flags = flags };
	struct kvr_obj *obj;
	int ret;

	*out = NULL;
	if (kvr_foreign(vm->generation))
		return -KVR_EFORKED;
	obj = obj_new(KVR_DEVICE, vm);
	if (!obj)
		return -ENOMEM;
	ret = kvr_ioctl(vm, KVM_CREATE_DEVICE, &device);
	if (ret < 0 || (flags & KVM_CREATE_DEVICE_TEST)) {
		kvr_obj_put(obj);
		return ret;
	}
	obj_own(obj, (int)device.fd);
	*out = obj;
	return 0;
}

int kvr_stats_open(struct kvr_obj *parent, struct kvr_obj **out)
{
	struct kvr_obj *obj;
	int fd;

	if (kvr_foreign(parent->generation))
		return -KVR_EFORKED;
	obj = obj_new(KVR_STATS, parent);
	if (!obj)
		return -ENOMEM;
	fd = kvr_ioctl_int(parent, KVM_GET_STATS_FD, 0);
	if (fd < 0) {
		kvr_obj_put(obj);
		return fd;
	}
	obj_own(obj, fd);
	*out = obj;
	return 0;
}

long kvr_pread(struct kvr_obj *obj, void *buf, size_t len, uint64_t offset)
{
	ssize_t ret;

	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	ret = pread(obj->fd, buf, len, (off_t)offset);
	return ret < 0 ? -errno : ret;
}

int kvr_map_new(uint64_t bytes, struct kvr_map **out)
{
	struct kvr_map *map = calloc(1, sizeof(*map));
	void *addr;

	if (!map)
		return -ENOMEM;
	/* NORESERVE: guests are given more than they touch. */
	addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (addr == MAP_FAILED) {
		int ret = -errno;

		free(map);
		return ret;
	}
	madvise(addr, bytes, MADV_DONTFORK);
	atomic_init(&map->refs, 1);
	map->generation = atomic_load(&kvr_generation);
	map->bytes = bytes;
	map->addr = addr;
	atomic_fetch_add(&kvr_live_maps, 1);
	*out = map;
	return 0;
}

struct kvr_map *kvr_map_get(struct kvr_map *map)
{
	atomic_fetch_add(&map->refs, 1);
	return map;
}

void kvr_map_put(struct kvr_map *map)
{
	if (!map || atomic_fetch_sub(&map->refs, 1) != 1)
		return;
	if (!kvr_foreign(map->generation))
		munmap(map->addr, map->bytes);
	atomic_fetch_sub(&kvr_live_maps, 1);
	free(map);
}

uint64_t kvr_map_bytes(const struct kvr_map *map)
{
	return map->bytes;
}

static int map_range(const struct kvr_map *map, uint64_t offset, uint64_t len)
{
	if (kvr_foreign(map->generation))
		return -KVR_EFORKED;
	if (offset > map->bytes || len > map->bytes - offset)
		return -EFAULT;
	return 0;
}

int kvr_map_read(struct kvr_map *map, uint64_t offset, void *buf, uint64_t len)
{
	int ret = map_range(map, offset, len);

	if (!ret)
		memcpy(buf, map->addr + offset, len);
	return ret;
}

int kvr_map_write(struct kvr_map *map, uint64_t offset, const void *buf, uint64_t len)
{
	int ret = map_range(map, offset, len);

	if (!ret)
		memcpy(map->addr + offset, buf, len);
	return ret;
}

int kvr_map_gather(struct kvr_map *map, uint64_t offset, uint64_t stride, uint64_t count,
		   uint64_t *out)
{
	if (kvr_foreign(map->generation))
		return -KVR_EFORKED;
	if (!count)
		return 0;
	if (offset % 8 || stride % 8)
		return -EINVAL;
	if (map->bytes < 8 || offset > map->bytes - 8)
		return -EFAULT;
	if (stride && count - 1 > (map->bytes - 8 - offset) / stride)
		return -EFAULT;
	for (uint64_t i = 0; i < count; i++) /* aligned, so a running vCPU cannot tear it */
		out[i] = *(const volatile uint64_t *)(map->addr + offset + i * stride);
	return 0;
}
