"""What a run would take, without writing anything."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from statistics import median

from tcsae.store import ActivationStore
from tcsae.store.device import choose_device
from tcsae.train.config import SELECTING, TrainConfig
from tcsae.train.flop import Flop, flop_per_step
from tcsae.train.training import Training, peak_memory, timed_steps

TIMED_STEPS = 3


@dataclass(frozen=True, slots=True)
class DryRun:
    """Size and estimated cost of a run."""

    saes: list[str]
    """names of the SAEs that would be trained"""
    parameters: int
    """of all of them together"""
    steps: int
    tokens: int
    """that would be trained on: whole batches"""
    epochs: float
    """passes over the train split's windows"""
    memory_bytes: int
    """this process's peak after a few steps, which later ones do not exceed by much"""
    flop_per_step: dict[str, float]
    """of all SAEs together, by what it is spent on: dense, sparse, contrast (`tcsae.train.flop`)"""
    seconds_per_step: float
    seconds: float
    """of all steps; finishing adds a few seconds"""
    notes: list[str]
    """what the figures are not"""


def dry_run(store: ActivationStore, config: TrainConfig, *, device: str = "auto") -> DryRun:
    """Check ``config`` against ``store`` and time a few steps; writes nothing. Raises what `train` would."""
    training = Training(store, config, choose_device(device))
    with closing(training.loader):
        return _timed(training)


def _timed(training: Training) -> DryRun:
    """The figures of a training that has taken no step yet."""
    config, store = training.config, training.store
    seconds = median(timed_steps(training, TIMED_STEPS))
    tokens = config.steps * config.batch_tokens
    terms = training.step(detailed=False)
    flop = [flop_per_step(arm.config, config, store.d_model, terms[arm.name]["l0"]) for arm in training.arms]
    return DryRun(
        saes=[arm.name for arm in training.arms],
        parameters=sum(p.numel() for arm in training.arms for p in arm.sae.parameters()),
        steps=config.steps,
        tokens=tokens,
        epochs=tokens / training.loader.tokens_per_epoch,
        memory_bytes=peak_memory(),
        flop_per_step={name: sum(getattr(one, name) for one in flop) for name in Flop._fields},
        seconds_per_step=seconds,
        seconds=seconds * config.steps,
        notes=[
            f"{arm.name}: learns how sparse to be and was timed while its codes were dense; its time and sparse FLOP "
            "are upper bounds"
            for arm in config.arms
            if arm.architecture not in SELECTING
        ],
    )
