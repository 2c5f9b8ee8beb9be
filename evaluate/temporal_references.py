"""Rows to hold the temporal figures of SAEs against, one set for each hook.

raw
    each dimension of the activations as a feature. It has a sign and is never off, so autocorrelations and timescale
    are all there is; every other figure says why it is undefined
random
    random unit directions about the mean activation, on where the product passes one threshold for all features,
    as many features as the hook's first SAE has, on as often
averaged
    the first SAE's code followed by an exponential moving average over each context, `AVERAGE_TOKENS` long, on where it
    passes one threshold for all features, as often as the SAE: what persistence can be had for nothing

They have no seed of training and no control, and their files are called ``_reference-NAME`` beside those of the SAEs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import TemporalReference
from tcsae.evaluate.estimates import Estimate, SuiteResult, fingerprint
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.results import fields_of_reference, kept_result, write_measured
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.summary import Row
from tcsae.evaluate.temporal import metric_name, temporal_figures
from tcsae.evaluate.temporal_codes import LAGS, SKIPPED_POSITIONS
from tcsae.evaluate.temporal_count import SignedAccumulator
from tcsae.evaluate.temporal_encoders import (
    AVERAGE_TOKENS,
    AveragedEncoder,
    Encoder,
    SAEEncoder,
    random_directions,
    random_encoder,
)
from tcsae.evaluate.temporal_features import METRICS, autocorrelation_figures
from tcsae.evaluate.temporal_pass import (
    Advance,
    codes_of,
    n_tokens_read,
    parts_of_text,
    sample_blocks,
    units_of,
)
from tcsae.evaluate.temporal_suite import DEFINITIONS, measured, n_documents
from tcsae.evaluate.temporal_sums import TemporalSums
from tcsae.store.progress import progress

THRESHOLD_TOKENS = 2**13
"""Sample that a threshold is set on."""

SIGNED = "undefined, because a dimension of the activations has a sign and is never off"

DESCRIPTIONS: dict[TemporalReference, str] = {
    "raw": "raw activations",
    "random": "random encoder",
    "averaged": f"first SAE, averaged over {AVERAGE_TOKENS:g} tokens",
}


def reference_rows(
    subjects: Sequence[Subject], results: Mapping[str, SuiteResult], bench: Bench
) -> list[Row]:
    """The rows that were asked for, read where they are there with the same settings, else measured.

    ``results`` are those of the temporal suite, by name of the subject.
    """
    rows = []
    for hook, held_out in bench.held_out.items():
        first = next(one for one in subjects if one.hook == hook)
        for reference in bench.config.temporal_references:
            name = f"_reference-{reference}" + (f"-{hook}" if len(bench.held_out) > 1 else "")
            result = _result(reference, name, first, results[first.name].facts["l0"], held_out, bench)
            size = 0 if reference == "raw" else first.sae.block_size
            rows.append(Row(name, f"reference: {reference}", None, size, result.estimates, result.draws))
    return rows


def _result(
    reference: TemporalReference, name: str, first: Subject, l0: float, held_out: HeldOut, bench: Bench
) -> SuiteResult:
    config = bench.config
    print_ = fingerprint(
        suite="temporal",
        reference=DESCRIPTIONS[reference],
        definitions=DEFINITIONS,
        sae=None if reference == "raw" else first.digest,
        store=bench.store.id,
        hook=held_out.hook,
        **bench.conditions,
    )
    kept = kept_result(config.out, "temporal", name, print_)
    if kept is not None:
        return kept
    with progress(n_tokens_read(held_out), "token", f"temporal, {reference}") as bar:
        found = _measure(reference, first, l0, held_out, bench, print_, bar.update)
    write_measured(config.out, "temporal", name, found, fields_of_reference(DESCRIPTIONS[reference]))
    return found.result


def _measure(
    reference: TemporalReference,
    first: Subject,
    l0: float,
    held_out: HeldOut,
    bench: Bench,
    print_: str,
    advance: Advance,
) -> Measured:
    if reference == "raw":
        return _raw(held_out, bench, print_, advance)
    sae = first.sae.to(bench.device)
    build: Callable[[float], Encoder]
    if reference == "random":
        mean = torch.from_numpy(bench.store.statistics(held_out.hook).mean).float()
        directions = random_directions(sae.d_in, sae.d_sae, bench.config.seed)

        def build(threshold: float) -> Encoder:
            return SAEEncoder(random_encoder(directions, mean, threshold, sae.block_size).to(bench.device))
    else:

        def build(threshold: float) -> Encoder:
            return AveragedEncoder(sae, threshold)

    encoder = build(threshold_for(build(0.0), held_out, l0))
    return measured(encoder, held_out, bench, print_, advance)


def threshold_for(encoder: Encoder, held_out: HeldOut, l0: float) -> float:
    """The threshold that leaves ``l0`` features on per counted token of a sample, 0 where fewer are on without."""
    values, n = [], 0
    for contexts in sample_blocks(held_out, THRESHOLD_TOKENS):
        one = codes_of(encoder, held_out.block(contexts))
        values.append(one.value[one.counted.take(one.row)].numpy())
        n += int(one.counted.sum())
    found = np.concatenate(values)
    n_on = round(l0 * n)
    if n_on >= len(found):
        return 0.0
    return float(np.partition(found, len(found) - 1 - n_on)[len(found) - 1 - n_on])


def _raw(held_out: HeldOut, bench: Bench, print_: str, advance: Advance) -> Measured:
    """The dimensions of the activations as features."""
    config, d_model = bench.config, bench.store.d_model
    unit_of_document = units_of(held_out, d_model)
    total = TemporalSums.zeros(int(unit_of_document.max()) + 1, d_model, LAGS)
    accumulator = SignedAccumulator(total, unit_of_document)
    for blocks in parts_of_text(held_out):
        for contexts in blocks:
            block = held_out.block(contexts)
            counted = block.kept & (block.position >= SKIPPED_POSITIONS)
            accumulator.add(block.x, counted=counted, context=block.context, document=block.document)
            advance(len(counted))
        accumulator.finish()
    sums = total.without_empty_units()
    n = n_documents(sums, held_out)
    found, table = temporal_figures(
        sums,
        autocorrelation_figures(sums),
        block_size=0,
        n_documents=n,
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
        print_=print_,
    )
    estimates = dict(found.estimates)
    for metric in METRICS.values():
        for lag in LAGS if metric.has_lag else (None,):
            name = metric_name("whole", lag, metric.name)
            estimates.setdefault(name, Estimate.count(name, metric.unit, None, n, SIGNED))
    result = SuiteResult(print_, estimates, found.draws, found.facts)
    metrics = {"temporal": {name: estimate.value for name, estimate in estimates.items()}}
    return Measured(
        result=result, kind="tcsae_temporal", settings=bench.conditions, metrics=metrics, features=table
    )
