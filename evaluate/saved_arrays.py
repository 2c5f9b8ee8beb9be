"""Named arrays and a text as the bytes of one file: work that is kept until it is finished.

Not an ``.npz``: a Ctrl-C that arrives while one is written leaves an archive that cannot be closed, and the
error of that takes the interruption's place. These bytes come out of one call of a library, in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

_TEXT = "_text"
"""Name of the array that holds the text."""


def bytes_of_arrays(arrays: Mapping[str, np.ndarray], text: str) -> bytes:
    """``arrays`` and ``text``, for `arrays_from_bytes`."""
    # its bytes are taken as they lie in memory
    ordered = {name: array.copy(order="C") for name, array in arrays.items()}
    found: bytes = save({**ordered, _TEXT: np.frombuffer(text.encode(), dtype=np.uint8)})
    return found


def arrays_from_bytes(content: bytes) -> tuple[dict[str, np.ndarray], str]:
    """What `bytes_of_arrays` was given; ValueError if ``content`` did not come from it whole."""
    try:
        arrays = load(content)
        text = arrays.pop(_TEXT).tobytes().decode()
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"not what tcsae wrote ({error})") from error
    return arrays, text
