"""Token ids as text again, without the model and without the network: for showing what a store holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tcsae.harvest.locate import converted_folder
from tcsae.harvest.packaged import table
from tcsae.harvest.weights import backend_sha256
from tcsae.store.errors import ModelNotFound

TOKENIZER = "tokenizer.json"
"""what every fast tokenizer of Hugging Face is saved as"""


def local_decoder(model: str, revision: str, tokenizer_sha256: str) -> Callable[[list[int]], str]:
    """The function that turns ids into text as the tokenizer of a store's model does.

    Parameters
    ----------
    model, revision, tokenizer_sha256
        as the store's provenance has them: a folder, a packaged model or a hub name, of which the hub's cache
        is looked into and nothing is fetched

    Takes a quarter of a second: neither transformers nor torch's model code is imported.

    Raises
    ------
    ModelNotFound
        the tokenizer is not on this machine, is not of the fast kind, or is another one by now; says which
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(model, revision)
    if path is None:
        raise ModelNotFound(
            f"{model}: its tokenizer is not on this machine ({TOKENIZER} of a local folder, of a "
            "packaged model that was used before, or of the hub's cache)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # a plain Exception is what the library raises for any bad file
        raise ModelNotFound(f"{path}: cannot be read as a tokenizer ({error})") from error
    if (found := backend_sha256(tokenizer.to_str())) != tokenizer_sha256:
        raise ModelNotFound(
            f"{path}: another tokenizer than the store's: expected {tokenizer_sha256[:12]}…, got {found[:12]}…"
        )
    # an id that the tokenizer lacks has no text; of a negative one, which a damaged store may hold, it raises
    return lambda ids: str(tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=False))


def _tokenizer_file(model: str, revision: str) -> Path | None:
    packaged = table("models")
    if model in packaged:
        return _if_there(converted_folder(packaged[model]))
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return _if_there(folder)
    except (OSError, RuntimeError):  # too long for a path, or the home of a user who is not here
        return None
    return _in_hub_cache(model, revision)


def _if_there(folder: Path) -> Path | None:
    path = folder / TOKENIZER
    return path if path.is_file() else None


def _in_hub_cache(model: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, TOKENIZER, revision=revision or None)
    except (HFValidationError, OSError, ValueError):  # the folder of another machine is no hub name
        return None
    return Path(found) if isinstance(found, str) else None
