"""Silence for what other libraries print while they load a model, so that stderr holds our lines only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars, log lines below ERROR and warnings of transformers and TransformerLens."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    verbosity = hf_logging.get_verbosity()
    root_level = logging.root.level
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    # TransformerLens logs through the root logger.
    logging.root.setLevel(max(root_level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(root_level)
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()
