"""SAE folders: SAELens' format to the letter, and refusals in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcsae.store.errors import RunError, RunNotFound, TcsaeError
from tcsae.train import SAE, load_sae, save_sae


def example(architecture: str = "jumprelu", **more: Any) -> SAE:
    draw = torch.Generator().manual_seed(0)
    extra: dict[str, Any] = {"jumprelu": {"threshold": torch.rand(6, generator=draw)}, "topk": {"k": 3}}.get(
        architecture, {}
    )
    return SAE(
        architecture=architecture,  # type: ignore[arg-type]
        W_enc=torch.randn(4, 6, generator=draw),
        b_enc=torch.randn(6, generator=draw),
        W_dec=torch.randn(6, 4, generator=draw),
        b_dec=torch.randn(4, generator=draw),
        **(extra | more),
    )


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_a_saved_sae_loads_with_the_same_outputs_and_fields(tmp_path: Path, architecture: str) -> None:
    metadata = {"model_name": "m", "hook_name": "h", "tcsae": {"arm": "tc16", "recipe": {"alpha": 0.05}}}
    saved = example(architecture, block_size=2, name="tc16-s3", metadata=metadata)
    save_sae(saved, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(x), saved(x))
    assert (loaded.architecture, loaded.k, loaded.block_size, loaded.name) == (
        architecture,
        saved.k,
        2,
        "tc16-s3",
    )
    assert loaded.metadata["hook_name"] == "h"
    assert loaded.metadata["tcsae"]["recipe"] == {"alpha": 0.05}


def test_the_files_are_those_of_saelens(tmp_path: Path) -> None:
    save_sae(example(metadata={"hook_name": "blocks.3.hook_resid_post", "prepend_bos": True}), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "jumprelu",
        "d_in": 4,
        "d_sae": 6,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert set(metadata) == {
        "sae_lens_version",
        "sae_lens_training_version",
        "model_name",
        "model_class_name",
        "hook_name",
        "hook_head_index",
        "context_size",
        "prepend_bos",
        "seqpos_slice",
        "dataset_path",
        "model_from_pretrained_kwargs",
        "exclude_special_tokens",
        "tcsae",
    }
    # Below version 6, or without one, SAELens would drop the metadata silently.
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,), "threshold": (6,)}


def test_topk_writes_the_k_that_saelens_would_otherwise_guess(tmp_path: Path) -> None:
    save_sae(example("topk"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["k"], config["rescale_acts_by_decoder_norm"]) == (3, False)


def test_a_peers_sae_that_does_not_subtract_b_dec_gives_the_peers_output(tmp_path: Path) -> None:
    sae = example("standard")
    save_sae(sae, tmp_path)
    _edit(tmp_path, apply_b_dec_to_input=False)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = (x @ sae.W_enc + sae.b_enc).relu()
    torch.testing.assert_close(load_sae(tmp_path).encode(x), expected)


def _edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | fields))


def _change_weight(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "sae_weights.safetensors")
        save_file(tensors | {name: value}, folder / "sae_weights.safetensors")
        config = json.loads((folder / "cfg.json").read_text())
        config["metadata"].pop("tcsae", None)  # as a peer's folder, which has no checksum of ours
        (folder / "cfg.json").write_text(json.dumps(config))

    return damage


def _overflow_when_folded(folder: Path) -> None:
    _change_weight("b_dec", torch.full((4,), 3e38))(folder)
    # 4 x 3e38 is beyond float32, whose largest is 3.4e38
    _change_weight("W_enc", torch.ones(4, 6))(folder)
    _edit(folder, apply_b_dec_to_input=False)


def _as_pickle(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()
    (folder / "ae.pt").write_bytes(pickle.dumps({"W_enc": 1}))


def _flip_bit(folder: Path) -> None:
    content = bytearray((folder / "sae_weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "sae_weights.safetensors").write_bytes(content)


def _pickle_under_our_name(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps({"W_enc": 1}))
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["tcsae"]
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / "cfg.json").unlink(), RunNotFound, "cfg.json: no such file"),
        (lambda p: (p / "sae_weights.safetensors").unlink(), RunNotFound, "no such file"),
        (_as_pickle, RunNotFound, "ae.pt is a pickle and is never opened"),
        (_pickle_under_our_name, RunError, "not a safetensors file"),
        (lambda p: _edit(p, architecture="gated"), TcsaeError, "unknown architecture 'gated'"),
        (lambda p: _edit(p, d_sae=7), RunError, r"W_enc has shape \(4, 6\), expected \(4, 7\)"),
        (lambda p: _edit(p, d_in="4"), RunError, "field 'd_in' is '4', expected int"),
        (lambda p: _edit(p, d_in=True), RunError, "field 'd_in' is True, expected int"),
        (lambda p: _edit(p, metadata=[1]), RunError, r"field 'metadata' is \[1\], expected dict"),
        (
            lambda p: _edit(p, metadata={"tcsae": "x"}),
            RunError,
            "field 'metadata.tcsae' is 'x', expected dict",
        ),
        (
            lambda p: _edit(p, metadata={"tcsae": {"block_size": "2"}}),
            RunError,
            "field 'metadata.tcsae.block_size' is '2', expected int",
        ),
        (
            lambda p: _edit(p, metadata={"tcsae": {"weights_sha256": 5}}),
            RunError,
            "field 'metadata.tcsae.weights_sha256' is 5, expected str",
        ),
        (lambda p: _edit(p, architecture="topk", k="3"), RunError, "field 'k' is '3', expected int"),
        (lambda p: _edit(p, normalize_activations="layer_norm"), RunError, "fold it into the weights"),
        (
            _change_weight("b_enc", torch.full((6,), torch.nan)),
            RunError,
            "sae_weights.safetensors: b_enc holds 6 NaN or infinite of 6 values",
        ),
        (
            _change_weight("b_enc", torch.full((6,), 1e300, dtype=torch.float64)),
            RunError,
            "b_enc holds 6 NaN or infinite of 6 values in float32",
        ),
        (_overflow_when_folded, RunError, "b_enc with b_dec @ W_enc folded into it holds 6 NaN or infinite"),
        (
            _change_weight("b_enc", torch.zeros(6, dtype=torch.float8_e4m3fn)),
            RunError,
            "b_enc is of float8_e4m3fn, expected one of float32, float16, bfloat16, float64",
        ),
        (_change_weight("b_enc", torch.zeros(6, dtype=torch.int32)), RunError, "b_enc is of int32"),
        (_change_weight("b_enc", torch.zeros(5)), RunError, r"b_enc has shape \(5,\)"),
        (_change_weight("extra", torch.zeros(1)), RunError, "expected"),
        (lambda p: (p / "cfg.json").write_text("{"), RunError, "not JSON"),
        (_flip_bit, RunError, "SHA-256"),
    ],
    ids=[
        "no configuration",
        "no weights",
        "a pickle instead of the weights",
        "a pickle named as the weights",
        "unknown architecture",
        "another width than the weights'",
        "a width that is text",
        "a width that is a truth value",
        "metadata that is a list",
        "our metadata is text",
        "a block size that is text",
        "a checksum that is a number",
        "a k that is text",
        "activations normalised outside the weights",
        "NaN",
        "too large for float32",
        "too large for float32 once folded",
        "eight bits",
        "whole numbers",
        "wrong shape",
        "one tensor too many",
        "configuration cut short",
        "a flipped bit",
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], error: type[TcsaeError], message: str
) -> None:
    save_sae(example(), tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
