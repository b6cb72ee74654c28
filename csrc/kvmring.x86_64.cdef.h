/* CFFI declarations that only x86-64's <asm/kvm.h> has. */
#define KVM_GET_SUPPORTED_CPUID ...
#define KVM_SET_CPUID2 ...

struct kvm_regs {
	unsigned long long rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
	unsigned long long r8, r9, r10, r11, r12, r13, r14, r15;
	unsigned long long rip, rflags;
};
struct kvm_segment {
	unsigned long long base;
	unsigned int limit;
	unsigned short selector;
	unsigned char type;
	unsigned char present, dpl, db, s, l, g, avl;
	unsigned char unusable;
	unsigned char padding;
};
struct kvm_dtable {
	unsigned long long base;
	unsigned short limit;
	unsigned short padding[3];
};
struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	unsigned long long cr0, cr2, cr3, cr4, cr8, efer, apic_base;
	unsigned long long interrupt_bitmap[4];
};
struct kvm_cpuid_entry2 {
	unsigned int function, index, flags, eax, ebx, ecx, edx;
	unsigned int padding[3];
};
struct kvm_cpuid2 {
	unsigned int nent;
	unsigned int padding;
	struct kvm_cpuid_entry2 entries[];
};
