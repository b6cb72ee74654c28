"""caps.*: what KVM_CHECK_EXTENSION says about dirty logging, and that it is true.

Also the ABI that every user of these capabilities is compiled with: the requests' numbers carry
the sizes of their structs, so the kernel itself says whether it has the same ones.
"""

from __future__ import annotations

import errno
import platform
import struct
from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import LOG, READONLY, Memory, ioctl
from kvmring.checks.rules import RAM_GPA, Trial, rule

CHECK = "virt/kvm/kvm_main.c, kvm_vm_ioctl_check_extension_generic()"
UAPI = "include/uapi/linux/kvm.h"
# kvm_arch_vm_ioctl() has the last word on a request: ENOTTY, but EINVAL on arm64
UNKNOWN_REQUEST = errno.EINVAL if platform.machine() == "aarch64" else errno.ENOTTY
MAX_RING_BYTES = 65536 * 16  # KVM_DIRTY_RING_MAX_ENTRIES entries

DIRTY_LOGGING = (
    Cap.DIRTY_LOG_RING,
    Cap.DIRTY_LOG_RING_ACQ_REL,
    Cap.DIRTY_LOG_RING_WITH_BITMAP,
    Cap.MANUAL_DIRTY_LOG_PROTECT,
    Cap.MANUAL_DIRTY_LOG_PROTECT2,
    Cap.NR_MEMSLOTS,
)


@rule(
    "caps.ring_acq_rel.bytes",
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL answers with the largest ring in bytes, 1 MiB, not entries",
    source=CHECK,
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
    meaning="A VMM that takes the number for entries asks for rings 16 times too large: E2BIG.",
)
def ring_acq_rel_bytes(trial: Trial) -> None:
    """Compare the answer with what can be enabled."""
    most = trial.kvm.check_extension(Cap.DIRTY_LOG_RING_ACQ_REL)
    trial.expect("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", most, MAX_RING_BYTES)
    cap = Cap.DIRTY_LOG_RING_ACQ_REL
    trial.errno(f"a ring of {most} bytes", lambda: raw.enable_cap(trial.vm(), cap, most), 0)
    trial.errno(
        f"a ring of {2 * most} bytes",
        lambda: raw.enable_cap(trial.vm(), cap, 2 * most),
        errno.E2BIG,
    )


@rule(
    "caps.ring.tso",
    "on x86 KVM_CAP_DIRTY_LOG_RING and KVM_CAP_DIRTY_LOG_RING_ACQ_REL answer the same",
    source=CHECK,
    machine="x86_64",
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
)
def ring_tso(trial: Trial) -> None:
    """Compare them."""
    acq_rel = trial.kvm.check_extension(Cap.DIRTY_LOG_RING_ACQ_REL)
    trial.expect("KVM_CAP_DIRTY_LOG_RING", trial.kvm.check_extension(Cap.DIRTY_LOG_RING), acq_rel)


@rule(
    "caps.ring.not_tso",
    "on arm64 KVM_CAP_DIRTY_LOG_RING is 0: its rings need acquire and release",
    source=CHECK,
    machine="aarch64",
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
    meaning="A VMM that reads entries without acquire loads may read a stale slot or offset.",
)
def ring_not_tso(trial: Trial) -> None:
    """Ask, and try to enable it."""
    trial.expect("KVM_CAP_DIRTY_LOG_RING", trial.kvm.check_extension(Cap.DIRTY_LOG_RING), 0)
    trial.errno(
        "enabling it",
        lambda: raw.enable_cap(trial.vm(), Cap.DIRTY_LOG_RING, MAX_RING_BYTES),
        errno.EINVAL,
    )


@rule(
    "caps.with_bitmap",
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP is 1 on arm64, where devices write guest memory outside "
    "any vCPU, and 0 on x86",
    source=CHECK + ": CONFIG_NEED_KVM_DIRTY_RING_WITH_BITMAP",
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
    meaning="On arm64 a VMM without the backup bitmap loses what the VGIC and the ITS write.",
)
def with_bitmap(trial: Trial) -> None:
    """Ask."""
    expected = 1 if platform.machine() == "aarch64" else 0
    got = trial.kvm.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    trial.expect("KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP", got, expected)


@rule(
    "caps.manual_protect",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 answers with the flags that may be enabled: "
    "ENABLE (1), and INITIALLY_SET (2) beside it",
    source=CHECK + "; kvm_vm_ioctl_enable_cap_generic()",
    needs=[Cap.MANUAL_DIRTY_LOG_PROTECT2],
)
def manual_protect(trial: Trial) -> None:
    """Ask, and enable what it says."""
    cap = Cap.MANUAL_DIRTY_LOG_PROTECT2
    offered = trial.kvm.check_extension(cap)
    trial.expect_true(
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", offered in (1, 3), got=offered, rule="1 or 3"
    )
    trial.note("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", offered)
    vm = trial.vm()
    trial.errno(f"enabling {offered}", lambda: raw.enable_cap(vm, cap, offered), 0)
    rest = 4 if offered == 3 else 3
    trial.errno(f"enabling {rest}", lambda: raw.enable_cap(vm, cap, rest), errno.EINVAL)


@rule(
    "caps.manual_protect.obsolete",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT, whose semantics were wrong, is 0 and cannot be enabled",
    source=CHECK + ": no case for it",
    needs=[Cap.MANUAL_DIRTY_LOG_PROTECT2],
)
def manual_protect_obsolete(trial: Trial) -> None:
    """Ask, and try."""
    cap = Cap.MANUAL_DIRTY_LOG_PROTECT
    trial.expect("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT", trial.kvm.check_extension(cap), 0)
    trial.errno("enabling it", lambda: raw.enable_cap(trial.vm(), cap, 1), errno.EINVAL)


@rule(
    "caps.same_on_vm",
    "/dev/kvm and a VM of the default type give the same answers about dirty logging",
    source="virt/kvm/kvm_main.c, kvm_dev_ioctl() and kvm_vm_ioctl(): KVM_CHECK_EXTENSION",
)
def same_on_vm(trial: Trial) -> None:
    """Ask both about each."""
    vm = trial.vm()
    for cap in (*DIRTY_LOGGING, Cap.MULTI_ADDRESS_SPACE):
        trial.expect(
            f"KVM_CAP_{cap.name} of a VM",
            vm.check_extension(cap),
            trial.kvm.check_extension(cap),
        )


@rule(
    "caps.same_with_ring",
    "the answers do not change when a ring is enabled or a vCPU exists: they say what KVM can, "
    "not what the VM has",
    source=CHECK,
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
)
def same_with_ring(trial: Trial) -> None:
    """Ask before and after."""
    vm = trial.vm(ring=trial.least_entries)
    vm.create_vcpu()
    for cap in DIRTY_LOGGING:
        trial.expect(
            f"KVM_CAP_{cap.name} with a ring",
            vm.check_extension(cap),
            trial.kvm.check_extension(cap),
        )


@rule(
    "caps.unknown",
    "a capability that the kernel does not know is 0, not an error",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl_check_extension_generic(): default",
)
def unknown(trial: Trial) -> None:
    """Ask about numbers that nobody has given out."""
    for cap in (0x7FFFFFFF, 0xFFFFFF, 60000):
        trial.expect(f"capability {cap}", ioctl(trial.kvm, raw.KVM_CHECK_EXTENSION, cap), 0)
        trial.expect(f"capability {cap} of a VM", ioctl(trial.vm(), 0xAE03, cap), 0)


@rule(
    "caps.nr_memslots",
    "KVM_CAP_NR_MEMSLOTS is the number of slot ids of an address space: the one below it is a "
    "slot, and the number itself is EINVAL",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl_set_memory_region(): KVM_USER_MEM_SLOTS",
)
def nr_memslots(trial: Trial) -> None:
    """Create the last slot, and the one after it."""
    number = trial.kvm.check_extension(Cap.NR_MEMSLOTS)
    trial.note("KVM_CAP_NR_MEMSLOTS", number)
    vm, memory = trial.vm(), Memory(trial.page_size)

    def add(slot: int) -> None:
        raw.set_region(vm, slot, RAM_GPA, memory.num_bytes, memory.address, LOG)

    trial.errno(f"slot {number}", lambda: add(number), errno.EINVAL)
    trial.errno("slot 65535", lambda: add(65535), errno.EINVAL)
    trial.errno(f"slot {number - 1}", lambda: add(number - 1), 0)
    trial.expect(f"dirty pages of slot {number - 1}", raw.get_dirty_log(vm, number - 1, 1), 0)


@rule(
    "caps.address_spaces",
    "KVM_CAP_MULTI_ADDRESS_SPACE counts the address spaces that slots may be in, 0 being one: "
    "the last is usable and the next is EINVAL",
    source="virt/kvm/kvm_main.c, kvm_set_memory_region(): kvm_arch_nr_memslot_as_ids()",
)
def address_spaces(trial: Trial) -> None:
    """Create a slot in the last space and in the one after it."""
    vm, memory = trial.vm(), Memory(trial.page_size)
    answer = vm.check_extension(Cap.MULTI_ADDRESS_SPACE)
    trial.note("KVM_CAP_MULTI_ADDRESS_SPACE", answer)
    count = max(1, answer)

    def add(as_id: int) -> None:
        raw.set_region(vm, as_id << 16, RAM_GPA, memory.num_bytes, memory.address, LOG)

    trial.errno(f"a slot in space {count}", lambda: add(count), errno.EINVAL)
    trial.errno(f"a slot in space {count - 1}", lambda: add(count - 1), 0)
    trial.errno(
        f"KVM_GET_DIRTY_LOG in space {count}",
        lambda: raw.get_dirty_log(vm, count << 16, 1),
        errno.EINVAL,
    )


@rule(
    "caps.smm",
    "on x86 there are two address spaces where KVM emulates SMM, and one where it does not",
    source="arch/x86/include/asm/kvm_host.h, KVM_MAX_NR_ADDRESS_SPACES; x86.c, KVM_CAP_X86_SMM",
    machine="x86_64",
)
def smm(trial: Trial) -> None:
    """Ask about both."""
    has_smm = trial.kvm.check_extension(Cap.X86_SMM)
    spaces = max(1, trial.kvm.check_extension(Cap.MULTI_ADDRESS_SPACE))
    trial.note("KVM_CAP_X86_SMM", has_smm)
    trial.expect("KVM_CAP_MULTI_ADDRESS_SPACE", spaces, 2 if has_smm else 1)


@rule(
    "caps.user_memory2",
    "KVM_SET_USER_MEMORY_REGION2 is there exactly where KVM_CAP_USER_MEMORY2 says so",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl()",
)
def user_memory2(trial: Trial) -> None:
    """Ask, and make a slot with it."""
    vm, memory = trial.vm(), Memory(trial.page_size)
    absent = (errno.ENOTTY, errno.EINVAL)
    trial.errno(
        "KVM_SET_USER_MEMORY_REGION2",
        lambda: raw.set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, version=2),
        *((0,) if trial.kvm.check_extension(Cap.USER_MEMORY2) else absent),
    )


@rule(
    "caps.readonly_mem",
    "KVM_MEM_READONLY is accepted exactly where KVM_CAP_READONLY_MEM says so",
    source="virt/kvm/kvm_main.c, check_memory_region_flags()",
)
def readonly_mem(trial: Trial) -> None:
    """Ask, and make a slot with it."""
    vm, memory = trial.vm(), Memory(trial.page_size)
    offered = trial.kvm.check_extension(Cap.READONLY_MEM)
    trial.errno(
        "a slot with KVM_MEM_READONLY",
        lambda: raw.set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, READONLY),
        0 if offered else errno.EINVAL,
    )


def other_sizes(request: int) -> tuple[int, int]:
    """Return the request for a struct 8 bytes smaller, and 8 bytes larger."""
    return request - (8 << 16), request + (8 << 16)


def expect_unknown(trial: Trial, name: str, request: int) -> None:
    """Expect that only the very size of the struct is known."""
    for other in other_sizes(request):
        trial.errno(
            f"{name} with {other >> 16 & 0x3FFF} bytes",
            partial(ioctl, trial.vm(), other, bytes(256)),
            UNKNOWN_REQUEST,
        )


@rule(
    "caps.abi.memslot",
    "struct kvm_userspace_memory_region is u32 slot, u32 flags, u64 guest_phys_addr, "
    "u64 memory_size, u64 userspace_addr; KVM_MEM_LOG_DIRTY_PAGES is 1",
    source=UAPI + ", KVM_SET_USER_MEMORY_REGION",
)
def abi_memslot(trial: Trial) -> None:
    """Make a slot with numbers written out, and look whether it is there."""
    expect_unknown(trial, "KVM_SET_USER_MEMORY_REGION", 0x4020AE46)
    vm, memory = trial.vm(), Memory(3 * trial.page_size)
    region = struct.pack("=IIQQQ", 5, 1, RAM_GPA, memory.num_bytes, memory.address)
    trial.errno("slot 5 with flags 1", lambda: ioctl(vm, 0x4020AE46, region), 0)
    trial.expect("KVM_GET_DIRTY_LOG of slot 5", raw.get_dirty_log(vm, 5, 3), 0)


@rule(
    "caps.abi.get_dirty_log",
    "struct kvm_dirty_log is u32 slot, u32 padding, u64 address, and the bitmap has a bit for "
    "every page of the slot, page 0 lowest, in whole 64-bit words",
    source=UAPI + ", KVM_GET_DIRTY_LOG",
    needs=[Cap.MANUAL_DIRTY_LOG_PROTECT2],
)
def abi_get_dirty_log(trial: Trial) -> None:
    """Have a bitmap of ones written where the struct says."""
    if trial.kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) != 3:
        trial.skip("this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
    expect_unknown(trial, "KVM_GET_DIRTY_LOG", 0x4010AE42)
    vm, pages = trial.vm(), 100
    memory, bitmap = Memory(pages * trial.page_size), Memory(trial.page_size)
    raw.enable_cap(vm, Cap.MANUAL_DIRTY_LOG_PROTECT2, 3)
    raw.set_region(vm, 7, RAM_GPA, memory.num_bytes, memory.address, LOG)
    bitmap.map[:32] = b"\xa5" * 32
    log = struct.pack("=IIQ", 7, 0, bitmap.address)
    trial.errno("KVM_GET_DIRTY_LOG of slot 7", lambda: ioctl(vm, 0x4010AE42, log), 0)
    trial.expect("the bitmap of 100 pages", int.from_bytes(bitmap.map[:16], "little"), 2**100 - 1)
    trial.expect("what follows its 16 bytes", bitmap.map[16:32].hex(), "a5" * 16)


@rule(
    "caps.abi.clear_dirty_log",
    "struct kvm_clear_dirty_log is u32 slot, u32 num_pages, u64 first_page, u64 address, and "
    "bit 0 of its bitmap is page first_page",
    source=UAPI + ", KVM_CLEAR_DIRTY_LOG",
    needs=[Cap.MANUAL_DIRTY_LOG_PROTECT2],
)
def abi_clear_dirty_log(trial: Trial) -> None:
    """Clear a range of a bitmap of ones, and fetch what is left."""
    if trial.kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) != 3:
        trial.skip("this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
    expect_unknown(trial, "KVM_CLEAR_DIRTY_LOG", 0xC018AEC0)
    vm, memory, bitmap = trial.vm(), Memory(256 * trial.page_size), Memory(trial.page_size)
    raw.enable_cap(vm, Cap.MANUAL_DIRTY_LOG_PROTECT2, 3)
    raw.set_region(vm, 7, RAM_GPA, memory.num_bytes, memory.address, LOG)
    bitmap.map[:16] = (1 << 0 | 1 << 70).to_bytes(16, "little")
    clear = struct.pack("=IIQQ", 7, 128, 64, bitmap.address)
    trial.errno("KVM_CLEAR_DIRTY_LOG of (64, 128)", lambda: ioctl(vm, 0xC018AEC0, clear), 0)
    left = raw.get_dirty_log(vm, 7, 256)
    clean = [page for page in range(256) if not left >> page & 1]
    trial.expect("pages clean after it", clean, [64, 134])


@rule(
    "caps.abi.enable_cap",
    "struct kvm_enable_cap is u32 cap, u32 flags, u64 args[4] and 64 bytes of padding",
    source=UAPI + ", KVM_ENABLE_CAP",
    needs=[Cap.MANUAL_DIRTY_LOG_PROTECT2],
)
def abi_enable_cap(trial: Trial) -> None:
    """Enable with numbers written out; the first argument's place decides."""
    expect_unknown(trial, "KVM_ENABLE_CAP", 0x4068AEA3)
    vm = trial.vm()
    for where, args, answer in (("args[0]", (8, 0), errno.EINVAL), ("args[1]", (0, 8), 0)):
        argument = struct.pack("=II4Q64s", 168, 0, *args, 0, 0, b"\xff" * 64)
        trial.errno(
            f"capability 168 with 8 in {where}",
            partial(ioctl, vm, 0x4068AEA3, argument),
            answer,
        )


@rule(
    "caps.abi.reset_dirty_rings",
    "KVM_RESET_DIRTY_RINGS is request 0xAEC7, which has no struct, and ignores its argument",
    source=UAPI + ", KVM_RESET_DIRTY_RINGS",
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
)
def abi_reset_dirty_rings(trial: Trial) -> None:
    """Make it with numbers written out."""
    vm = trial.vm(ring=trial.least_entries)
    trial.errno("request 0xAEC7", lambda: ioctl(vm, 0xAEC7), 0)
    trial.expect("entries reset, argument 1", ioctl(vm, 0xAEC7, 1), 0)
    trial.expect("entries reset, a bad pointer", ioctl(vm, 0xAEC7, 0x10), 0)
