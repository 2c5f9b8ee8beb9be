"""The README.md of a store: what it is, from what it was made, and how to read it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tcsae.store.describe import Description, describe
from tcsae.store.effect import effect_on_saes
from tcsae.store.reader import ActivationStore

MOST = 12
"""lines of a table before it is cut"""


def write_card(store: ActivationStore | str | Path, decode: Callable[[list[int]], str] | None = None) -> str:
    """The card of a store as Markdown; writes no file (see `describe` for the parameters and errors)."""
    about = describe(store, decode)
    parts = [
        f"# Activations of {_text(about.model)}",
        f"{about.rows:,} activations of {_code(about.model)} in token order, with the boundaries of "
        f"{about.documents:,} documents and {about.contexts:,} contexts: a Zarr v3 group with a Parquet table, "
        "format 1 of tcsae.",
        _facts(about),
        _hooks(about),
        _documents(about),
        *_examples(about),
        _use(about),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(about: Description) -> str:
    lines = [
        ("id", _code(about.id)),
        ("model", _text(about.model)),
        ("corpus", _text(about.corpus)),
        ("rows x dimensions", f"{about.rows:,} x {about.d_model:,}"),
        ("stored as", f"{about.dtype}, codec {about.codec}; forward pass in {_text(about.precision)}"),
        ("chunk files a hook", f"{about.chunks:,}"),
        ("uncompressed", f"{about.bytes / 1e9:,.3f} GB"),
        ("made on", _text(about.created)),
    ]
    return _table(("", ""), lines)


def _hooks(about: Description) -> str:
    rows = []
    for hook in about.hooks:
        norms = about.norm_quantiles.get(hook)
        ratio, error = about.codec_ratio.get(hook), about.codec_error.get(hook)
        measured = [] if ratio is None else [f"{ratio:.2f} x smaller"]
        measured += [] if error is None else [f"error {error:.2g} of the variance"]
        effect = ", ".join(measured) or ("as harvested" if about.codec == "raw" else "not measured")
        quantiles, outliers = "no row in the train split", "-"
        if norms is not None:
            quantiles = " / ".join(f"{norms[q]:.4g}" for q in ("0.01", "0.5", "0.99", "1.0"))
            outliers = f"{about.outliers[hook]:,}"
        rows.append((_code(hook), quantiles, outliers, effect))
    header = ("hook", "norm: 1 % / median / 99 % / largest", "outliers", "codec, measured on a sample")
    note = "Norms and outliers (more than ten times the median) are those of the train split."
    return "\n\n".join([f"## Hooks\n\n{_table(header, rows)}", note, *_effect(about)])


def _effect(about: Description) -> list[str]:
    """What the codec costs an SAE; nothing where no row is changed."""
    if about.codec in ("raw", "lossless"):
        return []
    lines = "\n".join(f"- {sentence}" for sentence in effect_on_saes(about.codec))
    return [
        f"What `{about.codec}` costs a trained SAE, measured by benchmarks/codecs.py of tcsae:\n\n{lines}"
    ]


def _documents(about: Description) -> str:
    parts = ["## Documents"]
    for name, counts in (
        ("split", about.splits),
        ("source", about.sources),
        ("topic", about.documents_by_topic),
    ):
        rows = [(_text(value), f"{n:,}") for value, n in counts.items()]
        if len(rows) > MOST:
            rest = sum(counts.values()) - sum(list(counts.values())[:MOST])
            rows = [*rows[:MOST], (f"{len(rows) - MOST} more", f"{rest:,}")]
        parts.append(_table((name, "documents"), rows))
    return "\n\n".join(parts)


def _examples(about: Description) -> list[str]:
    if not about.examples:
        return []
    # an indented line is code: nothing in it is Markdown or HTML, and unlike a fence no text can end it
    return ["## A few beginnings\n\n" + "\n".join(f"    {_line(text)}" for text in about.examples)]


def _use(about: Description) -> str:
    return f"""## Reading it

```python
from tcsae.store import ActivationStore

store = ActivationStore.open({_string(about.path)})
store.rows(0, 16, {_string(about.hooks[0])})  # [16, {about.d_model}] {about.dtype}
store.document(0, {_string(about.hooks[0])})  # every token of the first document
store.tokens, store.document_offsets, store.context_offsets, store.documents
```

`tcsae store verify` reads every byte and compares it with the checksums; `tcsae store copy` copies it, whole or
in part. Any Zarr v3 reader opens it too{"" if about.codec in ("raw", "lossless") else " where tcsae is installed"}."""


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """``text`` on one line and without what Markdown would take for a border."""
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """``text`` on one line, without control characters: a terminal obeys those, and a store may be anyone's."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _text(text: str) -> str:
    """A foreign ``text`` that Markdown shows as it is, in a line or a cell."""
    return re.sub(r"([\\`*_\[\]<>&#~])", r"\\\1", _line(text))


def _code(text: str) -> str:
    """``text`` as inline code, in which a backtick cannot be escaped."""
    return "`" + _line(text).replace("`", "'") + "`"


def _string(text: str) -> str:
    """``text`` as a string of Python, on one line."""
    return json.dumps(text, ensure_ascii=not text.isprintable())
