"""The run folder: what is in it, who may write to it, and what a run has come to.

config.toml           the whole configuration, as used
run.json              store, versions, seeds, status
metrics.parquet       every logged term (tcsae.train.metrics)
machine.parquet       tokens per second and memory
checkpoints/          the newest two
sae/<arm>-s<seed>/    SAELens' format
training_metrics.png
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tcsae.store import ActivationStore
from tcsae.store.atomic import PARTIAL, exclusive, remove_partials, write_atomically
from tcsae.store.errors import RunBusy, RunError, RunExists, RunMismatch, RunNotFound
from tcsae.train.config import TrainConfig
from tcsae.train.metrics import METRICS_FILE
from tcsae.train.settings import differences, load_config, to_toml

Status = Literal["running", "interrupted", "collapsed", "finished"]

CONFIG_FILE = "config.toml"
RUN_FILE = "run.json"
FIGURE_FILE = "training_metrics.png"
SAE_FOLDER = "sae"
LOCK_FILE = ".lock"

_PACKAGES = ("tcsae", "torch", "numpy", "pyarrow", "safetensors", "zarr")


@dataclass(frozen=True, slots=True)
class Run:
    """A training run on disk, as it was when it was opened."""

    path: Path
    """the run folder"""
    status: Status
    """what it has come to; "running" also if its process was killed"""
    step: int
    """steps done when the status was written"""
    steps: int
    """of the whole run"""
    saes: list[Path]
    """folders of the trained SAEs: arm by arm in the configuration's order, each seed by seed"""
    metrics: Path
    """metrics.parquet"""
    figure: Path
    """training_metrics.png"""

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at ``path``, finished or not; raises `RunNotFound` if there is none."""
        path = Path(path)
        facts = run_facts(path)
        folders = [path / SAE_FOLDER / f"{arm}-s{seed}" for arm in facts["arms"] for seed in facts["seeds"]]
        return cls(
            path=path,
            status=facts["status"],
            step=facts["step"],
            steps=facts["steps"],
            saes=[folder for folder in folders if folder.is_dir()],
            metrics=path / METRICS_FILE,
            figure=path / FIGURE_FILE,
        )


def run_facts(path: Path) -> dict[str, Any]:
    """What run.json says.

    Raises
    ------
    RunNotFound
        there is no run at ``path``
    RunError
        the file is damaged
    """
    try:
        facts: dict[str, Any] = json.loads((path / RUN_FILE).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFound(
            f"{path}: no training run there; start one with `tcsae train STORE {path} --recipe NAME`"
        ) from None
    except ValueError as error:
        raise RunError(f"{path / RUN_FILE}: not JSON ({error}); train the run again") from error
    return facts


def own_config(path: Path) -> TrainConfig:
    """The configuration that the run at ``path`` was begun with; raises what `run_facts` does."""
    run_facts(path)
    return load_config(path / CONFIG_FILE)


@contextmanager
def writing(path: Path, store: ActivationStore, config: TrainConfig, *, resume: bool) -> Iterator[None]:
    """Hold the run folder's lock for the block, with its configuration and status on disk.

    Raises
    ------
    RunExists
        there is something at ``path`` and ``resume`` is false
    RunNotFound
        there is no run at ``path`` and ``resume`` is true
    RunMismatch
        the run was begun with another store or configuration; every field that differs is named
    RunBusy
        another process is writing to it
    """
    if resume:
        _check_same(path, store, config)
    elif path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= _planned_names(path)):
        begun = (path / RUN_FILE).exists()
        raise RunExists(
            f"{path}: already holds {'a run; add --resume to go on with it' if begun else 'something else'}"
            f"{', or' if begun else ';'} choose another path"
        )
    busy = RunBusy(f"{path}: another process is writing to this run; wait for it or stop it")
    with exclusive(path / LOCK_FILE, busy):
        remove_partials(path)
        if not resume:
            # The status comes last: a folder without it is not a run yet.
            write_atomically(path / CONFIG_FILE, to_toml(config).encode())
            set_status(path, store, config, "running", 0)
        yield


def _planned_names(path: Path) -> set[str]:
    """What a run that was killed before it began may leave."""
    return {LOCK_FILE, CONFIG_FILE} | {p.name for p in path.glob(f"*{PARTIAL}")}


def set_status(path: Path, store: ActivationStore, config: TrainConfig, status: Status, step: int) -> None:
    """Write run.json."""
    facts = {
        "format_version": 1,
        "status": status,
        "step": step,
        "steps": config.steps,
        "tokens": config.steps * config.batch_tokens,
        "arms": [arm.name for arm in config.arms],
        "seeds": list(config.seeds),
        "store": {
            "id": store.id,
            "path": store.url,
            "hook": config.hook or store.hooks[0],
            "model": store.provenance.model,
            "model_sha256": store.provenance.model_sha256,
            "corpus": store.provenance.corpus,
        },
        "versions": {name: version(name) for name in _PACKAGES},
    }
    write_atomically(path / RUN_FILE, (json.dumps(facts, indent=1) + "\n").encode())


def _check_same(path: Path, store: ActivationStore, config: TrainConfig) -> None:
    begun_store = run_facts(path)["store"]
    if begun_store["id"] != store.id:
        raise RunMismatch(
            f"{path}: begun with store {begun_store['id']} ({begun_store['path']}), now {store.id} "
            f"({store.url}); resume with the first or choose another path"
        )
    differing = differences(load_config(path / CONFIG_FILE), config)
    if differing:
        raise RunMismatch(
            f"{path}: begun with other settings: {'; '.join(differing)}; resume with the first ones or "
            "choose another path"
        )
