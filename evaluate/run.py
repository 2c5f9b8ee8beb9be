"""`evaluate`: from SAE folders and a store to an evaluation folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.bench import Bench
from tcsae.evaluate.config import DEFAULT_SUITES, EvaluateConfig, Suite
from tcsae.evaluate.core_checkpoint import remove_states
from tcsae.evaluate.estimates import SuiteResult
from tcsae.evaluate.finish import finish
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.references import Material, reference_sample, references
from tcsae.evaluate.results import fields_of_sae, kept_result, write_measured
from tcsae.evaluate.splice import ReplayModel
from tcsae.evaluate.subjects import Origin, Subject, find_saes, load_subject, with_unique_names
from tcsae.evaluate.suites import SUITES_IN_ORDER
from tcsae.evaluate.summary import Evaluation
from tcsae.evaluate.token_rows import TokenRows, read_token_rows
from tcsae.harvest.model import LanguageModel
from tcsae.store.atomic import exclusive
from tcsae.store.device import choose_device
from tcsae.store.errors import ConfigError, RunBusy
from tcsae.store.interrupt import interruptible
from tcsae.store.reader import ActivationStore


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
        the evaluation folder cannot be written, two SAEs have the same name, there is no such device, or an SAE cannot
        be spliced at its hook
    RunBusy
        another process writes to the same folder
    Interrupted
        Ctrl-C; finished results stay
    """
    _refuse_unwritable(config.out)
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


def _refuse_unwritable(out: Path) -> None:
    """Raise `ConfigError` where no folder ``out`` can be made or written to."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"OUT: {out}: expected a folder, there or not, but {there} is a file; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"OUT: {out}: expected a folder that can be written to, but {there} cannot; name another"
        )


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
    message = f"{config.out}: interrupted; finished results are kept, run the same command again to go on"
    with interruptible(message), exclusive(config.out / ".lock", busy):
        return finish(subjects, _results(subjects, bench), bench)


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
            kept = kept_result(bench.config.out, suite.name, one.name, print_)
            if kept is None:
                missing[suite.name].append(one)
            else:
                results[suite.name, one.name] = kept
    for suite in suites:
        if not missing[suite.name]:
            continue
        asked = [prints[suite.name, one.name] for one in missing[suite.name]]
        for one, measured in suite.measure(missing[suite.name], asked, bench):
            of = fields_of_sae(one, bench.about)
            write_measured(bench.config.out, suite.name, one.name, measured, of)
            results[suite.name, one.name] = measured.result
    remove_states(
        bench.config.out / "core", [print_ for (suite, _), print_ in prints.items() if suite == "core"]
    )
    return results
