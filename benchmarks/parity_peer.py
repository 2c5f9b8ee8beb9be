"""SAEBench's own figures for `parity`, from a process in an environment of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

PEER = Path(__file__).parent / "peers" / "saebench_core.py"

OTHER_PRODUCTS = {"MKL_CBWR": "COMPATIBLE"}
"""environment in which PyTorch's matrix products use other instructions: the sums of another machine"""


def saebench_figures(
    python: str, asked: dict[str, Any], environment: dict[str, str], *, reuses: bool
) -> dict[str, Any]:
    """What `PEER` writes when it is ``asked``; with ``reuses`` what it wrote before. RuntimeError if it fails."""
    Path(asked["seen"]).mkdir(exist_ok=True)
    written = Path(asked["out"])
    if not (reuses and written.is_file()):
        command = [python, "-P", str(PEER), json.dumps(asked)]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | environment
        )
        if ran.returncode:
            raise RuntimeError("SAEBench failed: " + "\n".join(ran.stderr.splitlines()[-15:]))
    figures: dict[str, Any] = json.loads(written.read_text())
    return figures


def as_a_result(theirs: dict[str, Any]) -> dict[str, Any]:
    """SAEBench's figures in the shape of our result's file."""
    columns = theirs["features"]
    lines = zip(*columns.values(), strict=True)
    return {
        "eval_result_metrics": theirs["metrics"],
        "eval_result_details": [
            {name: value if math.isfinite(value) else -1 for name, value in zip(columns, line, strict=True)}
            for line in lines
        ],
    }
