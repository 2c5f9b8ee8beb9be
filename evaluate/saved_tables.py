"""Tables of an evaluation as files: written whole, with checksums, and what is said of a file that is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tcsae.store.atomic import partial_file
from tcsae.store.errors import RunError


def write_table(table: pa.Table, path: Path) -> None:
    """Write ``table`` as Parquet, whole or not at all."""
    with partial_file(path) as beside:
        pq.write_table(table, beside, compression="zstd", write_page_checksum=True)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The Parquet file at ``path``, of ``columns`` those that it has.

    Raises
    ------
    RunError
        it is no such file, or damaged
    """
    try:
        if columns is not None:
            known = pq.read_schema(path).names
            columns = [name for name in columns if name in known]
        return pq.read_table(path, columns=columns, memory_map=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        # what the system refuses has a number or a kind; what Arrow cannot make out is an OSError with neither
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        reason = " ".join(str(error).split())
        raise RunError(
            f"{path}: not a table that tcsae wrote ({reason}); delete it and evaluate again"
        ) from error
