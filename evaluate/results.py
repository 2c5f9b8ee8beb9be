"""The files of a suite's result, for an SAE and for what is measured beside SAEs alike."""

from __future__ import annotations

import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tcsae.evaluate.bench import About, Measured
from tcsae.evaluate.config import Suite
from tcsae.evaluate.estimates import SuiteResult, read_result, write_result
from tcsae.evaluate.saved_tables import read_table, write_table
from tcsae.evaluate.subjects import Subject

TABLED: Suite = "temporal"
"""The suite that has a table of features beside its figures"""


def paths_of(out: Path, suite: Suite, name: str) -> tuple[Path, Path]:
    """The JSON file and the draws of one result in the evaluation folder ``out``."""
    return out / suite / f"{name}.json", out / "draws" / suite / f"{name}.parquet"


def features_path(out: Path, name: str) -> Path:
    """The table of features of what is called ``name`` in the evaluation folder ``out``."""
    return out / "features" / f"{name}.parquet"


def kept_result(out: Path, suite: Suite, name: str, wanted: str) -> SuiteResult | None:
    """The finished result with fingerprint ``wanted``, None if any of its files is not there or of other settings.

    Raises
    ------
    RunError
        a file is there, but it cannot be read
    """
    found = read_result(*paths_of(out, suite, name), wanted)
    if found is None or suite != TABLED:
        return found
    table = features_path(out, name)
    if not table.is_file():
        return None
    read_table(table)
    return found


def write_measured(out: Path, suite: Suite, name: str, measured: Measured, of: dict[str, Any]) -> None:
    """A result's files, the JSON last: where it is, the result is whole.

    Parameters
    ----------
    out
        the evaluation folder
    suite, name
        name the files
    measured
        what they hold, in SAEBench's envelope with all of its keys
    of
        the envelope's fields about what was measured: `fields_of_sae` or `fields_of_reference`
    """
    if measured.features is not None:
        write_table(measured.features, features_path(out, name))
    envelope = {
        "eval_type_id": measured.kind,
        "eval_config": measured.settings,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": measured.metrics,
        "eval_result_details": measured.details,
        "sae_bench_commit_hash": f"tcsae {version('tcsae')}",
        "sae_lens_id": "custom_sae",
        **of,
    }
    write_result(*paths_of(out, suite, name), envelope, measured.result)


def fields_of_sae(one: Subject, about: About) -> dict[str, Any]:
    """SAEBench's fields about an SAE."""
    sae = one.sae
    return {
        "sae_lens_release_id": one.name,
        "sae_lens_version": str(sae.metadata.get("sae_lens_version") or "unknown"),
        "sae_cfg_dict": {
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "model_name": about.model,
            "hook_name": one.hook,
            "context_size": about.context_length,
            "prepend_bos": about.has_bos,
            "dtype": "float32",
            "k": sae.k,
            "block_size": sae.block_size,
        },
    }


def fields_of_reference(description: str) -> dict[str, Any]:
    """The same fields about what is no SAE."""
    return {
        "sae_lens_release_id": f"reference: {description}",
        "sae_lens_version": "unknown",
        "sae_cfg_dict": {},
    }
