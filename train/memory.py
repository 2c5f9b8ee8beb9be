"""Refusing a run that the machine cannot hold, before the system ends its process without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

from tcsae.store.errors import ConfigError
from tcsae.train.config import TrainConfig

LIMIT_FILES = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
"""file with the limit of a control group, by the kind of its file system: version 2 and version 1"""


def least_bytes(config: TrainConfig, d_model: int, dtype: torch.dtype, processes: int = 1) -> dict[str, int]:
    """What a process of a run holds at least, in bytes, by the setting that decides it.

    ``ring_size``: the ring in the store's ``dtype``, if some arm takes keys from it. ``batch_tokens``: the batch as
    stored, twice, and normalised, and the pre-activations of the widest arm. ``expansion``: weights and two moments of
    every SAE, and the gradients of the largest, since arms step one after the other.

    4 rows of 2 numbers of 2 bytes; 8 tokens; an SAE of 6 features: 2 matrices of 6 x 2 and biases of 6 and 2, and
    one of 4: 2 of 4 x 2 and biases of 4 and 2.

    >>> from tcsae.train.config import ArmConfig
    >>> arm = ArmConfig(name="a", expansion=3.0, k=2, block_share=0.5, block_k_share=0.5, window=2, anchors=1)
    >>> small = ArmConfig(name="b", expansion=2.0, k=1, block_share=0.0, window=2, anchors=1)
    >>> least_bytes(TrainConfig(arms=(arm, small), batch_tokens=8, ring_size=4, ring_feed=1), 2, torch.float16)
    {'ring_size': 16, 'batch_tokens': 320, 'expansion': 776}
    """
    features = [arm.features(d_model) for arm in config.arms]
    parameters = [2 * n * d_model + n + d_model for n in features]
    stored = d_model * dtype.itemsize
    takes_keys = any(arm.takes_keys(d_model) for arm in config.arms)
    return {
        "ring_size": config.ring_size * stored if takes_keys else 0,
        "batch_tokens": config.batch_tokens // processes * (2 * stored + 4 * d_model + 4 * max(features)),
        "expansion": 12 * sum(parameters) * len(config.seeds) + 4 * max(parameters),
    }


def check_memory(least: dict[str, int], device: torch.device) -> None:
    """Refuse what is more than all of this process's memory (`most_bytes`), or of the GPU's; see `least_bytes`.

    >>> check_memory({"ring_size": 10**18, "expansion": 10**6}, torch.device("cpu"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    tcsae.store.errors.ConfigError: ring_size: this run needs at least 1,000,000,000,001 MB of memory, \
1,000,000,000,000 MB of them for this setting, and there are ... MB; lower it
    """
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else most_bytes()
    needed, most = sum(least.values()), max(least, key=least.__getitem__)
    if needed > there:
        raise ConfigError(
            f"{most}: this run needs at least {needed / 1e6:,.0f} MB of memory, {least[most] / 1e6:,.0f} MB of "
            f"them for this setting, and there are {there / 1e6:,.0f} MB; lower it"
        )


def most_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can have: the machine's, or less where a container has a limit.

    Such a limit is that of the process's control group or of one above it, of either version (proc(5),
    cgroups(7)). ``root`` is the folder with ``proc`` and ``sys``.
    """
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits(root)])


def _group_limits(root: Path) -> Iterator[int]:
    """Of the process's control groups and those above them, as far as they can be seen from here."""
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:  # another system than Linux
        return
    own: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for line in mounts:
        where, _, what = line.partition(" - ")
        mounted, point = where.split()[3:5]
        kind, *_, options = what.split()
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top = root / point.lstrip("/")
        for below in _from_own_up(own[kind], mounted):
            with suppress(OSError, ValueError):  # the topmost group has no such file, and "max" is no limit
                yield int((top / below / LIMIT_FILES[kind]).read_text())


def _from_own_up(group: str, mounted: str) -> list[PurePosixPath]:
    """A group's path below the group that is ``mounted``, and the paths of those above it.

    >>> [str(path) for path in _from_own_up("/docker/ab/job", "/docker/ab")]
    ['job', '.']
    >>> [str(path) for path in _from_own_up("/docker/ab", "/other")]  # it cannot be seen
    ['.']
    """
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(mounted):
        return [PurePosixPath()]
    below = path.relative_to(mounted)
    return [below, *below.parents]
