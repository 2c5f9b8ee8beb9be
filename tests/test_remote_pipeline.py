"""Train and evaluate from object storage as a user does: real commands, moto's S3 server, a cache of its own.

Whatever a command gives from the URL is compared, byte by byte, with what it gives from the folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tcsae.store import ActivationStore
from tcsae.store.copy import copy_store
from tcsae.tests.fixtures import save_neox, write_corpus
from tcsae.tests.servers import moto_server, serving

pytestmark = pytest.mark.slow

HOOK = "blocks.1.hook_resid_post"
SMALL = (
    "batch_tokens=512",
    "ring_size=1024",
    "ring_feed=256",
    "anchors=64",
    "warmup_steps=5",
    "k=8",
    "precision=float32",
)
TRAIN = ["--recipe", "block", "--tokens", "15360", *(p for s in SMALL for p in ("--set", s))]
CHUNK_BYTES = 1024 * 64 * 2 + 4
"""1024 rows of 64 dimensions in float16 and a checksum"""


def start(*arguments: str, cwd: Path, cache: Path, limit_gb: str = "1") -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "tcsae.cli", *arguments]
    environment = os.environ | {"TCSAE_CACHE": str(cache), "TCSAE_CACHE_GB": limit_gb}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell puts in the background inherits a SIGINT that is ignored; a terminal's command does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return out


def tcsae(*arguments: str, cwd: Path, cache: Path, limit_gb: str = "1") -> str:
    return finish(start(*arguments, cwd=cwd, cache=cache, limit_gb=limit_gb))


def chunks_in(cache: Path) -> dict[str, Path]:
    return {p.parts[-2]: p for p in cache.glob("stores/*/activations/*/c/*/0")}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an empty bucket."""
    with moto_server() as url:
        yield url


@pytest.fixture(scope="module")
def folder(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and what training and evaluating from it gives; the store is at s3 too."""
    path = tmp_path_factory.mktemp("remote-pipeline")
    save_neox(path / "model", n_layers=3, d_model=64, n_heads=4, seed=0)
    write_corpus(path / "corpus.jsonl", n_documents=120, parts="boolq,coqa")
    source = ["--model", "model", "--corpus", "corpus.jsonl", "--hook", HOOK, "--context-length", "64"]
    for arguments in (
        ["harvest", "acts.zarr", *source, "--rows-per-chunk", "1024", "--max-tokens", "16000"],
        ["store", "copy", "acts.zarr", f"{s3}/acts.zarr"],
        ["train", "acts.zarr", "run", *TRAIN],
        ["evaluate", "run", "results", "--store", "acts.zarr", "--max-tokens", "300"],
    ):
        tcsae(*arguments, cwd=path, cache=path / "unused")
    assert not (path / "unused" / "stores").exists()
    return path


@pytest.fixture(scope="module")
def from_url(folder: Path, s3: str) -> Path:
    """The same folder, with what training and evaluating from the URL gives: ``remote`` and ``remote-results``."""
    url = f"{s3}/acts.zarr"
    tcsae("train", url, "remote", *TRAIN, cwd=folder, cache=folder / "cache")
    evaluated = ["evaluate", "remote", "remote-results", "--store", url, "--max-tokens", "300"]
    tcsae(*evaluated, cwd=folder, cache=folder / "cache")
    return folder


def test_training_from_a_url_gives_the_same_bytes(from_url, s3):
    for name in ("config.toml", "metrics.parquet", "sae/block-s0/sae_weights.safetensors"):
        assert (from_url / "remote" / name).read_bytes() == (from_url / "run" / name).read_bytes(), name
    local, remote = (json.loads((from_url / run / "run.json").read_text()) for run in ("run", "remote"))
    assert remote["store"].pop("path") == f"{s3}/acts.zarr"
    local["store"].pop("path")
    assert remote == local


def test_evaluating_from_a_url_gives_the_same_figures(from_url):
    local, remote = (pq.read_table(from_url / f / "summary.parquet") for f in ("results", "remote-results"))
    assert local.num_rows > 10
    assert remote.equals(local)


def test_the_cache_holds_every_chunk_once_and_whole(from_url):
    chunks = chunks_in(from_url / "cache")
    store = ActivationStore.open(from_url / "acts.zarr")
    assert len(chunks) == -(-store.n_rows // 1024) > 8
    original = store.path / "activations" / HOOK / "c"
    for number, path in chunks.items():
        assert path.read_bytes() == (original / number / "0").read_bytes()


def test_a_small_cache_keeps_below_its_limit_and_changes_nothing(from_url, s3):
    # room for about four of the chunks beside the tables
    cache, limit = from_url / "small-cache", 800_000
    tcsae("train", f"{s3}/acts.zarr", "small", *TRAIN, cwd=from_url, cache=cache, limit_gb=str(limit / 1e9))
    kept = chunks_in(cache)
    assert 1 <= len(kept) < len(chunks_in(from_url / "cache"))
    # looked at once a tenth of the limit has come: one chunk here
    assert sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) <= limit + CHUNK_BYTES
    weights = "sae/block-s0/sae_weights.safetensors"
    assert (from_url / "small" / weights).read_bytes() == (from_url / "run" / weights).read_bytes()


def test_two_trainings_at_once_share_a_cache(from_url, s3):
    cache = from_url / "shared-cache"
    both = [
        start("train", f"{s3}/acts.zarr", f"twin{i}", *TRAIN, "--seeds", str(i), cwd=from_url, cache=cache)
        for i in (0, 1)
    ]
    for process in both:
        finish(process)
    assert len(list((cache / "stores").glob("[0-9a-f]*"))) == 1
    assert len(chunks_in(cache)) == len(chunks_in(from_url / "cache"))
    first, second = (
        from_url / f"twin{i}" / "sae" / f"block-s{i}" / "sae_weights.safetensors" for i in (0, 1)
    )
    assert first.read_bytes() == (from_url / "run/sae/block-s0/sae_weights.safetensors").read_bytes()
    assert first.read_bytes() != second.read_bytes()


def test_a_stopped_training_from_a_url_names_it_and_goes_on(from_url, s3):
    url, cache = f"{s3}/acts.zarr", from_url / "cache"
    process = start("train", url, "stopped", *TRAIN, cwd=from_url, cache=cache)
    while not (from_url / "stopped" / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert f"tcsae train {url} stopped --resume" in said
    tcsae("train", url, "stopped", "--resume", cwd=from_url, cache=cache)
    # the same store by another name: a run knows it by its id
    for name in ("metrics.parquet", "sae/block-s0/sae_weights.safetensors"):
        assert (from_url / "stopped" / name).read_bytes() == (from_url / "run" / name).read_bytes(), name


LARGE = ("--set", "batch_tokens=100000", "--set", "tokens=1000000", "--set", "warmup_steps=0")
"""a batch larger than the store"""


def test_messages_name_the_url_and_not_the_cache(from_url, s3):
    url, cache = f"{s3}/acts.zarr", from_url / "cache"
    process = start("train", url, "wide", *TRAIN, *LARGE, cwd=from_url, cache=cache)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert url in said
    assert str(cache) not in said
    assert len(said.strip().splitlines()) == 1, said


def test_training_from_http_gives_the_same_bytes(from_url):
    with serving(from_url) as server:
        tcsae("train", f"{server.url}/acts.zarr", "web", *TRAIN, cwd=from_url, cache=from_url / "web-cache")
    weights = "sae/block-s0/sae_weights.safetensors"
    assert (from_url / "web" / weights).read_bytes() == (from_url / "run" / weights).read_bytes()


def test_a_compressed_store_at_a_url_is_trained_on(from_url, s3, monkeypatch):
    monkeypatch.setenv("TCSAE_CACHE", str(from_url / "cache"))
    copied = copy_store(from_url / "acts.zarr", f"{s3}/small.zarr", codec="lossless")
    tcsae("train", f"{s3}/small.zarr", "packed", *TRAIN, cwd=from_url, cache=from_url / "cache")
    weights = "sae/block-s0/sae_weights.safetensors"
    assert json.loads((from_url / "packed" / "run.json").read_text())["store"]["id"] == copied.id
    from safetensors.torch import load_file

    packed, plain = (load_file(from_url / run / weights) for run in ("packed", "run"))
    assert packed.keys() == plain.keys()
    for name, values in plain.items():
        assert packed[name].equal(values), name
