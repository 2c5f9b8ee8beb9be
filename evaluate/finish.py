"""From the results of all suites to what stands beside them: summary, comparisons with controls, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from tcsae.evaluate.bench import Bench
from tcsae.evaluate.config import Suite
from tcsae.evaluate.core import outliers_left_out
from tcsae.evaluate.estimates import RESULT_VERSION, Draws, Estimate, SuiteResult
from tcsae.evaluate.plots import final_metrics
from tcsae.evaluate.probe_figures import SIZES, probe_name
from tcsae.evaluate.probe_samples import CONTEXT_TASKS, TOKEN_TASKS
from tcsae.evaluate.results import paths_of
from tcsae.evaluate.subjects import Subject, control_of
from tcsae.evaluate.summary import Comparison, Evaluation, Row, replayed_documents, write_summary
from tcsae.evaluate.temporal import PRIMARY_METRIC, Part, compare_with_control, metric_name, parts_of
from tcsae.evaluate.temporal_references import reference_rows
from tcsae.evaluate.truth_oracle import oracle_table
from tcsae.evaluate.truth_ranking import Ranking, rank, write_ranking
from tcsae.evaluate.unlearning_plot import read_unlearning_rows, unlearning_figure
from tcsae.harvest.synthetic import truth_of_store

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

Results = Mapping[tuple[Suite, str], SuiteResult]
"""By suite and name of the SAE."""


def finish(
    subjects: Sequence[Subject],
    results: Results,
    bench: Bench,
) -> Evaluation:
    """Write summary, comparisons and figures, and measure the reference rows that were asked for."""
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


def _ranked(results: Results, bench: Bench) -> Ranking:
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
        read_unlearning_rows(paths_of(bench.config.out, "unlearning", one.name)[0] for one in subjects),
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
