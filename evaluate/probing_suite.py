"""The probing suite as ``evaluate`` runs it: what can be read from a code, from the store alone.

**What H shall know.** Probes of topic and source on the block H, the block L, a random block of H's size (the
control within the SAE), the whole dictionary, and the raw activations ("residual", the reference: no code of
them says more to a dense probe than they do themselves, but a sparse probe may find it more easily).

**What H shall not know: the leak gates.** The contrast tells two tokens of one window from tokens of other
documents, and there are short cuts to that besides what the text is about: tokens of one window stand at
neighbouring positions, and a token is often repeated or followed by the same token. Probes of the position in
the context, of the token and of the token before tell whether H has taken one. A block that reads them better
than a random block of its size (``…_H_minus_random_…``), and better than H of the control arm with alpha = 0
does, has: with an interval of the difference above 0 its persistence is in part the short cut's. There is no
threshold; the residual row says how much is there to be read at all.

Figures are those of `tcsae.evaluate.probing`: balanced accuracies of multi-class probes by the name
``probe_<task>_<part>_<size>``, and SAEBench's one-vs-rest accuracies, which fill the fields of its
``sparse_probing`` file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tcsae.evaluate import probe_samples as samples
from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.estimates import Draws, Estimate, SuiteResult
from tcsae.evaluate.heldout import HeldOut, Indices
from tcsae.evaluate.probe_codes import Codes, Encode, ProbeData
from tcsae.evaluate.probe_figures import (
    SAEBENCH_SIZES,
    Fitted,
    Size,
    class_counts,
    fit,
    multi_class_figures,
    n_fits,
    one_vs_rest_figures,
    probe_name,
    size_name,
)
from tcsae.evaluate.probe_samples import CONTEXT_TASKS, NoTask, Task
from tcsae.evaluate.probing import MAX_ITERATIONS, Predicted
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.temporal import parts_of
from tcsae.evaluate.temporal_codes import SKIPPED_POSITIONS
from tcsae.store.errors import ConfigError
from tcsae.store.progress import progress
from tcsae.train.sae.inference import SAE

RESIDUAL = "residual"
"""The part that is no part of the SAE: its raw input."""


class ProbingSuite:
    """What can be read from the code; the store alone is read, no model runs."""

    name: Suite = "probing"

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """Nothing beside what decides every suite's figures."""
        return {}

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Refuse documents that probes would be trained on.

        Raises
        ------
        ConfigError
            figures are asked for on other documents than those of the test split
        """
        if bench.config.split != "test":
            raise ConfigError(
                f"split: --suite probing trains its probes on the train split and tests them on the test split, "
                f"got --split {bench.config.split}; use --split test, or leave probing out"
            )

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """One SAE after the other; samples and reference are made once for all SAEs of a hook."""
        by_hook: dict[str, list[tuple[Subject, str]]] = {}
        for one, print_ in zip(subjects, prints, strict=True):
            by_hook.setdefault(one.hook, []).append((one, print_))
        for hook, ones in by_hook.items():
            train = HeldOut(bench.store, hook, "train")
            with progress(None, "token", f"{self.name}: {hook}") as bar:
                data = ProbeData(train, bench.held_out[hook], bench.config.seed, bar.update)
            everything = {RESIDUAL: np.arange(bench.store.d_model)}
            reference = self._fits(data, data.raw, everything, [RESIDUAL], RESIDUAL)
            for one, print_ in ones:
                sae = one.sae.to(bench.device)
                with progress(data.n_tokens, "token", f"{self.name}: {one.name}") as bar:
                    codes = data.codes(_encoder(sae), sae.d_sae, bar.update)
                parts = probed_parts(sae, bench.config.seed)
                fitted = self._fits(data, codes, parts, ["whole"], one.name)
                yield one, _measured(data, fitted, reference, print_, bench)

    def _fits(
        self,
        data: ProbeData,
        codes: dict[str, tuple[Codes, Codes]],
        parts: dict[str, Indices],
        one_vs_rest_of: list[str],
        what: str,
    ) -> dict[str, Fitted]:
        tasks = [task for task in data.tasks.values() if isinstance(task, Task)]
        compared = {task.name: one_vs_rest_of if task.name in CONTEXT_TASKS else [] for task in tasks}
        n_probes = sum(n_fits(task, len(parts), len(compared[task.name])) for task in tasks)
        with progress(n_probes, "probe", f"{self.name}: {what}") as bar:
            return {
                task.name: fit(task, codes[task.name], parts, compared[task.name], bar.update)
                for task in tasks
            }


def _encoder(sae: SAE) -> Encode:
    return lambda x: sae.encode(x.to(sae.device))


def probed_parts(sae: SAE, seed: int) -> dict[str, Indices]:
    """Feature indices of the whole dictionary and, where there is a block, of H, L and ``random``: as many
    features as H has, drawn from the whole dictionary."""
    found: dict[str, Indices] = {
        part: np.arange(span.start, span.stop) for part, span in parts_of(sae).items()
    }
    if sae.block_size:
        drawn = np.random.default_rng([seed, 3]).choice(sae.d_sae, sae.block_size, replace=False)
        found["random"] = np.sort(drawn)
    return found


def _measured(
    data: ProbeData, fitted: dict[str, Fitted], reference: dict[str, Fitted], print_: str, bench: Bench
) -> Measured:
    config = bench.config
    estimates: dict[str, Estimate] = {}
    draws: dict[str, Draws] = {}
    tasks: dict[str, Any] = {}
    of_classes: dict[str, Any] = {}
    for name, task in data.tasks.items():
        if isinstance(task, NoTask):
            missing = f"probe_{name}_chance"
            estimates[missing] = Estimate.count(missing, "1", None, 0, f"undefined, because {task.reason}")
            tasks[name] = {"undefined": task.reason}
            continue
        ours, raw = fitted[name], reference[name]
        figures = multi_class_figures(
            task, ours.multi_class | raw.multi_class, config.n_bootstrap, config.seed
        )
        estimates |= figures.estimates
        draws |= figures.draws
        if name in CONTEXT_TASKS:
            figures, each = one_vs_rest_figures(
                task, raw.one_vs_rest | ours.one_vs_rest, config.n_bootstrap, config.seed
            )
            estimates |= figures.estimates
            draws |= figures.draws
            of_classes[name] = {f"{part}_{size_name(size)}": one for (part, size), one in each.items()}
        tasks[name] = _facts(task, ours, raw)
    facts = {
        "definitions": {
            "min_train_documents": samples.MIN_TRAIN_DOCUMENTS,
            "min_test_documents": samples.MIN_TEST_DOCUMENTS,
            "max_classes": samples.MAX_CLASSES,
            "contexts_per_document": samples.CONTEXTS_PER_DOCUMENT,
            "min_tokens": samples.MIN_TOKENS,
            "skipped_positions_of_gates": SKIPPED_POSITIONS,
            "max_iterations": MAX_ITERATIONS,
        },
        "n_contexts": {"train": len(data.sides[0].contexts), "test": len(data.sides[1].contexts)},
        "tasks": tasks,
        "one_vs_rest_of_classes": of_classes,
    }
    names: list[str] = [name for name in CONTEXT_TASKS if isinstance(data.tasks[name], Task)]
    details = [
        {
            "dataset_name": name,
            **_fields("llm", RESIDUAL, [name], estimates),
            **_fields("sae", "whole", [name], estimates),
        }
        for name in names
    ]
    made = bench.store.provenance
    settings = {
        **bench.conditions,
        "random_seed": config.seed,
        "dataset_names": names,
        "probe_train_set_size": samples.MAX_TRAIN_CONTEXTS,
        "probe_test_set_size": samples.MAX_TEST_CONTEXTS,
        "context_length": made.context_length,
        "model_name": made.model,
        "llm_dtype": made.precision,
        "k_values": [size for size in SAEBENCH_SIZES if size is not None],
    }
    return Measured(
        result=SuiteResult(print_, estimates, draws, facts),
        kind="sparse_probing",
        settings=settings,
        metrics={
            "llm": _fields("llm", RESIDUAL, names, estimates),
            "sae": _fields("sae", "whole", names, estimates),
        },
        details=details,
    )


def _fields(
    who: str, part: str, tasks: Sequence[str], estimates: dict[str, Estimate]
) -> dict[str, float | None]:
    """SAEBench's fields: means over the tasks, null where one has no figure."""

    def field(size: Size) -> str:
        return f"{who}_test_accuracy" if size is None else f"{who}_top_{size}_test_accuracy"

    found: dict[str, float | None] = {}
    for size in (None, *SAEBENCH_SIZES[:-1]):
        values = [estimates[probe_name(f"one_vs_rest_{task}", part, size)].value for task in tasks]
        known = [value for value in values if value is not None]
        found[field(size)] = float(np.mean(known)) if known and len(known) == len(values) else None
    return found


def _facts(task: Task, ours: Fitted, raw: Fitted) -> dict[str, Any]:
    """What the probes of a task rest on."""
    unconverged = [
        probe_name(task.name, *probe)
        for probe, one in (ours.multi_class | raw.multi_class).items()
        if isinstance(one, Predicted) and not one.has_converged
    ]
    for probe, ones in (ours.one_vs_rest | raw.one_vs_rest).items():
        if isinstance(ones, list) and not all(one.has_converged for one in ones):
            unconverged.append(probe_name(f"one_vs_rest_{task.name}", *probe))
    return {
        "classes": class_counts(task),
        "n_classes_left_out": task.n_left_out,
        "chosen_features": ours.chosen,
        "n_features_of_dense": {
            part: one.n_used
            for (part, size), one in (ours.multi_class | raw.multi_class).items()
            if size is None and isinstance(one, Predicted)
        },
        "not_converged": unconverged,
    }
