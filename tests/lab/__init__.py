"""The lab: emulated hosts with a stock kernel and a real /dev/kvm, on any machine.

Exports the Python interface, `Lab`, `LabResult`, `Outcome` and `LabError`;
`python -m tests.lab` is the command line. lab.py is the place to start reading.
"""

from .errors import LabError
from .lab import Lab, LabResult, Outcome

__all__ = ["Lab", "LabError", "LabResult", "Outcome"]
