"""bitmap_backup.*: the ring's backup bitmap, and what KVM writes outside any vCPU (arm64)."""

from __future__ import annotations

import errno

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.bits import KEEP, LOST, MANUAL, as_bits, expect_pages, pages_of
from kvmring.checks.gic import Gic
from kvmring.checks.rules import Trial, rule

ARM64 = "aarch64"
NEEDS = (Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING_WITH_BITMAP)
MARK = "virt/kvm/kvm_main.c, mark_page_dirty_in_slot()"
SAVE = f"arch/arm64/kvm/vgic/vgic-its.c, vgic_its_save_tables_v0(); {MARK}"
PENDING = f"arch/arm64/kvm/vgic/vgic-v3.c, vgic_v3_save_pending_tables(); {MARK}"
RESTORE = f"arch/arm64/kvm/vgic/vgic-v3.c, vgic_v3_lpi_sync_pending_status(); {MARK}"
ONES = (1 << 1024) - 1
GIB = 1 << 30


@rule(
    "bitmap_backup.vcpu_writes",
    "what a vCPU writes is in its ring, and not in the backup bitmap",
    source=MARK,
    needs=NEEDS,
    guest=True,
)
def vcpu_writes(trial: Trial) -> None:
    """Read twice, the bitmap before the ring and after it."""
    host = Gic(trial, tables=False)
    host.write(host.spare)
    expect_pages(trial, "pages in the bitmap before the harvest", host.bitmap(), ())
    expect_pages(trial, "pages in the ring", host.ring(), host.spare)
    expect_pages(trial, "pages in the bitmap after the reset", host.bitmap(), ())


@rule(
    "bitmap_backup.any_time",
    "GET and CLEAR are legal at any time, and take nothing from the ring",
    source="virt/kvm/kvm_main.c, kvm_get_dirty_log_protect(), kvm_clear_dirty_log_protect()",
    needs=[*NEEDS, MANUAL],
    guest=True,
    meaning=LOST,
)
def any_time(trial: Trial) -> None:
    """With entries pending, harvested, reset."""
    host = Gic(trial, tables=False)
    slot, pages = host.ram.slot, host.ram.num_pages
    bits = ONES & (1 << pages) - 1

    def both(when: str) -> None:
        trial.errno(f"GET {when}", lambda: raw.get_dirty_log(host.vm, slot, pages), 0)
        trial.errno(f"CLEAR {when}", lambda: raw.clear_dirty_log(host.vm, slot, 0, pages, bits), 0)

    both("with an empty ring")
    host.write(host.spare[:20])
    both("with entries in the ring")
    expect_pages(trial, "pages in the ring", host.ring(), host.spare[:20])
    both("after the reset")
    host.write(host.spare[10:30])
    expect_pages(trial, "pages in the ring after the reset", host.ring(), host.spare[10:30])


@rule(
    "bitmap_backup.save_tables",
    "KVM_DEV_ARM_ITS_SAVE_TABLES logs the pages that it writes in the backup bitmap, and no "
    "other page there, and nothing in a ring",
    source=SAVE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a migrated guest finds old interrupt tables: take the backup bitmap after the save",
)
def save_tables(trial: Trial) -> None:
    """Tables of two devices and a collection."""
    host = Gic(trial)
    host.program()
    queue = host.tables.queue_pages()
    expect_pages(trial, "pages in the ring: the command queue", host.ring(), queue)
    expect_pages(trial, "pages in the bitmap before the save", host.bitmap(), ())
    host.its.save_tables()
    expect_pages(trial, "pages in the ring after the save", host.ring(), ())
    expect_pages(trial, "pages in the bitmap", host.bitmap(), host.tables.saved_pages())


@rule(
    "bitmap_backup.save_tables.changes",
    "every page that changed in memory by a save is in the backup bitmap",
    source=SAVE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a migrated guest finds old interrupt tables",
)
def save_tables_changes(trial: Trial) -> None:
    """The memory compared, byte by byte."""
    host = Gic(trial)
    host.program()
    host.forget()
    host.its.save_tables()
    logged, changed = host.bitmap(), host.changed()
    trial.expect_true("pages that changed by the save", len(changed) > 2, got=len(changed))
    expect_pages(trial, "of these, in the bitmap", logged & changed, changed)


@rule(
    "bitmap_backup.save_tables.again",
    "the bitmap that a GET returns has what was saved before it: a later save is in a later GET",
    source=SAVE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="take the backup bitmap last, after every save",
)
def save_tables_again(trial: Trial) -> None:
    """Save, GET, another device, save, GET."""
    host = Gic(trial)
    host.program()
    host.its.save_tables()
    expect_pages(trial, "pages of the first save", host.bitmap(), host.tables.saved_pages())
    expect_pages(trial, "pages in the next GET", host.bitmap(), ())
    host.do(host.tables.map_device(4, [2]))
    expect_pages(trial, "pages after another device was mapped", host.bitmap(), ())
    host.its.save_tables()
    expect_pages(trial, "pages of the second save", host.bitmap(), host.tables.saved_pages())


@rule(
    "bitmap_backup.pending_tables",
    "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES logs the pages that it writes in the backup bitmap, "
    "and nothing in a ring",
    source=PENDING,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a migrated guest loses interrupts: take the backup bitmap after the save",
)
def pending_tables(trial: Trial) -> None:
    """Two interrupts that nobody takes."""
    host = Gic(trial)
    host.program()
    host.do(host.tables.interrupt(1, 5) + host.tables.interrupt(9, 30))
    host.forget()
    host.gic.save_pending_tables()
    pages = host.tables.pending_pages()
    expect_pages(trial, "pages that changed by the save", host.changed(), pages)
    expect_pages(trial, "pages in the bitmap", host.bitmap(), pages)
    expect_pages(trial, "pages in the ring", host.ring(), ())


@rule(
    "bitmap_backup.pending_tables.unchanged",
    "a byte of a pending table that is right already is neither written nor logged",
    source=PENDING,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
)
def pending_unchanged(trial: Trial) -> None:
    """Saved once more, then with one interrupt more."""
    host = Gic(trial)
    host.program()
    host.do(host.tables.interrupt(1, 5))
    host.gic.save_pending_tables()
    pages = host.tables.pending_pages()
    expect_pages(trial, "pages of the first save", host.bitmap(), pages)
    host.gic.save_pending_tables()
    expect_pages(trial, "pages of the second save", host.bitmap(), ())
    host.do(host.tables.interrupt(9, 30))
    host.gic.save_pending_tables()
    expect_pages(trial, "one interrupt later", host.bitmap(), host.tables.pending_pages())


@rule(
    "bitmap_backup.restore_tables",
    "KVM_DEV_ARM_ITS_RESTORE_TABLES clears the pending bits that it takes, and logs their page "
    "in the backup bitmap only",
    source=RESTORE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a restore dirties memory: one that is followed by another migration must be logged",
)
def restore_tables(trial: Trial) -> None:
    """Saved, reset, restored."""
    host = Gic(trial)
    host.program()
    host.do(host.tables.interrupt(1, 5))
    host.its.save_tables()
    host.gic.save_pending_tables()
    pages = host.tables.pending_pages()
    host.its.reset()
    host.new_tables()
    host.forget()
    host.its.restore_tables()
    expect_pages(trial, "pages that changed by the restore", host.changed(), pages)
    expect_pages(trial, "pages in the bitmap", host.bitmap(), pages)
    expect_pages(trial, "pages in the ring", host.ring(), ())


@rule(
    "bitmap_backup.in_a_vcpu",
    "the same write, made while a vCPU runs the guest's command, is in that vCPU's ring and not "
    "in the bitmap",
    source=RESTORE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=LOST,
)
def in_a_vcpu(trial: Trial) -> None:
    """An interrupt that is pending in memory is mapped by the guest: KVM takes its bit."""
    host = Gic(trial)
    byte = host.pending_at() + host.tables.lpi(1, 5) // 8
    page = byte // trial.page_size
    host.ram.write(byte, bytes([1 << host.tables.lpi(1, 5) % 8]))
    host.do(host.tables.map_collection(0) + host.tables.map_device(1, [5]))
    trial.expect("the pending byte, taken by KVM", host.ram.read(byte, 1), b"\0")
    expect_pages(trial, "pages in the ring", host.ring(), {page} | host.tables.queue_pages())
    expect_pages(trial, "pages in the bitmap", host.bitmap(), ())


@rule(
    "bitmap_backup.reset_keeps",
    "KVM_RESET_DIRTY_RINGS takes nothing from the backup bitmap",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()",
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a migrated guest finds old interrupt tables",
)
def reset_keeps(trial: Trial) -> None:
    """A save, a vCPU's write to one of its pages, a reset."""
    host = Gic(trial)
    host.program()
    host.ring()
    host.its.save_tables()
    saved = host.tables.saved_pages()
    host.write([min(saved), host.spare[0]])
    expect_pages(trial, "pages in the ring", host.ring(), [min(saved), host.spare[0]])
    expect_pages(trial, "pages in the bitmap after the reset", host.bitmap(), saved)


@rule(
    "bitmap_backup.together",
    "ring and backup bitmap together name every page that changed",
    source=MARK,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=LOST,
)
def together(trial: Trial) -> None:
    """In the order that loses nothing: stop, harvest, reset, save, GET."""
    host = Gic(trial)
    host.program()
    written = trial.random.sample(host.spare, 40)
    host.write(written)
    host.do(host.tables.interrupt(1, 1))
    by_ring = host.ring()
    host.its.save_tables()
    host.gic.save_pending_tables()
    by_bitmap = host.bitmap()
    changed = host.changed()
    expect_pages(trial, "in the ring", by_ring, {*written, *host.tables.queue_pages()})
    expected = host.tables.saved_pages() | host.tables.pending_pages()
    expect_pages(trial, "in the bitmap", by_bitmap, expected)
    expect_pages(trial, "of what changed, in one of them", changed & (by_ring | by_bitmap), changed)


@rule(
    "bitmap_backup.clear",
    "with manual protect a GET leaves the backup bitmap's bits, and a CLEAR takes those it names",
    source="virt/kvm/kvm_main.c, kvm_clear_dirty_log_protect()",
    needs=[*NEEDS, MANUAL],
    machine=ARM64,
    guest=True,
)
def clear(trial: Trial) -> None:
    """A part of the saved pages."""
    host = Gic(trial, manual=KEEP)
    host.program()
    host.ring()
    host.its.save_tables()
    saved = host.tables.saved_pages()
    for number in (1, 2):
        expect_pages(trial, f"GET number {number}", host.bitmap(), saved)
    some = sorted(saved)[1:]
    raw.clear_dirty_log(host.vm, host.ram.slot, 0, host.ram.num_pages, as_bits(some))
    expect_pages(trial, "pages left after a CLEAR", host.bitmap(), saved - set(some))
    host.its.save_tables()
    expect_pages(trial, "pages after another save", host.bitmap(), saved)


@rule(
    "bitmap_backup.slots",
    "each slot has a backup bitmap of its own",
    source=MARK,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a VMM must ask for the bitmap of every slot that logs",
)
def slots(trial: Trial) -> None:
    """The tables lie in one of two slots that log."""
    host = Gic(trial)
    end = max(slot.end for slot in host.vm.slots.values())
    other = trial.ram(host.vm, 70, gpa=-(-end // GIB) * GIB)
    host.program()
    host.its.save_tables()
    logged = pages_of(raw.get_dirty_log(host.vm, other.slot, 70))
    expect_pages(trial, "pages in the other slot's bitmap", logged, ())
    expect_pages(trial, "pages in the bitmap", host.bitmap(), host.tables.saved_pages())


@rule(
    "bitmap_backup.log_off",
    "turning logging off drops the backup bitmap; turned on again it is empty",
    source="virt/kvm/kvm_main.c, kvm_prepare_memory_region(), kvm_commit_memory_region()",
    needs=NEEDS,
    machine=ARM64,
    guest=True,
)
def log_off(trial: Trial) -> None:
    """With pages in it."""
    host = Gic(trial)
    host.program()
    host.its.save_tables()
    host.ram.set_log_dirty(False)
    pages = host.ram.num_pages
    trial.errno(
        "KVM_GET_DIRTY_LOG with logging off",
        lambda: raw.get_dirty_log(host.vm, host.ram.slot, pages),
        errno.ENOENT,
    )
    host.its.save_tables()
    host.ram.set_log_dirty(True)
    expect_pages(trial, "pages in the new bitmap", host.bitmap(), ())
    host.its.save_tables()
    expect_pages(trial, "pages after another save", host.bitmap(), host.tables.saved_pages())


@rule(
    "bitmap_backup.initially_set",
    "with INITIALLY_SET a new backup bitmap has every page of the slot dirty",
    source="virt/kvm/kvm_main.c, kvm_prepare_memory_region()",
    needs=[*NEEDS, MANUAL],
)
def initially_set(trial: Trial) -> None:
    """Of a slot of 100 pages."""
    if not trial.kvm.check_extension(MANUAL) & 2:
        trial.skip("this KVM lacks KVM_DIRTY_LOG_INITIALLY_SET")
    vm = trial.vm(ring=trial.least_entries, with_bitmap=True)
    raw.enable_cap(vm, MANUAL, 3)
    ram = trial.ram(vm, 100)
    logged = pages_of(raw.get_dirty_log(vm, ram.slot, 100))
    expect_pages(trial, "pages in a new bitmap", logged, range(100))


@rule(
    "bitmap_backup.without",
    "with a ring and no backup bitmap, what KVM writes outside any vCPU is in no log",
    source=SAVE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="on arm64 enable KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP with every ring, before the "
    "first memory slot; without it the interrupt tables must be sent always",
)
def without(trial: Trial) -> None:
    """The tables are written all the same."""
    host = Gic(trial, with_bitmap=False)
    host.program()
    host.forget()
    host.its.save_tables()
    changed = host.changed()
    trial.expect_true("pages that changed by the save", len(changed) > 2, got=len(changed))
    expect_pages(trial, "pages in the ring", host.ring(), ())
    trial.errno(
        "KVM_GET_DIRTY_LOG",
        lambda: raw.get_dirty_log(host.vm, host.ram.slot, host.ram.num_pages),
        errno.ENXIO,
    )


@rule(
    "bitmap_backup.no_ring",
    "without a ring there is one bitmap, for what vCPUs write and for what KVM writes itself",
    source=MARK,
    machine=ARM64,
    guest=True,
    meaning=LOST,
)
def no_ring(trial: Trial) -> None:
    """Both, then a save alone."""
    host = Gic(trial, ring=False)
    host.program()
    host.write(host.spare[:5])
    host.its.save_tables()
    expected = {*host.spare[:5], *host.tables.queue_pages(), *host.tables.saved_pages()}
    expect_pages(trial, "pages in the bitmap", host.bitmap(), expected)
    host.its.save_tables()
    expect_pages(trial, "pages of a save alone", host.bitmap(), host.tables.saved_pages())
