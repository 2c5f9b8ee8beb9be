"""The training loop: every arm and seed side by side in one pass over a store."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tcsae.store import ActivationStore
from tcsae.store.errors import ConfigError, Interrupted, RunMismatch, TrainingCollapsed
from tcsae.store.interrupt import Stop
from tcsae.store.progress import progress
from tcsae.store.spec import TORCH_DTYPES
from tcsae.train.arm import Arm, Surroundings
from tcsae.train.batches import Rows, WindowLoader
from tcsae.train.checkpoint import (
    Checkpoint,
    arm_tensors,
    as_bytes,
    as_tensor,
    checkpoint_step,
    checkpoints,
    restore_arms,
    save_checkpoint,
)
from tcsae.train.collapse import CollapseWatch, Watched
from tcsae.train.config import TrainConfig
from tcsae.train.median import SAMPLE_TOKENS, geometric_median
from tcsae.train.memory import check_memory, least_bytes
from tcsae.train.metrics import MACHINE, MACHINE_FILE, METRICS, METRICS_FILE, Log
from tcsae.train.pairs import NO_PAIRS, AskedPairs, Pairs, asked_pairs, sample_pairs
from tcsae.train.plots import plot_training
from tcsae.train.precision import compiled, dtype_for, float32_linear, linear_for
from tcsae.train.ring import Ring
from tcsae.train.run import FIGURE_FILE, SAE_FOLDER, Status, set_status
from tcsae.train.saelens import save_sae
from tcsae.train.schedule import check_schedule
from tcsae.train.temporal import check_data
from tcsae.train.window_reader import PAIRS, random_stream
from tcsae.train.world import ALONE, World
from tcsae.train.writers import Writer

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 16
"""batches of train tokens over which the final thresholds are a quantile"""


class Training:
    """The state of a run in memory; nothing on disk is touched before `run`."""

    def __init__(
        self, store: ActivationStore, config: TrainConfig, device: torch.device, world: World = ALONE
    ) -> None:
        self.store, self.config, self.world = store, config, world
        if config.steps == 0:
            raise ConfigError(
                f"tokens: {config.tokens} is less than one batch of {config.batch_tokens}; raise tokens or "
                "lower batch_tokens"
            )
        for arm in config.arms:
            check_schedule(arm, config.steps)
            arm.check_sizes(store.d_model)
        dtype = TORCH_DTYPES[store.provenance.dtype]
        check_memory(least_bytes(config, store.d_model, dtype, world.size), device)
        self.loader = WindowLoader(
            store,
            config.hook,
            window=config.window,
            batch_tokens=config.batch_tokens,
            seed=config.data_seed,
            min_position=config.min_position,
            device=device,
            world=world,
        )
        for arm in config.arms:
            check_data(arm, config, self.loader, str(store.url))
        self.arms = [
            Arm(arm, seed, store.d_model, device, world) for arm in config.arms for seed in config.seeds
        ]
        self._centre_decoders()
        takes_keys = any(arm.takes_keys(store.d_model) for arm in config.arms)
        self.feeds_ring = self.loader.most_eligible > 0 and takes_keys
        """whether some arm compares with the ring's items; it has no slots otherwise"""
        self.ring = Ring(config.ring_size if self.feeds_ring else 0, store.d_model, dtype, device)
        widest = max(arm.features(store.d_model) for arm in config.arms)
        linear = linear_for(config.precision, device)
        self.around = Surroundings(
            scaler=self.loader.scaler,
            ring=self.ring,
            linear=compiled(linear) if config.compile else linear,
            dtype=dtype_for(config.precision, device),
            buffer=torch.empty(config.batch_tokens // world.size * widest, device=device),
            steps=config.steps,
        )
        self.done = 0
        self.metrics, self.machine = Log(METRICS), Log(MACHINE)
        self.writers: list[Writer] = []
        """which also get every logged line; of several processes the first has some"""
        watched = {
            arm.name: Watched(
                {name: b.stop - b.start for name, b in zip(arm.sae.block_names, arm.sae.blocks, strict=True)},
                contrasts=arm.config.alpha > 0,
            )
            for arm in self.arms
        }
        self._watch = CollapseWatch(watched, config.collapse_steps)
        self._last_logged = (0, time.perf_counter())

    def run(self, folder: Path, stop: Stop) -> None:
        """All remaining steps, with a checkpoint after the last."""
        config = self.config
        total, done = config.steps * config.batch_tokens, self.done * config.batch_tokens
        with progress(total, "token", "train", done, is_shown=self.world.is_first) as bar:
            self._last_logged = (self.done, time.perf_counter())
            while self.done < config.steps:
                nth = self.done + 1
                detailed = nth == 1 or nth % config.log_every == 0 or nth == config.steps
                terms = self.step(detailed=detailed)
                self._check_collapse(folder, terms)
                if detailed:
                    bar.set_postfix_str(
                        summary([(arm.config.name, terms[arm.name]) for arm in self.arms]), refresh=False
                    )
                bar.update(config.batch_tokens)
                (stopping,) = self.world.totals(stop.requested is not None)
                if self.done % config.checkpoint_every == 0 or self.done == config.steps or stopping:
                    self.save(folder)
                if stopping and self.done < config.steps:
                    self.set_status(folder, "interrupted")
                    signal = stop.requested or "a signal to another of its processes"
                    raise Interrupted(
                        f"{folder}: stopped by {signal} after step {self.done} of "
                        f"{config.steps}; the state is saved, go on with "
                        f"`tcsae train {self.store.url} {folder} --resume`"
                    )

    def _warn(self) -> None:
        """Say of what has been trained to the end that it is worth nothing: nothing else would."""
        for line in self.metrics.last(len(self.arms)):
            if not line["fvu"] < 1:
                log.warning(
                    "%s-s%d: explained variance %.3f with %.2f active features per token in the last step, no better "
                    "than the activations' mean; raise tokens, or lower learning_rate or sparsity_weight",
                    *(line["arm"], line["seed"], 1 - line["fvu"], line["l0"]),
                )

    def step(self, *, detailed: bool) -> dict[str, dict[str, Any]]:
        """One step of every arm on the same batch; the terms of each by name, logged if ``detailed``."""
        config, step = self.config, self.done
        with self.world.together():
            batch = self.loader.next()
        if self.feeds_ring:
            self.loader.begin_ring_rows(step, config.ring_feed)
        terms, drawn = {}, self._pairs(batch, step, detailed=detailed)
        for arm in self.arms:
            pairs = drawn.get(asked_pairs(arm.config), NO_PAIRS)
            terms[arm.name] = arm.step(batch, pairs, self.around, step, detailed=detailed)
        if self.feeds_ring:
            # After the loss: no positive is among the keys of its own step.
            with self.world.together():
                self.feed(step, config.ring_feed)
        self.done += 1
        if detailed:
            self._log(terms)
        return terms

    def feed(self, step: int, n: int) -> None:
        """Push ``n`` random eligible activations of the train split into the ring.

        Fewer enter where more than a third of the positions are outliers or special tokens, none where no
        context reaches ``min_position``.
        """
        if self.loader.most_eligible:
            self.ring.push(*self.loader.ring_rows(step, n))

    def save(self, folder: Path) -> None:
        """Write metrics so far and a checkpoint; of several processes the first does."""
        with self.world.together():
            if self.world.is_first:
                self._save(folder)

    def set_status(self, folder: Path, status: Status) -> None:
        """Write run.json; of several processes the first does."""
        with self.world.together():
            if self.world.is_first:
                set_status(folder, self.store, self.config, status, self.done)

    def _check_weights(self) -> None:
        """Refuse to save what the last update has made useless: the terms only tell with the next batch."""
        for arm in self.arms:
            for name, weight in arm.sae.named_parameters():
                if not torch.isfinite(weight).all():
                    raise TrainingCollapsed(
                        f"{arm.name} collapsed at step {self.done}: {name} holds NaN or Inf; lower its "
                        "learning_rate, or set clip_norm"
                    )

    def _save(self, folder: Path) -> None:
        self._check_weights()
        self.metrics.write(folder / METRICS_FILE)
        self.machine.write(folder / MACHINE_FILE)
        tensors = arm_tensors(self.arms)
        tensors |= {f"ring/{name}": value for name, value in self.ring.state_dict().items()}
        tensors |= {
            "metrics": as_tensor(self.metrics.to_bytes()),
            "machine": as_tensor(self.machine.to_bytes()),
        }
        facts = {
            "store": self.store.id,
            "config": _as_json(self.config),
            "loader": self.loader.state_dict(),
            "watch": self._watch.lasting,
        }
        save_checkpoint(folder, self.done, facts, tensors)

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint; raises `RunMismatch` if it is of another store or configuration."""
        if saved.facts["store"] != self.store.id:
            raise RunMismatch(f"the checkpoint is of store {saved.facts['store']}, not of {self.store.id}")
        mine = _as_json(self.config)
        differing = [name for name, value in saved.facts["config"].items() if value != mine.get(name)]
        if differing:
            raise RunMismatch(f"the checkpoint was made with another {', '.join(differing)}")
        restore_arms(self.arms, saved.tensors)
        if self.feeds_ring:  # an older version saved one of full size in any case
            self.ring.load_state_dict(
                {n.removeprefix("ring/"): t for n, t in saved.tensors.items() if n.startswith("ring/")}
            )
        self.metrics.restore(as_bytes(saved.tensors["metrics"]))
        self.machine.restore(as_bytes(saved.tensors["machine"]))
        self.loader.load_state_dict(saved.facts["loader"])
        self._watch.lasting = saved.facts["watch"]
        self.done = saved.step

    def finish(self, folder: Path) -> None:
        """Calibrate the thresholds on train tokens, write the SAEs and the figure.

        Of several processes the first does, with what the others read of the batches.
        """
        calibration = []
        for _ in range(CALIBRATION_BATCHES):
            with self.world.together():
                batch = self.loader.next()
            calibration.append(self.world.gather(self._valid_rows(batch)))
        with self.world.together():
            if self.world.is_first:
                self._finish(folder, calibration)

    def _finish(self, folder: Path, calibration: list[Tensor]) -> None:
        for arm in self.arms:
            arm.take_average()
            arm.sae.world = ALONE
            # In float32 as the saved SAE, whatever the precision of the training.
            arm.sae.calibrate(calibration, float32_linear)
            sae = arm.sae.to_inference(self.loader.scaler, name=arm.name, metadata=self._metadata(arm))
            save_sae(sae, folder / SAE_FOLDER / arm.name)
        plot_training(folder / METRICS_FILE, folder / FIGURE_FILE, self.config)
        self._warn()
        set_status(folder, self.store, self.config, "finished", self.done)

    def _centre_decoders(self) -> None:
        """Let the decoder's bias of the arms that ask for it begin at the geometric median of a sample."""
        asking = [arm for arm in self.arms if arm.config.decoder_bias == "geometric_median"]
        if asking:
            median = geometric_median(self._valid_rows(self.loader.sample(SAMPLE_TOKENS)))
            for arm in asking:
                arm.begin_at(median)

    def _valid_rows(self, batch: Rows) -> Tensor:
        return batch.x[batch.valid]

    def _pairs(self, batch: Rows, step: int, *, detailed: bool = True) -> dict[AskedPairs, Pairs]:
        """Drawn once for all arms that ask for the same; every draw begins with the same stream."""
        asking = {asked_pairs(arm.config) for arm in self.arms if arm.takes_pairs(detailed=detailed)}
        if not asking:
            return {}
        token, document, eligible = (
            self.world.gather(torch.from_numpy(values)).numpy()
            for values in (batch.token, batch.document, batch.eligible)
        )
        drawn = {}
        for asked in asking:
            stream = random_stream(self.config.data_seed, PAIRS, step)
            drawn[asked] = sample_pairs(token, document, eligible, asked, stream)
        return drawn

    def _metadata(self, arm: Arm) -> dict[str, Any]:
        """What the SAE's cfg.json says of its origin: SAELens' fields, then ours."""
        made, config = self.store.provenance, self.config
        return {
            "model_name": made.model,
            "hook_name": config.hook or made.hooks[0],
            "context_size": made.context_length,
            "prepend_bos": made.bos_token_id is not None,
            "tcsae": {
                "arm": arm.config.name,
                "seed": arm.seed,
                "store": self.store.id,
                "model_sha256": made.model_sha256,
                "corpus": made.corpus,
                "scale": self.loader.scaler.scale,
                "steps": config.steps,
                "tokens": config.steps * config.batch_tokens,
                "recipe": asdict(arm.config),
            },
        }

    def _log(self, terms: dict[str, dict[str, Any]]) -> None:
        config = self.config
        for arm in self.arms:
            self.metrics.add(
                step=self.done,
                tokens=self.done * config.batch_tokens,
                epoch=self.loader.epoch,
                arm=arm.config.name,
                seed=arm.seed,
                **terms[arm.name],
            )
        (step, then), now = self._last_logged, time.perf_counter()
        machine = {
            "tokens_per_second": (self.done - step) * config.batch_tokens / (now - then),
            "memory_bytes": peak_memory(),
        }
        self.machine.add(step=self.done, **machine)
        for writer in self.writers:
            writer.write(self.done, terms, machine)
        self._last_logged = (self.done, now)

    def _check_collapse(self, folder: Path, terms: dict[str, dict[str, Any]]) -> None:
        problem = self._watch.problem(terms, self.done)
        if problem is None:
            return
        with self.world.together():
            if self.world.is_first:
                self.metrics.write(folder / METRICS_FILE)
                set_status(folder, self.store, self.config, "collapsed", self.done)
        began = self.done - max(1, *self._watch.lasting.values(), 0)
        saved = checkpoints(folder)
        good = [path for path in saved if checkpoint_step(path) <= began]
        last = "every checkpoint left is from after it began" if saved else "there is no checkpoint yet"
        raise TrainingCollapsed(f"{problem}; {f'the last good checkpoint is {good[-1]}' if good else last}")


def summary(terms: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The progress bar's right end, from pairs of an arm's name and one SAE's terms.

    Explained variance, L0, share of dead features and InfoNCE accuracy of each arm, a mean over its seeds:

    >>> terms = {"fvu": 0.25, "l0": 32.0, "dead_share": 0.01, "accuracy": 0.05}
    >>> summary([("tc16", terms), ("tc16", {**terms, "fvu": 0.27}), ("block", {**terms, "accuracy": math.nan})])
    'tc16 EV .740 L0 32.0 dead 1.0% acc 5.0% | block EV .750 L0 32.0 dead 1.0%'
    """
    of_arm: dict[str, list[dict[str, Any]]] = {}
    for name, found in terms:
        of_arm.setdefault(name, []).append(found)
    return " | ".join(_summary(name, found) for name, found in of_arm.items())


def _summary(name: str, seeds: list[dict[str, Any]]) -> str:
    fvu, l0, dead, accuracy = (
        fmean(found[field] for found in seeds) for field in ("fvu", "l0", "dead_share", "accuracy")
    )
    shown = f"{name} EV {1 - fvu:.3f} L0 {l0:.1f} dead {dead:.1%}".replace("EV 0.", "EV .")
    return shown if math.isnan(accuracy) else f"{shown} acc {accuracy:.1%}"


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_steps(training: Training, n: int) -> Iterator[float]:
    """Seconds of each of ``n`` ordinary steps with a full ring, after one to warm up; alters ``training``."""
    ring = training.ring
    for i in range(-(-ring.size // training.config.ring_feed) if training.feeds_ring else 0):
        training.feed(training.config.steps + i, training.config.ring_feed)
    training.step(detailed=False)
    for _ in range(n):
        began = time.perf_counter()
        training.step(detailed=False)
        yield time.perf_counter() - began


def _as_json(config: TrainConfig) -> dict[str, Any]:
    """What decides a run's result as it comes back from JSON: tuples are lists, explanations left out."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for arm in values["arms"]:
        del arm["explanation"]
    return values
