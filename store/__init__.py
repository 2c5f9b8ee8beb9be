"""The activation store: token-ordered activations with document boundaries, in Zarr v3.

This package imports nothing else of tcsae.
"""

from tcsae.store.describe import Description, describe
from tcsae.store.layout import Layout
from tcsae.store.reader import ActivationStore
from tcsae.store.spec import HookStatistics, Provenance, split_of
from tcsae.store.writer import StoreWriter

__all__ = [
    "ActivationStore",
    "Description",
    "HookStatistics",
    "Layout",
    "Provenance",
    "StoreWriter",
    "describe",
    "split_of",
]
