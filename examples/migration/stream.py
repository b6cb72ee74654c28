"""The stream between source and destination: frames, their checks, and the destination's side.

A hello with the RAM's regions, then frames. Whatever comes is checked before it is used, and every
wait has its end: a stream that is damaged or cut off is one StreamError.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from kvmring import page_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvmring import VM, GuestMemory

PAGE = page_size()
MAX_CHUNK = 1 << 20  # bytes of one frame
HASH_RATE = 50e6  # bytes per second that a slow machine still hashes

# The stream: a hello, the RAM's regions, then frames; those with a payload say its length.
HELLO = struct.Struct("!8sHHI")  # magic, version, number of regions, page size
MAGIC, VERSION, MAX_REGIONS = b"KVRMIGR\0", 1, 64
REGION = struct.Struct("!QQ")  # gpa, bytes
FRAME_HEAD = struct.Struct("!4sQQ")  # kind and two numbers


class Kind(enum.Enum):
    """What a frame is."""

    PAGES = b"PAGE"  # gpa, length, and the bytes
    END = b"ENDR"  # round, pages in it; answered by
    ACK = b"ACKR"  # the same, when all of it is in the destination's memory
    STOPPED = b"STOP"  # the vCPUs stand still: what follows is the last round
    HASH = b"HASH"  # 0, length, SHA-256 over all RAM: the source's, then the destination's


class Frame(NamedTuple):
    """A frame as it came; the payload is valid until the next one."""

    kind: Kind
    number: int
    size: int
    payload: memoryview


class StreamError(Exception):
    """The other side is gone, or what it sends is not the protocol."""


class Stream:
    """One connection, with a time limit on every wait."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._buffer = memoryview(bytearray(MAX_CHUNK))
        self._out = bytearray()
        self.batch = MAX_CHUNK  # bytes
        self.patience_s = timeout_s

    @contextlib.contextmanager
    def _wait(self, what: str) -> Iterator[None]:
        """Limit the time of the socket's calls within, and turn their errors into ours."""
        try:
            self._sock.settimeout(self.patience_s)
            yield
        except TimeoutError:
            raise StreamError(f"nothing moved for {self.patience_s:g} s, at {what}") from None
        except OSError as error:
            raise StreamError(f"the connection broke: {error.strerror}, at {what}") from None

    def send_bytes(self, data: bytes | bytearray, what: str) -> None:
        """Send all of it."""
        with self._wait(what):
            self._sock.sendall(data)

    def send(self, kind: Kind, number: int = 0, size: int = 0, payload: bytes = b"") -> None:
        """Send a frame; those with pages go in batches, since pages are small."""
        self._out += FRAME_HEAD.pack(kind.value, number, size)
        self._out += payload
        if kind is not Kind.PAGES or len(self._out) >= self.batch:
            out, self._out = self._out, bytearray()
            self.send_bytes(out, f"a {kind.name} frame")

    def receive_bytes(self, size: int, what: str) -> memoryview:
        """Receive exactly size bytes, at most MAX_CHUNK; valid until the next call."""
        view, have = self._buffer[:size], 0
        while have < size:
            with self._wait(what):
                n = self._sock.recv_into(view[have:])
            if not n:
                raise StreamError(f"the stream ended after {have} of {size} bytes of {what}")
            have += n
        return view

    def receive(self) -> Frame:
        """Receive a frame."""
        raw, number, size = FRAME_HEAD.unpack(
            self.receive_bytes(FRAME_HEAD.size, "a frame's header")
        )
        try:
            kind = Kind(raw)
        except ValueError:
            raise StreamError(f"the stream is damaged: no frame is called {raw!r}") from None
        if kind not in (Kind.PAGES, Kind.HASH):
            return Frame(kind, number, size, self._buffer[:0])
        if size > MAX_CHUNK:
            raise StreamError(f"the stream is damaged: a frame of {size} bytes")
        return Frame(kind, number, size, self.receive_bytes(size, f"a {kind.name} frame"))

    def expect(self, kind: Kind) -> Frame:
        """Receive a frame of one kind."""
        frame = self.receive()
        if frame.kind is not kind:
            raise StreamError(f"a {frame.kind.name} frame came where {kind.name} belongs")
        return frame

    def send_hello(self, rams: Sequence[GuestMemory]) -> None:
        """Say what RAM will come."""
        regions = b"".join(REGION.pack(ram.gpa, ram.size_bytes) for ram in rams)
        self.send_bytes(HELLO.pack(MAGIC, VERSION, len(rams), PAGE) + regions, "the hello")

    def receive_hello(self) -> list[tuple[int, int]]:
        """Receive the regions, as gpa and bytes."""
        hello = self.receive_bytes(HELLO.size, "the hello")
        magic, version, number, page = HELLO.unpack(hello)
        if magic != MAGIC or version != VERSION:
            raise StreamError(f"this is no stream of version {VERSION}: it begins {magic!r}")
        if page != PAGE:
            raise StreamError(f"the source has pages of {page} bytes, this kernel of {PAGE}")
        if not 0 < number <= MAX_REGIONS:
            raise StreamError(f"the stream is damaged: {number} regions of RAM")
        regions = self.receive_bytes(number * REGION.size, "the list of regions")
        return list(REGION.iter_unpack(regions))


def chunks(first: int, pages: int, step: int) -> Iterable[tuple[int, int]]:
    """Cut a run of pages into pieces of at most step bytes; yields byte offset and length."""
    end = (first + pages) * PAGE
    for offset in range(first * PAGE, end, step):
        yield offset, min(step, end - offset)


def sha256_of(rams: Iterable[GuestMemory]) -> bytes:
    """Hash all RAM, by ascending address."""
    digest = hashlib.sha256()
    for ram in sorted(rams, key=lambda ram: ram.gpa):
        for offset, length in chunks(0, ram.num_pages, MAX_CHUNK):
            digest.update(ram.read(offset, length))
    return digest.digest()


def receive_ram(stream: Stream, vm: VM) -> tuple[bytes, bytes]:
    """Be the destination; returns the SHA-256 of its RAM, and the source's."""
    rams = [vm.add_memory(gpa, size) for gpa, size in stream.receive_hello()]
    stream.patience_s += sum(ram.size_bytes for ram in rams) / HASH_RATE
    number = pages = 0
    while True:
        frame = stream.receive()
        if frame.kind is Kind.PAGES:
            store(rams, frame.number, frame.payload)
            pages += frame.size // PAGE
        elif frame.kind is Kind.END:
            if (frame.number, frame.size) != (number, pages):
                raise StreamError(
                    f"the stream is damaged: {pages} pages came in round {number}, the source "
                    f"says {frame.size} in round {frame.number}"
                )
            stream.send(Kind.ACK, number, pages)
            number, pages = number + 1, 0
        elif frame.kind is Kind.HASH:
            theirs, own = bytes(frame.payload), sha256_of(rams)
            stream.send(Kind.HASH, size=len(own), payload=own)
            return own, theirs
        elif frame.kind is not Kind.STOPPED:
            raise StreamError(f"a {frame.kind.name} frame came, which only the source receives")


def store(rams: Sequence[GuestMemory], gpa: int, data: memoryview) -> None:
    """Put pages where they belong, which must be RAM throughout."""
    for ram in rams:
        if ram.gpa <= gpa and gpa + len(data) <= ram.gpa + ram.size_bytes:
            if gpa % PAGE or len(data) % PAGE or not data:
                break
            ram.write(gpa - ram.gpa, data)
            return
    raise StreamError(f"the stream is damaged: {len(data)} bytes at {gpa:#x} are no pages of RAM")


def address_of(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Return a socket's family and address."""
    if "/" in text:
        return socket.AF_UNIX, text
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f"{text!r} is neither HOST:PORT nor the path of a socket, with a /")
    return socket.AF_INET, (host, int(port))


def connect(text: str, timeout_s: float) -> socket.socket:
    """Connect to the destination, which may come up a little later."""
    family, where = address_of(text)
    limit = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(family)
        try:
            sock.settimeout(timeout_s)
            sock.connect(where)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() > limit:
                raise StreamError(f"no destination at {text}: {error.strerror}") from None
            time.sleep(0.05)
