"""SAEs whose figures are known beforehand or that learned nothing: what the measurements are held against.

identity    returns its input: explained variance 1, loss recovered 1, KL 0
pca:K       the K leading principal components of the train split, two features each: the best that K numbers a
            token can do linearly, and dense
random      random directions, top-k at the sparsity of the first SAE: what sparse coding gives without learning
untrained   the first SAE's own initial weights: what its training has added
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tcsae.evaluate.config import parse_reference
from tcsae.evaluate.heldout import Block, HeldOut
from tcsae.evaluate.subjects import Origin, Subject, subject
from tcsae.store.errors import ConfigError, TcsaeError
from tcsae.store.progress import progress
from tcsae.store.reader import ActivationStore
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import load_sae, save_sae
from tcsae.train.untrained import untrained_sae

SAMPLE_TOKENS = 8192
"""tokens on which sparsity is matched, a gain is fitted and thresholds are calibrated"""


def identity_sae(d_model: int) -> SAE:
    """The SAE that returns its input: explained variance 1, loss recovered 1, KL 0."""
    return SAE.identity(d_model)


def zero_sae(d_model: int) -> SAE:
    """The SAE that returns zeros: where it is spliced it *is* the zero ablation, so loss recovered 0."""
    return SAE.zero(d_model)


def mean_sae(mean: Float[Tensor, " d_model"]) -> SAE:
    """The SAE without live features that returns ``mean``: explained variance 0, the mean ablation."""
    sae = SAE.zero(mean.shape[0])
    return SAE(
        architecture="standard",
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=mean.to(torch.float32),
        name="mean",
    )


def pca_sae(components: Float[Tensor, "component d_model"], mean: Float[Tensor, " d_model"]) -> SAE:
    """The projection on orthonormal ``components`` about ``mean``.

    A code is not negative, so a component has two features, one for either sign: 2 K features, of which K are
    active at every token.

    >>> sae = pca_sae(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 5.0]))
    >>> sae(torch.tensor([-3.0, 9.0]))
    tensor([-3.,  5.])
    """
    both = torch.cat([components, -components]).float()
    return SAE(
        architecture="standard",
        W_enc=both.T.contiguous(),
        b_enc=torch.zeros(len(both)),
        W_dec=both,
        b_dec=mean.float(),
        name=f"pca-{len(components)}",
    )


def random_sae(sample: Float[Tensor, "token d_model"], d_sae: int, k: int, seed: int) -> SAE:
    """Random unit directions, the same for encoder and decoder, with the ``k`` largest kept.

    About the mean of ``sample``. Directions that overlap add up to too much or too little, so the decoder has one
    gain for all, by least squares on the sample: without it the figures would tell of k and not of the directions.
    """
    draw = torch.Generator().manual_seed(seed)
    d_model = sample.shape[1]
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=draw), dim=1)
    mean = sample.double().mean(dim=0).float()
    plain = SAE(
        architecture="topk",
        W_enc=directions.T.contiguous(),
        b_enc=torch.zeros(d_sae),
        W_dec=directions,
        b_dec=mean,
        k=k,
        name="random",
    )
    target, found = (sample - mean).double(), (plain(sample) - mean).double()
    square = found.square().sum().item()
    gain = (target * found).sum().item() / square if square > 0 else 1.0
    plain.W_dec = gain * directions
    return plain


def principal_components(
    blocks: Iterable[Block],
    centre: Float64[Tensor, " d_model"],
    n_components: int,
    advance: Callable[[int], None],
) -> tuple[Float64[Tensor, "component d_model"], Float64[Tensor, " d_model"]]:
    """Leading eigenvectors of the covariance of all kept rows, and their mean; one pass, in float64.

    Sums are taken about ``centre``, a vector near the mean, so that no precision is lost where the mean is large.
    Memory is one matrix [d_model, d_model]. ``advance`` is told the rows of each block.
    """
    d_model = len(centre)
    total, squares, n = torch.zeros(d_model).double(), torch.zeros(d_model, d_model).double(), 0
    for block in blocks:
        x = block.x[block.kept].double() - centre
        total += x.sum(dim=0)
        squares.addmm_(x.T, x)
        n += len(x)
        advance(len(block.x))
    shift = total / max(n, 1)
    covariance = squares / max(n, 1) - torch.outer(shift, shift)
    _, vectors = torch.linalg.eigh(covariance)
    leading = vectors.T.flip(0)[:n_components]
    # an eigenvector's sign is the library's choice: its largest entry is made positive
    signs = leading.gather(1, leading.abs().argmax(dim=1, keepdim=True)).sign()
    return leading * signs, centre + shift


@dataclass(frozen=True, slots=True)
class Material:
    """What references are made of at one hook."""

    first: Subject
    """the first SAE that reads it"""
    origin: Origin
    """store or model that they must fit"""
    store: ActivationStore | None
    """None: rows of tokens alone are evaluated"""
    sample: Callable[[], Float[Tensor, "token d_model"]]
    """activations of train tokens or, without a store, of the rows"""
    seed: int
    """of the random directions"""


def references(kinds: Sequence[str], materials: Sequence[Material], folder: Path) -> list[Subject]:
    """Every reference of ``kinds`` at the hook of each of ``materials``, made or read from ``folder``.

    They are kept there in SAELens' format, with what they were made from, since components and thresholds take a
    pass over the train split.

    Raises
    ------
    ConfigError
        a reference needs a store and there is none, more components are asked for than there are dimensions, or
        the first SAE does not say how it was trained
    """
    found = []
    for material in materials:
        for text in dict.fromkeys(kinds):
            name = text.replace(":", "-") + (f"-{material.first.hook}" if len(materials) > 1 else "")
            made_from = _made_from(text, material)
            sae = _kept(folder / name, made_from)
            if sae is None:
                sae = _make(text, material)
                sae.name = name
                sae.metadata = {
                    "hook_name": material.first.hook,
                    "tcsae": {"arm": f"reference {name}", "reference": made_from},
                }
                save_sae(sae, folder / name)
            found.append(subject(sae, material.origin, where=f"--reference {text}"))
    return found


def reference_sample(store: ActivationStore, hook: str, seed: int) -> Float[Tensor, "token d_model"]:
    """About `SAMPLE_TOKENS` kept activations of contexts drawn at random from the train split."""
    train = HeldOut(store, hook, "train")
    rows: list[Tensor] = []
    n_tokens = 0
    for context in np.random.default_rng(seed).permutation(len(train.contexts)):
        start, stop = int(train.start[context]), int(train.start[context] + train.length[context])
        x = store.rows(start, stop, hook).float()
        special = np.isin(store.tokens[start:stop], store.provenance.special_token_ids)
        x = x[torch.from_numpy(~special) & (torch.linalg.vector_norm(x, dim=-1) <= train.outlier_norm)]
        rows.append(x)
        n_tokens += len(x)
        if n_tokens >= SAMPLE_TOKENS:
            break
    return torch.cat(rows)


def _made_from(text: str, material: Material) -> dict[str, Any]:
    """Everything that decides a reference's weights, in JSON's types."""
    return {
        "kind": text,
        "origin": material.store.id if material.store is not None else material.origin.model_sha256,
        "hook": material.first.hook,
        "first": material.first.digest,
        "seed": material.seed,
    }


def _kept(folder: Path, made_from: dict[str, Any]) -> SAE | None:
    """The reference in ``folder`` if it was made from the same; anything else is made again."""
    try:
        sae = load_sae(folder)
    except TcsaeError:
        return None
    return sae if sae.metadata.get("tcsae", {}).get("reference") == made_from else None


def _make(text: str, material: Material) -> SAE:
    kind, n_components = parse_reference(text)
    first, d_model = material.first, material.origin.d_model
    if kind == "identity":
        return identity_sae(d_model)
    if kind == "random":
        sample = material.sample()
        l0 = float((first.sae.encode(sample.to(first.sae.device)) != 0).sum(dim=1).double().mean())
        k = min(max(round(l0), 1), first.sae.d_sae)
        return random_sae(sample, first.sae.d_sae, k, material.seed)
    if material.store is None:
        raise ConfigError(
            f"reference {text!r}: needs a store, whose train split it is made from; add --store, or leave it out"
        )
    statistics = material.store.statistics(first.hook)
    if kind == "untrained":
        if not first.settings or first.seed is None:
            raise ConfigError(
                f"reference 'untrained': {first.where} does not say how it was trained (metadata.tcsae.recipe and "
                "seed in its cfg.json); name an SAE that tcsae has trained first"
            )
        return untrained_sae(
            first.settings, first.seed, material.sample(), statistics, name="untrained", where=first.where
        )
    assert n_components is not None
    if n_components > d_model:
        raise ConfigError(
            f"reference {text!r}: the activations have {d_model} dimensions, so at most pca:{d_model}"
        )
    train = HeldOut(material.store, first.hook, "train")
    with progress(train.n_tokens, "row", f"reference {text}") as bar:
        centre = torch.from_numpy(statistics.mean).double()
        return pca_sae(*principal_components(train.blocks(), centre, n_components, bar.update))
