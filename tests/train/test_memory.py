"""How much memory a process can have, in a container too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tcsae.store.errors import ConfigError
from tcsae.train import memory
from tcsae.train.memory import check_memory, most_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

VERSION_2 = "30 24 0:26 {} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate"
VERSION_1 = "36 25 0:33 {} /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory"
OTHERS = [
    "25 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw",
    "37 25 0:34 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu",
]

Plant = Callable[..., Path]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """A folder with what the kernel of a container would say."""

    def make(groups: list[str], mounts: list[str], limits: dict[str, str]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))
        (tmp_path / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in [*OTHERS, *mounts]))
        for name, limit in limits.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{limit}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("groups", "mounts", "limits", "expected"),
    [
        pytest.param(
            ["0::/job/step"],
            [VERSION_2.format("/")],
            {"job/step/memory.max": "3000", "job/memory.max": "4000", "memory.max": "9000"},
            3000,
            id="version 2, the process's own",
        ),
        pytest.param(
            ["0::/job/step"],
            [VERSION_2.format("/")],
            {"job/step/memory.max": "max", "job/memory.max": "4000"},
            4000,
            id="version 2, that of a group above",
        ),
        pytest.param(
            ["0::/"], [VERSION_2.format("/")], {"memory.max": "5000"}, 5000, id="version 2, a namespace"
        ),
        pytest.param(
            ["5:cpu:/x", "4:memory,hugetlb:/docker/ab", "0::/"],
            [VERSION_1.format("/")],
            {
                "memory/docker/ab/memory.limit_in_bytes": "9223372036854771712",  # no limit
                "memory/docker/memory.limit_in_bytes": "6000",
                "cpu/x/memory.limit_in_bytes": "1",
            },
            6000,
            id="version 1, that of a group above",
        ),
        pytest.param(
            ["4:memory:/docker/ab"],
            [VERSION_1.format("/docker/ab")],
            {"memory/memory.limit_in_bytes": "7000"},
            7000,
            id="version 1, named as the machine outside names it",
        ),
        pytest.param(
            ["4:memory:/job", "0::/job"],
            [VERSION_1.format("/"), "40 25 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
            {"memory/job/memory.limit_in_bytes": "8000", "unified/job/memory.max": "8500"},
            8000,
            id="both versions, the smaller",
        ),
        pytest.param(
            ["0::/../../outside"],
            [VERSION_2.format("/")],
            {"memory.max": "9000", "../outside/memory.max": "1"},
            9000,
            id="a group outside of what is seen",
        ),
        pytest.param(["0::/job"], [VERSION_2.format("/")], {"job/memory.max": "max"}, MACHINE, id="no limit"),
        pytest.param(["0::/job"], [], {"job/memory.max": "1"}, MACHINE, id="nothing mounted"),
        pytest.param(
            ["0::/job"],
            [VERSION_2.format("/")],
            {"job/memory.max": f"{2 * MACHINE}"},
            MACHINE,
            id="above the machine's",
        ),
    ],
)
def test_the_smallest_limit_of_machine_and_control_groups_counts(
    plant: Plant, groups: list[str], mounts: list[str], limits: dict[str, str], expected: int
) -> None:
    assert most_bytes(plant(groups, mounts, limits)) == expected


def test_without_proc_it_is_the_machines(tmp_path: Path) -> None:
    assert most_bytes(tmp_path) == MACHINE


def test_a_run_that_a_container_cannot_hold_is_refused_with_its_limit(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = plant(["0::/job"], [VERSION_2.format("/")], {"job/memory.max": "512000000"})
    monkeypatch.setattr(memory, "most_bytes", lambda: most_bytes(root))
    check_memory({"expansion": 512_000_000}, torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs at least 512 MB .* and there are 512 MB; lower it"):
        check_memory({"expansion": 512_000_001}, torch.device("cpu"))
