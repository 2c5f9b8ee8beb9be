"""`evaluate`: from SAE folders and a store to an evaluation folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.core import CoreResult, core_results
from tcsae.evaluate.estimates import Draws, Estimate, SuiteResult, fingerprint, read_result, write_result
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.plots import final_metrics
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.subjects import Subject, control_of, find_saes, load_subject, with_unique_names
from tcsae.evaluate.summary import Comparison, Evaluation, Row, replayed_documents, write_summary
from tcsae.evaluate.temporal import compare_with_control, metric_name, parts_of, temporal_result
from tcsae.store.atomic import exclusive
from tcsae.store.device import choose_device
from tcsae.store.errors import ConfigError, Interrupted, RunBusy, StoreMismatch
from tcsae.store.progress import progress
from tcsae.store.reader import ActivationStore

COMPARED_LAG = 8
"""Lag, in tokens, at which an SAE is compared with its control."""

BRANCH_INPUTS = ("hook_resid_mid", "ln1.hook_in", "ln2.hook_in")
"""Ends of the names of hooks that hold the residual stream, but only as the input of one branch off it."""

RECONSTRUCTION_METRICS = ("explained_variance", "loss_recovered", "kl_sae")
"""Compared with the control beside the autocorrelation: what the consistency cost."""


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
    # before anything is measured: the temporal suite alone can take long
    choose_device(config.device)
    if "core" in config.suites:
        _check_spliceable(held_out)
    busy = RunBusy(f"{config.out}: another process is evaluating into this folder; wait or choose another")
    try:
        with exclusive(config.out / ".lock", busy):
            return _finish(subjects, _results(subjects, held_out, store, config), held_out, store, config)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{config.out}: interrupted; finished results are kept, run the same command again to go on"
        ) from None


def _results(
    subjects: Sequence[Subject], held_out: dict[str, HeldOut], store: ActivationStore, config: EvaluateConfig
) -> dict[tuple[Suite, str], SuiteResult]:
    """Every result of every suite, read where it is there with the same settings, else measured."""
    results: dict[tuple[Suite, str], SuiteResult] = {}
    for suite in config.suites:
        for one in subjects:
            kept = read_result(*_paths(config, suite, one), _fingerprint(config, suite, one, store))
            if kept is not None:
                results[suite, one.name] = kept
    for suite, measure in (("temporal", _temporal), ("core", _core)):  # the cheap one first
        if suite in config.suites:
            missing = [one for one in subjects if (suite, one.name) not in results]
            results |= measure(missing, held_out, store, config)
    return results


def _paths(config: EvaluateConfig, suite: Suite, one: Subject) -> tuple[Path, Path]:
    return config.out / suite / f"{one.name}.json", config.out / "draws" / suite / f"{one.name}.parquet"


def _fingerprint(config: EvaluateConfig, suite: Suite, one: Subject, store: ActivationStore) -> str:
    """Hash over everything that decides a suite's figures for one SAE; paths and device do not."""
    decides: dict[str, Any] = {
        "suite": suite,
        "sae": one.digest,
        "name": one.name,
        "arm": one.arm,
        "store": store.id,
        "hook": one.hook,
        "split": config.split,
        "n_bootstrap": config.n_bootstrap,
        "seed": config.seed,
    }
    if suite == "core":
        decides |= {"max_tokens": config.max_tokens, "batch_size": config.batch_size}
    return fingerprint(**decides)


def _temporal(
    subjects: Sequence[Subject], held_out: dict[str, HeldOut], store: ActivationStore, config: EvaluateConfig
) -> dict[tuple[Suite, str], SuiteResult]:
    results: dict[tuple[Suite, str], SuiteResult] = {}
    if not subjects:
        return results
    device = choose_device(config.device)
    with progress(len(subjects), "SAE", "temporal") as bar:
        for one in subjects:
            result = temporal_result(
                one.sae.to(device),
                held_out[one.hook],
                n_bootstrap=config.n_bootstrap,
                seed=config.seed,
                print_=_fingerprint(config, "temporal", one, store),
            )
            figures = {name: estimate.value for name, estimate in result.estimates.items()}
            envelope = _envelope(
                "tcsae_temporal", one, store, {**_settings(config)}, {"temporal": figures}, []
            )
            write_result(*_paths(config, "temporal", one), envelope, result)
            results["temporal", one.name] = result
            bar.update()
    return results


def _core(
    subjects: Sequence[Subject], held_out: dict[str, HeldOut], store: ActivationStore, config: EvaluateConfig
) -> dict[tuple[Suite, str], SuiteResult]:
    results: dict[tuple[Suite, str], SuiteResult] = {}
    if not subjects:
        return results
    model = _load_model(config, store)
    device = choose_device(config.device)
    by_hook: dict[str, list[Subject]] = {}
    for one in subjects:
        by_hook.setdefault(one.hook, []).append(one)
    settings = {"max_tokens": config.max_tokens, "batch_size": config.batch_size, "seed": config.seed}
    n_tokens = {
        hook: sum(sum(batch.length) for batch in held_out[hook].batches(**settings)) for hook in by_hook
    }
    with progress(sum(n_tokens.values()), "token", "core") as bar:
        for hook, ones in by_hook.items():
            found = core_results(
                [one.sae.to(device) for one in ones],
                [_fingerprint(config, "core", one, store) for one in ones],
                held_out[hook],
                model,
                n_bootstrap=config.n_bootstrap,
                advance=bar.update,
                **settings,
            )
            for one, result in zip(ones, found, strict=True):
                envelope = _core_envelope(one, store, config, result)
                write_result(*_paths(config, "core", one), envelope, result.result)
                results["core", one.name] = result.result
    return results


def _check_spliceable(hooks: Iterable[str]) -> None:
    for hook in hooks:
        if hook.endswith(BRANCH_INPUTS):
            raise ConfigError(
                f"hook {hook}: read at the input of a norm, which the residual stream also goes past, so "
                "nothing can be spliced into the stream there; use --suite temporal, or SAEs of "
                "hook_resid_pre or hook_resid_post"
            )


def _load_model(config: EvaluateConfig, store: ActivationStore) -> ReplayModel:
    """The model that made the store.

    Raises
    ------
    StoreMismatch
        the weights or the tokenizer are not those of the store
    """
    # imported here: the temporal suite and kept results need no model, and transformer_lens takes seconds
    from tcsae.harvest.model import load_model

    made = store.provenance
    model = load_model(config.model or made.model, precision=made.precision, device=config.device)
    for what, theirs, stores in (
        ("weights", model.sha256, made.model_sha256),
        ("tokenizer", model.tokenizer_sha256, made.tokenizer_sha256),
    ):
        if theirs != stores:
            raise StoreMismatch(
                f"{store.url}: made by {made.model} with {what} {stores[:12]}…, but model {model.name} has "
                f"{what} {theirs[:12]}…; name the store's own model or harvest again"
            )
    return cast(ReplayModel, model)


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    return {"split": config.split, "n_bootstrap": config.n_bootstrap, "seed": config.seed}


def _core_envelope(
    one: Subject, store: ActivationStore, config: EvaluateConfig, result: CoreResult
) -> dict[str, Any]:
    made = store.provenance
    n_batches = result.result.facts["replay"]["n_batches"]
    settings = {
        "model_name": made.model,
        "llm_dtype": made.precision,
        "batch_size_prompts": config.batch_size,
        "n_eval_reconstruction_batches": n_batches,
        "n_eval_sparsity_variance_batches": n_batches,
        "dataset": made.corpus,
        "context_size": made.context_length,
        "compute_kl": True,
        "compute_ce_loss": True,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }
    return _envelope("core", one, store, settings, result.metrics, result.details)


def _envelope(
    kind: str,
    one: Subject,
    store: ActivationStore,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    details: list[dict[str, Any]],
) -> dict[str, Any]:
    """SAEBench's envelope, all of its keys but the unstructured part."""
    sae = one.sae
    return {
        "eval_type_id": kind,
        "eval_config": settings,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
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
    held_out: dict[str, HeldOut],
    store: ActivationStore,
    config: EvaluateConfig,
) -> Evaluation:
    """Summary, comparisons and figure from the results of all suites."""
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
        **_settings(config),
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
    for name in (*names, *RECONSTRUCTION_METRICS):
        if name not in treated.estimates:
            continue
        pair = compare_with_control(
            name, treated.draws.get(name), control.draws.get(name), treated.estimates[name].n_documents
        )
        estimates |= {estimate.metric: estimate for estimate in pair}
    return Comparison(treated.sae, control.sae, estimates)
