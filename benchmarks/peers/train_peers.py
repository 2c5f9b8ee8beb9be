"""The peers' training steps, timed on request: the other half of benchmarks/train.py --peers-python.

It runs in an environment of its own, where sae-lens, eai-sparsify and dictionary-learning are installed and tcsae need
not be. One argument, a JSON object with ``d_model, features, batch, k, threads``. It writes one line, ``{"ready":
versions}``; a peer that is missing or does not start is named in ``"missing"`` with the reason. Then, for each line
that it reads, the name of a peer, it takes one training step on a batch of random rows and writes its seconds. A step
is the peer's own: selection, losses, its bookkeeping, gradient clipping and optimiser; no data is loaded.

T-SAE (Bhalla et al. 2025, arXiv 2511.05541) is no package. Its row is its objective as released, with the contrast that
is off there by default, in lines of our own on top of dictionary_learning's Matryoshka trainer, from which the release
was made: `tsae`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from typing import Any

import torch
from torch.nn.functional import cross_entropy

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"


def saelens(asked: dict[str, Any], kind: str, *, autocast: bool = False) -> Callable[[], object]:
    """SAELens' training class in SAELens' trainer, with ``autocast`` in bfloat16."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size = {"d_in": asked["d_model"], "d_sae": asked["features"]}
    sae = (
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=asked["k"]))
        if kind == "batchtopk"
        else StandardTrainingSAE(StandardTrainingSAEConfig(**size))
    )
    rows = data(asked)
    settings = SAETrainerConfig(
        total_training_samples=10**6 * asked["batch"],
        train_batch_size_samples=asked["batch"],
        lr_end=3e-5,
        autocast=autocast,
    )
    trainer = SAETrainer(settings, sae, rows)
    return lambda: trainer._train_step(sae, next(rows))


def of_dictionary_learning(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings that all of its trainers take; a run that never ends."""
    size = {"activation_dim": asked["d_model"], "dict_size": asked["features"], "k": asked["k"]}
    return {**size, "steps": 10**6, "layer": 0, "lm_name": "none"}


def dictionary_learning(asked: dict[str, Any]) -> Callable[[], object]:
    """dictionary_learning's BatchTopK trainer."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        **of_dictionary_learning(asked),
        device="cpu",
    )
    rows, step = data(asked), count(1)
    return lambda: trainer.update(next(step), next(rows))


def tsae(asked: dict[str, Any], n_pairs: int) -> Callable[[], object]:
    """T-SAE as released on ``n_pairs`` pairs of neighbouring tokens: float32, dense, plain autograd.

    Two groups, 20 % and 80 % of the features. Both tokens of a pair are encoded, each with a BatchTopK over all of its
    own side; the second is reconstructed, by the first group alone (weight 0.2) and by both (0.8), and AuxK is added as
    in dictionary_learning. The contrast is the cross-entropy, both ways, of the plain dot products of the first group's
    codes of all second tokens with those of all first tokens, each to find its own; it weighs 0.1.
    """
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    class TSAETrainer(MatryoshkaBatchTopKTrainer):
        def loss(self, x: torch.Tensor, step: int, logging: bool = False) -> torch.Tensor:  # noqa: ARG002
            before, token = x.unbind(dim=1)
            code, fired, every = self.ae.encode(token, return_active=True, use_threshold=False)
            code_before = self.ae.encode(before, use_threshold=False)
            if step > self.threshold_start_step:
                self.update_threshold(code)
            first = self.group_sizes[0]
            by_first = code[:, :first] @ self.ae.W_dec[:first] + self.ae.b_dec
            by_both = by_first + code[:, first:] @ self.ae.W_dec[first:]
            alone, whole = ((token - found).square().sum(dim=1).mean() for found in (by_first, by_both))
            fit = (self.group_weights[0] * alone + self.group_weights[1] * whole) / 2
            similarity = code[:, :first] @ code_before[:, :first].T
            itself = torch.arange(len(token))
            contrast = (cross_entropy(similarity, itself) + cross_entropy(similarity.T, itself)) / 2
            self.num_tokens_since_fired += len(token)
            self.num_tokens_since_fired[fired] = 0
            auxiliary = self.get_auxiliary_loss((token - by_both).detach(), every)
            return fit + self.auxk_alpha * auxiliary + 0.1 * contrast

    trainer = TSAETrainer(
        **of_dictionary_learning(asked),
        group_fractions=[0.2, 0.8],
        group_weights=[0.2, 0.8],
        lr=3e-4,
        device="cpu",
    )
    generator, step = torch.Generator().manual_seed(0), count(1)
    # as alike as two neighbours whose activations correlate at 0.8
    before = torch.randn(4, n_pairs, asked["d_model"], generator=generator)
    token = 0.8 * before + 0.6 * torch.randn(before.shape, generator=generator)
    batches = torch.stack([before, token], dim=2)
    return lambda: trainer.update(i := next(step), batches[i % 4])


def sparsify(asked: dict[str, Any]) -> Callable[[], object]:
    """sparsify's TopK coder with its sparse decoder, in the order of its trainer's loop, with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(asked["d_model"], SparseCoderConfig(num_latents=asked["features"], k=asked["k"]))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    rows = data(asked)
    fired = torch.zeros(asked["features"], dtype=torch.bool)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        found = coder(next(rows))
        found.fvu.backward()
        fired[found.latent_indices.flatten()] = True
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def data(asked: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The same four batches again and again."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(asked["batch"], asked["d_model"], generator=generator) for _ in range(4)]
    for i in count():
        yield batches[i % 4]


PEERS: dict[str, tuple[str, Callable[[dict[str, Any]], Callable[[], object]]]] = {
    "SAELens BatchTopK": ("sae-lens", lambda asked: saelens(asked, "batchtopk")),
    "SAELens BatchTopK, autocast": ("sae-lens", lambda asked: saelens(asked, "batchtopk", autocast=True)),
    "SAELens Standard": ("sae-lens", lambda asked: saelens(asked, "standard")),
    "SAELens Standard, autocast": ("sae-lens", lambda asked: saelens(asked, "standard", autocast=True)),
    "dictionary_learning BatchTopK": ("dictionary-learning", dictionary_learning),
    "T-SAE, B tokens in pairs": ("dictionary-learning", lambda asked: tsae(asked, asked["batch"] // 2)),
    "T-SAE, B pairs": ("dictionary-learning", lambda asked: tsae(asked, asked["batch"])),
    "sparsify TopK": ("eai-sparsify", sparsify),
}


def main() -> None:
    """Make the peers, then answer requests until the input ends."""
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked["threads"])
    steps, versions, missing = {}, {"torch": torch.__version__}, {}
    with contextlib.redirect_stdout(sys.stderr):
        for name, (package, make) in PEERS.items():
            try:
                steps[name] = make(asked)
                versions[package] = version(package)
                steps[name]()
            except Exception as error:  # noqa: BLE001  # whatever ails a peer is said beside its name
                steps.pop(name, None)
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        answers.write(json.dumps({"ready": versions, "steps": list(steps), "missing": missing}) + "\n")
        for line in sys.stdin:
            began = time.perf_counter()
            steps[line.strip()]()
            answers.write(json.dumps(time.perf_counter() - began) + "\n")


if __name__ == "__main__":
    main()
