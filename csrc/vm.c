// SPDX-License-Identifier: MIT
/*
 * What a VM's fd does beside running: capabilities, memory slots, the bitmap
 * log, and the attributes and registers that are passed by pointer.
 *
 * The slot table here exists for safety alone: it keeps RAM mapped while KVM
 * uses it, and knows how many bytes KVM_GET_DIRTY_LOG will write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

int kvr_enable_cap(struct kvr_obj *obj, uint32_t cap, uint32_t flags, const uint64_t args[4])
{
	struct kvm_enable_cap arg = { .cap = cap, .flags = flags };
	bool ring = cap == KVM_CAP_DIRTY_LOG_RING || cap == KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	int ret;

	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	memcpy(arg.args, args, sizeof(arg.args));
	if (obj->kind != KVR_VM || !ring)
		return kvr_ioctl(obj, KVM_ENABLE_CAP, &arg);
	pthread_mutex_lock(&kvr_vm(obj)->rings_lock);
	ret = kvr_ioctl(obj, KVM_ENABLE_CAP, &arg);
	if (!ret)
		kvr_vm(obj)->ring_bytes = (uint32_t)args[0]; /* KVM drops the high half too */
	pthread_mutex_unlock(&kvr_vm(obj)->rings_lock);
	return ret;
}

int kvr_ring_bytes(struct kvr_obj *vm, uint64_t *out)
{
	int ret = kvr_expect(vm, KVR_VM);

	if (!ret)
		*out = kvr_vm(vm)->ring_bytes;
	return ret;
}

static struct kvr_slot *slot_find(struct kvr_vm *vm, uint32_t slot)
{
	for (uint32_t i = 0; i < vm->num_slots; i++)
		if (vm->slots[i].slot == slot)
			return &vm->slots[i];
	return NULL;
}

static int region_ioctl(struct kvr_obj *vm, int version, uint32_t slot, uint32_t flags,
			uint64_t gpa, uint64_t bytes, uint64_t hva)
{
	if (version == 2) {
		struct kvm_userspace_memory_region2 region = {
			.slot = slot,
			.flags = flags,
			.guest_phys_addr = gpa,
			.memory_size = bytes,
			.userspace_addr = hva,
		};
		return kvr_ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region);
	}
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = bytes,
		.userspace_addr = hva,
	};
	return kvr_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static int slot_change(struct kvr_vm *vm, int version, uint32_t slot, uint32_t flags, uint64_t gpa,
		       uint64_t bytes, struct kvr_map *map, uint64_t map_offset)
{
	struct kvr_slot *known = slot_find(vm, slot);
	uint64_t hva = map ? (uint64_t)(uintptr_t)map->addr + map_offset : 0;
	struct kvr_map *old = NULL;
	int ret;

	/* Room first: after the ioctl nothing may fail. */
	if (!known && bytes) {
		struct kvr_slot *slots =
			realloc(vm->slots, (vm->num_slots + 1) * sizeof(*vm->slots));

		if (!slots)
			return -ENOMEM;
		vm->slots = slots;
	}
	ret = region_ioctl(&vm->obj, version, slot, flags, gpa, bytes, hva);
	if (ret < 0)
		return ret;
	if (!bytes) {
		if (known) {
			old = known->map;
			*known = vm->slots[--vm->num_slots];
		}
	} else {
		if (known)
			old = known->map;
		else
			known = &vm->slots[vm->num_slots++];
		*known = (struct kvr_slot){
			.slot = slot,
			.num_pages = bytes / kvr_page_size(),
			.map = kvr_map_get(map),
		};
	}
	kvr_map_put(old);
	return ret;
}

int kvr_set_memory(struct kvr_obj *vm, int version, uint32_t slot, uint32_t flags, uint64_t gpa,
		   uint64_t bytes, struct kvr_map *map, uint64_t map_offset)
{
	int ret;

	if (kvr_foreign(vm->generation) || (map && kvr_foreign(map->generation)))
		return -KVR_EFORKED;
	if (bytes && (!map || map_offset > map->bytes || bytes > map->bytes - map_offset))
		return -EFAULT;
	if (kvr_frozen(vm, KVR_FROZEN))
		return -KVR_EFROZEN;
	if (vm->kind != KVR_VM) /* the kernel's own no; it reads nothing of it */
		return region_ioctl(vm, version, slot, flags, gpa, bytes, 0);
	pthread_mutex_lock(&kvr_vm(vm)->slots_lock);
	ret = slot_change(kvr_vm(vm), version, slot, flags, gpa, bytes, map, map_offset);
	pthread_mutex_unlock(&kvr_vm(vm)->slots_lock);
	return ret;
}

int kvr_get_dirty_log(struct kvr_obj *vm, uint32_t slot, struct kvr_bitmap *into)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = into->words };
	struct kvr_slot *known;
	int ret;

	if (kvr_foreign(vm->generation))
		return -KVR_EFORKED;
	if (vm->kind != KVR_VM)
		return kvr_ioctl(vm, KVM_GET_DIRTY_LOG, &log);
	pthread_mutex_lock(&kvr_vm(vm)->slots_lock);
	known = slot_find(kvr_vm(vm), slot);
	if (known && known->num_pages != into->num_pages) {
		ret = -KVR_ESIZE;
	} else {
		/* A slot that we did not make has a size that we cannot know; KVM
		 * then finds nowhere to write, after all its other checks. */
		if (!known)
			log.dirty_bitmap = NULL;
		else
			kvr_bitmap_touch_all(into);
		ret = kvr_ioctl(vm, KVM_GET_DIRTY_LOG, &log);
	}
	pthread_mutex_unlock(&kvr_vm(vm)->slots_lock);
	return ret;
}

int kvr_clear_dirty_log(struct kvr_obj *vm, uint32_t slot, const struct kvr_bitmap *bits,
			uint64_t first, uint32_t num)
{
	struct kvm_clear_dirty_log log = {
		.slot = slot,
		.num_pages = num,
		.first_page = first,
	};

	/* KVM reads whole words of what it was told is there: the range must lie
	 * in the bitmap, and only then is the pointer given. */
	if (first / 64 <= bits->num_words && num <= (bits->num_words - first / 64) * 64)
		log.dirty_bitmap = bits->words + first / 64;
	return kvr_ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log);
}

int kvr_device_attr(struct kvr_obj *obj, unsigned long request, uint32_t group, uint64_t attr,
		    void *buf, uint32_t len)
{
	_Alignas(16) unsigned char bounce[KVR_ATTR_BYTES] = { 0 };
	struct kvm_device_attr arg = {
		.group = group,
		.attr = attr,
		.addr = (uint64_t)(uintptr_t)bounce,
	};
	int ret;

	if (len > sizeof(bounce))
		return -EINVAL;
	if (request == KVM_SET_DEVICE_ATTR && kvr_frozen(obj, KVR_FROZEN))
		return -KVR_EFROZEN;
	if (len)
		memcpy(bounce, buf, len);
	else
		arg.addr = 0; /* commands and the like take no data */
	ret = kvr_ioctl(obj, request, &arg);
	if (ret >= 0 && len)
		memcpy(buf, bounce, len);
	return ret;
}

int kvr_one_reg(struct kvr_obj *vcpu, unsigned long request, uint64_t id, void *buf, uint32_t len)
{
	struct kvm_one_reg arg = { .id = id, .addr = (uint64_t)(uintptr_t)buf };

	if (len != 1U << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT))
		return -EINVAL;
	return kvr_ioctl(vcpu, request, &arg);
}
