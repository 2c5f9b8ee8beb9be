"""The peers' training steps, each of which runs in a process and an environment of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcsae.benchmarks.training.common import Case, K

PEER = Path(__file__).parents[1] / "peers" / "train_peers.py"


@contextmanager
def peers(python: str | None, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Case]]:
    """The peers' steps, each of which runs in the other process; none where there is no ``python``."""
    if python is None:
        print("peers: n/a, no --peers-python was given")
        yield {}
        return
    asked = {name: getattr(options, name) for name in ("d_model", "features", "batch", "threads")} | {"k": K}
    with (folder / "peers.err").open("w") as errors:
        process = subprocess.Popen(
            [python, "-P", str(PEER), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def step(name: str) -> float:
        requests.write(name + "\n")
        return float(answers.readline())

    try:
        found = json.loads(answers.readline())
        print("peers: " + ", ".join(f"{name} {version}" for name, version in found["ready"].items()))
        for name, reason in found["missing"].items():
            print(f"  {name}: n/a, {reason}")
        yield {name: (lambda name=name: step(name)) for name in found["steps"]}
    finally:
        requests.close()
        process.wait()
