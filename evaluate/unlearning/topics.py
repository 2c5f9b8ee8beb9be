"""Topics of a store as forget domains: what is drawn, and one SAE's sums for one topic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.intervals import Array
from tcsae.evaluate.splice import ReplayModel, Splicer
from tcsae.evaluate.unlearning.clamp import settings_of
from tcsae.evaluate.unlearning.domains import (
    MIN_DOCUMENTS,
    Domain,
    Indices,
    Sides,
    draw_contexts,
    find_domains,
    sides_of,
)
from tcsae.evaluate.unlearning.replay import (
    ClampedReplay,
    CleanContext,
    Outcome,
    clamped_outcome,
    clean_contexts,
)
from tcsae.evaluate.unlearning.score import TopicSums
from tcsae.evaluate.unlearning.select import Activity, activities
from tcsae.store.errors import ConfigError
from tcsae.store.reader import ActivationStore
from tcsae.train.sae.inference import SAE

SELECTION_TOKENS = 1 << 18
"""Stored tokens of a domain, and of what is outside it, that densities are counted on, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One domain and the contexts, by number in the store, that stand for it and for what is outside it."""

    domain: Domain
    """what is to be forgotten"""
    select_forget: Indices
    """features are selected on these"""
    select_retain: Indices
    """and on these"""
    scored_forget: Indices
    """clamped features are scored on these"""
    scored_retain: Indices
    """and on these"""


def draw_domains(store: ActivationStore, config: EvaluateConfig) -> tuple[Sides, list[Drawn]]:
    """The forget domains that ``config`` asks for and their contexts; no activation is read.

    Raises
    ------
    UnknownName, StoreMismatch
        as `find_domains`
    ConfigError
        ``domain_tokens`` are too few documents
    """
    sides = sides_of(store, config.split)
    drawn = []
    for domain in find_domains(store, sides, config.forget):
        inside, outside = domain.members, ~domain.members
        one = Drawn(
            domain,
            draw_contexts(store, inside & sides.selecting, SELECTION_TOKENS, config.seed),
            draw_contexts(store, outside & sides.selecting, SELECTION_TOKENS, config.seed),
            draw_contexts(store, inside & sides.scored, config.domain_tokens, config.seed),
            draw_contexts(store, outside & sides.scored, config.domain_tokens, config.seed),
        )
        for where, contexts in (("in", one.scored_forget), ("outside", one.scored_retain)):
            n_documents = len(np.unique(store.document_of_context[contexts]))
            if n_documents < MIN_DOCUMENTS:
                raise ConfigError(
                    f"domain_tokens: {config.domain_tokens} tokens are contexts of {n_documents} documents "
                    f"{where} {domain.column} {domain.name!r} of {store.url}; expected at least "
                    f"{MIN_DOCUMENTS} documents: raise --domain-tokens"
                )
        drawn.append(one)
    return sides, drawn


class TopicReplay:
    """The topics of one hook: the clean pass that all SAEs share, made when it is first needed."""

    def __init__(
        self,
        model: Callable[[], ReplayModel],
        store: ActivationStore,
        hook: str,
        drawn: Sequence[Drawn],
        batch_size: int,
    ) -> None:
        self._model = model
        self._held_out = HeldOut(store, hook, "all")
        self._drawn = drawn
        self._batch_size = batch_size
        self._pool: tuple[Splicer, list[CleanContext]] | None = None
        used = np.concatenate([part for one in drawn for part in (one.scored_forget, one.scored_retain)])
        self._contexts: Indices = np.unique(used)
        self.documents: Int64[np.ndarray, " document"] = np.unique(store.document_of_context[self._contexts])

    def activities(self, sae: SAE) -> list[Activity]:
        """How often the features fire inside and outside each domain."""
        return activities(
            sae, self._held_out, [(one.select_forget, one.select_retain) for one in self._drawn]
        )

    def sums(
        self, sae: SAE, one: Drawn, activity: Activity, seed: int, advance: Callable[[int], None]
    ) -> TopicSums:
        """Every setting of one topic; ``advance`` is told of each one that is done."""
        if self._pool is None:
            splicer = Splicer(self._model(), self._held_out.hook)
            self._pool = splicer, clean_contexts(splicer, self._held_out, self._contexts, self._batch_size)
        splicer, pool = self._pool
        used = set(one.scored_forget.tolist()) | set(one.scored_retain.tolist())
        contexts = [clean for clean in pool if clean.number in used]
        settings = settings_of(activity, seed)
        features = sorted({feature for setting in settings for feature in setting.features})
        replay = ClampedReplay(splicer, sae, contexts, features, self._batch_size)
        # fewer features than wanted make settings equal, which are then run once
        done: dict[tuple[float, tuple[int, ...]], Outcome] = {}
        outcomes = []
        for setting in settings:
            key = (setting.multiple, setting.features)
            if key not in done:
                values = [-setting.multiple * activity.mean_active[feature] for feature in setting.features]
                done[key] = clamped_outcome(replay, contexts, setting.features, values)
            outcomes.append(done[key])
            advance(1)
        owner = np.searchsorted(self.documents, [clean.document for clean in contexts])

        def by_document(values: Sequence[float] | Array) -> Array:
            sums = np.zeros((len(self.documents), *np.shape(values)[1:]))
            np.add.at(sums, owner, values)
            return sums

        return TopicSums(
            settings=tuple(settings),
            is_forget=one.domain.members[self.documents],
            n=by_document([float(clean.counted.sum()) for clean in contexts]),
            loss=by_document([float(clean.loss[clean.counted].sum()) for clean in contexts]),
            hits=by_document([float((clean.hit & clean.counted).sum()) for clean in contexts]),
            rise=by_document(np.stack([outcome.rise for outcome in outcomes], axis=1)),
            hits_with=by_document(np.stack([outcome.hits for outcome in outcomes], axis=1)),
        )
