"""Bad input through the real command: one line that says what to do, no traceback, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tcsae.store.verify import verify
from tcsae.tests.fixtures import hashes, save_neox, write_corpus
from tcsae.tests.store.damage import edit_root, flip

pytestmark = pytest.mark.slow

HOOK = "blocks.1.hook_resid_post"
SOURCE = ["--model", "model", "--corpus", "corpus.jsonl", "--hook", HOOK, "--context-length", "64"]


def tcsae(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tcsae.cli", *arguments]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TCSAE_CACHE": str(cwd / ".cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, corpora good and bad, a finished store, and stores that are not what they should be."""
    path = tmp_path_factory.mktemp("bad-input")
    save_neox(path / "model", n_layers=2, d_model=32, n_heads=2)
    write_corpus(path / "corpus.jsonl", n_documents=12)
    (path / "empty.jsonl").write_text("")
    (path / "broken.jsonl").write_text('{"text": "cut\n[1]\n{"id": "x"}\n')
    (path / "no-texts").mkdir()
    (path / "no-tokenizer").mkdir()
    for file in (path / "model").glob("[cm]*"):
        shutil.copy(file, path / "no-tokenizer")
    done = tcsae("harvest", "acts.zarr", *SOURCE, "--rows-per-chunk", "500", cwd=path)
    assert done.returncode == 0, done.stderr
    for name, changes in (("newer.zarr", {"format_version": 2}), ("begun.zarr", {"complete": False})):
        shutil.copytree(path / "acts.zarr", path / name)
        edit_root(path / name, **changes)
    shutil.copytree(path / "acts.zarr", path / "flipped.zarr")
    flip(path / "flipped.zarr" / "activations" / HOOK / "c" / "1" / "0", 99)
    (path / "notes").mkdir()
    (path / "notes" / "thesis.tex").write_text("precious")
    return path


HARVESTS = [
    (["new", "--corpus", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder; expected FILE.jsonl"),
    (["new", "--corpus", "model/config.json"], "expected a name that ends in .jsonl or .parquet"),
    (["new", "--corpus", "empty.jsonl"], "found no rows; expected documents with a non-empty text"),
    (["new", "--corpus", "broken.jsonl"], "all 3 rows are bad: 1 not JSON (first: broken.jsonl, line 1)"),
    (["new", "--corpus", "no-texts"], "no-texts: found no rows"),
    (["new", "--corpus", "hf:nobody/nothing"], "no hub can be reached; pass FILE.jsonl"),
    (["new", "--hook", "blocks.1.hook_residpost"], f"did you mean: {HOOK}"),
    (["new", "--model", "nowhere/at/all"], "nowhere/at/all: no such folder; pass a local folder"),
    (["new", "--model", "no-tokenizer"], "no-tokenizer"),
    (["new", "--context-length", "0"], "context_length: expected at least 2, got 0; raise it"),
    (["new", "--context-length", "4096"], "expected at most the 2048 tokens"),
    (["new", "--max-tokens", "-7"], "max_tokens: expected at least 2, got -7; raise it"),
    (["new", "--max-tokens", "3"], "raise it"),
    (["new", "--rows-per-chunk", "0"], "rows_per_chunk: expected at least 1, got 0"),
    (["new", "--rows-per-chunk", "1000000000000"], "bytes free for 1 chunks"),
    (["new", "--workers", "0"], "workers: expected at least 1"),
    (["new", "--scheduler", "tcp://127.0.0.1:9"], "none answers there"),
    (["new", "--scheduler", "nonsense"], "none answers there"),
    (["new", "--device", "gpu7"], "device"),
    (["s3://lab/acts.zarr"], "s3://lab/acts.zarr: expected a folder on this machine, got a URL"),
    (["corpus.jsonl"], "corpus.jsonl: exists and is not a store; choose another path"),
    (["corpus.jsonl/acts.zarr"], "cannot be written to (Not a directory); choose another path"),
    (["notes"], "notes: exists and is not a store; choose another path"),
    (["notes", "--resume"], "notes: exists and is not a store; choose another path"),
    (
        ["acts.zarr"],
        "acts.zarr: already holds a finished store, which --resume checks and mends; choose another",
    ),
    (["begun.zarr"], "an unfinished store: add --resume"),
    (["newer.zarr", "--resume"], "format 2, this tcsae reads 1; upgrade tcsae"),
    (["acts.zarr", "--resume"], "rows_per_chunk: begun with 500, now 16384; resume with the first ones"),
    (
        ["acts.zarr", "--resume", "--rows-per-chunk", "500", "--dtype", "bfloat16"],
        "dtype: begun with 'float16'",
    ),
    (
        ["acts.zarr", "--resume", "--rows-per-chunk", "500", "--corpus", "empty.jsonl"],
        "corpus: begun with 'corpus",
    ),
]

OTHERS = [
    (["store", "info", "corpus.jsonl"], "not an activation store"),
    (["store", "info", "notes"], "not an activation store"),
    (["store", "info", "newer.zarr"], "format 2, this tcsae reads 1; upgrade tcsae"),
    (
        ["store", "info", "begun.zarr"],
        "the harvest has not finished; run the same `tcsae harvest` with --resume",
    ),
    (["store", "info", "http://127.0.0.1:9/acts.zarr"], "cannot read"),
    (["store", "info", "gopher://lab/acts.zarr"], "cannot be opened"),
    (["store", "verify", "nowhere.zarr"], "not an activation store"),
    (["store", "verify", "acts.zarr", "--workers", "-1"], "workers: expected at least 1, got -1"),
    (["store", "verify", "s3://lab/acts.zarr"], "copy it here first with `tcsae store copy`"),
    (["store", "copy", "acts.zarr", "acts.zarr/inside"], "is the source itself, or lies in it"),
    (["store", "copy", "acts.zarr", "notes"], "notes: exists and is not a store; choose another place"),
    (["store", "copy", "acts.zarr", "new", "--hook", "blocks.0.hook_resid_post"], f"did you mean: {HOOK}"),
    (["store", "copy", "acts.zarr", "new", "--documents", "5"], "--documents: expected A:B"),
    (["store", "copy", "acts.zarr", "new", "--documents", "3:99"], "expected a range inside 0:12"),
    (["store", "copy", "acts.zarr", "new", "--rows", "-4:9"], "rows: expected a range inside"),
    (["store", "copy", "acts.zarr", "new", "--compress", "int9"], "did you mean: int8"),
    (["store", "copy", "acts.zarr", "http://127.0.0.1:9/x"], "http cannot be written to"),
    (["store", "copy", "newer.zarr", "new"], "format 2, this tcsae reads 1; upgrade tcsae"),
    (["store", "card", "acts.zarr", "--out", "notes"], "notes: is a directory; see that the path is right"),
    (
        ["train", "acts.zarr", "s3://lab/run", "--recipe", "block"],
        "expected a folder on this machine, got a URL",
    ),
    (["train", "flipped.zarr", "new", "--recipe", "block", "--tokens", "2000"], "batch"),
]


CASES = [(["harvest", *given], said) for given, said in HARVESTS] + OTHERS


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(given) for given, _ in CASES])
def test_bad_input_is_one_line_that_says_what_to_do_and_loses_nothing(folder, arguments, message):
    before = hashes(folder)
    # an option that is given again goes over the first, but hooks add up
    common = [part for part in SOURCE if not ("--hook" in arguments and part in ("--hook", HOOK))]
    given = [*arguments[:2], *common, *arguments[2:]] if arguments[0] == "harvest" else arguments
    done = tcsae(*given, cwd=folder)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert last.startswith("tcsae: ")
    assert message in last
    assert "Traceback" not in done.stderr
    after = {name: value for name, value in hashes(folder).items() if not name.startswith(".cache")}
    assert after == {name: value for name, value in before.items() if not name.startswith(".cache")}


def test_broken_lines_are_skipped_and_counted_and_the_store_is_whole(folder, tmp_path):
    lines = (folder / "corpus.jsonl").read_bytes().splitlines()
    corpus = tmp_path / "mixed.jsonl"
    corpus.write_bytes(
        b"\n".join([lines[0], b'{"text": "cut', b"\xff\xfe", *lines[1:], b'{"text": ""}']) + b"\n"
    )
    source = ["--model", str(folder / "model"), "--corpus", str(corpus), "--hook", HOOK]
    done = tcsae("harvest", "s.zarr", *source, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["documents"] == 12
    assert found["skipped"] == {"not JSON": 1, "not UTF-8": 1, "empty": 1}
    assert "mixed.jsonl, line 2" in done.stderr
    assert verify(tmp_path / "s.zarr").is_good


def test_verify_says_every_bad_chunk_on_stdout_and_exits_1(folder):
    done = tcsae("store", "verify", "flipped.zarr", cwd=folder)
    assert done.returncode == 1
    assert "c/1/0: CRC-32C" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert done.stderr.strip().splitlines()[-1].startswith("tcsae: flipped.zarr: 1 problem")
    assert tcsae("store", "verify", "acts.zarr", cwd=folder).returncode == 0
