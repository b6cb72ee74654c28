"""What dirty logging costs on this host, measured beside the same work in C.

One module per group of figures; measure.py has the method, report.py the form in which every
group gives its figures. `kvmring bench` (commands/bench.py) is their face.
"""

__all__ = ["GROUPS"]

GROUPS = {
    "harvest": "nanoseconds per entry of a full ring",
    "cycle": "pages per second of run, harvest and reset",
    "calls": "microseconds per call, beside the bare ioctl",
    "bitmap": "what is done with a bitmap, in gigabytes per second",
    "modes": "what each way of logging costs the guest and its VMM",
    "scale": "many vCPUs, and large slots",
}
