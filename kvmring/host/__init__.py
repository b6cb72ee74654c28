"""Other processes' VMs, seen from outside and read-only: host.vms(), RingObserver, RingEvents.

/proc says which processes hold VMs, where their dirty rings stand, and which threads run the
vCPUs. RingObserver follows a ring by copies of it; RingEvents records KVM's tracepoints. The
other process is never written to and never stopped, and none of its descriptors is kept.
"""

from typing import TYPE_CHECKING

from kvmring.lazy import lazy

if TYPE_CHECKING:
    from kvmring.host.events import EventKind, RingEvent, RingEvents
    from kvmring.host.observer import RingObserver, RingView
    from kvmring.host.processes import HostVcpu, Scan, VmProcess, inspect, scan, vms
    from kvmring.host.verdict import State, Verdict, judge
    from kvmring.host.watcher import RingFigures, Watcher

__all__ = [
    "EventKind",
    "HostVcpu",
    "RingEvent",
    "RingEvents",
    "RingFigures",
    "RingObserver",
    "RingView",
    "Scan",
    "State",
    "Verdict",
    "VmProcess",
    "Watcher",
    "inspect",
    "judge",
    "scan",
    "vms",
]

# imported when first used, as in the package itself: kvmring ps wants one of them
_HOME = {
    "EventKind": "events",
    "RingEvent": "events",
    "RingEvents": "events",
    "RingObserver": "observer",
    "RingView": "observer",
    "HostVcpu": "processes",
    "Scan": "processes",
    "VmProcess": "processes",
    "inspect": "processes",
    "scan": "processes",
    "vms": "processes",
    "State": "verdict",
    "Verdict": "verdict",
    "judge": "verdict",
    "RingFigures": "watcher",
    "Watcher": "watcher",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
