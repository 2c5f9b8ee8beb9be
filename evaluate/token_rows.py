"""Rows of token ids from a file, in its order: so that others can be held against us on the very same text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tcsae.evaluate.heldout import Batch
from tcsae.evaluate.splice import ReplayModel
from tcsae.store.errors import ConfigError

MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Contexts of one length, as the model reads them."""

    path: Path
    """the file"""
    ids: Int64[np.ndarray, "row position"]
    """token ids, BOS included where the model is to see one"""
    sha256: str
    """over shape and ids"""

    @property
    def n_rows(self) -> int:
        """contexts, each of which is a unit of resampling"""
        return len(self.ids)

    @property
    def context_length(self) -> int:
        """tokens of a row"""
        return int(self.ids.shape[1])

    @property
    def n_tokens(self) -> int:
        """tokens of all rows, special ones included"""
        return int(self.ids.size)

    def check(self, vocab_size: int, max_context: int | None, special: tuple[int, ...]) -> None:
        """Refuse rows that a model cannot read, or whose tokens are all special.

        Raises
        ------
        ConfigError
            an id is not in the vocabulary, rows are longer than the model takes, or nothing is left to measure
        """
        wrong = np.argwhere((self.ids < 0) | (self.ids >= vocab_size))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ConfigError(
                f"{self.path}: row {row}, column {column}: token {self.ids[row, column]} is not in 0.."
                f"{vocab_size - 1}, the model's vocabulary ({len(wrong)} such tokens); tokenise with the model's "
                "own tokenizer"
            )
        if max_context is not None and self.context_length > max_context:
            raise ConfigError(
                f"{self.path}: rows of {self.context_length} tokens, but the model reads at most {max_context}; "
                "cut them"
            )
        if np.isin(self.ids, special).all():
            raise ConfigError(
                f"{self.path}: every token is one of the special tokens {', '.join(map(str, special))}, which "
                "no figure counts; give rows of text"
            )

    def batches(self, batch_size: int, special: tuple[int, ...]) -> list[Batch]:
        """The rows in order, ``batch_size`` at a time; the last batch may be smaller."""
        found = []
        for start in range(0, self.n_rows, batch_size):
            ids = torch.from_numpy(self.ids[start : start + batch_size])
            found.append(
                Batch(
                    input_ids=ids,
                    keep=~torch.isin(ids, torch.tensor(special, dtype=torch.int64)),
                    length=(self.context_length,) * len(ids),
                    document=tuple(range(start, start + len(ids))),
                )
            )
        return found

    @torch.no_grad()
    def sample(
        self, hook: str, model: ReplayModel, batch_size: int, special: tuple[int, ...], most: int = 8192
    ) -> Float[Tensor, "token d_model"]:
        """Activations of kept tokens, float32, from the first batches, until there are ``most``."""
        found: list[Tensor] = []
        for batch in self.batches(batch_size, special):
            x = model.residuals(batch.input_ids, [hook])[hook]
            found.append(x[batch.keep.to(x.device)].float().cpu())
            if sum(map(len, found)) >= most:
                break
        return torch.cat(found)


def read_token_rows(path: Path) -> TokenRows:
    """The rows in a ``.npy`` file of integers [rows, context].

    Raises
    ------
    ConfigError
        no such file, no array of NumPy's, one that holds Python objects (never unpickled), damaged, not of two
        dimensions, not of integers, without a row, or of rows too short to predict anything
    """
    shape = "expected a .npy file of integers [rows, context], BOS included"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {shape}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{path}: not a .npy file; {shape}, as numpy.save writes it")
    try:
        # mapped first, so that a header which promises more than the file holds costs no memory
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read ({reason}); {shape}; pickles are never opened") from error
    if found.ndim != 2:
        raise ConfigError(f"{path}: has {found.ndim} dimensions of sizes {list(found.shape)}; {shape}")
    if found.dtype.kind not in "iu":
        raise ConfigError(f"{path}: holds {found.dtype}; {shape}")
    if not len(found) or found.shape[1] < 2:
        raise ConfigError(
            f"{path}: has shape {list(found.shape)}; expected at least one row of at least two tokens, else "
            "nothing is predicted"
        )
    # an id that int64 cannot hold becomes negative, which `TokenRows.check` refuses
    ids = np.array(found, dtype=np.int64)
    digest = hashlib.sha256(repr(ids.shape).encode() + ids.tobytes())
    return TokenRows(path, ids, digest.hexdigest())
