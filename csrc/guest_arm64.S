/* SPDX-License-Identifier: MIT */
/*
 * The built-in guest for arm64: EL1, MMU off, position independent.
 *
 * x0 holds the gpa of its struct kvr_guest_block (kvmring.h).  It stores
 * 1, 2, 3, ..., or the values it is given, at the addresses of its list, says
 * after each store how far it is, and writes to the doorbell when a command is
 * done; entered again, it takes the next command.  With the MMU off all accesses are to Device memory, so they are
 * aligned and in order.
 */
#if defined(__aarch64__)
	.section .rodata
	.globl kvr_guest_code, kvr_guest_code_end
	.hidden kvr_guest_code, kvr_guest_code_end
	.balign 16
kvr_guest_code:
.Lcommand:
	ldr	x1, [x0, #0]		/* list */
	ldr	x2, [x0, #8]		/* count */
	ldr	x3, [x0, #16]		/* rounds */
	ldr	x4, [x0, #32]		/* at */
	ldr	x5, [x0, #40]		/* stores */
	ldr	x11, [x0, #64]		/* values */
	mov	x6, #0			/* round */
.Lround:
	mov	x7, #0			/* index */
.Lnext:
	cmp	x7, x2
	b.hs	.Lround_done
	ldr	x8, [x1, x7, lsl #3]
	add	x5, x5, #1
	mov	x9, x5
	cbz	x11, .Lstore
	ldr	x9, [x11, x7, lsl #3]
.Lstore:
	str	x9, [x8, x4]		/* the store */
	str	x5, [x0, #40]
	add	x7, x7, #1
	ldr	x10, [x0, #24]		/* stop */
	cbz	x10, .Lnext
	b	.Ldone
.Lround_done:
	add	x6, x6, #1
	str	x6, [x0, #48]
	ldr	x10, [x0, #24]
	cbnz	x10, .Ldone
	cbz	x3, .Lround
	cmp	x6, x3
	b.lo	.Lround
.Ldone:
	ldr	x8, [x0, #56]		/* doorbell: KVM_EXIT_MMIO */
	str	x5, [x8]
	b	.Lcommand
kvr_guest_code_end:
#endif
	.section .note.GNU-stack, "", %progbits
