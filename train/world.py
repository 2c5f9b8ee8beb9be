"""The processes that train one run together under torchrun, and what they tell each other.

Each takes an equal slice of every batch, and every figure that depends on the whole batch is summed or
gathered, so a step is that of one process with the same batch (docs/decisions/007-data-parallel.md). All
ranks call the same methods in the same order; what a method returns is the same on every rank, bit for bit.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tcsae.store.errors import ConfigError, TcsaeError, WorkersLost

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""what torchrun sets in the environment of each process"""


class World:
    """A single process: every sum is its own addend, and nothing costs anything."""

    rank = 0
    """of this process, 0 to ``size`` - 1"""
    size = 1
    """processes"""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def slice(self, n: int) -> slice:
        """This process's part of ``n`` things in order; ``n`` is a multiple of `size`.

        >>> ALONE.slice(8)
        slice(0, 8, None)
        """
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, addend: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over ranks, with gradient.

        The gradient is that of the sum over ranks of what each makes of the result: each rank's loss has to
        be its addend of the whole loss.
        """
        return addend

    def sum_(self, addends: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, without gradient."""

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over ranks; where some rank has none it counts as zeros."""

    def totals(self, *addends: float | int) -> list[float]:
        """The sum over ranks of each number, in float64."""
        return [float(addend) for addend in addends]

    def any(self, flags: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which flags are set on some rank."""
        return flags

    def gather(self, rows: Shaped[Tensor, " mine *shape"]) -> Shaped[Tensor, " all *shape"]:
        """Every rank's rows, one rank after the other, without gradient; their numbers may differ."""
        return rows

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when every rank has come to its end, or raise on all what one of them has raised.

        For what one rank alone does, such as writing, or may fail at, such as reading. Nothing in the block
        may wait for another rank.
        """
        yield


ALONE = World()


class Processes(World):
    """Several processes, connected by the default group of torch.distributed.

    Every method raises `WorkersLost` when a process has gone.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self._device = rank, size, device

    def sum(self, addend: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over ranks, with gradient."""
        found: Tensor = _Sum.apply(addend)  # type: ignore[no-untyped-call]
        return found

    def sum_(self, addends: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, without gradient."""
        for addend in addends:
            _all_reduce(addend)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over ranks; where some rank has none it counts as zeros."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            _all_reduce(parameter.grad)

    def totals(self, *addends: float | int) -> list[float]:
        """The sum over ranks of each number, in float64."""
        numbers = torch.tensor(addends, dtype=torch.float64, device=self._device)
        _all_reduce(numbers)
        found: list[float] = numbers.tolist()
        return found

    def any(self, flags: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which flags are set on some rank."""
        counts = flags.to(torch.uint8)
        _all_reduce(counts, dist.ReduceOp.MAX)
        return counts.bool()

    @torch.no_grad()
    def gather(self, rows: Shaped[Tensor, " mine *shape"]) -> Shaped[Tensor, " all *shape"]:
        """Every rank's rows, one rank after the other, without gradient; their numbers may differ."""
        # As bytes, since gloo knows neither bool nor bfloat16.
        mine = rows.detach().to(self._device).contiguous().flatten().view(torch.uint8)
        lengths = mine.new_zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(mine)
        _all_reduce(lengths)
        longest = int(lengths.max())
        padded = torch.cat([mine, mine.new_zeros(longest - len(mine))])
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        with _peers():
            dist.all_gather(pieces, padded)
        every = torch.cat([piece[:n] for piece, n in zip(pieces, lengths.tolist(), strict=True)])
        return every.view(rows.dtype).view(-1, *rows.shape[1:]).to(rows.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when every rank has come to its end, or raise on all what one of them has raised."""
        mine: TcsaeError | None = None
        try:
            yield
        except TcsaeError as error:
            mine = error
        failures = torch.tensor([mine is not None], dtype=torch.int64, device=self._device)
        _all_reduce(failures)
        if not failures:
            return
        content = b"" if mine is None else pickle.dumps(mine)
        # The first failing rank's alone: bytes of two pickles in a row are read up to the first one's end.
        first: TcsaeError = pickle.loads(bytes(self.gather(_as_bytes(content)).tolist()))
        raise first from mine


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, addend: Tensor) -> Tensor:
        return _all_reduce(addend.clone())

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return _all_reduce(grad.clone(memory_format=torch.contiguous_format))


def _as_bytes(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def _all_reduce(tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place, and return."""
    with _peers():
        dist.all_reduce(tensor, op=operation)
    return tensor


@contextmanager
def _peers() -> Iterator[None]:
    """Turn what a lost connection raises into one line."""
    try:
        yield
    except RuntimeError as error:
        raise WorkersLost(
            "a process of this run has ended, so the others stop too; see its own message, then go on from "
            f"the newest checkpoint with --resume ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The world of this process, with the device it computes on; connected for the block.

    Without torchrun that is `ALONE`. Under torchrun processes talk through gloo on the CPU and NCCL on GPUs,
    where each takes the one of its local rank.

    Raises
    ------
    ConfigError
        the environment has a part of what torchrun sets, or ``device`` gives all processes the same GPU
    WorkersLost
        the processes cannot reach each other
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start several processes with torchrun"
        )
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        if device.index is not None:
            raise ConfigError(
                f"device: {device} would be that of all {size} processes; leave it out, and each takes its own"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    was_connected = dist.is_initialized()
    with _peers():
        if not was_connected:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield Processes(rank, size, device), device
    finally:
        if not was_connected:
            dist.destroy_process_group()
