"""What probes read: codes averaged over a context, or of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from scipy import sparse
from torch import Tensor

from tcsae.evaluate.heldout import BLOCK_ROWS, HeldOut
from tcsae.evaluate.probe_samples import (
    CONTEXT_TASKS,
    MAX_TEST_CONTEXTS,
    MAX_TRAIN_CONTEXTS,
    MIN_TOKENS,
    NoTask,
    Side,
    Task,
    choose_contexts,
    context_task,
    position_task,
    token_task,
)

Encode = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row feature"]]
"""From raw activations to what a probe reads, such as an SAE's ``encode``."""

Codes: TypeAlias = np.ndarray[Any, np.dtype[np.float32]] | sparse.csr_array
"""[sample, feature], float32"""


class Pooled:
    """Mean codes of contexts.

    Parameters
    ----------
    mean
        [context, feature], float32; over the counted tokens of each context, which are neither special nor
        outliers. SAEBench also leaves out tokens without any active feature, so a mean over one SAE's tokens
        is not one over another's; here all SAEs are averaged over the same tokens.
    is_usable
        [context]; whether at least `MIN_TOKENS` tokens are counted, which does not depend on the SAE
    """

    def __init__(self, mean: Float32[np.ndarray, "context feature"], is_usable: Bool[np.ndarray, " context"]):
        self.mean = mean
        self.is_usable = is_usable


@torch.no_grad()
def pooled(encode: Encode, chosen: HeldOut, width: int, advance: Callable[[int], Any]) -> Pooled:
    """Mean codes of the chosen contexts; contexts times ``width`` times 4 bytes, whatever the store's length.

    ``advance`` is told the number of tokens read.
    """
    mean = np.empty((len(chosen.contexts), width), dtype=np.float32)
    usable = np.empty(len(chosen.contexts), dtype=bool)
    first = 0
    for block in chosen.blocks():
        _, index = torch.unique_consecutive(block.context, return_inverse=True)
        n_contexts = int(index[-1]) + 1
        # a masked row may hold anything, and 0 * inf would be nan
        f = encode(block.x).to("cpu", torch.float32).masked_fill(~block.kept[:, None], 0.0)
        weights = torch.zeros(n_contexts, len(index)).index_put_(
            (index, torch.arange(len(index))), block.kept.to(torch.float32)
        )
        n_kept = weights.sum(dim=1)
        mean[first : first + n_contexts] = (weights @ f / n_kept.clamp(min=1)[:, None]).numpy()
        usable[first : first + n_contexts] = (n_kept >= MIN_TOKENS).numpy()
        first += n_contexts
        advance(len(index))
    return Pooled(mean, usable)


class ProbeData:
    """The samples of all tasks at one hook, and what any encoder makes of them.

    Parameters
    ----------
    train, test
        documents to learn from and to be tested on
    seed
        of every draw
    advance
        told the number of tokens read
    """

    def __init__(self, train: HeldOut, test: HeldOut, seed: int, advance: Callable[[int], Any]) -> None:
        self.sides = (
            choose_contexts(train, MAX_TRAIN_CONTEXTS, seed),
            choose_contexts(test, MAX_TEST_CONTEXTS, seed),
        )
        width = train.store.d_model
        raw = [pooled(lambda x: x, side, width, advance) for side in self.sides]
        self._usable = [one.is_usable for one in raw]
        chosen = [
            side.only(side.contexts[usable]) for side, usable in zip(self.sides, self._usable, strict=True)
        ]
        gates: dict[str, Task | NoTask] = {
            "position": position_task(chosen[0], chosen[1], seed),
            "token": token_task("token", chosen[0], chosen[1], seed),
            "previous_token": token_task("previous_token", chosen[0], chosen[1], seed),
        }
        self._rows: dict[str, list[Float32[np.ndarray, "_ d_model"]]] = {}
        for name, task in gates.items():
            if isinstance(task, Task):
                gates[name], rows = _without_outliers(task, train)
                if rows:
                    self._rows[name] = rows
        self.tasks: dict[str, Task | NoTask] = {
            **{name: context_task(name, chosen[0], chosen[1]) for name in CONTEXT_TASKS},
            **gates,
        }
        """every task by name, in the order of the tables"""
        self.raw = self._by_task([one.mean[one.is_usable] for one in raw], lambda x: x)
        """of every task that is not a `NoTask`: raw activations of the training and the test samples"""

    @property
    def n_tokens(self) -> int:
        """tokens that one reading reads"""
        return sum(side.n_tokens for side in self.sides)

    def codes(
        self, encode: Encode, width: int, advance: Callable[[int], Any]
    ) -> dict[str, tuple[Codes, Codes]]:
        """As `raw`, for codes of ``width`` features: contexts dense, tokens sparse."""
        means = [
            pooled(encode, side, width, advance).mean[usable]
            for side, usable in zip(self.sides, self._usable, strict=True)
        ]
        return self._by_task(means, lambda x: codes_of(encode, x))

    def _by_task(
        self,
        means: list[Float32[np.ndarray, "_ feature"]],
        of_rows: Callable[[Float32[np.ndarray, "_ d_model"]], Codes],
    ) -> dict[str, tuple[Codes, Codes]]:
        found: dict[str, tuple[Codes, Codes]] = {}
        for name in CONTEXT_TASKS:
            task = self.tasks[name]
            if isinstance(task, Task):
                found[name] = (means[0][task.train.at], means[1][task.test.at])
        for gate, (train, test) in self._rows.items():
            found[gate] = (of_rows(train), of_rows(test))
        return found


def _without_outliers(
    task: Task, held_out: HeldOut
) -> tuple[Task | NoTask, list[Float32[np.ndarray, "_ d_model"]]]:
    """The task without the rows that are outliers at the hook, and the activations of those that stay."""
    sides, rows = [], []
    for side in (task.train, task.test):
        x = held_out.store.gather(side.at, held_out.hook).to(torch.float32)
        kept = (torch.linalg.vector_norm(x, dim=-1) <= held_out.outlier_norm).numpy()
        sides.append(Side(*(column[kept] for column in side)))
        rows.append(x.numpy()[kept])
        if len(np.unique(sides[-1].label)) < len(task.classes):
            return NoTask(task.name, "all samples of a class are outliers"), []
    return replace(task, train=sides[0], test=sides[1]), rows


@torch.no_grad()
def codes_of(encode: Encode, x: Float32[np.ndarray, "row d_model"]) -> sparse.csr_array:
    """Codes of single tokens, sparse: at 32 active features of 16,384 a hundredth of the dense size."""
    parts = [
        sparse.csr_array(encode(torch.from_numpy(x[at : at + BLOCK_ROWS])).to("cpu", torch.float32).numpy())
        for at in range(0, len(x), BLOCK_ROWS)
    ]
    return sparse.vstack(parts, format="csr")
