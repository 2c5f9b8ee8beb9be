"""The unlearning suite as ``evaluate`` runs it: topics of the store as forget domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tcsae.evaluate.bench import Bench, Measured
from tcsae.evaluate.config import EvaluateConfig, Suite
from tcsae.evaluate.core_suite import check_spliceable
from tcsae.evaluate.estimates import SuiteResult
from tcsae.evaluate.intervals import Bootstrap
from tcsae.evaluate.subjects import Subject
from tcsae.evaluate.unlearning.choice import ABSOLUTE
from tcsae.evaluate.unlearning.clamp import MULTIPLES, Setting
from tcsae.evaluate.unlearning.domains import Sides
from tcsae.evaluate.unlearning.examination import (
    N_QUESTION_SETTINGS,
    Examination,
    Examined,
    question_files,
)
from tcsae.evaluate.unlearning.parts import Parts
from tcsae.evaluate.unlearning.score import (
    RETAIN_LIMIT,
    TopicSums,
    chosen_setting,
    score_bootstraps,
    setting_rows,
    strata_of,
    topic_estimates,
    undefined_figures,
)
from tcsae.evaluate.unlearning.select import NUMBERS, THRESHOLDS, Activity
from tcsae.evaluate.unlearning.topics import Drawn, TopicReplay, draw_domains
from tcsae.store.progress import progress

N_SETTINGS = 2 * len(THRESHOLDS) * len(NUMBERS) * len(MULTIPLES)
"""Settings of one topic, the controls' included."""


class UnlearningSuite:
    """What clamping a domain's features costs that domain, and what it costs everything else."""

    name: Suite = "unlearning"

    def decides(self, config: EvaluateConfig) -> dict[str, Any]:
        """Which domains, how much text, which settings."""
        return {
            "forget": list(config.forget),
            "domain_tokens": config.domain_tokens,
            "questions": [file.sha256 for file in question_files(config) or ()],
            "grid": [THRESHOLDS, NUMBERS, MULTIPLES, RETAIN_LIMIT],
        }

    def check(self, subjects: Sequence[Subject], bench: Bench) -> None:
        """Refuse unknown or small domains and hooks that nothing can be spliced in at."""
        bench.check_model()
        check_spliceable(subjects)
        draw_domains(bench.store, bench.config)
        question_files(bench.config)

    def measure(
        self, subjects: Sequence[Subject], prints: Sequence[str], bench: Bench
    ) -> Iterator[tuple[Subject, Measured]]:
        """One SAE after the other; they share the clean passes, and finished topics are kept on the way."""
        config = bench.config
        sides, drawn = draw_domains(bench.store, config)
        replays: dict[str, TopicReplay] = {}
        # first of all: whether the model can answer at all is then known before anything long is run
        examinations = _examinations(subjects, bench)
        n_settings = len(drawn) * N_SETTINGS + (N_QUESTION_SETTINGS if examinations else 0)
        with progress(len(subjects) * n_settings, "setting", self.name) as bar:
            for one, print_ in zip(subjects, prints, strict=True):
                if one.hook not in replays:
                    replays[one.hook] = TopicReplay(
                        lambda: bench.model, bench.store, one.hook, drawn, config.batch_size
                    )
                replay, sae = replays[one.hook], one.sae.to(bench.device)
                parts = Parts(config.out / self.name / f"{one.name}.parts", print_)
                activities = replay.activities(sae)
                found: dict[str, TopicSums] = {}
                for topic, activity in zip(drawn, activities, strict=True):
                    kept = parts.read(topic.domain.name)
                    if kept is None:
                        kept = replay.sums(sae, topic, activity, config.seed, bar.update)
                        parts.write(topic.domain.name, kept)
                    else:
                        bar.update(N_SETTINGS)
                    found[topic.domain.name] = kept
                examined = None
                if examinations:
                    examined = examinations[one.hook].examine(
                        sae, activities[0], config.n_bootstrap, config.seed, bar.update
                    )
                yield one, _measured(one, print_, bench, sides, drawn, activities, found, examined)
                parts.delete()


def _examinations(subjects: Sequence[Subject], bench: Bench) -> dict[str, Examination]:
    """The questions by hook; empty where there are none."""
    files = question_files(bench.config)
    if files is None:
        return {}
    saved = bench.config.out / "unlearning" / "questions" / "known.json"
    return {
        hook: Examination(bench.language_model, hook, files, saved, bench.config.batch_size)
        for hook in dict.fromkeys(one.hook for one in subjects)
    }


def _measured(
    one: Subject,
    print_: str,
    bench: Bench,
    sides: Sides,
    drawn: Sequence[Drawn],
    activities: Sequence[Activity],
    found: dict[str, TopicSums],
    examined: Examined | None,
) -> Measured:
    """Figures, intervals and every setting's row, from the sums."""
    strata = strata_of([sums.is_forget for sums in found.values()])
    boots: dict[str, dict[str, Bootstrap]] = {
        name: score_bootstraps(sums, strata, bench.config.n_bootstrap, bench.config.seed)
        for name, sums in found.items()
    }
    n_documents = {name: int(np.count_nonzero(sums.n)) for name, sums in found.items()}
    undefined = {name: undefined_figures(sums) for name, sums in found.items()}
    estimates, draws = topic_estimates(boots, undefined, n_documents)
    settings = bench.conditions | {
        "model_name": bench.store.provenance.model,
        "forget": list(found),
        "domain_tokens": bench.config.domain_tokens,
        "retain_thresholds": list(THRESHOLDS),
        "n_features_list": list(NUMBERS),
        "multiples_of_mean_active": list(MULTIPLES),
        "retain_limit_nats": RETAIN_LIMIT,
    }
    facts: dict[str, Any] = {
        "sae": {"name": one.name, "arm": one.arm, "seed": one.seed},
        "documents": sides.rule,
        "retain_limit_nats": RETAIN_LIMIT,
        "topics": [
            _topic(topic, activity, found[topic.domain.name], boots[topic.domain.name]["rises"])
            for topic, activity in zip(drawn, activities, strict=True)
        ],
    }
    topics = {name: estimate.value for name, estimate in estimates.items()}
    if examined is None:
        return Measured(
            result=SuiteResult(print_, estimates, draws, facts),
            kind="tcsae_unlearning",
            settings=settings,
            metrics={"topics": topics},
        )
    score = examined.estimates["unlearning_questions_score"]
    no_score = {"unlearning_score": score.reason} if score.value is None else {}
    facts |= {"questions": examined.facts, "undefined": no_score}
    return Measured(
        result=SuiteResult(print_, estimates | examined.estimates, draws | examined.draws, facts),
        kind="unlearning",
        settings=settings | _saebench_settings(examined, bench),
        # -1 stands for what is undefined, as SAEBench has it in its core files; ``undefined`` says why
        metrics={"unlearning": {"unlearning_score": -1.0 if score.value is None else score.value}},
    )


def _saebench_settings(examined: Examined, bench: Bench) -> dict[str, Any]:
    """SAEBench's own fields of ``eval_config``."""
    sides = [examined.facts[side] for side in ("forget", "retain")]
    return {
        "random_seed": bench.config.seed,
        "dataset_names": [side["file"] for side in sides],
        "intervention_method": "clamp_feature_activation",
        "multipliers": list(ABSOLUTE),
        "target_metric": "correct",
        "llm_batch_size": bench.config.batch_size,
        "mcq_batch_size": bench.config.batch_size,
        "llm_dtype": bench.store.provenance.precision,
    }


def _topic(drawn: Drawn, activity: Activity, sums: TopicSums, rises: Bootstrap) -> dict[str, Any]:
    """What the file says of one topic."""
    features = sorted({feature for setting in sums.settings for feature in setting.features})
    domains = {}
    for domain, members in (("forget", sums.is_forget), ("retain", ~sums.is_forget)):
        n = float(sums.n[members].sum())
        domains[domain] = {
            "n_selecting_tokens": getattr(activity, f"n_{domain}"),
            "n_documents": int(np.count_nonzero(sums.n[members])),
            "n_predictions": int(n),
            "cross_entropy": float(sums.loss[members].sum()) / n if n else None,
            "accuracy": float(sums.hits[members].sum()) / n if n else None,
        }
    chosen = {kind: chosen_setting(sums, kind) for kind in ("selected", "control")}
    return {
        "topic": drawn.domain.name,
        "column": drawn.domain.column,
        "domains": domains,
        "features": [
            {
                "feature": feature,
                "forget_density": float(activity.forget_density[feature]),
                "retain_density": float(activity.retain_density[feature]),
                "mean_active": float(activity.mean_active[feature]),
            }
            for feature in features
        ],
        "fewer_features_than_wanted": _short(sums.settings),
        "chosen": {
            kind: "the untouched model: no setting raises the forget domain's loss within the limit"
            if at is None
            else at
            for kind, at in chosen.items()
        },
        "settings": setting_rows(sums, rises),
    }


def _short(settings: Sequence[Setting]) -> list[str]:
    """The settings that found fewer features than they asked for, in words."""
    return list(
        dict.fromkeys(
            f"{one.kind}, threshold {one.threshold}: {len(one.features)} of {one.n_wanted}"
            for one in settings
            if len(one.features) < one.n_wanted
        )
    )
