"""What the fields of a provenance are in JSON: a shared store's attributes may be anything."""

from __future__ import annotations

import sys
from typing import Any

JSON_TYPES: dict[type, tuple[str, ...]] = {
    str: (
        *("model", "model_revision", "model_sha256", "tokenizer_sha256", "dtype", "precision"),
        *("corpus", "corpus_sha256", "created", "codec"),
    ),
    int: ("d_model", "context_length", "bos_token_id", "vocab_size", "rows_per_chunk", "max_tokens"),
    list: ("hooks", "special_token_ids"),
    dict: ("versions", "codec_configuration", "codec_effect", "derived_from", "truth"),
}
"""What each field of a `Provenance` is in JSON."""

NULLABLE = ("bos_token_id", "max_tokens", "derived_from", "truth")
"""fields that may be null instead"""

PARTS = {"hooks": str, "special_token_ids": int, "codec_configuration": dict, "codec_effect": dict}
"""what the entries of a list or the values of an object are"""


def type_problem(values: dict[str, Any]) -> str | None:
    """What is wrong with the types of a provenance's fields, or None; exact, for true is no number in JSON."""
    for kind, names in JSON_TYPES.items():
        for name in names:
            if name not in values or (values[name] is None and name in NULLABLE):
                continue
            found = values[name]
            if type(found) is not kind:
                return f"{name}: expected {kind.__name__}, got {type(found).__name__}"
            if name in PARTS:
                for one in values[name] if kind is list else values[name].values():
                    if type(one) is not PARTS[name]:
                        return f"{name}: expected {PARTS[name].__name__} for each, got {type(one).__name__}"
    for hook, effect in values.get("codec_effect", {}).items():
        if not all(map(is_finite_number, effect.values())):
            return f"codec_effect: {hook}: expected finite numbers"
    return None


def is_finite_number(value: Any) -> bool:
    """Whether ``value`` is a number of JSON that a float64 holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
