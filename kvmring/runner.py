"""Threads: Runner, one per vCPU that keeps it in the guest, and Reaper, which empties rings.

A full ring is served by the thread that met it, at once; other exits go to a callback. Pause,
resume and stop are race-free: a thread is either inside a run that a kick ends, or it looks at
the flags before its next one.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from kvmring.abi import Exit, ExitReason
from kvmring.errors import ClosedError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from kvmring.vcpu import VCPU

    ExitHandler = Callable[[VCPU, Exit], bool]
    FullHandler = Callable[[VCPU], None]
    VcpuRunner = Callable[[VCPU], Exit]

__all__ = ["Reaper", "Runner"]


class Runner:
    """Threads that run vCPUs.

    Args:
        vcpus: The vCPUs, each of which gets a thread. Nobody else may run them meanwhile.
        on_exit: Called in the vCPU's thread for every exit but a full ring and an
            interruption; true: go on, false: this vCPU is done and its thread ends.
        on_full: Called in the vCPU's thread when its ring is full; usually the Tracker's
            serve(). Without it a full ring goes to on_exit.

    An exception of a callback, or of the run, ends that thread; join() and stop() raise it.

    Attributes:
        run_vcpu: What runs a vCPU once; usually VCPU.run(), or the Tracker's, which serves most
            full rings by itself.
    """

    def __init__(
        self,
        vcpus: Sequence[VCPU],
        on_exit: ExitHandler,
        *,
        on_full: FullHandler | None = None,
    ) -> None:
        self.vcpus = tuple(vcpus)
        self.on_full = on_full
        self.run_vcpu: VcpuRunner = lambda vcpu: vcpu.run()
        self._on_exit = on_exit
        self._change = threading.Condition()
        self._paused = self._stopping = False
        self._parked: set[int] = set()  # positions whose thread waits for resume()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._loop, args=(i, vcpu), name=f"vcpu-{vcpu.id}", daemon=True)
            for i, vcpu in enumerate(self.vcpus)
        ]
        self._started = False

    def start(self) -> None:
        """Start the threads."""
        if self._started:
            raise StateError("a Runner runs once; make a new one")
        self._started = True
        for thread in self._threads:
            thread.start()

    def _loop(self, position: int, vcpu: VCPU) -> None:
        try:
            while self._may_run(position) and self._one_run(vcpu):
                pass
        except BaseException as error:
            with self._change:
                self._errors.append(error)
        finally:
            with self._change:
                self._parked.add(position)  # for good
                self._change.notify_all()

    def _may_run(self, position: int) -> bool:
        """Wait while paused; false when stopping."""
        # Unlocked first: a flag that is set after this look is followed by a kick.
        if not (self._paused or self._stopping):
            return True
        with self._change:
            self._parked.add(position)
            self._change.notify_all()
            self._change.wait_for(lambda: self._stopping or not self._paused)
            if self._stopping:
                return False
            self._parked.discard(position)
            return True

    def _one_run(self, vcpu: VCPU) -> bool:
        exit = self.run_vcpu(vcpu)
        if exit.reason is ExitReason.DIRTY_RING_FULL and self.on_full is not None:
            self.on_full(vcpu)
            return True
        if exit.reason is ExitReason.INTR:
            return True
        return self._on_exit(vcpu, exit)

    @property
    def paused(self) -> bool:
        """Whether every thread is outside the guest, and stays there until resume()."""
        with self._change:
            return (self._paused or self._stopping) and self._all_parked()

    @property
    def running(self) -> bool:
        """Whether any thread is alive."""
        return any(thread.is_alive() for thread in self._threads)

    def _all_parked(self) -> bool:
        return not self._started or len(self._parked) == len(self._threads)

    def _halt(self) -> None:
        """Kick every vCPU and wait until its thread is parked, or has ended."""
        for vcpu, thread in zip(self.vcpus, self._threads, strict=True):
            if thread.is_alive():
                with suppress(ClosedError):  # its next run says so, in its own thread
                    vcpu.kick()
        with self._change:
            self._change.wait_for(self._all_parked)

    def pause(self) -> None:
        """Bring every vCPU out of the guest, and keep it out; returns when all are."""
        if threading.current_thread() in self._threads:
            raise StateError("a vCPU's own thread cannot wait for itself to pause")
        with self._change:
            self._paused = True
        self._halt()

    def resume(self) -> None:
        """Let the vCPUs run again."""
        with self._change:
            self._paused = False
            self._change.notify_all()

    def kick(self) -> None:
        """Make every vCPU leave the guest once."""
        for vcpu in self.vcpus:
            vcpu.kick()

    def stop(self) -> None:
        """End all threads, and raise what the first of them that failed raised."""
        if threading.current_thread() in self._threads:
            raise StateError("a vCPU's own thread cannot stop the Runner; return false instead")
        with self._change:
            self._stopping = True
            self._change.notify_all()
        if self._started:
            self._halt()
        self.join()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until all threads have ended by themselves; false when the time is up.

        Raises:
            BaseException: What the first thread that failed raised.
        """
        if self._started:
            for thread in self._threads:
                thread.join(timeout_s)
        with self._change:
            if self._errors:
                raise self._errors[0]
        return not self.running

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
            return
        try:
            self.stop()
        except BaseException as other:
            if error is not None:
                error.add_note(f"a vCPU's thread had failed too: {other!r}")


class Reaper:
    """A thread that calls a function at intervals, until it answers false or the context ends.

    An error of the function is raised at the end of the context. Made by Tracker.reaper().
    """

    def __init__(self, reap: Callable[[], bool], interval_s: float) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s must be positive, not {interval_s}")
        self._reap = reap
        self._interval = interval_s
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="reaper", daemon=True)

    def _loop(self) -> None:
        try:
            while not self._end.wait(self._interval) and self._reap():
                pass
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
