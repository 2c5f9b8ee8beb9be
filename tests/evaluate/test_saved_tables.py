"""Tables read back, whole, in part or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tcsae.evaluate.saved_tables import read_table, write_table
from tcsae.store.errors import RunError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "table.parquet"
    write_table(pa.table({"a": np.random.default_rng(0).normal(size=5000), "b": np.arange(5000)}), path)
    return path


def test_of_the_columns_asked_for_those_come_back_that_are_there(path: Path) -> None:
    assert read_table(path).column_names == ["a", "b"]
    assert read_table(path, ["b", "c"]).column_names == ["b"]


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _one_bit_of_a_value(content: bytes) -> bytes:
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _no_head_of_a_page(content: bytes) -> bytes:
    return content[:4] + bytes(byte ^ 0xFF for byte in content[4:200]) + content[200:]


@pytest.mark.parametrize("damage", [_half, _one_bit_of_a_value, _no_head_of_a_page, lambda _: b""])
def test_a_damaged_file_is_named_in_one_line(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"table\.parquet: not a table that tcsae wrote .*; delete it"):
        read_table(path)


def test_what_the_system_refuses_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "absent.parquet")
