/* SPDX-License-Identifier: MIT */
/*
 * The built-in guest for x86-64: 64-bit code for CPL 3, position independent.
 *
 * rdi holds the gpa of its struct kvr_guest_block (kvmring.h).  It stores
 * 1, 2, 3, ..., or the values it is given, at the addresses of its list, says
 * after each store how far it is, and writes to the doorbell when a command is
 * done; entered again, it takes the next command.  Its own reads and its counters lie in the block's slot, so the
 * list is exactly what it dirties elsewhere.
 */
#if defined(__x86_64__)
	.section .rodata
	.globl kvr_guest_code, kvr_guest_code_end
	.hidden kvr_guest_code, kvr_guest_code_end
	.balign 16
kvr_guest_code:
.Lcommand:
	mov	0(%rdi), %rsi		/* list */
	mov	8(%rdi), %rcx		/* count */
	mov	16(%rdi), %r9		/* rounds */
	mov	32(%rdi), %r10		/* at */
	mov	40(%rdi), %rax		/* stores */
	mov	64(%rdi), %r12		/* values */
	xor	%r11d, %r11d		/* round */
.Lround:
	xor	%edx, %edx		/* index */
.Lnext:
	cmp	%rcx, %rdx
	jae	.Lround_done
	mov	(%rsi,%rdx,8), %rbx
	add	%r10, %rbx
	inc	%rax
	mov	%rax, %r8
	test	%r12, %r12
	jz	.Lstore
	mov	(%r12,%rdx,8), %r8
.Lstore:
	mov	%r8, (%rbx)		/* the store */
	mov	%rax, 40(%rdi)
	inc	%rdx
	cmpq	$0, 24(%rdi)		/* stop */
	je	.Lnext
	jmp	.Ldone
.Lround_done:
	inc	%r11
	mov	%r11, 48(%rdi)
	cmpq	$0, 24(%rdi)
	jne	.Ldone
	test	%r9, %r9
	jz	.Lround
	cmp	%r9, %r11
	jb	.Lround
.Ldone:
	mov	56(%rdi), %rbx		/* doorbell: KVM_EXIT_MMIO */
	mov	%rax, (%rbx)
	jmp	.Lcommand
kvr_guest_code_end:
#endif
	.section .note.GNU-stack, "", %progbits
