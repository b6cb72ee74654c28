/* SPDX-License-Identifier: MIT */
/*
 * The only place that includes <linux/kvm.h>.
 *
 * Adds what older headers lack and repairs what they get wrong, then asserts
 * the layouts that the rest of the code relies on.  Add a constant here when a
 * new kernel brings one that Debian 12's headers (Linux 6.1) do not have.
 */
#ifndef KVM_COMPAT_H
#define KVM_COMPAT_H

#include <linux/kvm.h>
#include <stddef.h>

/* Obsolete, and bound to vanish from headers; kernels still answer for it. */
#ifndef KVM_CAP_MANUAL_DIRTY_LOG_PROTECT
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT 166
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#endif
#ifndef KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE
#define KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE 228
#endif
#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 231
#endif
#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif
#ifndef KVM_CAP_MEMORY_ATTRIBUTES
#define KVM_CAP_MEMORY_ATTRIBUTES 233
#endif
#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
#ifndef KVM_CAP_PRE_FAULT_MEMORY
#define KVM_CAP_PRE_FAULT_MEMORY 236
#endif
#ifndef KVM_MEM_GUEST_MEMFD
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
#endif
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif

/* Linux 6.8 brought the second memory region ioctl. */
#ifndef KVM_SET_USER_MEMORY_REGION2
struct kvm_userspace_memory_region2 {
	__u32 slot;
	__u32 flags;
	__u64 guest_phys_addr;
	__u64 memory_size;
	__u64 userspace_addr;
	__u64 guest_memfd_offset;
	__u32 guest_memfd;
	__u32 pad1;
	__u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif

/*
 * Linux 6.1's arm64 header falls through to the generic 0, which names the
 * kvm_run page: a harvester built against it reads that page and finds nothing,
 * without any error.  Every architecture that has rings uses 64.
 */
#if defined(__x86_64__) || defined(__aarch64__) || defined(__riscv) || defined(__loongarch__)
#undef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 64
#endif

#define KVR_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " changed size")
#define KVR_AT(type, field, bytes)                                                                 \
	_Static_assert(offsetof(type, field) == (bytes), #type "." #field " moved")

KVR_SIZE(struct kvm_dirty_gfn, 16);
KVR_AT(struct kvm_dirty_gfn, flags, 0);
KVR_AT(struct kvm_dirty_gfn, slot, 4);
KVR_AT(struct kvm_dirty_gfn, offset, 8);
KVR_SIZE(struct kvm_enable_cap, 104);
KVR_AT(struct kvm_enable_cap, cap, 0);
KVR_AT(struct kvm_enable_cap, flags, 4);
KVR_AT(struct kvm_enable_cap, args, 8);
KVR_SIZE(struct kvm_dirty_log, 16);
KVR_AT(struct kvm_dirty_log, slot, 0);
KVR_AT(struct kvm_dirty_log, dirty_bitmap, 8);
KVR_SIZE(struct kvm_clear_dirty_log, 24);
KVR_AT(struct kvm_clear_dirty_log, slot, 0);
KVR_AT(struct kvm_clear_dirty_log, num_pages, 4);
KVR_AT(struct kvm_clear_dirty_log, first_page, 8);
KVR_AT(struct kvm_clear_dirty_log, dirty_bitmap, 16);
KVR_SIZE(struct kvm_userspace_memory_region, 32);
KVR_AT(struct kvm_userspace_memory_region, guest_phys_addr, 8);
KVR_AT(struct kvm_userspace_memory_region, memory_size, 16);
KVR_AT(struct kvm_userspace_memory_region, userspace_addr, 24);
KVR_SIZE(struct kvm_userspace_memory_region2, 160);
KVR_AT(struct kvm_userspace_memory_region2, userspace_addr, 24);
KVR_AT(struct kvm_userspace_memory_region2, guest_memfd_offset, 32);
KVR_AT(struct kvm_userspace_memory_region2, guest_memfd, 40);
KVR_SIZE(struct kvm_device_attr, 24);
KVR_AT(struct kvm_device_attr, group, 4);
KVR_AT(struct kvm_device_attr, attr, 8);
KVR_AT(struct kvm_device_attr, addr, 16);
KVR_SIZE(struct kvm_create_device, 12);
KVR_SIZE(struct kvm_one_reg, 16);
KVR_SIZE(struct kvm_stats_header, 24);
KVR_AT(struct kvm_run, immediate_exit, 1);
KVR_AT(struct kvm_run, exit_reason, 8);
KVR_AT(struct kvm_run, flags, 14);
KVR_AT(struct kvm_run, mmio, 32);
KVR_AT(struct kvm_run, io, 32);
#if defined(__x86_64__)
KVR_SIZE(struct kvm_regs, 144);
KVR_AT(struct kvm_regs, rip, 128);
KVR_SIZE(struct kvm_sregs, 312);
KVR_SIZE(struct kvm_segment, 24);
#elif defined(__aarch64__)
KVR_SIZE(struct kvm_vcpu_init, 32);
KVR_AT(struct kvm_vcpu_init, features, 4);
#endif

#endif
