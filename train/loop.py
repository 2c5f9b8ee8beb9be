"""Training a run: what is checked, written and resumed around the steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from tcsae.store import ActivationStore
from tcsae.store.device import choose_device
from tcsae.store.errors import ConfigError, Interrupted
from tcsae.store.interrupt import stop_on_signal
from tcsae.train.checkpoint import checkpoints, load_checkpoint
from tcsae.train.config import TrainConfig
from tcsae.train.run import Run, own_config, set_status, writing
from tcsae.train.training import Training
from tcsae.train.world import World, joined
from tcsae.train.writers import check_writers, writers

log = logging.getLogger(__name__)


def train(
    store: ActivationStore,
    run: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    log_to: Sequence[str] = (),
) -> Run:
    """Train every arm of ``config`` with every seed on ``store`` and write the run folder.

    Under torchrun the processes share out each batch; the run is the same but for rounding, and one that was
    begun by some number of processes can be gone on with by another. Rank 0 writes; an error of any rank is
    raised on all.

    Parameters
    ----------
    store
        activations; only the documents of its train split are read
    run
        folder that is made, or gone on with
    config
        arms, seeds, token budget; may be left out when resuming, which then takes the run's own
    resume
        go on from the newest checkpoint of a run that was begun with the same store and configuration: the
        result is, on the CPU, bit for bit that of an uninterrupted run on the same machine and number of
        threads. A finished run is returned as it is.
    device
        "auto" (a GPU if there is one), or a torch device
    log_to
        what gets every line of metrics.parquet as it is logged: "tensorboard", "wandb"
        (`tcsae.train.writers`); a part of the call, not of the configuration

    Returns
    -------
    the finished run: `Run.saes`, `Run.metrics`, `Run.figure`

    Raises
    ------
    ConfigError
        before the first step: a writer whose package is not installed, a schedule that the token budget
        cannot complete, a batch larger than the train split, a window longer than every context, a block with
        fewer features than it keeps, a contrast without a possible pair
    TrainingCollapsed
        a loss is not finite, no feature of a block is active, nearly all are dead for ``collapse_steps``
        steps, or a contrast has had no pair for as many
    Interrupted
        Ctrl-C or SIGTERM; the state is saved. A second Ctrl-C stops as soon as what is being read
        is there; the newest checkpoint is named
    RunExists, RunNotFound, RunMismatch, RunBusy
        see `tcsae.train.run.writing`
    WorkersLost
        under torchrun, another process has ended without a word; the newest checkpoint can be gone on with
    """
    check_writers(log_to)
    with joined(choose_device(device)) as (world, own_device):
        return _train(store, Path(run), config, resume, own_device, world, log_to)


def _train(
    store: ActivationStore,
    path: Path,
    config: TrainConfig | None,
    resume: bool,
    device: torch.device,
    world: World,
    log_to: Sequence[str],
) -> Run:
    if config is None:
        if not resume:
            raise ConfigError("config: a new run needs one; only --resume can do without")
        config = own_config(path)
    with world.together():
        training = Training(store, config, device, world)
    with ExitStack() as held:
        held.callback(training.loader.close)
        with world.together():
            if world.is_first:
                held.enter_context(writing(path, store, config, resume=resume))
        if resume and Run.open(path).status == "finished":
            log.info("%s: already finished", path)
            return Run.open(path)
        try:
            with world.together():
                saved = checkpoints(path)
                if saved:
                    training.restore(load_checkpoint(saved[-1]))
            _say_what_is_unusual(config, training.loader.tokens_per_epoch)
            with stop_on_signal(once=world.size == 1) as stop:
                training.set_status(path, "running")
                if world.is_first:
                    training.writers = held.enter_context(writers(log_to, path, config, training.done))
                training.run(path, stop)
                training.finish(path)
        except KeyboardInterrupt:
            newest = checkpoints(path)[-1:]
            set_status(path, store, config, "interrupted", training.done)
            raise Interrupted(
                f"{path}: stopped at once during step {training.done + 1}; "
                f"{f'the newest checkpoint is {newest[0]}' if newest else 'there is no checkpoint yet'}, go on "
                f"with `tcsae train {store.url} {path} --resume`"
            ) from None
        return Run.open(path)


def _say_what_is_unusual(config: TrainConfig, epoch: int) -> None:
    tokens = config.steps * config.batch_tokens
    if tokens > epoch:
        log.info("%d tokens are %.1f epochs of %d, each in a new order", tokens, tokens / epoch, epoch)
    for arm in config.arms:
        if arm.dead_after >= tokens:
            log.warning(
                "%s: dead_after = %d is not below the run's %d tokens: no feature will count as dead, so "
                "neither AuxK nor resampling will act",
                *(arm.name, arm.dead_after, tokens),
            )
