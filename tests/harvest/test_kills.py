"""SIGKILL at any moment, then resume: the same bytes as without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tcsae.tests.fixtures import hashes
from tcsae.tests.harvest import kills


@pytest.mark.parametrize(
    ("in_planning", "in_chunks", "in_finish"),
    [(1, 1, 1), pytest.param(6, 14, 6, marks=pytest.mark.slow)],
    ids=["three kills", "twenty-six kills"],
)
def test_a_store_killed_at_random_moments_and_resumed_has_the_same_bytes(
    in_planning: int, in_chunks: int, in_finish: int, neox_folder: Path, real_text: Path, tmp_path: Path
) -> None:
    seed = 3
    counts = [str(n) for n in (in_planning, in_chunks, in_finish)]
    command = [
        sys.executable,
        "-P",
        kills.__file__,
        str(tmp_path),
        str(neox_folder),
        str(real_text),
        str(seed),
    ]
    ended = subprocess.run(
        [*command, *counts],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line.split() for line in ended.stdout.splitlines()]
    phases = Counter(phase for phase, _ in lines)
    asked = in_planning + in_chunks + in_finish
    # A harvest may end before its kill, when another process takes the processor away from this one.
    assert phases, "no harvest was killed"
    if asked > 20:
        assert sum(phases.values()) >= 20, ended.stdout
        assert min(phases["planning"], phases["finish"]) >= 2, ended.stdout
        assert any(int(partial) for _, partial in lines), "no kill fell into the writing of a file"
    assert hashes(tmp_path / "killed.zarr") == hashes(tmp_path / "whole.zarr")
