"""`minillm doctor`: what is installed, what is active, and whether each fast path is right and fast on this machine.

Reading order: checks, kernels, machine, examination, tables. A new kernel adds a `Check` to `checks.CHECKS`.
"""

from minillm.doctor.examination import Examination, examine
from minillm.doctor.tables import describe

__all__ = ["Examination", "describe", "examine"]
