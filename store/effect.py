"""What a lossy codec costs a trained SAE, as measured once: ``data/codec_effect.json``, in sentences.

``benchmarks/codecs.py`` measures it on one model, hook and corpus, which are named: on other activations it is a guide.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

FILE = "codec_effect.json"


def effect_on_saes(codec: str) -> tuple[str, ...]:
    """One sentence for each SAE that ``codec`` was measured on; none for a codec that was not.

    Differences are from the same SAE on uncompressed rows, with 95 % intervals over documents.
    """
    found = json.loads((resources.files("tcsae.data") / FILE).read_text(encoding="utf-8"))
    effect = found["codecs"].get(codec)
    if effect is None:
        return ()
    return tuple(_sentence(found, name, figures) for name, figures in effect["saes"].items())


def _sentence(found: dict[str, Any], name: str, figures: dict[str, Any]) -> str:
    sae = found["saes"][name]
    return (
        f"on {found['model']} {found['hook']}, SAE {name} (k = {sae['recipe']['k']}, L0 {sae['l0']:.1f}): "
        f"explained variance {_change(figures['explained_variance'])} ({found['n_documents']} held-out "
        f"documents), loss recovered {_change(figures['loss_recovered'])} "
        f"({found['n_documents_replayed']} of them, replayed)"
    )


def _change(figure: dict[str, float | None]) -> str:
    value, low, high = (figure[end] for end in ("value", "low", "high"))
    ends = "no interval" if low is None or high is None else f"{low:+.4f}, {high:+.4f}"
    return f"{'undefined' if value is None else f'{value:+.4f}'} [{ends}]"
