"""The SAEs that are evaluated: found in folders, loaded, checked against the store, named."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tcsae.harvest.model import LanguageModel
from tcsae.store.errors import ConfigError, RunNotFound, StoreMismatch, TrainingCollapsed
from tcsae.store.reader import ActivationStore
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import CONFIG_FILE, load_sae

TAKEN = (".", "_reference-", "_truth")
"""Beginnings of the names of what an evaluation folder holds beside the files of SAEs."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One SAE with its place in an experiment."""

    sae: SAE
    """raw activations in and out"""
    name: str
    """unique in an evaluation; names its files, such as ``tc16-s0``"""
    arm: str
    """the kind of SAE, such as ``tc16``"""
    seed: int | None
    """of its training, None where nobody said"""
    settings: Mapping[str, Any]
    """the arm's settings, empty where unknown"""
    where: str
    """folder, for messages"""
    hook: str
    """TransformerLens name of the activation that it reads"""
    digest: str
    """SHA-256 over the weights and what decides how they are used"""

    @property
    def alpha(self) -> float | None:
        """Weight of the contrastive loss it was trained with, None where unknown."""
        alpha = self.settings.get("alpha")
        return None if alpha is None else float(alpha)

    @property
    def origin(self) -> dict[str, Any]:
        """What it is and where it came from, in JSON's types: enough to tell SAEs apart, to know which differ in what,
        and to find the run again."""
        ours = self.sae.metadata.get("tcsae") or {}
        folder = Path(self.where)
        return {
            "digest": self.digest,
            "hook": self.hook,
            "architecture": self.sae.architecture,
            "d_sae": self.sae.d_sae,
            "k": self.sae.k,
            "steps": ours.get("steps"),
            "tokens": ours.get("tokens"),
            "trained_on": ours.get("store"),
            "settings": dict(self.settings),
            "folder": str(folder.resolve()) if folder.is_dir() else None,
        }


def find_saes(path: Path) -> list[Path]:
    """The SAE folders at ``path``: itself, or those below ``sae/`` of a run.

    Raises
    ------
    RunNotFound
        neither an SAE folder nor a run that has any
    """
    if (path / CONFIG_FILE).is_file():
        return [path]
    found = sorted(config.parent for config in (path / "sae").glob(f"*/{CONFIG_FILE}"))
    if not found:
        looked = f"{path / CONFIG_FILE} or {path / 'sae' / '*' / CONFIG_FILE}"
        hint = "finish the run with `tcsae train --resume`" if path.is_dir() else "no such folder"
        raise RunNotFound(f"{path}: no SAE there: expected {looked}; {hint}")
    return found


class Origin(NamedTuple):
    """What an SAE must fit: the store that it is evaluated on, or the model alone."""

    where: str
    """how messages name it"""
    hooks: tuple[str, ...]
    """activations that it has"""
    d_model: int
    """their width"""
    model: str
    """name of the model"""
    model_sha256: str
    """of the model's weights"""
    advice: str
    """what to do about another hook, with the hook's name to be filled in"""

    @classmethod
    def of_store(cls, store: ActivationStore) -> Origin:
        """A store and the model that made it."""
        made = store.provenance
        return cls(
            store.url,
            store.hooks,
            store.d_model,
            made.model,
            made.model_sha256,
            "evaluate it on a store harvested with --hook {}",
        )

    @classmethod
    def of_model(cls, model: LanguageModel) -> Origin:
        """A model without a store."""
        return cls(
            f"model {model.name}",
            model.hook_names,
            model.d_model,
            model.name,
            model.sha256,
            "evaluate it in its own model, not one without {}",
        )


def load_subject(folder: Path, origin: ActivationStore | Origin) -> Subject:
    """The SAE in ``folder`` as a subject for ``origin``; checked by `subject`."""
    return subject(load_sae(folder), origin, where=str(folder))


def subject(sae: SAE, origin: ActivationStore | Origin, *, where: str) -> Subject:
    """``sae`` as a subject for a store or a model. ``where`` names it in messages.

    Raises
    ------
    TrainingCollapsed
        a weight is NaN or infinite
    StoreMismatch
        it reads another hook, width or model than there is
    """
    for name, weight in sae.state_dict().items():
        n_bad = int((~torch.isfinite(weight)).sum())
        if n_bad:
            raise TrainingCollapsed(
                f"{where}: {name} holds {n_bad} NaN or infinite of {weight.numel()} values; its training "
                "collapsed, train it again"
            )
    ours = sae.metadata.get("tcsae") or {}
    arm, seed = ours.get("arm"), ours.get("seed")
    return Subject(
        sae=sae,
        name=sae.name,
        arm=sae.name if arm is None else str(arm),
        seed=None if seed is None else int(seed),
        settings=ours.get("recipe") or {},
        where=where,
        hook=_matching_hook(sae, origin if isinstance(origin, Origin) else Origin.of_store(origin), where),
        digest=digest_of(sae),
    )


def _matching_hook(sae: SAE, origin: Origin, where: str) -> str:
    """The hook that ``sae`` reads, after every check that needs no pass of the model."""
    hook = sae.metadata.get("hook_name")
    if hook is None:
        if len(origin.hooks) > 1:
            raise StoreMismatch(
                f"{where}: does not say which hook it reads, and {origin.where} has "
                f"{_some(origin.hooks)}; put hook_name into its cfg.json"
            )
        hook = origin.hooks[0]
    if hook not in origin.hooks:
        raise StoreMismatch(
            f"{where}: reads hook {hook!r}, but {origin.where} holds {_some(origin.hooks)}; "
            + origin.advice.format(hook)
        )
    if sae.metadata.get("hook_head_index") is not None:
        raise StoreMismatch(
            f"{where}: reads head {sae.metadata['hook_head_index']} of {hook} alone, but {origin.where} has whole "
            "activations only; evaluate SAEs of whole activations"
        )
    if sae.d_in != origin.d_model:
        raise StoreMismatch(
            f"{where}: takes activations of {sae.d_in} dimensions, but {origin.where} holds {origin.d_model}; "
            "evaluate it on a store of its own model"
        )
    ours = sae.metadata.get("tcsae") or {}
    sha256, model = ours.get("model_sha256"), sae.metadata.get("model_name")
    made_by = (
        origin.where
        if origin.where == f"model {origin.model}"
        else f"{origin.where} was made by {origin.model}"
    )
    if sha256 is not None and sha256 != origin.model_sha256:
        raise StoreMismatch(
            f"{where}: trained on model {model} with weights {sha256[:12]}…, but {made_by} with weights "
            f"{origin.model_sha256[:12]}…; evaluate it on a store of its own model"
        )
    if sha256 is None and model is not None and not _same_model(model, origin.model):
        raise StoreMismatch(
            f"{where}: trained on model {model!r}, but {made_by}; evaluate it on a store of its own model, or "
            "correct model_name in its cfg.json"
        )
    return str(hook)


def _some(names: Sequence[str], most: int = 8) -> str:
    """``a, b, c`` or, of many, the first and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _same_model(one: str, other: str) -> bool:
    """Whether two names may be those of one model: hub name, short name, or a folder that is called so.

    The hub's cache calls its folders ``models--EleutherAI--pythia-70m/snapshots/<commit>``.

    >>> _same_model("pythia-70m", "EleutherAI/pythia-70m"), _same_model("pythia-70m", "pythia-160m")
    (True, False)
    """

    def called(name: str) -> set[str]:
        parts = [part.casefold() for part in name.split("/") if part]
        return {*parts[-1:], *(part.split("--")[-1] for part in parts if part.startswith("models--"))}

    return bool(called(one) & called(other))


def digest_of(sae: SAE) -> str:
    """SHA-256 over everything that changes a figure: weights, non-linearity, block."""
    digest = hashlib.sha256(repr((sae.architecture, sae.k, sae.block_size)).encode())
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_unique_names(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects with the run's folder in front of the names of every arm that is not one.

    An arm is prefixed whole, so its seeds stay together: if a name of it occurs twice, or if SAEs that were
    not trained alike share its name.

    Raises
    ------
    ConfigError
        two are still called the same, or two of one arm are not alike; both folders are named
    """
    often = Counter(one.name for one in subjects)
    alike: dict[str, Subject] = {}
    torn = {
        one.arm
        for one in subjects
        if often[one.name] > 1 or _kind(alike.setdefault(one.arm, one)) != _kind(one)
    }
    named = [
        replace(one, name=f"{run_of(one)}-{one.name}", arm=f"{run_of(one)}-{one.arm}")
        if one.arm in torn
        else one
        for one in subjects
    ]
    first: dict[str, Subject] = {}
    alike = {}
    for one in named:
        other = first.setdefault(one.name, one)
        if other is not one:
            raise ConfigError(
                f"{other.where} and {one.where} are both called {one.name!r}; evaluate them into two folders"
            )
        other = alike.setdefault(one.arm, one)
        if _kind(other) != _kind(one):
            raise ConfigError(
                f"{other.where} and {one.where} are both of arm {one.arm!r}, but were not trained alike; "
                "evaluate them into two folders"
            )
        if "/" in one.name or one.name.startswith(TAKEN):
            raise ConfigError(f"{one.where}: {one.name!r} cannot name a file; rename the SAE in its cfg.json")
    return named


def _kind(one: Subject) -> tuple[Any, ...]:
    """What the seeds of one arm have in common."""
    steps = (one.sae.metadata.get("tcsae") or {}).get("steps")
    sizes = (one.sae.architecture, one.sae.k, one.sae.d_sae, one.sae.block_size)
    return (dict(one.settings), steps, one.hook, *sizes)


def run_of(one: Subject) -> str:
    """Name of the run's folder, or of the SAE's own folder if it is not in a run."""
    folder = Path(one.where).resolve()
    return folder.parent.parent.name if folder.parent.name == "sae" else folder.name


def control_of(one: Subject, subjects: Sequence[Subject]) -> Subject | None:
    """The control of ``one``: same seed, sizes, block and sparsity, but trained with alpha = 0.

    None if ``one`` has no contrast itself, or there is no such SAE among ``subjects``. Of several, one whose
    other settings are the same comes first, then one of the same run.
    """
    if not one.alpha or not one.sae.block_size:
        return None
    candidates = [other for other in subjects if other.alpha == 0 and _shape(other) == _shape(one)]
    ignored = {"name", "explanation", "alpha"}

    def distance(other: Subject) -> tuple[int, bool]:
        keys = (set(one.settings) | set(other.settings)) - ignored
        return (
            sum(one.settings.get(key) != other.settings.get(key) for key in keys),
            run_of(one) != run_of(other),
        )

    return min(candidates, key=distance, default=None)


def _shape(one: Subject) -> tuple[Any, ...]:
    """What a control has in common: without equal sparsity, consistency cannot be compared."""
    sparsity = [one.settings.get(key) for key in ("architecture", "k", "block_k_share")]
    return (one.seed, one.sae.d_sae, one.sae.block_size, one.hook, one.sae.architecture, one.sae.k, *sparsity)
