"""Chunks computed by other processes are those that one process computes, to the last bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tcsae.harvest import HarvestConfig, LanguageModel, harvest, workers
from tcsae.harvest.workers import ChunkTask, compute_chunk, fingerprint
from tcsae.store import ActivationStore, StoreWriter
from tcsae.store.errors import ActivationError, ConfigError, Interrupted, StoreMismatch
from tcsae.store.index import read_layout
from tcsae.store.kept import Kept
from tcsae.tests.clusters import ctrl_c_while_held, dask_cluster, holding, objects_of, until_workers_say
from tcsae.tests.fixtures import HOOKS, hashes, save_neox


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """A Dask cluster that was there before, as a user's would be: one process with two threads."""
    from dask.distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        dashboard_address=":0",  # None would take port 8787, which another cluster may have
        memory_limit=0,
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_kept", Kept())


def tasks_of(config: HarvestConfig, reference: ActivationStore, neox: LanguageModel) -> list[ChunkTask]:
    known = fingerprint(config, neox, read_layout(reference.path))
    n_chunks = -(-reference.n_rows // config.rows_per_chunk)
    return [ChunkTask("one", config, reference.provenance, known, chunk) for chunk in range(n_chunks)]


def spawned(process: psutil.Process) -> list[psutil.Process]:
    """Worker processes below a process."""
    return [p for p in process.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


# --------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("n_threads", [2, 3, 4])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    n_threads: int, reference: ActivationStore, config: HarvestConfig, neox: LanguageModel
) -> None:
    layout = read_layout(reference.path)
    alone = fingerprint(config, neox, layout)
    try:
        torch.set_num_threads(n_threads)
        assert fingerprint(config, neox, layout) == alone
    finally:
        torch.set_num_threads(1)


def test_workers_of_which_one_is_killed_write_the_bytes_of_one_process(
    scheduler: str, reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    killed: list[int] = []

    def kill_one() -> None:
        while not list(store.glob("activations/*/c/*/0")):
            time.sleep(0.001)
        victim = spawned(psutil.Process())[0]
        killed.append(victim.pid)
        victim.kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    harvest(replace(config, store=store, scheduler=scheduler))
    killer.join(10)
    assert len(killed) == 1
    assert hashes(store) == hashes(reference.path)


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one_process_and_leave_nothing_behind(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    environment = dict(os.environ)
    before = {process.pid for process in spawned(psutil.Process())}
    summary = harvest(replace(config, store=store, workers=2))
    assert summary.computed_chunks == summary.chunks
    assert hashes(store) == hashes(reference.path)
    assert dict(os.environ) == environment
    assert {process.pid for process in spawned(psutil.Process())} <= before


def test_threads_of_one_process_take_turns_at_the_model(
    reference: ActivationStore, config: HarvestConfig, neox: LanguageModel, tmp_path: Path
) -> None:
    mine = replace(config, store=tmp_path / "s.zarr")
    first = json.loads((reference.path / "zarr.json").read_text())["attributes"]["first_batch_sha256"]
    with StoreWriter.create(
        mine.store, read_layout(reference.path), reference.provenance, first_batch_sha256=first
    ) as writer:
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(compute_chunk, tasks_of(mine, reference, neox)))
        writer.finish()
    assert hashes(mine.store) == hashes(reference.path)


# --------------------------------------------------------------------- what is refused


def test_an_overflow_in_a_worker_is_the_error_that_one_process_raises(
    scheduler: str, neox_folder: Path, config: HarvestConfig, tmp_path: Path
) -> None:
    model = save_neox(tmp_path / "large")
    weights = load_file(model / "model.safetensors")
    weights["gpt_neox.embed_in.weight"] *= 1e6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    mine = replace(
        config, model=str(model), hooks=("blocks.0.hook_resid_pre",), dtype="float16", rows_per_chunk=9999
    )
    messages = []
    for name, where in (("here", None), ("there", scheduler)):
        with pytest.raises(ActivationError, match=r"token 0 \(row 0\): .* overflows float16") as caught:
            harvest(replace(mine, store=tmp_path / name, scheduler=where))
        messages.append(str(caught.value).replace(f"/{name}:", ":"))
    assert messages[0] == messages[1]


def test_a_worker_that_rounds_differently_is_refused(
    reference: ActivationStore, config: HarvestConfig, neox: LanguageModel
) -> None:
    task = replace(tasks_of(config, reference, neox)[0], fingerprint="0" * 64)
    with pytest.raises(ConfigError, match="expected every process to round alike"):
        compute_chunk(task)


def test_a_worker_with_other_weights_is_refused(
    reference: ActivationStore, config: HarvestConfig, neox: LanguageModel
) -> None:
    planned = replace(reference.provenance, model_sha256="0" * 64)
    task = replace(tasks_of(config, reference, neox)[0], provenance=planned)
    with pytest.raises(StoreMismatch, match="a worker differs from what was planned: model_sha256"):
        compute_chunk(task)


def test_a_scheduler_that_does_not_answer_is_one_line(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcsae.store.parallel.ANSWER_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="none answers there") as caught:
        harvest(replace(config, store=tmp_path / "s", max_tokens=1500, scheduler="tcp://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------- interrupted

INTERRUPTED = """
import sys
from pathlib import Path
from tcsae.harvest import HarvestConfig, harvest
from tcsae.store.errors import Interrupted
if __name__ == "__main__":
    store, model, corpus, hook = sys.argv[1:]
    try:
        harvest(HarvestConfig(store=Path(store), model=model, corpus=corpus, hooks=(hook,),
                              context_length=64, rows_per_chunk=10, workers=2))
    except Interrupted as error:
        sys.exit(f"tcsae: {error}")
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_says_how_to_resume(config: HarvestConfig, tmp_path: Path) -> None:
    store, script = tmp_path / "s.zarr", tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, "-P", str(script), str(store), config.model, config.corpus, HOOKS[0]]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # What a shell puts in the background inherits a SIGINT that is ignored; a terminal's command does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(store.glob("activations/*/c/*/0")):
        time.sleep(0.01)
    workers_of = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process at once
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"tcsae: {store}: interrupted; finished chunks are kept")
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(workers_of, timeout=10)
    assert not alive


KEPT = "__import__('tcsae.harvest.workers', fromlist=['_'])._kept.is_empty"


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_schedulers_workers_and_they_neither_write_nor_keep_anything_after_it(
    reference: ActivationStore, config: HarvestConfig, tmp_path: Path
) -> None:
    mine = replace(config, store=tmp_path / "s.zarr")
    script = holding(tmp_path, "tcsae.harvest.workers", "run_chunk")
    with dask_cluster(tmp_path, nanny=False, preload=[script]) as cluster:
        with pytest.raises(Interrupted, match="--resume"), ctrl_c_while_held(tmp_path):
            harvest(replace(mine, scheduler=cluster.address))
        left = hashes(mine.store)
        until_workers_say(cluster, KEPT, True)
        until_workers_say(cluster, objects_of("LanguageModel"), 0)
        assert hashes(mine.store) == left
        harvest(replace(mine, scheduler=cluster.address, resume=True))
    assert hashes(mine.store) == hashes(reference.path)


def test_a_chunk_is_not_written_when_its_harvest_is_over_by_then(
    reference: ActivationStore,
    config: HarvestConfig,
    neox: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = replace(config, store=tmp_path / "s.zarr")
    shutil.copytree(reference.path, mine.store)
    shutil.rmtree(mine.store / "activations" / HOOKS[0] / "c")
    task = tasks_of(mine, reference, neox)[0]
    whole = workers.run_chunk

    def then_over(*args: Any, **options: Any) -> Any:
        rows = whole(*args, **options)
        workers.release(task.run)
        return rows

    monkeypatch.setattr(workers, "run_chunk", then_over)
    before = hashes(mine.store)
    with pytest.raises(Interrupted, match="is over"):
        compute_chunk(task)
    assert hashes(mine.store) == before
