"""Reading and writing activation stores, against the plain and the usual ways, in one run.

python -P benchmarks/store.py [--rows 900000] [--d-model 512] [--rounds 5] [--chunks 48] [--files 61036]
    [--folder DIR] [--only reading|writing|files]

Every line is measured in the same rounds, one after the other, and the medians of the rounds are printed, with the
ratio to the line that it is held against. Reading is with a warm page cache: it is about the way, not the disk.
Writing is to the disk that --folder is on, and what fsync costs there decides: a file system in memory says nothing.
"SAELens' path" is how its cached-activations store reads: a Hugging Face dataset in torch format, sliced.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import google_crc32c
import numpy as np
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from tcsae.store import ActivationStore, Layout, Provenance, StoreWriter, split_of
from tcsae.store.chunks import chunk_path, map_chunk, map_raw
from tcsae.store.layout import documents_table
from tcsae.store.mapped import RESIDENT_VARIABLE

HOOK = "blocks.0.hook_resid_post"
CHUNK = 16384
CONTEXT = 127


def layout_of(n_rows: int) -> Layout:
    """Documents of 4 contexts of 127 rows."""
    document_offsets = np.unique(np.append(np.arange(0, n_rows, 4 * CONTEXT), n_rows))
    context_offsets = np.unique(np.append(np.arange(0, n_rows, CONTEXT), n_rows))
    ids = [str(i) for i in range(len(document_offsets) - 1)]
    table = documents_table(
        {
            "id": ids,
            "source": ["benchmark"] * len(ids),
            "topic": ["none"] * len(ids),
            "split": [split_of(name) for name in ids],
            "n_tokens": np.diff(document_offsets).tolist(),
            "sha256": [""] * len(ids),
        }
    )
    return Layout(np.zeros(n_rows, dtype=np.int32), document_offsets, context_offsets, table)


def provenance(d_model: int) -> Provenance:
    """Of a store that no model made."""
    return Provenance(
        model="benchmark",
        model_revision="",
        model_sha256="",
        tokenizer_sha256="",
        hooks=(HOOK,),
        d_model=d_model,
        context_length=CONTEXT + 1,
        bos_token_id=0,
        special_token_ids=(0,),
        vocab_size=1,
        dtype="float16",
        precision="float32",
        rows_per_chunk=CHUNK,
        corpus="benchmark",
        corpus_sha256="",
        max_tokens=None,
        versions={},
        created="2026-01-01",
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(
    title: str,
    cases: dict[str, Callable[[], object]],
    amount: float,
    unit: str,
    rounds: int,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Print the median rate of each case and its ratio to the first one; ``between`` is not measured."""
    for work in cases.values():
        between()
        work()
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            between()
            seconds[name].append(timed(work))
    base = statistics.median(next(iter(seconds.values())))
    print(f"\n{title}")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{amount / max(values):8.3f} to {amount / min(values):8.3f}"
        print(f"  {name:<34} {amount / median:9.3f} {unit}   ({spread})   x {base / median:6.3f}")


def main() -> None:
    """Make the data in a temporary folder, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=900_000)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=48, help="chunks to write in a round")
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    parser.add_argument("--only", choices=["reading", "writing", "files"])
    parser.add_argument("--files", type=int, default=61_036, help="a hook's chunk files at a billion rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only in (None, "reading"):
            reading(Path(folder), options.rows, options.d_model, options.rounds)
        if options.only in (None, "writing"):
            writing(Path(folder), options.d_model, options.chunks, options.rounds)
        if options.only in (None, "files"):
            files(Path(folder), options.files)


def file_system(folder: Path) -> str:
    """Kind of the file system that ``folder`` is on, as Linux names it."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    # field 5 is where it is mounted; its kind follows the "-"
    found = [(m[4], m[m.index("-") + 1]) for m in mounts if folder.resolve().is_relative_to(m[4])]
    return max(found, key=lambda mount: len(mount[0]))[1]


def reading(folder: Path, n_rows: int, d_model: int, rounds: int) -> None:
    """Sequential batches of 4096 rows and random windows of 16 and 64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows, d_model, generator=generator).half()
    with StoreWriter.create(folder / "store.zarr", layout_of(n_rows), provenance(d_model)) as writer:
        for chunk in range(writer.n_chunks):
            start, stop = writer.rows_of(chunk)
            writer.write(HOOK, chunk, rows[start:stop])
        writer.finish()
    rows.numpy().tofile(folder / "flat.bin")
    flat = np.memmap(folder / "flat.bin", dtype=np.float16, mode="r", shape=(n_rows, d_model))
    store = ActivationStore.open(folder / "store.zarr")
    os.environ[RESIDENT_VARIABLE] = "1000"
    unbounded = ActivationStore.open(folder / "store.zarr")
    del os.environ[RESIDENT_VARIABLE]
    plain = zarr.open_array(str(folder / "store.zarr" / "activations" / HOOK), mode="r")
    contexts = rows[: n_rows // 128 * 128].view(-1, 128, d_model)
    kind = datasets.Features({HOOK: datasets.Array2D(shape=(128, d_model), dtype="float16")})
    datasets.Dataset.from_dict({HOOK: contexts.numpy()}, features=kind).save_to_disk(str(folder / "saelens"))
    peer = datasets.load_from_disk(str(folder / "saelens")).with_format("torch")
    maps = [
        np.memmap(path, dtype=np.float16, mode="r")[:-2].reshape(CHUNK, d_model)
        for path in sorted(
            (folder / "store.zarr" / "activations" / HOOK / "c").glob("*/0"), key=lambda p: int(p.parts[-2])
        )
    ]
    del rows, contexts

    batch = 4096
    starts = range(0, n_rows - batch + 1, batch)
    out = torch.empty(batch, d_model, dtype=torch.float16)
    table(
        f"sequential batches of {batch} rows, M rows/s",
        {
            "plain memory map of a flat file": lambda: [
                np.copyto(out.numpy(), flat[s : s + batch]) for s in starts
            ],
            # copied by numpy as well: torch's own copy is threaded, and stalls while another job has the cores
            "tcsae": lambda: [np.copyto(out.numpy(), store.rows(s, s + batch).numpy()) for s in starts],
            "zarr-python": lambda: [np.copyto(out.numpy(), plain[s : s + batch]) for s in starts],
            "SAELens' path": lambda: [peer[s // 128 : (s + batch) // 128][HOOK] for s in starts],
        },
        len(starts) * batch / 1e6,
        "M rows/s",
        rounds,
    )
    for length in (16, 64):
        n_windows = 4000  # of a store above the bound on resident maps, some are given up meanwhile
        at = np.random.default_rng(0).integers(0, n_rows // 128 - 1, n_windows) * 128
        window = torch.empty(length, d_model, dtype=torch.float16)

        def by_hand(length: int = length, at: np.ndarray = at, window: torch.Tensor = window) -> None:
            for start in at:
                chunk, offset = divmod(int(start), CHUNK)
                np.copyto(window.numpy(), maps[chunk][offset : offset + length])

        def ours(
            store: ActivationStore, length: int = length, at: np.ndarray = at, window: torch.Tensor = window
        ) -> None:
            for start in at:
                window.copy_(store.rows(int(start), int(start) + length))

        few = at[:20]
        rates = {
            "hand-written memory-map loop": (by_hand, n_windows),
            "tcsae": (partial(ours, store), n_windows),
            "tcsae, all of it may be resident": (partial(ours, unbounded), n_windows),
            "zarr-python": (lambda length=length, few=few: [plain[s : s + length] for s in few], len(few)),
            "SAELens' path": (lambda few=few: [peer[int(s) // 128][HOOK] for s in few], len(few)),
        }
        print(f"\nrandom windows of {length} rows")
        medians = {}
        for work, _ in rates.values():
            work()
        for name, (work, n) in rates.items():
            medians[name] = statistics.median(timed(work) / n for _ in range(rounds))
        for name, median in medians.items():
            ratio = medians["tcsae"] / median
            print(
                f"  {name:<34} {length / median / 1e6:9.4f} M rows/s   tcsae is x {1 / ratio if ratio else 0:8.3f}"
            )


def writing(folder: Path, d_model: int, n: int, rounds: int) -> None:
    """One chunk at a time, to new files; removing the files of the round before is not measured.

    Ours has the plan included, and ends when every chunk is synced and in its place. The flat file is one file of the
    same rows, without checks: synced after each chunk's worth of rows, as sure as ours, and once at the end.
    """
    chunk = torch.randn(CHUNK, d_model).half()
    made = provenance(d_model)
    full = layout_of(n * CHUNK)

    def ours() -> None:
        with StoreWriter.create(folder / "written.zarr", full, made) as writer:
            for number in range(n):
                writer.write(HOOK, number, chunk)

    def remove() -> None:
        for name in ("written.zarr", "plain.zarr"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "written.bin").unlink(missing_ok=True)
        os.sync()

    def flat(synced: range) -> None:
        with (folder / "written.bin").open("wb", buffering=0) as file:
            for number in range(n):
                file.write(chunk.numpy().data)
                if number in synced:
                    os.fsync(file.fileno())

    def plain() -> None:
        array = zarr.create_array(
            str(folder / "plain.zarr"),
            shape=(n * CHUNK, d_model),
            chunks=(CHUNK, d_model),
            dtype="float16",
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
        )
        for number in range(n):
            array[number * CHUNK : (number + 1) * CHUNK] = chunk.numpy()

    table(
        f"writing {n} chunks of {chunk.numel() * 2 / 1e6:.1f} MB on {file_system(folder)}, GB/s",
        {
            "flat file, fsync each chunk": lambda: flat(range(n)),
            "flat file, one fsync at the end": lambda: flat(range(n - 1, n)),
            "flat file, no fsync": lambda: flat(range(0)),
            "tcsae (checks, CRC, fsync, rename)": ours,
            "zarr-python": plain,
        },
        n * chunk.numel() * 2 / 1e9,
        "GB/s",
        rounds,
        remove,
    )


def files(folder: Path, n: int) -> None:
    """What many chunk files cost beyond their bytes: files of one short row, laid out as a hook's chunks are."""
    made = replace(provenance(8), rows_per_chunk=1)
    body = np.zeros(16, dtype=np.uint8)
    paths = [chunk_path(folder / "files.zarr", HOOK, number) for number in range(n)]

    def write() -> None:
        for path in paths:
            path.parent.mkdir(parents=True)
            path.write_bytes(body.tobytes() + google_crc32c.value(body).to_bytes(4, "little"))

    ways: dict[str, Callable[[], object]] = {
        "make folder and file, no fsync": write,
        "list": lambda: sum(len(names) for _, _, names in os.walk(folder / "files.zarr")),
        "map and verify": lambda: [map_raw(path, 20) and None for path in paths],
        "map again": lambda: [map_chunk(str(path), made) is None for path in paths],
        "remove": lambda: shutil.rmtree(folder / "files.zarr"),
    }
    print(f"\n{n} chunk files on {file_system(folder)}, microseconds each (of them on the processor)")
    for name, work in ways.items():
        busy = time.process_time()
        seconds = timed(work)
        print(f"  {name:<34} {seconds / n * 1e6:9.1f} ({(time.process_time() - busy) / n * 1e6:.1f})")


if __name__ == "__main__":
    main()
