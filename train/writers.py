"""Copies of the lines of metrics.parquet for TensorBoard and Weights & Biases, as they are logged.

Both are optional (docs/decisions/006). Values that are nan do not apply to an arm and are left out. A resumed run goes
on in the same place, and the steps that it does again are there once.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tcsae.store.atomic import write_atomically
from tcsae.store.errors import ConfigError, UnknownName
from tcsae.train.config import TrainConfig


class Writer(ABC):
    """Takes every logged line of one run.

    Parameters
    ----------
    folder
        the run folder
    config
        what is trained
    done
        steps that are done and logged already, more than 0 when the run is resumed
    """

    @abstractmethod
    def __init__(self, folder: Path, config: TrainConfig, done: int) -> None: ...

    @abstractmethod
    def write(self, step: int, lines: Mapping[str, Mapping[str, Any]], machine: Mapping[str, float]) -> None:
        """The terms of each SAE by name after ``step`` steps, and the process' speed and memory."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is still in memory."""


class TensorBoard(Writer):
    """Event files in ``tensorboard/<arm>-s<seed>``, a scalar for each term; the machine's beside them.

    The folders are runs to TensorBoard, so it draws all SAEs of a term into one chart.
    """

    def __init__(self, folder: Path, config: TrainConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        names = [f"{arm.name}-s{seed}" for arm in config.arms for seed in config.seeds]
        self._of = {}
        for name in [*names, "machine"]:
            own = folder / "tensorboard" / name
            # From the first step that will come again, readers forget what an interrupted process wrote; one that
            # was killed before its first checkpoint has written too.
            self._of[name] = SummaryWriter(str(own), purge_step=done + 1 if own.exists() else None)

    def write(self, step: int, lines: Mapping[str, Mapping[str, Any]], machine: Mapping[str, float]) -> None:
        """One scalar for each finite term."""
        for name, values in (*lines.items(), ("machine", machine)):
            writer = self._of[name]
            for field, value in _finite(values):
                writer.add_scalar(field, value, step)
            writer.flush()

    def close(self) -> None:
        """Close the event files."""
        for writer in self._of.values():
            writer.close()


class WeightsAndBiases(Writer):
    """One run of Weights & Biases, its id and newest step kept in ``wandb.json``.

    Where it goes is the user's: WANDB_PROJECT (default tcsae), WANDB_MODE=offline, WANDB_ENTITY, `wandb login`.
    """

    def __init__(self, folder: Path, config: TrainConfig, done: int) -> None:
        import wandb

        del done  # the file knows better: a process may have been killed after its last checkpoint
        self._path = folder / "wandb.json"
        known = json.loads(self._path.read_text("utf-8")) if self._path.exists() else None
        self._id: str = known["id"] if known else secrets.token_hex(4)
        self._newest: int = known["step"] if known else 0
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tcsae"),
                name=folder.resolve().name,
                id=self._id,
                resume="allow",
                dir=str(folder),
                config=asdict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"--log wandb: {error}; `wandb login` first, or set WANDB_MODE=offline and sync later"
            ) from error

    def write(self, step: int, lines: Mapping[str, Mapping[str, Any]], machine: Mapping[str, float]) -> None:
        """One entry, its keys ``<arm>-s<seed>/<term>``; nothing for a step that is there already."""
        if step <= self._newest:
            return
        found = {
            f"{name}/{field}": value
            for name, values in (*lines.items(), ("machine", machine))
            for field, value in _finite(values)
        }
        self._run.log(found, step=step)
        self._newest = step
        write_atomically(self._path, (json.dumps({"id": self._id, "step": step}) + "\n").encode())

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


WRITERS: dict[str, type[Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_writers(names: Sequence[str]) -> None:
    """Refuse, before anything is begun, a writer that does not exist or whose package is not installed.

    >>> check_writers(["tensorbord"])
    Traceback (most recent call last):
        ...
    tcsae.store.errors.UnknownName: unknown writer 'tensorbord'; did you mean: tensorboard
    """
    for name in names:
        if name not in WRITERS:
            raise UnknownName.among("writer", name, WRITERS)
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ConfigError(
                f"--log {name}: the package {name} is not installed ({error}); pip install 'tcsae[{name}]'"
            ) from error


@contextmanager
def writers(names: Sequence[str], folder: Path, config: TrainConfig, done: int) -> Iterator[list[Writer]]:
    """The writers called ``names``, closed at the end of the block."""
    opened: list[Writer] = []
    try:
        for name in names:
            opened.append(WRITERS[name](folder, config, done))
        yield opened
    finally:
        for writer in opened:
            writer.close()


def _finite(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for field, value in values.items():
        if math.isfinite(value):
            yield field, float(value)
