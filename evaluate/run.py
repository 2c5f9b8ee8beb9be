"""`evaluate`: from SAE folders and a store to an evaluation folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.estimates import Draws, Estimate, SuiteResult, read_result, write_result
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.plots import final_metrics
from tcsae.evaluate.probe_figures import probe_name
from tcsae.evaluate.subjects import Subject, control_of, find_saes, load_subject, with_unique_names
from tcsae.evaluate.suites import SUITES_IN_ORDER
from tcsae.evaluate.summary import Comparison, Evaluation, Row, replayed_documents, write_summary
from tcsae.evaluate.temporal import compare_with_control, metric_name, parts_of
from tcsae.store.atomic import exclusive, partial_file
from tcsae.store.device import choose_device
from tcsae.store.errors import Interrupted, RunBusy
from tcsae.store.reader import ActivationStore

COMPARED_LAG = 8
"""Lag, in tokens, at which an SAE is compared with its control."""

RECONSTRUCTION_METRICS = ("explained_variance", "loss_recovered", "kl_sae")
"""Compared with the control beside the autocorrelation: what the consistency cost."""

COMPARED_PROBES = tuple(
    probe_name(task, "H", 20) for task in ("topic", "source", "position", "token", "previous_token")
)
"""What H tells more, and by which short cuts."""


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
    store = ActivationStore.open(config.store)
    subjects = with_unique_names(
        [load_subject(folder, store) for path in config.saes for folder in find_saes(path)]
    )
    return evaluate_subjects(subjects, store, config)


def evaluate_subjects(
    subjects: Sequence[Subject], store: ActivationStore, config: EvaluateConfig
) -> Evaluation:
    """As `evaluate`, for SAEs that are already loaded (reference SAEs, for instance)."""
    held_out = {
        hook: HeldOut(store, hook, config.split) for hook in dict.fromkeys(one.hook for one in subjects)
    }
    bench = Bench(config, store, held_out)
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
    write_result(*_paths(bench.config, suite, one), _envelope(one, measured, bench.store), measured.result)


def _envelope(one: Subject, measured: Measured, store: ActivationStore) -> dict[str, Any]:
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
            "model_name": store.provenance.model,
            "hook_name": one.hook,
            "context_size": store.provenance.context_length,
            "prepend_bos": store.provenance.bos_token_id is not None,
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
    config, store, held_out = bench.config, bench.store, bench.held_out
    rows = []
    for one in subjects:
        estimates: dict[str, Estimate] = {}
        draws: dict[str, Draws] = {}
        for suite in config.suites:
            estimates |= results[suite, one.name].estimates
            draws |= results[suite, one.name].draws
        rows.append(Row(one.name, one.arm, one.seed, one.sae.block_size, estimates, draws))
    row_of = {row.sae: row for row in rows}
    comparisons = []
    for one in subjects:
        control = control_of(one, subjects)
        if control is not None:
            comparisons.append(_compare(one, row_of[one.name], row_of[control.name]))
    first = next(iter(held_out.values()))
    made = store.provenance
    conditions = {
        "tcsae": version("tcsae"),
        "store": store.id,
        "model": made.model,
        "model_sha256": made.model_sha256,
        "corpus": made.corpus,
        "hooks": list(held_out),
        "n_documents": first.n_documents,
        "n_tokens": first.n_tokens,
        "suites": list(config.suites),
        "max_tokens": config.max_tokens,
        "batch_size": config.batch_size,
        **bench.conditions,
    }
    replayed = replayed_documents(rows)
    left_out = {
        one.hook: results["core", one.name].facts["store"]["n_outliers_left_out"]
        for one in subjects
        if "core" in config.suites
    }
    if replayed is not None:
        conditions |= {"n_replayed_documents": replayed, "n_outliers_left_out": left_out}
    figure = config.out / "final_metrics.png" if "core" in config.suites else None
    if figure is not None:
        caption = (
            f"{made.model}, {', '.join(held_out)}; {first.n_documents} {config.split} documents, KL on "
            f"{replayed} of them; error bars: 95 % bootstrap intervals over documents"
        )
        n_outliers = sum(left_out.values())
        final_metrics(rows, figure, caption + (f"; {n_outliers} outlier rows left out" if n_outliers else ""))
    evaluation = Evaluation(config.out, tuple(rows), tuple(comparisons), conditions, figure)
    write_summary(evaluation)
    return evaluation


def _compare(one: Subject, treated: Row, control: Row) -> Comparison:
    names = [metric_name(part, COMPARED_LAG) for part in parts_of(one.sae)]
    estimates: dict[str, Estimate] = {}
    for name in (*names, *RECONSTRUCTION_METRICS, *COMPARED_PROBES):
        if name not in treated.estimates:
            continue
        pair = compare_with_control(
            name, treated.draws.get(name), control.draws.get(name), treated.estimates[name].n_documents
        )
        estimates |= {estimate.metric: estimate for estimate in pair}
    return Comparison(treated.sae, control.sae, estimates)
