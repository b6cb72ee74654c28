"""Built-in guests: small programs that dirty pages and know which.

PageWriter writes a list of pages that it is given, in order; page_order() makes such lists.
What it wrote is known from the list and a counter, never from a dirty log: it is the truth
that logs are compared with.
"""

from kvmring.guests.orders import ORDERS, page_order
from kvmring.guests.writer import PageWriter, Progress

__all__ = ["ORDERS", "PageWriter", "Progress", "page_order"]
