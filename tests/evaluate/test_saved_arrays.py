"""Arrays and a text as the bytes of one file."""

from __future__ import annotations

import numpy as np
import pytest

from tcsae.evaluate.saved_arrays import arrays_from_bytes, bytes_of_arrays


def test_arrays_come_back_with_their_shapes_and_may_be_changed() -> None:
    given = {
        "number": np.array(5),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3)),
        "one/in/a/folder": np.arange(3),
    }
    found, text = arrays_from_bytes(bytes_of_arrays(given, '["é"]'))
    assert text == '["é"]'
    assert found.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    found["number"] += 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", bytes_of_arrays({"a": np.ones(9)}, "")[:-1]])
def test_what_is_not_whole_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="not what tcsae wrote"):
        arrays_from_bytes(content)
