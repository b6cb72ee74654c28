"""Owned: the base of every handle. One C owner, one closed state, `with`, repr.

close() forgets the owner and no more: a call that is under way in another thread keeps its
own reference, and what is owned goes when that call is done. Any later use is ClosedError.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Generic, NoReturn, Self, TypeVar

from kvmring.errors import ClosedError, ForkedError

if TYPE_CHECKING:
    from types import TracebackType

H = TypeVar("H")


class Owned(Generic[H]):
    """A handle: open until close(), or the end of its `with` block.

    Closing a handle closes what was made from it. A handle that is never closed is
    reported by ResourceWarning.
    """

    __slots__ = ("__weakref__", "_handle")
    _handle: H | None

    def __init__(self, handle: H) -> None:
        self._handle = handle

    @property
    def handle(self) -> H:
        """The C owner, for kvmring.ioctls; pass it on, do not keep it."""
        handle = self._handle
        if handle is None:
            raise ClosedError(f"{type(self).__name__} is closed")
        return handle

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._handle is None

    def close(self) -> None:
        """Close the handle, and those made from it. Never blocks; may be repeated."""
        self._handle = None

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed before there was anything to close
        if getattr(self, "_handle", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._handle = None

    def __repr__(self) -> str:
        try:
            about = "closed" if self._handle is None else self._about()
        except ForkedError:
            about = "of another process"
        return f"<{type(self).__name__} {about}>"

    def _about(self) -> str:
        """Say in a few words which one this is, for repr."""
        return "open"

    def _require_open(self) -> None:
        if self._handle is None:
            raise ClosedError(f"{type(self).__name__} is closed")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: it owns kernel state")
