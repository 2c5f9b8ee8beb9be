"""Codecs: what comes back, how large the error is, and that zarr reads every one of them."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from numcodecs.zstd import Zstd

from tcsae.store import ActivationStore, StoreWriter, codecs
from tcsae.store.chunks import chunk_path, read_chunk
from tcsae.store.copy import copy_store
from tcsae.store.errors import StoreCorrupt, UnknownName
from tcsae.store.verify import verify

HOOK = "blocks.0.hook_resid_post"


def stream(n_rows: int = 2000, d_model: int = 32) -> torch.Tensor:
    """Rows like a residual stream's: a mean, dimensions of different size, one of them huge, one outlier row."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(n_rows, d_model, generator=generator) * torch.linspace(0.5, 2.0, d_model) + 1.0
    rows[:, 5] *= 60.0
    rows[17] *= 200.0
    return rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["raw", "lossless"])
def test_lossless_codecs_return_the_same_bits(name, dtype):
    rows = stream().to(codecs.TORCH_DTYPES[dtype])
    codec = codecs.make_codec(name, dtype, codecs.fit(name, rows, dtype))
    assert torch.equal(codec.decode(codec.encode(rows), *rows.shape), rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("name", "most"), [("int8", 1e-3), ("uniform", 2e-3)])
def test_lossy_codecs_err_by_no_more_than_they_say(name, most, dtype):
    rows = stream().to(codecs.TORCH_DTYPES[dtype])
    codec = codecs.make_codec(name, dtype, codecs.fit(name, rows, dtype))
    assert 0 < codecs.relative_error(codec, rows) < most
    decoded = codec.decode(codec.encode(rows), *rows.shape)
    assert decoded.dtype == rows.dtype
    # the outlier is 200 times the others and still right to a few per cent of itself
    outlier = (decoded[17].double() - rows[17].double()).norm() / rows[17].double().norm()
    assert outlier < 0.02


def test_int8_keeps_the_huge_dimension_exactly():
    rows = stream().half()
    configuration = codecs.fit("int8", rows, "float16")
    assert configuration == {"large": [5]}
    codec = codecs.make_codec("int8", "float16", configuration)
    assert torch.equal(codec.decode(codec.encode(rows), *rows.shape)[:, 5], rows[:, 5])


def test_int8_by_hand():
    # scale 254 / 127 = 2; 3 / 2 rounds to 2 (ties to even), so 4 comes back
    rows = torch.tensor([[254.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    codec = codecs.Int8("float32", ())
    assert codec.decode(codec.encode(rows), 2, 3).tolist() == [[254.0, 4.0, 0.0], [0.0, 0.0, 0.0]]


def test_uniform_by_hand():
    # steps from the mean: (5 - 1) / 0.5 = 8, (1.3 - 1) / 0.5 = 0.6 -> 1; the second row has -100,000 steps, so
    # its factor is 100,000 / 32,767 and its 1.3 rounds to the mean
    rows = torch.tensor([[5.0, 1.3], [-49_999.0, 1.3]])
    codec = codecs.Uniform("float32", 0.5, (1.0, 1.0))
    first, second = codec.decode(codec.encode(rows), 2, 2)
    assert first.tolist() == [5.0, 1.5]
    torch.testing.assert_close(second, torch.tensor([-49_999.0, 1.0]))


@pytest.mark.parametrize("name", ["lossless", "int8", "uniform"])
def test_a_body_cut_short_is_an_error_not_zeros(name):
    rows = stream().half()
    codec = codecs.make_codec(name, "float16", codecs.fit(name, rows, "float16"))
    with pytest.raises(ValueError, match=r"\w"):
        codec.decode(codec.encode(rows)[:-100], *rows.shape)


@pytest.mark.parametrize("n", [4, 12], ids=["too few values", "too many values"])
def test_uniform_refuses_a_part_of_another_size_whose_compression_is_sound(n):
    # what memory held before must not come back as activations where a part is too short
    def part(size):
        return np.frombuffer(Zstd(level=1).encode(np.ones(size, np.uint8)), np.uint8)

    length, factors = np.array([part(n).size], "<u4").view(np.uint8), np.ones(2, np.float32).view(np.uint8)
    codec = codecs.Uniform("float16", 0.5, (0.0,) * 4)
    with pytest.raises(ValueError, match="ZSTD"):
        codec.decode(np.concatenate([length, factors, part(n), part(8)]), 2, 4)


def altered(good: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A chunk's body made into nonsense in one of six ways."""
    body, size = good.copy(), len(good)

    def noise(n: int) -> np.ndarray:
        return draw.integers(0, 256, n, dtype=np.uint8)

    match draw.integers(6):
        case 0:
            return noise(draw.integers(2 * size))
        case 1:
            return body[: draw.integers(size)]
        case 2:
            body[draw.integers(0, size, 3)] = noise(3)
        case 3:  # headers and lengths
            body[draw.integers(0, min(size, 64), 3)] = noise(3)
        case 4:
            body[draw.integers(size) :] = draw.integers(256)
        case _:
            at = draw.integers(size)
            return np.concatenate([body[:at], noise(draw.integers(1, 30)), body[at:]])
    return body


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["lossless", "int8", "uniform"])
def test_nonsense_under_a_good_checksum_is_named_or_decodes_to_finite_rows(
    make_provenance, tmp_path, name, dtype
):
    # Whoever writes nonsense may write its checksum too. Flipped codes are other numbers, which nothing can tell;
    # whatever else is wrong must be the store's own error.
    rows = stream(300, 16).to(codecs.TORCH_DTYPES[dtype])
    configuration = codecs.fit(name, rows, dtype)
    made = make_provenance(
        codec=name, codec_configuration={HOOK: configuration}, dtype=dtype, d_model=16, rows_per_chunk=300
    )
    good = codecs.make_codec(name, dtype, configuration).encode(rows)
    path, draw, refused = chunk_path(tmp_path, HOOK, 0), np.random.default_rng(0), list[str]()
    path.parent.mkdir(parents=True)
    for _ in range(300):
        body = altered(good, draw)
        path.write_bytes(body.tobytes() + google_crc32c.value(body.tobytes()).to_bytes(4, "little"))
        try:
            found = read_chunk(tmp_path, made, HOOK, 0)
        except StoreCorrupt as error:
            refused.append(str(error))
        else:
            assert found.shape == (300, 16)
            assert found.isfinite().all()
            assert torch.equal(found, read_chunk(tmp_path, made, HOOK, 0))
    assert len(refused) > 100
    assert all(said.startswith(f"{path}: ") and "\n" not in said for said in refused)


def test_an_unknown_codec_lists_the_known_ones(make_store):
    store = make_store(stream(100, 8), [100])
    with pytest.raises(UnknownName, match=r"did you mean: .*lossless"):
        copy_store(store.path, store.path.with_name("other"), codec="losless")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["lossless", "int8", "uniform"])
def test_zarr_reads_what_the_store_reads(make_store, tmp_path, name, dtype):
    store = make_store(stream(1000, 16), [100] * 10, dtype=dtype)
    copy_store(store.path, tmp_path / "small", codec=name)
    small = ActivationStore.open(tmp_path / "small")
    array = zarr.open_array(str(small.path / "activations" / HOOK), mode="r")
    ours = small.rows(0, 1000)
    bits = ours.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else ours.numpy()
    np.testing.assert_array_equal(array[:], bits)
    if name == "lossless":
        assert torch.equal(ours, store.rows(0, 1000))
    assert verify(small.path).problems == ()
    assert json.loads((small.path / "zarr.json").read_text())["attributes"]["codec"] == name


def test_decoded_chunks_are_kept_and_let_go(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.store.mapped.DECODED_BYTES", 3 * 300 * 16 * 2)
    rows = stream(1500, 16)
    store = make_store(rows, [100] * 15)
    copy_store(store.path, tmp_path / "small", codec="lossless")
    small = ActivationStore.open(tmp_path / "small")
    first = small.rows(0, 10)
    assert small.rows(5, 10)[0].data_ptr() == first[5].data_ptr()
    for start in (300, 600, 900, 1200):
        small.rows(start, start + 1)
    assert torch.equal(small.rows(0, 10), first)
    assert torch.equal(small.gather(torch.arange(1499, -1, -1)), store.rows(0, 1500).flip(0))


def test_several_threads_read_one_store_though_few_decoded_chunks_are_kept(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.store.mapped.DECODED_BYTES", 2 * 50 * 16 * 2)
    store = make_store(stream(1500, 16), [100] * 15, rows_per_chunk=50)
    copy_store(store.path, tmp_path / "small", codec="lossless")
    small, every = ActivationStore.open(tmp_path / "small"), store.rows(0, 1500)

    def read(seed: int) -> bool:
        draw = np.random.default_rng(seed)
        asked = [np.sort(draw.integers(1500, size=40)) for _ in range(30)]
        return all(torch.equal(small.gather(rows), every[rows]) for rows in asked)

    # A switch of threads after nearly every operation: without a lock a chunk goes between the look and the read.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(read, range(3)))
    finally:
        sys.setswitchinterval(before)


def test_damage_to_a_compressed_chunk_is_named(make_store, tmp_path):
    store = make_store(stream(1000, 16), [100] * 10)
    copy_store(store.path, tmp_path / "small", codec="uniform")
    chunk = tmp_path / "small" / "activations" / HOOK / "c" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[40] ^= 4
    chunk.write_bytes(content)
    with pytest.raises(StoreCorrupt, match="c/1/0: CRC-32C"):
        ActivationStore.open(tmp_path / "small").rows(0, 1000)


def test_a_plain_store_says_nothing_new_in_its_identity(make_provenance):
    # the ids of stores written before codecs came are hashes of these fields
    assert not {"codec", "codec_effect", "derived_from"} & set(make_provenance().to_dict())


def test_a_writer_encodes_as_its_provenance_says(make_layout, make_provenance, tmp_path):
    rows = stream(1000, 16)
    with StoreWriter.create(
        tmp_path / "s", make_layout([1000], 25), make_provenance(codec="lossless")
    ) as writer:
        for chunk in range(writer.n_chunks):
            writer.write(HOOK, chunk, rows[slice(*writer.rows_of(chunk))])
        writer.finish()
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(0, 1000), rows.half())
