"""Everything a run needs to go on, on the CPU bit-exactly, in one safetensors file without pickle.

Tensors carry weights, optimisers, counters, thresholds, the ring and the tables so far; a JSON object in the
file's header carries the step, the loader's place, the configuration and the store. Being one file, a
checkpoint is there whole or not at all. Random numbers need no state: they are a function of seed and step
(`tcsae.train.window_reader.random_stream`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor

from tcsae.store.atomic import write_atomically
from tcsae.store.errors import RunError, RunMismatch
from tcsae.train.arm import Arm

FOLDER = "checkpoints"
VERSION = 2
"""Raised with every change of what a checkpoint holds."""
KEPT = 2
"""checkpoints that stay: should the newest be damaged on disk, there is the one before"""


class Checkpoint(NamedTuple):
    """The state after ``step`` steps."""

    step: int
    facts: dict[str, Any]
    """JSON values: configuration, store, loader, collapse watch"""
    tensors: dict[str, Tensor]


def save_checkpoint(run: Path, step: int, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write the checkpoint after ``step`` steps, then delete all but the newest `KEPT`."""
    path = run / FOLDER / f"step-{step:08d}.safetensors"
    header = {"tcsae": json.dumps({"version": VERSION, "step": step, **facts})}
    # Not save_file: on a full disk it raises an error of its own and leaves a temporary file behind.
    write_atomically(
        path, bytes_of_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, header)
    )
    for old in checkpoints(run)[:-KEPT]:
        old.unlink()
    return path


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def checkpoint_step(path: Path) -> int:
    """After how many steps a checkpoint was made.

    >>> checkpoint_step(Path("run/checkpoints/step-00000040.safetensors"))
    40
    """
    return int(path.stem.removeprefix("step-"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    RunError
        the file is damaged
    RunMismatch
        another version of tcsae wrote it in another form
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["tcsae"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); delete it and resume from the checkpoint before"
        ) from error
    if facts["version"] != VERSION:
        advice = (
            "upgrade tcsae"
            if facts["version"] > VERSION
            else "finish the run with the tcsae that began it, or train it again"
        )
        raise RunMismatch(f"{path}: version {facts['version']}, this tcsae reads {VERSION}; {advice}")
    return Checkpoint(facts["step"], facts, tensors)


def arm_tensors(arms: Sequence[Arm]) -> dict[str, Tensor]:
    """Weights, their average, thresholds, counters and optimiser of each arm, by name."""
    tensors: dict[str, Tensor] = {}
    for arm in arms:
        for name, tensor in arm.sae.state_dict().items():
            tensors[f"{arm.name}/sae/{name}"] = tensor
        for name, parameter in arm.sae.named_parameters():
            for key, value in arm.optimizer.state[parameter].items():
                tensors[f"{arm.name}/optimizer/{name}/{key}"] = value
        tensors |= {f"{arm.name}/own/{name}": tensor for name, tensor in arm.own_tensors().items()}
    return tensors


def restore_arms(arms: Sequence[Arm], tensors: dict[str, Tensor]) -> None:
    """Put what `arm_tensors` returned back into ``arms`` of the same configuration."""
    for arm in arms:
        prefix = f"{arm.name}/sae/"
        arm.sae.load_state_dict(
            {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        )
        for name, parameter in arm.sae.named_parameters():
            prefix = f"{arm.name}/optimizer/{name}/"
            arm.optimizer.state[parameter] = {
                key[len(prefix) :]: value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        for name, tensor in arm.own_tensors().items():
            tensor.copy_(tensors[f"{arm.name}/own/{name}"])


def as_tensor(content: bytes) -> Tensor:
    """Bytes as a tensor, for a checkpoint."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """What `as_tensor` was given."""
    return tensor.numpy().tobytes()
