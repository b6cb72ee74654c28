/* CFFI declarations that only arm64's <asm/kvm.h> has. */
#define KVM_ARM_PREFERRED_TARGET ...
#define KVM_ARM_VCPU_INIT ...

struct kvm_vcpu_init {
	unsigned int target;
	unsigned int features[7];
};
