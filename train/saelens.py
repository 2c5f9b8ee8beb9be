"""SAE folders in SAELens' own format (6.54): ``cfg.json`` and ``sae_weights.safetensors``.

Peers load such a folder as it is. Our own fields (block size, arm, seed, store, recipe) are under
``metadata.tcsae``, which SAELens keeps and ignores. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor

from tcsae.store.atomic import write_atomically
from tcsae.store.errors import ConfigError, RunError, RunNotFound, UnknownName
from tcsae.train.sae.inference import ARCHITECTURES, SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The format that is written. Without a version >= 6 SAELens drops the metadata without a word."""

_METADATA_DEFAULTS: dict[str, Any] = {
    "sae_lens_version": SAELENS_VERSION,
    "sae_lens_training_version": None,
    "model_name": None,
    "model_class_name": "HookedTransformer",
    "hook_name": None,
    "hook_head_index": None,
    "context_size": None,
    "prepend_bos": None,
    "seqpos_slice": [None],
    "dataset_path": None,
    "model_from_pretrained_kwargs": {},
    "exclude_special_tokens": False,
}
AGAIN = "copy or export it again"
"""What to do about a damaged folder."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What weights may be saved in; everything is computed in float32."""

_LARGEST_CONFIG = 1 << 20
"""Bytes of cfg.json beyond which it is refused: ours are a few kilobytes."""


def save_sae(sae: SAE, folder: Path) -> None:
    """Write ``sae`` to ``folder``, which SAELens and `load_sae` read.

    Each file appears whole or not at all, the weights first; ``cfg.json`` holds their SHA-256, so a folder
    that was replaced only by half does not load.
    """
    tensors = {
        field: weight.detach().to("cpu", torch.float32).contiguous()
        for field, weight in sae.state_dict().items()
    }
    weights = bytes_of_tensors(tensors)
    ours = {
        "format_version": 1,
        **sae.metadata.get("tcsae", {}),
        "name": sae.name,
        "block_size": sae.block_size,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**_METADATA_DEFAULTS, **sae.metadata, "tcsae": ours},
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_atomically(folder / WEIGHTS_FILE, weights)
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())


def load_sae(folder: str | Path) -> SAE:
    """The SAE in ``folder``, ours or any that SAELens 6 wrote with one of the three architectures.

    Raises
    ------
    RunNotFound
        a file is missing; a folder that holds a pickle instead is refused in the same line
    UnknownName
        an architecture that is none of standard, topk and jumprelu
    RunError
        a file is damaged, a tensor is missing, extra, of the wrong shape or dtype or not finite in float32, or
        the configuration asks for a transformation of the activations that is not in the weights
    """
    folder = Path(folder)
    for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not path.is_file():
            pickles = sorted(
                p.name for pattern in ("*.pt", "*.pth", "*.pkl", "*.bin") for p in folder.glob(pattern)
            )
            hint = f"; {', '.join(pickles)} is a pickle and is never opened" if pickles else ""
            raise RunNotFound(
                f"{path}: no such file; an SAE folder holds {CONFIG_FILE} and {WEIGHTS_FILE}, as SAELens "
                f"writes them{hint}"
            )
    config = _read_config(folder / CONFIG_FILE)
    weights = (folder / WEIGHTS_FILE).read_bytes()
    metadata = dict(config.get("metadata") or {})
    ours = metadata.get("tcsae", {})
    if ours.get("weights_sha256", digest := hashlib.sha256(weights).hexdigest()) != digest:
        raise RunError(
            f"{folder / WEIGHTS_FILE}: its SHA-256 is {digest[:12]}…, {CONFIG_FILE} says "
            f"{ours['weights_sha256'][:12]}…; the folder is damaged, {AGAIN}"
        )
    tensors = _read_weights(folder / WEIGHTS_FILE, weights, config)
    if config.get("apply_b_dec_to_input", True) is False:
        # x @ W + b = (x - b_dec) @ W + (b + b_dec @ W)
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
        _check_finite(folder / WEIGHTS_FILE, "b_enc with b_dec @ W_enc folded into it", tensors["b_enc"])
    try:
        return SAE(
            architecture=config["architecture"],
            **tensors,
            k=config.get("k") if config["architecture"] == "topk" else None,
            block_size=ours.get("block_size", 0),
            name=ours.get("name", folder.name),
            metadata=metadata,
        )
    except ConfigError as error:
        raise RunError(f"{folder}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """``cfg.json`` as a dict, refused unless its transformations of the activations are the identity."""
    if path.stat().st_size > _LARGEST_CONFIG:
        raise RunError(
            f"{path}: {path.stat().st_size} bytes, more than {_LARGEST_CONFIG}; not an SAE's configuration"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); {AGAIN}") from error
    if not isinstance(config, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(config).__name__}; {AGAIN}")
    for field, kind in (("architecture", str), ("d_in", int), ("d_sae", int)):
        _check_type(path, field, config.get(field), kind)
    if config["architecture"] not in ARCHITECTURES:
        raise UnknownName(
            f"{path}: unknown architecture {config['architecture']!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    for field in ("normalize_activations", "reshape_activations"):
        if config.get(field, "none") != "none":
            raise RunError(
                f"{path}: {field} is {config[field]!r}, only 'none' is read; fold it into the weights first"
            )
    if config.get("rescale_acts_by_decoder_norm", False):
        raise RunError(f"{path}: rescale_acts_by_decoder_norm is true, only false is read")
    if config["architecture"] == "topk":
        _check_type(path, "k", config.get("k"), int)
    metadata = config.get("metadata") or {}
    _check_type(path, "metadata", metadata, dict)
    ours = metadata.get("tcsae", {})
    _check_type(path, "metadata.tcsae", ours, dict)
    for field, kind in (("block_size", int), ("weights_sha256", str), ("name", str)):
        _check_type(path, f"metadata.tcsae.{field}", ours.get(field, kind()), kind)
    return config


def _check_type(path: Path, field: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RunError(f"{path}: field {field!r} is {value!r}, expected {kind.__name__}; {AGAIN}")


def _read_weights(path: Path, weights: bytes, config: dict[str, Any]) -> dict[str, Tensor]:
    """Exactly the tensors of the architecture, each of the right shape and finite."""
    try:
        tensors = tensors_from_bytes(weights)
    except SafetensorError as error:
        raise RunError(f"{path}: not a safetensors file ({error}); pickles are never opened") from error
    d_in, d_sae = config["d_in"], config["d_sae"]
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config["architecture"] == "jumprelu":
        expected["threshold"] = (d_sae,)
    if tensors.keys() != expected.keys():
        raise RunError(f"{path}: tensors {sorted(tensors)}, expected {sorted(expected)}; {AGAIN}")
    for field, shape in expected.items():
        if tuple(tensors[field].shape) != shape:
            raise RunError(
                f"{path}: {field} has shape {tuple(tensors[field].shape)}, expected {shape}; {AGAIN}"
            )
        if tensors[field].dtype not in _DTYPES:
            raise RunError(
                f"{path}: {field} is of {_name(tensors[field].dtype)}, expected one of "
                f"{', '.join(map(_name, _DTYPES))}; convert it first"
            )
        tensors[field] = tensors[field].float()
        _check_finite(path, field, tensors[field])
    return tensors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_finite(path: Path, field: str, weight: Tensor) -> None:
    n_bad = int((~torch.isfinite(weight)).sum())
    if n_bad:
        raise RunError(
            f"{path}: {field} holds {n_bad} NaN or infinite of {weight.numel()} values in float32; its training "
            "collapsed, train it again"
        )
