"""The one type of csrc/buffer.c, for type checkers."""

class Buffer:
    """Base of classes that define __buffer__, on Python 3.11."""
