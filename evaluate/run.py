"""`evaluate`: from SAE folders and a store to an evaluation folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.bench import About, Bench, Measured
from tcsae.evaluate.config import DEFAULT_SUITES, EvaluateConfig, Suite
from tcsae.evaluate.core import outliers_left_out
from tcsae.evaluate.estimates import RESULT_VERSION, Draws, Estimate, SuiteResult, read_result, write_result
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.plots import final_metrics
from tcsae.evaluate.probe_figures import SIZES, probe_name
from tcsae.evaluate.probe_samples import CONTEXT_TASKS, TOKEN_TASKS
from tcsae.evaluate.references import Material, reference_sample, references
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.subjects import (
    Origin,
    Subject,
    control_of,
    find_saes,
    load_subject,
    with_unique_names,
)
from tcsae.evaluate.suites import SUITES_IN_ORDER
from tcsae.evaluate.summary import Comparison, Evaluation, Row, replayed_documents, write_summary
from tcsae.evaluate.temporal import PRIMARY_METRIC, Part, compare_with_control, metric_name, parts_of
from tcsae.evaluate.temporal_references import reference_rows
from tcsae.evaluate.token_rows import TokenRows, read_token_rows
from tcsae.evaluate.truth_oracle import oracle_table
from tcsae.evaluate.truth_ranking import Ranking, rank, write_ranking
from tcsae.evaluate.unlearning_plot import read_unlearning_rows, unlearning_figure
from tcsae.harvest.model import LanguageModel
from tcsae.harvest.synthetic import truth_of_store
from tcsae.store.atomic import exclusive, partial_file
from tcsae.store.device import choose_device
from tcsae.store.errors import Interrupted, RunBusy
from tcsae.store.reader import ActivationStore

COMPARED_LAG = 8
"""Lag, in tokens, at which an SAE is compared with its control."""

COMPARED_METRICS = ("autocorrelation", PRIMARY_METRIC)
"""Temporal metrics that are compared with the control's, for every part of the dictionary."""

RECONSTRUCTION_METRICS = ("explained_variance", "loss_recovered", "kl_sae")
"""Compared with the control beside them: what the consistency cost."""

COMPARED_PROBES = tuple(
    probe_name(task, "H", size) for task in (*CONTEXT_TASKS, *TOKEN_TASKS) for size in SIZES
)
"""What H tells that the control's H does not, and whether it has taken a short cut."""


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure every SAE of ``config`` and write the evaluation folder.

    Each SAE and suite whose files are there with the same settings is read, not measured again, so an
    interrupted call is resumed by calling again.

    Raises
    ------
    RunNotFound
        a path holds no SAE
    StoreMismatch
        an SAE, the store and the model do not belong together, or the split is empty
    TrainingCollapsed
        an SAE holds NaN
    ConfigError
        two SAEs have the same name, there is no such device, or an SAE cannot be spliced at its hook
    RunBusy
        another process writes to the same folder
    Interrupted
        Ctrl-C; finished results stay
    """
    store = None if config.store is None else ActivationStore.open(config.store)
    rows = None if config.tokens is None else read_token_rows(config.tokens)
    folders = [folder for path in config.saes for folder in find_saes(path)]
    model = None
    if store is not None:
        origin = Origin.of_store(store)
    else:
        from tcsae.harvest.model import load_model

        assert config.model is not None  # the configuration rejects it
        model = load_model(config.model, device=config.device)
        origin = Origin.of_model(model)
    if rows is not None and model is not None:
        rows.check(model.vocab_size, model.max_context, model.special_token_ids)
    subjects = [load_subject(folder, origin) for folder in folders]
    subjects += _references(subjects, origin, store, rows, model, config)
    return evaluate_subjects(with_unique_names(subjects), store, config, rows=rows, model=model)


def _references(
    subjects: Sequence[Subject],
    origin: Origin,
    store: ActivationStore | None,
    rows: TokenRows | None,
    model: LanguageModel | None,
    config: EvaluateConfig,
) -> list[Subject]:
    """What is evaluated beside ``subjects``, at each of their hooks."""

    def sample(hook: str) -> Float[Tensor, "token d_model"]:
        if store is not None:
            return reference_sample(store, hook, config.seed)
        assert rows is not None
        assert model is not None
        return rows.sample(hook, cast(ReplayModel, model), config.batch_size, model.special_token_ids)

    first: dict[str, Subject] = {}
    for one in subjects:
        first.setdefault(one.hook, one)
    materials = [
        Material(one, origin, store, partial(sample, hook), config.seed) for hook, one in first.items()
    ]
    return references(config.references, materials, config.out / "references")


def evaluate_subjects(
    subjects: Sequence[Subject],
    store: ActivationStore | None,
    config: EvaluateConfig,
    *,
    rows: TokenRows | None = None,
    model: LanguageModel | None = None,
) -> Evaluation:
    """As `evaluate`, for SAEs, and perhaps a model, that are already loaded."""
    if store is not None and store.provenance.truth is not None and config.suites == DEFAULT_SUITES:
        config = replace(config, suites=(*DEFAULT_SUITES, "truth"))
    hooks = dict.fromkeys(one.hook for one in subjects)
    held_out = (
        {hook: HeldOut(store, hook, config.split) for hook in hooks}
        if store is not None and rows is None
        else {}
    )
    bench = Bench(config, store, held_out, rows, model)
    if rows is not None:
        model = bench.language_model
        rows.check(model.vocab_size, model.max_context, model.special_token_ids)
    # before anything is measured: the temporal suite alone can take long
    choose_device(config.device)
    for suite in SUITES_IN_ORDER:
        if suite.name in config.suites:
            suite.check(subjects, bench)
    busy = RunBusy(f"{config.out}: another process is evaluating into this folder; wait or choose another")
    try:
        with exclusive(config.out / ".lock", busy):
            return _finish(subjects, _results(subjects, bench), bench)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{config.out}: interrupted; finished results are kept, run the same command again to go on"
        ) from None


def _results(subjects: Sequence[Subject], bench: Bench) -> dict[tuple[Suite, str], SuiteResult]:
    """Every result of every suite, read where it is there with the same settings, else measured."""
    results: dict[tuple[Suite, str], SuiteResult] = {}
    suites = [suite for suite in SUITES_IN_ORDER if suite.name in bench.config.suites]
    missing: dict[Suite, list[Subject]] = {}
    prints: dict[tuple[Suite, str], str] = {}
    for suite in suites:
        missing[suite.name] = []
        for one in subjects:
            print_ = bench.fingerprint(suite.name, one, suite.decides(bench.config))
            prints[suite.name, one.name] = print_
            kept = read_result(*_paths(bench.config, suite.name, one), print_)
            if kept is None:
                missing[suite.name].append(one)
            else:
                results[suite.name, one.name] = kept
    for suite in suites:
        if not missing[suite.name]:
            continue
        asked = [prints[suite.name, one.name] for one in missing[suite.name]]
        for one, measured in suite.measure(missing[suite.name], asked, bench):
            _write(one, suite.name, measured, bench)
            results[suite.name, one.name] = measured.result
    return results


def _paths(config: EvaluateConfig, suite: Suite, one: Subject) -> tuple[Path, Path]:
    return config.out / suite / f"{one.name}.json", config.out / "draws" / suite / f"{one.name}.parquet"


def _write(one: Subject, suite: Suite, measured: Measured, bench: Bench) -> None:
    """A result's files, the JSON last: where it is, the result is whole."""
    if measured.features is not None:
        with partial_file(bench.config.out / "features" / f"{one.name}.parquet") as beside:
            pq.write_table(measured.features, beside, compression="zstd")
    write_result(*_paths(bench.config, suite, one), _envelope(one, measured, bench.about), measured.result)


def _envelope(one: Subject, measured: Measured, about: About) -> dict[str, Any]:
    """SAEBench's envelope, all of its keys but the unstructured part."""
    sae = one.sae
    return {
        "eval_type_id": measured.kind,
        "eval_config": measured.settings,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": measured.metrics,
        "eval_result_details": measured.details,
        "sae_bench_commit_hash": f"tcsae {version('tcsae')}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": one.name,
        "sae_lens_version": str(sae.metadata.get("sae_lens_version") or "unknown"),
        "sae_cfg_dict": {
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "model_name": about.model,
            "hook_name": one.hook,
            "context_size": about.context_length,
            "prepend_bos": about.has_bos,
            "dtype": "float32",
            "k": sae.k,
            "block_size": sae.block_size,
        },
    }


def _finish(
    subjects: Sequence[Subject],
    results: dict[tuple[Suite, str], SuiteResult],
    bench: Bench,
) -> Evaluation:
    """Summary, comparisons and figure from the results of all suites."""
    config, about = bench.config, bench.about
    rows = []
    for one in subjects:
        estimates: dict[str, Estimate] = {}
        draws: dict[str, Draws] = {}
        for suite in config.suites:
            estimates |= results[suite, one.name].estimates
            draws |= results[suite, one.name].draws
        rows.append(Row(one.name, one.arm, one.seed, one.sae.block_size, estimates, draws, one.origin))
    row_of = {row.sae: row for row in rows}
    comparisons = []
    for one in subjects:
        control = control_of(one, subjects)
        if control is not None:
            comparisons.append(_compare(one, row_of[one.name], row_of[control.name]))
    references: list[Row] = []
    if config.temporal_references:
        temporal = {name: result for (suite, name), result in results.items() if suite == "temporal"}
        references = reference_rows(subjects, temporal, bench)
    conditions = {
        "tcsae": version("tcsae"),
        "result_version": RESULT_VERSION,
        "store": None if bench.store_or_none is None else bench.store_or_none.id,
        "model": about.model,
        "model_sha256": about.model_sha256,
        "corpus": about.corpus,
        "hooks": list(dict.fromkeys(one.hook for one in subjects)),
        "n_documents": about.n_documents,
        "n_tokens": about.n_tokens,
        "suites": list(config.suites),
        "max_tokens": config.max_tokens,
        "batch_size": config.batch_size,
        **bench.conditions,
    }
    if bench.rows is not None:
        conditions |= {"tokens_sha256": bench.rows.sha256, "split": None, "max_tokens": None}
    replayed = replayed_documents(rows)
    left_out = {
        one.hook: outliers_left_out(results["core", one.name]) for one in subjects if "core" in config.suites
    }
    if replayed is not None:
        conditions |= {"n_replayed_documents": replayed, "n_outliers_left_out": left_out}
    figure = config.out / "final_metrics.png" if "core" in config.suites else None
    if figure is not None:
        of_them = f", KL on {replayed} of them" if bench.rows is None and replayed is not None else ""
        unit = "documents" if bench.rows is None else "rows"
        caption = (
            f"{about.model}, {', '.join(conditions['hooks'])}; {about.caption}{of_them}; "
            f"error bars: 95 % bootstrap intervals over {unit}"
        )
        n_outliers = sum(left_out.values())
        final_metrics(rows, figure, caption + (f"; {n_outliers} outlier rows left out" if n_outliers else ""))
    unlearned = config.out / "unlearning.png" if "unlearning" in config.suites else None
    if unlearned is not None:
        _draw_unlearning(unlearned, subjects, bench)
    ranking = _ranked(results, bench) if {"temporal", "truth"} <= set(config.suites) else None
    evaluation = Evaluation(
        config.out, (*rows, *references), tuple(comparisons), conditions, figure, ranking, unlearned
    )
    write_summary(evaluation)
    return evaluation


def _ranked(results: dict[tuple[Suite, str], SuiteResult], bench: Bench) -> Ranking:
    of = {
        wanted: {sae: found for (suite, sae), found in results.items() if suite == wanted}
        for wanted in ("temporal", "truth")
    }
    source, out = truth_of_store(bench.store), bench.config.out
    held_out = next(iter(bench.held_out.values()))  # a synthetic store has one hook
    oracle = oracle_table(held_out, source, out, seed=bench.config.seed)
    ranking = rank(of["temporal"], of["truth"], source, out, oracle)
    write_ranking(ranking, bench.config.out)
    return ranking


def _draw_unlearning(path: Path, subjects: Sequence[Subject], bench: Bench) -> None:
    hooks = ", ".join(dict.fromkeys(one.hook for one in subjects))
    unlearning_figure(
        read_unlearning_rows(_paths(bench.config, "unlearning", one)[0] for one in subjects),
        path,
        f"{bench.store.provenance.model}, {hooks}; split {bench.config.split}; stairs: the best setting that "
        "costs no more; dots: all settings",
    )


def _compare(one: Subject, treated: Row, control: Row) -> Comparison:
    parts: list[Part] = list(parts_of(one.sae))
    if one.sae.block_size:
        parts.append("best")
    names = [metric_name(part, COMPARED_LAG, metric) for metric in COMPARED_METRICS for part in parts]
    estimates: dict[str, Estimate] = {}
    for name in (*names, *RECONSTRUCTION_METRICS, *COMPARED_PROBES):
        if name not in treated.estimates:
            continue
        pair = compare_with_control(
            name, treated.draws.get(name), control.draws.get(name), treated.estimates[name].n_documents
        )
        estimates |= {estimate.metric: estimate for estimate in pair}
    # a block that training made against the one that hindsight finds in the control
    for metric in COMPARED_METRICS:
        block, best = (metric_name(part, COMPARED_LAG, metric) for part in ("H", "best"))
        if block in treated.estimates:
            pair = compare_with_control(
                f"{block}_against_best",
                treated.draws.get(block),
                control.draws.get(best),
                treated.estimates[block].n_documents,
            )
            estimates |= {estimate.metric: estimate for estimate in pair}
    return Comparison(treated.sae, control.sae, estimates)
