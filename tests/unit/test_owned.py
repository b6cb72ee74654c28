"""Owned, the base of every handle: open, closed, `with`, dropped, copied, forked.

What is owned here is a list that records when it goes, so no device is needed. Every public
method of the real handles, called after close(), is in tests/kvm.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from typing import TYPE_CHECKING

import pytest

from kvmring import ClosedError, ForkedError
from kvmring.owned import Owned

from .synthetic import SyntheticRing

if TYPE_CHECKING:
    from collections.abc import Callable


class Thing:
    """What is owned: dies visibly."""


class Holder(Owned[Thing]):
    """The smallest handle."""

    __slots__ = ()

    def _about(self) -> str:
        return "holding"

    def use(self) -> Thing:
        return self.handle


class Foreign(Holder):
    """A handle that cannot even describe itself, as after fork()."""

    __slots__ = ()

    def _about(self) -> str:
        raise ForkedError("made by another process")


class Refused(Holder):
    """A handle whose making fails before there is anything to own."""

    __slots__ = ()

    def __init__(self) -> None:
        raise ValueError("refused")


def test_open_then_closed() -> None:
    thing = Thing()
    holder = Holder(thing)
    assert not holder.closed
    assert holder.handle is holder.use() is thing
    assert repr(holder) == "<Holder holding>"
    holder.close()
    assert holder.closed
    assert repr(holder) == "<Holder closed>"
    for use in (lambda: holder.handle, holder.use, holder.__enter__):
        with pytest.raises(ClosedError, match=r"^Holder is closed$"):
            use()
    holder.close()
    assert holder.closed


def test_close_lets_go_of_what_is_owned() -> None:
    thing = Thing()
    gone = weakref.ref(thing)
    holder = Holder(thing)
    del thing
    assert gone() is not None
    holder.close()
    assert gone() is None


def test_a_call_under_way_keeps_what_it_uses() -> None:
    thing = Thing()
    gone = weakref.ref(thing)
    holder = Holder(thing)
    del thing
    entered, leave = threading.Event(), threading.Event()

    def call(handle: Thing) -> None:  # as C is called: with the owner as an argument
        entered.set()
        leave.wait(60)
        assert handle is not None

    thread = threading.Thread(target=lambda: call(holder.handle))
    thread.start()
    entered.wait(60)
    holder.close()  # does not block
    assert gone() is not None
    leave.set()
    thread.join()
    assert gone() is None


def test_with_closes() -> None:
    with Holder(Thing()) as holder:
        assert not holder.closed
    assert holder.closed
    with pytest.raises(ClosedError), holder:
        pytest.fail("entered a closed handle")


def test_with_closes_after_an_error_and_lets_it_pass() -> None:
    holder = Holder(Thing())
    with pytest.raises(KeyError, match="mine"), holder:
        raise KeyError("mine")
    assert holder.closed


def test_close_within_with_is_fine() -> None:
    with Holder(Thing()) as holder:
        holder.close()
    assert holder.closed


def test_dropped_unclosed_is_reported_with_its_name() -> None:
    gone = weakref.ref(thing := Thing())
    holder = Holder(thing)
    del thing
    with pytest.warns(ResourceWarning, match=r"unclosed <Holder holding>"):
        del holder
    assert gone() is None


def test_dropped_in_a_cycle_is_reported() -> None:
    class Cyclic(Holder):
        __slots__ = ("me",)

        def __init__(self) -> None:
            super().__init__(Thing())
            self.me = self

    Cyclic()
    with pytest.warns(ResourceWarning, match="unclosed <Cyclic holding>"):
        gc.collect()


def test_closed_is_not_reported() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        holder = Holder(Thing())
        holder.close()
        del holder
        gc.collect()
    assert seen == []


def test_what_was_never_made_is_not_reported() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="refused"):
            Refused()
        gc.collect()
    assert seen == []


def test_repr_of_a_foreign_handle_does_not_raise() -> None:
    foreign = Foreign(Thing())
    assert repr(foreign) == "<Foreign of another process>"
    with pytest.warns(ResourceWarning, match="unclosed <Foreign of another process>"):
        del foreign


@pytest.mark.parametrize(
    "function", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"]
)
def test_handles_cannot_be_copied(function: Callable[[object], object]) -> None:
    with Holder(Thing()) as holder, pytest.raises(TypeError, match="Holder cannot be copied"):
        function(holder)
    with SyntheticRing() as ring, pytest.raises(TypeError, match="DirtyRing cannot be copied"):
        function(ring.ring)


def test_handles_have_no_dict() -> None:
    with Holder(Thing()) as holder, pytest.raises(AttributeError):
        holder.extra = 1  # type: ignore[attr-defined]


def test_an_unclosed_ring_is_reported_and_freed() -> None:
    ring = SyntheticRing()
    with pytest.warns(ResourceWarning, match="unclosed <DirtyRing 256 entries>"):
        del ring  # that C has freed it is what conftest.py looks at
