"""What a model and its tokenizer are, whatever files they came in: SHA-256 over tensors and vocabulary.

A hash over file bytes would tell the same weights apart when another library version has saved them, or when
they are sharded differently; a store shared between teammates must match in that case.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tcsae.store.errors import ModelNotFound


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model's tensors: name, dtype, shape and bytes of each, in the order of their names.

    Reads every weight once (1.5 GB/s). Of a model that has only PyTorch's older ``.bin`` files, those files
    are hashed whole, since to look inside them is to unpickle them.

    Raises
    ------
    ModelNotFound
        the folder holds no weights, or a file is no safetensors file or cut short
    """
    digest = hashlib.sha256()
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if not pickles:
            raise ModelNotFound(
                f"{folder}: expected *.safetensors with the model's weights, got none; save it again"
            )
        for path in pickles:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    tensors: list[tuple[str, dict[str, Any], mmap.mmap, int]] = []
    for path in shards:
        try:
            with safe_open(
                path, framework="numpy"
            ):  # refuses a header that makes no sense and a file cut short
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelNotFound(
                f"{path}: expected a safetensors file ({' '.join(str(error).split())}); copy it again"
            ) from error
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        tensors += [
            (name, entry, content, 8 + length) for name, entry in header.items() if name != "__metadata__"
        ]
    for name, entry, content, base in sorted(tensors, key=lambda found: found[0]):
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        start, stop = entry["data_offsets"]
        digest.update(memoryview(content)[base + start : base + stop])
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 over what turns text into ids: normaliser, splitting, vocabulary, merges and added tokens.

    Left out is what is never used here: truncation, padding and the template that adds BOS and EOS.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _json_sha256(tokenizer.get_vocab())
    return backend_sha256(backend.to_str())


def backend_sha256(tokenizer_json: str) -> str:
    """`tokenizer_sha256` of a fast tokenizer by what it is saved as."""
    whole = json.loads(tokenizer_json)
    return _json_sha256([whole[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")])


def _json_sha256(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
