"""KVM's binary statistics: what KVM_GET_STATS_FD serves, as a dict.

The file begins with a header, then an id, descriptors and data, each at the offset that the
header gives (Documentation/virt/kvm/api.rst, 4.133; Linux 5.14).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmring import ioctls
from kvmring.owned import Owned

if TYPE_CHECKING:
    from kvmring._kvm import Obj

__all__ = ["Statistics", "read"]

Statistics = dict[str, int | tuple[int, ...]]

_HEADER = struct.Struct("=6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESC = struct.Struct("=IhHII")  # flags, exponent, size, offset, bucket_size; then the name


class _StatsFile(Owned["Obj"]):
    """The descriptor, for as long as it is read."""

    __slots__ = ()


def read(owner: Owned[Obj]) -> Statistics:
    """Read every statistic of a VM or vCPU: name to value, or to a tuple for histograms."""
    with _StatsFile(ioctls.get_stats_fd(owner)) as file:
        _, name_size, num_desc, _, desc_offset, data_offset = _HEADER.unpack(
            ioctls.pread(file, _HEADER.size, 0)
        )
        step = _DESC.size + name_size
        table = ioctls.pread(file, num_desc * step, desc_offset)
        result: Statistics = {}
        entries = []
        for at in range(0, num_desc * step, step):
            _, _, size, offset, _ = _DESC.unpack_from(table, at)
            name = table[at + _DESC.size : at + step].split(b"\0", 1)[0].decode()
            entries.append((name, offset, size))
        end = max((offset + 8 * size for _, offset, size in entries), default=0)
        data = ioctls.pread(file, end, data_offset) if end else b""
        for name, offset, size in entries:
            values = struct.unpack_from(f"={size}Q", data, offset)
            result[name] = values[0] if size == 1 else values
        return result
