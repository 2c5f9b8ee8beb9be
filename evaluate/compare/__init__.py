"""The pre-registered comparison of SAEs, from evaluation folders alone."""

from tcsae.evaluate.compare.run import Compared, compare

__all__ = ["Compared", "compare"]
