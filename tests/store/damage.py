"""Ways to damage a store on disk, that several tests use."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HOOK = "blocks.0.hook_resid_post"
"""the hook of the stores that are damaged"""


def chunk(store: Path, number: int) -> Path:
    """File of a chunk."""
    return store / "activations" / HOOK / "c" / str(number) / "0"


def flip(path: Path, byte: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def swap(store: Path) -> None:
    """Let the first two chunks change their places."""
    first, second = chunk(store, 0).read_bytes(), chunk(store, 1).read_bytes()
    chunk(store, 0).write_bytes(second)
    chunk(store, 1).write_bytes(first)


def edit_root(store: Path, **changes: object) -> None:
    """Change attributes of the root group; None deletes one."""
    root = json.loads((store / "zarr.json").read_text())
    kept = root["attributes"] | changes
    root["attributes"] = {
        name: value for name, value in kept.items() if value is not None or name not in changes
    }
    (store / "zarr.json").write_text(json.dumps(root))


def edit_documents(store: Path, column: str, values: list) -> None:
    """Replace a column of the documents' table."""
    table = pq.read_table(store / "documents.parquet")
    at = table.column_names.index(column)
    kind = table.schema.field(column).type
    pq.write_table(table.set_column(at, column, pa.array(values, kind)), store / "documents.parquet")
