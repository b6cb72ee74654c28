"""The commands' faces, one module each: add_arguments(parser), and run(args) -> exit status.

cli.py imports the one that was asked for. What they share is in output.py.
"""

__all__ = ["DONE", "FAILED", "INTERRUPTED", "MISSING", "USAGE"]

DONE, FAILED, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
