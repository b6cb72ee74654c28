"""Which fault which check must catch: the table of test_check_faults.py, as data.

A fault is written as tests/c/faults.c reads it, with ioctls by name. Below it stand the checks
that must be "not ok" under it, because something that they looked at is not what they expect: a
check that merely fails to be set up has caught nothing.
"""

from __future__ import annotations

__all__ = ["MUST_CATCH", "NOT_COUNTED", "REQUESTS"]

REQUESTS = {
    "CREATE_VCPU": 0xAE41,
    "CHECK_EXTENSION": 0xAE03,
    "GET_VCPU_MMAP_SIZE": 0xAE04,
    "GET_DIRTY_LOG": 0x4010AE42,
    "SET_USER_MEMORY_REGION": 0x4020AE46,
    "SET_USER_MEMORY_REGION2": 0x40A0AE49,
    "RUN": 0xAE80,
    "SET_SIGNAL_MASK": 0x4004AE8B,
    "ENABLE_CAP": 0x4068AEA3,
    "CLEAR_DIRTY_LOG": 0xC018AEC0,
    "RESET_DIRTY_RINGS": 0xAEC7,
    "CREATE_DEVICE": 0xC00CAEE0,
    "SET_DEVICE_ATTR": 0x4018AEE1,
    "GET_DEVICE_ATTR": 0x4018AEE2,
    "HAS_DEVICE_ATTR": 0x4018AEE3,
}

# Checks that no fault here makes fail, and why; they are not among those that count.
NOT_COUNTED: dict[str, str] = {}

MUST_CATCH = {
    "ioctl:request=CHECK_EXTENSION:arg=168:nth=1:add=1": """
        caps.same_on_vm caps.same_with_ring
    """,
    "ioctl:request=CHECK_EXTENSION:arg=192:add=16": """
        caps.ring.not_tso caps.ring.tso
    """,
    "ioctl:request=CHECK_EXTENSION:arg=231:add=-1": """
        caps.user_memory2
    """,
    "ioctl:request=CHECK_EXTENSION:arg=81:add=-1": """
        caps.readonly_mem
    """,
    "ioctl:request=CHECK_EXTENSION:when=-1:error=33": """
        fork.exec.eio fork.passed_back
    """,
    "ioctl:request=CHECK_EXTENSION:when=-1:result=0": """
        fork.exec.eio fork.passed_back
    """,
    "ioctl:request=CHECK_EXTENSION:when=0:add=1": """
        caps.manual_protect caps.nr_memslots caps.ring_acq_rel.bytes caps.smm caps.unknown
        caps.with_bitmap manual_protect.values
    """,
    "ioctl:request=CLEAR_DIRTY_LOG:at=8:width=8:set=0": """
        caps.abi.clear_dirty_log clear.length clear.offset clear.range clear.tail
    """,
    "ioctl:request=CLEAR_DIRTY_LOG:result=0:instead": """
        bitmap_backup.clear clear.clears clear.extra_bits memslot.log.off
    """,
    "ioctl:request=CLEAR_DIRTY_LOG:when=-1:error=33": """
        clear.efault.argument clear.efault.bitmap clear.einval.first_page clear.einval.range
        clear.einval.slot clear.einval.tail clear.einval.wrap clear.enoent clear.enxio.ring
        clear.order enable_cap.bitmap.effect
    """,
    "ioctl:request=CLEAR_DIRTY_LOG:when=-1:result=0": """
        clear.efault.argument clear.efault.bitmap clear.einval.first_page clear.einval.range
        clear.einval.slot clear.einval.tail clear.einval.wrap clear.enoent clear.enxio.ring
        clear.order
    """,
    "ioctl:request=CREATE_DEVICE:when=-1:error=33": """
        vgic.create.eexist vgic.create.enodev
    """,
    "ioctl:request=CREATE_DEVICE:when=-1:result=0": """
        fork.device.eio vgic.create.eexist vgic.create.enodev
    """,
    "ioctl:request=CREATE_VCPU:when=-1:error=33": """
        fork.vm.eio
    """,
    "ioctl:request=CREATE_VCPU:when=-1:result=0": """
        fork.vm.eio
    """,
    "ioctl:request=ENABLE_CAP:first=168:at=8:width=8:set=0": """
        manual_protect.initially_set.clear_arms manual_protect.initially_set.existing
        manual_protect.initially_set.off manual_protect.initially_set.ones manual_protect.keeps
        manual_protect.other_arguments manual_protect.turned_off manual_protect.turned_on
    """,
    "ioctl:request=ENABLE_CAP:first=168:at=8:width=8:set=1": """
        manual_protect.initially_set.clear_arms manual_protect.initially_set.off
        manual_protect.initially_set.ones manual_protect.turned_off
    """,
    "ioctl:request=ENABLE_CAP:first=168:when=0:nth=2:error=22": """
        manual_protect.any_time manual_protect.values
    """,
    "ioctl:request=ENABLE_CAP:first=223:at=8:width=4:set=65536": """
        enable_cap.ring.size enable_cap.ring.u32
    """,
    "ioctl:request=ENABLE_CAP:first=223:when=0:nth=2:error=22": """
        enable_cap.ring.flags enable_cap.ring.u32 enable_cap.ring.with_slots
    """,
    "ioctl:request=ENABLE_CAP:first=225:result=0:instead": """
        bitmap_backup.any_time
    """,
    "ioctl:request=ENABLE_CAP:first=225:when=0:error=22": """
        enable_cap.bitmap.after_slot enable_cap.bitmap.flags enable_cap.bitmap.needs_ring
        enable_cap.bitmap.repeated
    """,
    "ioctl:request=ENABLE_CAP:when=-1:error=33": """
        caps.abi.enable_cap caps.manual_protect.obsolete caps.ring.not_tso
        enable_cap.bitmap.after_slot enable_cap.bitmap.flags enable_cap.bitmap.needs_ring
        enable_cap.bitmap.unsupported enable_cap.efault
        enable_cap.ring.after_vcpu enable_cap.ring.either_cap
        enable_cap.ring.least enable_cap.ring.power_of_two enable_cap.ring.refused
        enable_cap.ring.twice enable_cap.ring.zero enable_cap.unknown enable_cap.vcpu
        fork.enable_cap.eio manual_protect.einval.flags manual_protect.einval.values
        manual_protect.obsolete
    """,
    "ioctl:request=ENABLE_CAP:when=-1:result=0": """
        caps.abi.enable_cap caps.manual_protect.obsolete enable_cap.bitmap.after_slot
        enable_cap.bitmap.flags enable_cap.bitmap.needs_ring enable_cap.bitmap.unsupported
        enable_cap.efault
        enable_cap.ring.after_vcpu enable_cap.ring.either_cap enable_cap.ring.least
        enable_cap.ring.power_of_two enable_cap.ring.refused enable_cap.ring.twice
        enable_cap.ring.zero enable_cap.unknown enable_cap.vcpu fork.enable_cap.eio
        manual_protect.einval.flags manual_protect.einval.values manual_protect.obsolete
    """,
    "ioctl:request=GET_DEVICE_ATTR:when=-1:error=33": """
        vgic.its.registers.ebusy
    """,
    "ioctl:request=GET_DIRTY_LOG:nth=1:result=0:instead": """
        caps.address_spaces memslot.delete.drops
    """,
    "ioctl:request=GET_DIRTY_LOG:nth=2:result=0:instead": """
        get.exact get.running memslot.alias memslot.log.fresh
    """,
    "ioctl:request=GET_DIRTY_LOG:when=-1:error=33": """
        bitmap_backup.log_off bitmap_backup.without fork.get.order fork.get_clear.eio
        fork.memslot.eio get.efault.argument get.efault.manual_keeps
        get.efault.takes_all_or_nothing get.einval.as_id get.einval.slot_id get.enoent.log_off
        get.enoent.missing get.enxio.ring get.order memslot.efault memslot.flags.guest_memfd
    """,
    "ioctl:request=GET_DIRTY_LOG:when=-1:result=0": """
        bitmap_backup.log_off bitmap_backup.without fork.get.order fork.get_clear.eio
        fork.memslot.eio get.efault.argument get.efault.manual_keeps
        get.efault.takes_all_or_nothing get.einval.as_id get.einval.slot_id get.enoent.log_off
        get.enoent.missing get.enxio.ring get.order memslot.efault memslot.flags.guest_memfd
    """,
    "ioctl:request=GET_DIRTY_LOG:when=0:error=33": """
        bitmap_backup.any_time enable_cap.bitmap.effect
    """,
    "ioctl:request=RESET_DIRTY_RINGS:when=-1:error=33": """
        fork.reset.eio
    """,
    "ioctl:request=RESET_DIRTY_RINGS:when=-1:result=0": """
        fork.reset.eio
    """,
    "ioctl:request=RESET_DIRTY_RINGS:when=0:add=-1": """
        fork.ring.dontfork fork.system fork.thread
    """,
    "ioctl:request=RESET_DIRTY_RINGS:when=0:add=1": """
        caps.abi.reset_dirty_rings reset.no_vcpu reset.wrong_fd
    """,
    "ioctl:request=RUN:when=-1:error=33": """
        fork.vcpu.eio
    """,
    "ioctl:request=RUN:when=-1:result=0": """
        fork.vcpu.eio
    """,
    "ioctl:request=RUN:when=0:add=1": """
        ring_full.returns_0
    """,
    "ioctl:request=RUN:when=0:nth=1:error=4": """
        signals.run.blocked
    """,
    "ioctl:request=RUN:when=0:nth=2:error=4": """
        memslot.move.keeps memslot.move.logs memslot.ring.recreate
        ring_full.harvest_is_not_enough ring_full.immediate_exit ring_full.last_again
        ring_full.no_progress ring_full.not_retired signals.ignored signals.run.immediate_exit
    """,
    "ioctl:request=RUN:when=4:result=0": """
        ring_full.immediate_exit signals.run.immediate_exit signals.run.interrupted
        signals.run.signal_mask
    """,
    "ioctl:request=SET_DEVICE_ATTR:when=-1:error=33": """
        vgic.gic.unknown_command vgic.its.efault vgic.its.registers.ebusy vgic.its.reset.ebusy
        vgic.its.restore.ebusy vgic.its.restore.einval vgic.its.save.ebusy vgic.pending.ebusy
        vgic.pending.enxio
    """,
    "ioctl:request=SET_DEVICE_ATTR:when=-1:result=0": """
        vgic.gic.unknown_command vgic.its.efault vgic.its.reset.ebusy vgic.its.restore.ebusy
        vgic.its.restore.einval vgic.its.save.ebusy vgic.pending.ebusy vgic.pending.enxio
    """,
    "ioctl:request=SET_SIGNAL_MASK:when=-1:error=33": """
        signals.run.mask_size
    """,
    "ioctl:request=SET_SIGNAL_MASK:when=-1:result=0": """
        signals.run.mask_size
    """,
    "ioctl:request=SET_USER_MEMORY_REGION2:when=-1:error=33": """
        memslot.flags.unknown2
    """,
    "ioctl:request=SET_USER_MEMORY_REGION2:when=-1:result=0": """
        memslot.flags.unknown2
    """,
    "ioctl:request=SET_USER_MEMORY_REGION:nth=1:at=4:set=0": """
        ring_full.argument
    """,
    "ioctl:request=SET_USER_MEMORY_REGION:nth=2:when=0:error=22": """
        memslot.change.hva memslot.change.readonly memslot.change.size memslot.delete.missing
        memslot.overlap
    """,
    "ioctl:request=SET_USER_MEMORY_REGION:nth=3:at=4:set=0": """
        clear.tail get.length reset.other_vm reset.slot_moved ring.log_off ring.reads
        ring_full.soft_limit
    """,
    "ioctl:request=SET_USER_MEMORY_REGION:when=-1:error=33": """
        memslot.align.gpa memslot.align.hva memslot.align.size memslot.flags.unknown
        memslot.hva.not_user memslot.max_pages memslot.wrap
    """,
    "ioctl:request=SET_USER_MEMORY_REGION:when=-1:result=0": """
        memslot.align.gpa memslot.align.hva memslot.align.size memslot.flags.unknown
        memslot.hva.not_user memslot.max_pages memslot.wrap
    """,
    "mmap:page=3:when=0:mode=allow": """
        mmap.vcpu_size
    """,
    "mmap:page=63:when=0:error=22": """
        mmap.ring.private_round
    """,
    "mmap:page=63:when=0:mode=allow": """
        mmap.ring.before
    """,
    "mmap:page=64:when=0:from=2:error=13": """
        mmap.no_ring mmap.ring.keeps mmap.ring.rights
    """,
    "mmap:page=64:when=0:from=2:mode=allow": """
        mmap.ring.end mmap.ring.entry mmap.ring.keeps mmap.ring.marks mmap.ring.partial
        mmap.ring.per_vcpu
    """,
    "mmap:page=64:when=0:from=2:mode=other": """
        mmap.ring.end mmap.ring.entry mmap.ring.marks mmap.ring.offset mmap.ring.per_vcpu
    """,
    "mmap:page=64:when=0:mode=allow": """
        mmap.no_ring
    """,
    "mmap:page=65:when=0:mode=other": """
        mmap.ring.partial
    """,
    "mmap:when=-1:error=33": """
        mmap.other_fds mmap.ring.exec mmap.ring.private
    """,
    "mmap:when=-1:mode=allow": """
        mmap.other_fds mmap.ring.exec mmap.ring.private
    """,
    "get:mode=add": """
        memslot.hva.unmapped memslot.readonly.log truth.ring_bitmap.collecting
        truth.ring_bitmap.full truth.ring_bitmap.full_together truth.ring_bitmap.random
        truth.ring_bitmap.sequential truth.ring_bitmap.several_vcpus vgic.pending.nothing
    """,
    "get:mode=beyond": """
        caps.abi.get_dirty_log
    """,
    "get:mode=drop": """
        bitmap_backup.initially_set bitmap_backup.no_ring bitmap_backup.pending_tables
        bitmap_backup.pending_tables.unchanged bitmap_backup.reset_keeps
        bitmap_backup.restore_tables bitmap_backup.save_tables bitmap_backup.save_tables.again
        bitmap_backup.save_tables.changes bitmap_backup.slots bitmap_backup.together
        clear.address_spaces get.address_spaces memslot.as_id.overlap signals.get
        truth.bitmap.collecting truth.bitmap.random truth.bitmap.sequential
        truth.bitmap.several_vcpus truth.clear_log.collecting truth.clear_log.random
        truth.clear_log.sequential truth.clear_log.several_vcpus truth.initially_set.collecting
        truth.initially_set.random truth.initially_set.sequential
        truth.initially_set.several_vcpus vgic.its.round_trip vgic.its.save.no_tables
        vgic.its.unknown_command
    """,
    "get:mode=empty": """
        vgic.its.round_trip
    """,
    "get:mode=full": """
        truth.bitmap.collecting truth.bitmap.random truth.bitmap.sequential
        truth.bitmap.several_vcpus truth.clear_log.collecting truth.clear_log.random
        truth.clear_log.sequential truth.clear_log.several_vcpus truth.initially_set.collecting
        truth.initially_set.random truth.initially_set.sequential
        truth.initially_set.several_vcpus vgic.pending.nothing
    """,
    "get:mode=keep": """
        bitmap_backup.clear bitmap_backup.no_ring bitmap_backup.pending_tables.unchanged
        bitmap_backup.restore_tables bitmap_backup.save_tables.again clear.late_write
        clear.neighbours clear.relogs clear.running clear.without_manual_protect get.one_slot
        get.relogs get.takes memslot.host_writes signals.clear vgic.its.reset.writes_nothing
    """,
    "get:mode=late": """
        bitmap_backup.initially_set bitmap_backup.pending_tables bitmap_backup.reset_keeps
        bitmap_backup.save_tables bitmap_backup.save_tables.changes bitmap_backup.slots
        bitmap_backup.together vgic.its.reset.writes_nothing vgic.its.save.no_tables
        vgic.its.unknown_command
    """,
    "get:mode=short": """
        clear.nothing get.once get.overwrites memslot.log.write_protect memslot.same
    """,
    "get:mode=tail": """
        caps.abi.memslot get.host_writes get.padding
    """,
    "ring:mode=keep": """
        fork.ring.steals reset.argument reset.batch.ascending reset.batch.descending
        reset.batch.random reset.entries reset.two_threads ring.again ring.mark.both_flags
        ring.mark.unknown_bits ring.wrap ring_full.again signals.ignored signals.reset_count
        signals.reset_prefix signals.run.log
    """,
    "ring:mode=offset": """
        ring_full.others_run
    """,
    "ring:mode=offset:nth=50": """
        enable_cap.ring.logs_old_slots fork.ring.inherited fork.ring.mmap reset.batch.strides
        reset.batch.zigzag ring.first_writer ring.once ring.own truth.ring.full
        truth.ring.random truth.ring.sequential truth.ring.several_vcpus
    """,
    "ring:mode=slot": """
        fork.cow manual_protect.ring manual_protect.ring.initially_set memslot.ring.delete
        memslot.ring.log_off memslot.ring.log_on memslot.ring.move memslot.ring.other_slot
        memslot.ring.recreate reset.batch.slots reset.slot_made_anew ring.entry ring.without_run
        ring_full.reserve
    """,
    "ring:mode=slot:nth=2": """
        fork.cow manual_protect.ring manual_protect.ring.initially_set memslot.ring.delete
        memslot.ring.log_off memslot.ring.log_on memslot.ring.move memslot.ring.other_slot
        reset.batch.slots reset.slot_made_anew ring.entry ring.without_run
    """,
    "ring:mode=swap": """
        reset.protects ring.gap.first ring.gap.middle ring.host_writes ring.mark.both_flags
        ring.mark.unknown_bits ring.order ring.overwritten.other_page ring_full.last_again
        ring_full.last_not_again ring_full.not_retired ring_full.reserve
    """,
    "ring:mode=swap:nth=50": """
        ring.host_writes ring.order
    """,
    "ring:mode=twice:nth=50": """
        reset.closed_vcpu reset.log_off reset.slot_deleted ring.flags
    """,
    "ring:mode=withhold": """
        bitmap_backup.in_a_vcpu bitmap_backup.vcpu_writes
    """,
    "ring:mode=withhold:nth=2": """
        bitmap_backup.in_a_vcpu bitmap_backup.vcpu_writes truth.ring_bitmap.random
    """,
    "ring:mode=withhold:page=7": """
        ring_full.again ring_full.reset_of_some ring_full.soft_limit signals.guarded_reset
        signals.reset_loss truth.ring.collecting truth.ring.full truth.ring.full_together
        truth.ring.sequential truth.ring.several_vcpus truth.ring_bitmap.collecting
        truth.ring_bitmap.full truth.ring_bitmap.full_together truth.ring_bitmap.sequential
        truth.ring_bitmap.several_vcpus
    """,
    "reset:mode=any": """
        ring.gap.first ring.gap.middle ring.mark.none
    """,
    "reset:mode=extra": """
        fork.ring.steals reset.count reset.entries reset.nothing reset.one_vcpu reset.protects
        ring.mark.none ring.overwritten.other_page ring_full.last_not_again
        ring_full.others_reset ring_full.reset_of_1 ring_full.reset_of_some
    """,
    "reset:mode=late": """
        reset.batch.edges reset.before_reading ring.not_reset ring.overwritten.as_id
        ring.overwritten.offset ring.overwritten.slot ring.overwritten.slot_id signals.blocked
    """,
    "reset:mode=skip:nth=1": """
        fork.reset.takes_nothing reset.no_ring
    """,
}
