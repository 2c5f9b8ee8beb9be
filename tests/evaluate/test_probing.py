"""Probes on stores with planted labels: found where they are, at chance where they are not, split by document."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from tcsae.evaluate import EvaluateConfig, evaluate, probing_suite
from tcsae.evaluate.heldout import HeldOut
from tcsae.evaluate.probe_codes import ProbeData, codes_of, pooled
from tcsae.evaluate.probe_figures import Undefined, fit, multi_class_figures, one_vs_rest_figures
from tcsae.evaluate.probe_samples import (
    CONTEXTS_PER_DOCUMENT,
    NoTask,
    Side,
    Task,
    choose_contexts,
    context_task,
    position_task,
    token_task,
)
from tcsae.evaluate.probing import accuracies, contrasts, deviations, in_turns, one_vs_rest_accuracies
from tcsae.evaluate.probing_suite import probed_parts
from tcsae.store import ActivationStore, Layout, Provenance, StoreWriter, split_of
from tcsae.store.errors import ConfigError
from tcsae.store.layout import documents_table
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import load_sae, save_sae

HOOK = "blocks.0.hook_resid_post"
N_DOCUMENTS = 240
ROWS = 24
CONTEXTS = 3

StoreOf = Callable[..., ActivationStore]


@pytest.fixture
def store_of(tmp_path: Path, make_provenance: Callable[..., Provenance]) -> StoreOf:
    """A function that writes a store of given activations, tokens, topics and sources."""

    def make(
        x: np.ndarray[Any, Any],
        topics: list[str | None],
        tokens: np.ndarray[Any, Any] | None = None,
        *,
        sources: list[str | None] | None = None,
        rows: int = ROWS,
        name: str = "store.zarr",
    ) -> ActivationStore:
        n = len(topics)
        length = len(x) // n
        ids = [f"document-{i}" for i in range(n)]
        layout = Layout(
            np.ones(len(x), dtype=np.int32) if tokens is None else tokens.astype(np.int32),
            np.arange(n + 1, dtype=np.int64) * length,
            np.arange(0, len(x) + 1, rows, dtype=np.int64),
            documents_table(
                {
                    "id": ids,
                    "source": ["by hand"] * n if sources is None else sources,
                    "topic": topics,
                    "split": [split_of(i) for i in ids],
                    "n_tokens": [length] * n,
                    "sha256": [""] * n,
                }
            ),
        )
        made = make_provenance(d_model=x.shape[1], context_length=rows + 1, dtype="float32")
        with StoreWriter.create(tmp_path / name, layout, made) as writer:
            for chunk in range(writer.n_chunks):
                start, stop = writer.rows_of(chunk)
                writer.write(HOOK, chunk, torch.from_numpy(x[start:stop]))
            writer.finish()
        return ActivationStore.open(tmp_path / name)

    return make


def data_of(store: ActivationStore, seed: int = 0) -> ProbeData:
    return ProbeData(
        HeldOut(store, HOOK, "train"), HeldOut(store, HOOK, "test"), seed, advance=lambda n: None
    )


def sides_of(store: ActivationStore) -> tuple[HeldOut, HeldOut]:
    train, test = (choose_contexts(HeldOut(store, HOOK, split), 10_000, 0) for split in ("train", "test"))
    return train, test


TOPIC_AT, POSITION_AT, TOKEN_AT = 3, slice(4, 12), slice(12, 32)
PARTS = {
    "H": np.arange(4),
    "L": np.arange(4, 48),
    "random": np.array([33, 34, 35, 36]),
}


@pytest.fixture
def planted(store_of: StoreOf) -> ActivationStore:
    """Feature 3 is on in documents about animals, 4..11 say the eighth of the context, 12..31 the token.

    The others are noise. The first 8 tokens of a context are in no eighth.
    """
    generator = np.random.default_rng(0)
    n = N_DOCUMENTS * CONTEXTS * ROWS
    x = generator.random((n, 48)).astype(np.float32)
    tokens = generator.integers(1, 21, size=n)
    topics = generator.permutation(["animals", "plants"] * (N_DOCUMENTS // 2)).tolist()
    document = np.arange(n) // (CONTEXTS * ROWS)
    x[:, TOPIC_AT] = np.array(topics)[document] == "animals"
    position = np.arange(n) % ROWS
    x[:, POSITION_AT] = (position[:, None] - 8) // 2 == np.arange(8)
    x[:, TOKEN_AT] = tokens[:, None] == np.arange(1, 21)
    return store_of(x, topics, tokens)


def values_of(data: ProbeData, name: str, parts: dict[str, Any]) -> dict[str, Any]:
    task = data.tasks[name]
    assert isinstance(task, Task)
    fitted = fit(task, data.raw[name], parts, [], advance=lambda n: None)
    return multi_class_figures(task, fitted.multi_class, 200, 0).estimates


def test_a_planted_topic_is_read_from_one_feature_of_h_and_not_at_all_from_l(
    planted: ActivationStore,
) -> None:
    found = values_of(data_of(planted), "topic", PARTS)
    assert found["probe_topic_H_k1"].value == 1.0
    assert found["probe_topic_H_dense"].value == 1.0
    assert found["probe_accuracy_topic_H_k1"].value == 1.0
    assert found["probe_topic_chance"].value == 0.5
    for probe in ("probe_topic_L_k1", "probe_topic_L_k20", "probe_topic_L_dense"):
        assert found[probe].low < 0.5 < found[probe].high
    assert found["probe_topic_H_minus_random_k1"].low > 0.3


def test_a_planted_position_and_a_planted_token_are_found_by_their_gates_and_by_no_other(
    planted: ActivationStore,
) -> None:
    data = data_of(planted)
    position = values_of(data, "position", PARTS)
    assert position["probe_position_chance"].value == 1 / 8
    assert position["probe_position_L_k20"].value == 1.0
    assert abs(position["probe_position_H_k2"].value - 1 / 8) < 0.08
    token = values_of(data, "token", PARTS)
    assert token["probe_token_chance"].value == 1 / 20
    assert token["probe_token_L_k20"].value == 1.0
    assert abs(token["probe_token_H_k2"].value - 1 / 20) < 0.05
    previous = values_of(data, "previous_token", PARTS)
    assert abs(previous["probe_previous_token_L_k20"].value - 1 / 20) < 0.05


# Split by document ---------------------------------------------------------------------------------------


@pytest.fixture
def fingerprints(store_of: StoreOf) -> ActivationStore:
    """Every document has its own random code, and its topic has nothing to do with it."""
    generator = np.random.default_rng(1)
    codes = generator.standard_normal((N_DOCUMENTS, 400)).astype(np.float32)
    x = np.repeat(codes, CONTEXTS * ROWS, axis=0)
    x += 0.01 * generator.standard_normal(x.shape).astype(np.float32)
    return store_of(x, generator.permutation(["a", "b"] * (N_DOCUMENTS // 2)).tolist())


def test_no_document_stands_on_both_sides_of_any_task(planted: ActivationStore) -> None:
    tasks = [task for task in data_of(planted).tasks.values() if isinstance(task, Task)]
    assert [task.name for task in tasks] == ["topic", "position", "token", "previous_token"]
    split = np.array(planted.documents["split"].to_pylist())
    for task in tasks:
        assert set(split[task.train.document]) == {"train"}
        assert set(split[task.test.document]) == {"test"}


def test_a_topic_that_only_the_documents_identity_tells_is_at_chance(fingerprints: ActivationStore) -> None:
    data = data_of(fingerprints)
    found = values_of(data, "topic", {"whole": np.arange(400)})["probe_topic_whole_dense"]
    assert found.low < 0.5 < found.high
    # had contexts been split, two thirds of each document to learn from, the same probe would know them all
    task, (x, _) = data.tasks["topic"], data.raw["topic"]
    assert isinstance(task, Task)
    third = np.arange(len(x)) % CONTEXTS == 0
    by_context = replace(
        task,
        train=Side(*(column[~third] for column in task.train)),
        test=Side(*(column[third] for column in task.train)),
    )
    leaked = fit(by_context, (x[~third], x[third]), {"whole": np.arange(400)}, [], lambda n: None)
    figures = multi_class_figures(by_context, leaked.multi_class, 100, 0).estimates
    assert figures["probe_topic_whole_dense"].value > 0.95


# Samples -------------------------------------------------------------------------------------------------


def test_positions_come_evenly_from_every_document(planted: ActivationStore) -> None:
    task = position_task(*sides_of(planted), seed=0)
    assert isinstance(task, Task)
    assert task.classes[0] == "10-11"  # by name, as text
    assert set(task.classes) == {f"{a}-{a + 1}" for a in range(8, 24, 2)}
    for side in (task.train, task.test):
        for one in np.unique(side.document):
            assert len(set(np.bincount(side.label[side.document == one], minlength=8))) == 1
        position = side.at % ROWS
        names = np.array(task.classes)[side.label]
        assert (names == [f"{p // 2 * 2}-{p // 2 * 2 + 1}" for p in position]).all()


def test_shorter_contexts_are_in_no_position_probe(store_of: StoreOf) -> None:
    generator = np.random.default_rng(0)
    x = generator.random((N_DOCUMENTS * 40, 4)).astype(np.float32)
    store = store_of(x, ["a", "b"] * (N_DOCUMENTS // 2), rows=40)
    train, test = sides_of(store)
    documents = store.document_of_context[train.contexts]
    train.length[::2] -= 1
    task = position_task(train, test, seed=0)
    assert isinstance(task, Task)
    assert set(task.train.document) == set(documents[1::2])


def test_token_labels_are_the_tokens_and_the_tokens_before(planted: ActivationStore) -> None:
    sides = sides_of(planted)
    for name, back in (("token", 0), ("previous_token", 1)):
        task = token_task(name, *sides, seed=0)
        assert isinstance(task, Task)
        for side in (task.train, task.test):
            assert [task.classes[label] for label in side.label] == [
                str(planted.tokens[r - back]) for r in side.at
            ]
            assert (side.at % ROWS >= 8).all()
        assert np.bincount(task.train.label).tolist() == [200] * 20


def test_a_long_document_gives_only_some_of_its_contexts_and_rare_topics_come_first(
    store_of: StoreOf,
) -> None:
    x = np.zeros((100 * 20 * 8, 2), dtype=np.float32)
    topics: list[str | None] = ["rare" if i % 10 == 0 else "common" for i in range(100)]
    store = store_of(x, topics, rows=8)
    held_out = HeldOut(store, HOOK, "train")
    everything = store.document_of_context[choose_contexts(held_out, 10**6, 0).contexts]
    assert set(np.bincount(everything)) == {0, CONTEXTS_PER_DOCUMENT}
    chosen = choose_contexts(held_out, 16 * CONTEXTS_PER_DOCUMENT, 0)
    documents = np.unique(store.document_of_context[chosen.contexts])
    assert len(documents) == 16
    assert sum(topics[d] == "rare" for d in documents) == 8
    again = choose_contexts(held_out, 16 * CONTEXTS_PER_DOCUMENT, 0)
    assert (again.contexts == chosen.contexts).all()


def test_special_tokens_and_outliers_are_in_no_mean(store_of: StoreOf) -> None:
    generator = np.random.default_rng(0)
    x = generator.random((40 * ROWS, 3)).astype(np.float32)
    tokens = np.ones(len(x))
    tokens[5] = 0
    x[5] = 7.0
    x[6] = 1e6
    store = store_of(x, ["a"] * 40, tokens)
    held_out = HeldOut(store, HOOK, "all")
    found = pooled(lambda x: x, held_out, 3, lambda n: None)
    kept = np.delete(np.arange(ROWS), [5, 6])
    assert found.mean[0] == pytest.approx(x[kept].mean(axis=0), rel=1e-5)
    assert found.mean[1] == pytest.approx(x[ROWS : 2 * ROWS].mean(axis=0), rel=1e-5)
    assert found.is_usable.all()


def test_codes_of_tokens_are_the_encoders_own(planted: ActivationStore) -> None:
    x = np.random.default_rng(0).standard_normal((5000, 6)).astype(np.float32)
    assert (codes_of(torch.relu, x).toarray() == np.maximum(x, 0)).all()


# Undefined -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topics", "reason"),
    [
        ([None] * 60, "no topic is named in the store"),
        (["a"] * 60, "every document has the one topic 'a' in the store"),
        (
            ["a"] * 57 + ["b"] * 3,
            "1 of 2 classes (topic) have 10 documents of the train split and 5 of the test split, and telling "
            "apart takes two",
        ),
    ],
    ids=["none", "one", "few"],
)
def test_a_store_without_two_topics_has_no_topic_probe_and_says_why(
    store_of: StoreOf, topics: list[str | None], reason: str
) -> None:
    store = store_of(np.zeros((60 * ROWS, 2), dtype=np.float32), topics)
    task = context_task("topic", *sides_of(store))
    assert task == NoTask("topic", reason)


def test_a_class_with_too_few_documents_is_left_out_and_counted(store_of: StoreOf) -> None:
    topics: list[str | None] = ["a", "b"] * 100 + ["c"] * 3 + [None] * 5
    store = store_of(np.zeros((len(topics) * ROWS, 2), dtype=np.float32), topics)
    task = context_task("topic", *sides_of(store))
    assert isinstance(task, Task)
    assert (task.classes, task.n_left_out) == (("a", "b"), 1)
    unnamed = {i for i, topic in enumerate(topics) if topic in ("c", None)}
    assert not unnamed & {*task.train.document, *task.test.document}


def test_contexts_too_short_for_eight_parts_have_no_position_probe(store_of: StoreOf) -> None:
    store = store_of(np.zeros((60 * 15, 2), dtype=np.float32), ["a"] * 60, rows=15)
    task = position_task(*sides_of(store), seed=0)
    assert isinstance(task, NoTask)
    assert task.reason.startswith("the longest context has 15 tokens")


def test_documents_too_short_for_any_probe_are_no_samples_and_every_task_says_why(store_of: StoreOf) -> None:
    topics: list[str | None] = ["a", "b"] * 50
    data = data_of(store_of(np.zeros((100 * 4, 2), dtype=np.float32), topics, rows=4))
    assert {name: type(task) for name, task in data.tasks.items()} == dict.fromkeys(
        ("topic", "source", "position", "token", "previous_token"), NoTask
    )
    topic, token = data.tasks["topic"], data.tasks["token"]
    assert isinstance(topic, NoTask)
    assert isinstance(token, NoTask)
    assert topic.reason.startswith("0 of 0 classes (topic) have 10 documents of the train split")
    assert token.reason.startswith("0 of 0 classes (token) have 10 documents of the train split")


def a_task(train: list[int], test: list[int]) -> Task:
    def side(label: list[int], first: int) -> Side:
        return Side(np.arange(len(label)), np.array(label), np.arange(len(label)) + first)

    return Task("topic", ("a", "b", "c"), side(train, 0), side(test, 1000), 0)


def test_constant_features_are_never_chosen_and_a_part_of_them_is_undefined() -> None:
    generator = np.random.default_rng(0)
    label = generator.integers(0, 3, 60)
    x = np.full((60, 6), 0.1, dtype=np.float32)
    x[:, 4] = label
    x[:, 5] = generator.random(60)
    task = a_task(label.tolist(), label.tolist())
    parts = {"H": np.arange(3), "L": np.arange(3, 6)}
    found = fit(task, (x, x), parts, ["H", "L"], lambda n: None)
    assert found.chosen == {"H": [], "L": [4, 5]}
    assert found.multi_class["H", 1] == Undefined("no feature of H varies on the training samples")
    assert found.multi_class["H", 5] == Undefined("H has 3 features, fewer than 5")
    assert found.one_vs_rest["H", None] == Undefined("no feature of H varies on the training samples")
    estimates = multi_class_figures(task, found.multi_class, 100, 0).estimates
    assert estimates["probe_topic_H_k1"].value is None
    assert (
        estimates["probe_topic_H_k1"].reason
        == "undefined, because no feature of H varies on the training samples"
    )
    assert estimates["probe_topic_L_dense"].value == 1.0


# Against slow implementations ----------------------------------------------------------------------------


def slow_choice(x: Any, label: Any, n_classes: int, most: int, scaled: bool) -> list[int]:
    """Classes in turn, in plain loops."""
    differences: list[list[float]] = []
    for one in range(n_classes):
        row = []
        for j in range(x.shape[1]):
            column = [float(v) for v in x[:, j]]
            means = [
                np.mean([v for v, c in zip(column, label, strict=True) if c == d]) for d in range(n_classes)
            ]
            rest = np.mean([m for d, m in enumerate(means) if d != one])
            row.append(abs(means[one] - rest) / (np.std(column) if scaled else 1.0))
        differences.append(row)
    turns = sorted(range(n_classes), key=lambda c: -max(differences[c]))
    chosen: list[int] = []
    while True:
        for one in turns:
            left = [j for j in range(x.shape[1]) if j not in chosen]
            if len(chosen) == most or not left:
                return chosen
            chosen.append(max(left, key=lambda j: differences[one][j]))


@pytest.fixture
def three_classes() -> tuple[Task, Any, Any]:
    """Unequal classes, twelve features of unequal scale that say a little of them."""
    generator = np.random.default_rng(3)
    sides = []
    for n in (300, 200):
        label = np.sort(generator.choice(3, n, p=[0.6, 0.3, 0.1]))
        x = generator.random((n, 12)) + 0.3 * (label[:, None] == np.arange(12) % 5)
        sides.append((label, (x * np.logspace(-2, 2, 12)).astype(np.float32)))
    task = a_task(sides[0][0].tolist(), sides[1][0].tolist())
    return task, sides[0][1], sides[1][1]


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_features_and_balanced_accuracy_are_those_of_a_slow_implementation(
    three_classes: tuple[Task, Any, Any], form: str
) -> None:
    task, train, test = three_classes
    codes = (train, test) if form == "dense" else (sparse.csr_array(train), sparse.csr_array(test))
    found = fit(task, codes, {"L": np.arange(2, 12)}, [], lambda n: None)
    expected = [2 + j for j in slow_choice(train[:, 2:], task.train.label, 3, 20, scaled=True)]
    assert found.chosen["L"] == expected
    estimates = multi_class_figures(task, found.multi_class, 100, 0).estimates
    for size, name in ((1, "k1"), (5, "k5"), (10, "dense")):
        columns = expected[:size]
        deviation = train[:, columns].std(axis=0, dtype=np.float64)
        slow = LogisticRegression(max_iter=1000, class_weight="balanced", tol=1e-6)
        slow.fit(train[:, columns] / deviation, task.train.label)
        predicted = slow.predict(test[:, columns] / deviation)
        assert estimates[f"probe_topic_L_{name}"].value == pytest.approx(
            balanced_accuracy_score(task.test.label, predicted), abs=0.006
        )
        assert estimates[f"probe_accuracy_topic_L_{name}"].value == pytest.approx(
            np.mean(predicted == task.test.label), abs=0.006
        )
    assert estimates["probe_accuracy_topic_majority"].value == pytest.approx(np.mean(task.test.label == 0))
    assert estimates["probe_topic_L_k20"].value is None


def test_one_vs_rest_accuracy_is_that_of_a_drawn_half_and_half_sample(
    three_classes: tuple[Task, Any, Any],
) -> None:
    task, train, test = three_classes
    found = fit(task, (train, test), {"whole": np.arange(12)}, ["whole"], lambda n: None)
    figures, each = one_vs_rest_figures(task, found.one_vs_rest, 100, 0)
    label = task.test.label
    expected = {}
    for one, name in enumerate(task.classes):
        means = [train[task.train.label == c].mean(axis=0, dtype=np.float64) for c in range(3)]
        rest = np.mean([means[c] for c in range(3) if c != one], axis=0)
        column = int(np.argmax(np.abs(means[one] - rest)))
        # SAEBench's sample in expectation: as many negatives as positives, evenly of the other classes
        share = {c: (0.5 if c == one else 0.25) for c in range(3)}
        weight = np.array([300 * share[c] / np.sum(task.train.label == c) for c in task.train.label])
        slow = LogisticRegression(max_iter=1000)
        slow.fit(train[:, [column]].astype(np.float64), task.train.label == one, sample_weight=weight)
        says = slow.predict(test[:, [column]].astype(np.float64))
        expected[name] = sum(share[c] * np.mean(says[label == c] == (c == one)) for c in range(3))
    assert each["whole", 1] == pytest.approx(expected)
    value = figures.estimates["probe_one_vs_rest_topic_whole_k1"].value
    assert value == pytest.approx(np.mean(list(expected.values())))
    assert figures.estimates["probe_one_vs_rest_topic_whole_k20"].reason == (
        "undefined, because whole has 12 features, fewer than 20"
    )


def test_the_choice_does_not_depend_on_the_units_of_the_features(
    three_classes: tuple[Task, Any, Any],
) -> None:
    task, train, test = three_classes
    units = np.logspace(3, -3, 12, dtype=np.float32)
    parts = {"L": np.arange(12)}
    found = fit(task, (train, test), parts, [], lambda n: None)
    rescaled = fit(task, (train * units, test * units), parts, [], lambda n: None)
    assert rescaled.chosen == found.chosen
    for size in (1, 2, 5):
        a, b = found.multi_class["L", size], rescaled.multi_class["L", size]
        assert not isinstance(a, Undefined)
        assert not isinstance(b, Undefined)
        assert np.mean(a.label == b.label) > 0.99


def test_deviations_and_contrasts_of_sparse_codes_are_those_of_dense_ones() -> None:
    x = np.maximum(np.random.default_rng(0).standard_normal((200, 7)), 0).astype(np.float32)
    x[:, 6] = 0
    label = np.arange(200) % 3
    assert deviations(x) == pytest.approx(x.std(axis=0, dtype=np.float64))
    assert deviations(sparse.csr_array(x)) == pytest.approx(deviations(x))
    assert contrasts(sparse.csr_array(x), label, 3) == pytest.approx(contrasts(x, label, 3))


def test_classes_choose_in_turn_and_the_one_with_the_largest_difference_begins() -> None:
    contrast = np.array([[1.0, 3.0, 0.0, np.nan], [9.0, 8.0, 2.0, np.nan]])
    # class 1 takes 0, class 0 takes 1, class 1 takes 2; 3 is constant
    assert in_turns(contrast, 9).tolist() == [0, 1, 2]
    assert in_turns(contrast[:1], 2).tolist() == [1, 0]


def test_a_class_without_samples_in_a_resample_is_left_out_of_its_mean() -> None:
    # one probe of classes a and b: 3 of 4 samples of a recognised, none of b drawn
    assert accuracies(np.array([4.0, 0.0, 3.0, 0.0]), 2).tolist() == [0.75, 0.75]
    # three probes: a takes 3 of 4 and 1 of 2 of b; b takes 2 of 4 of a and none of its own; c was not drawn
    sums = np.array([4.0, 2.0, 0.0, 3.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    with np.errstate(invalid="ignore"):
        found = one_vs_rest_accuracies(sums, 3)
    assert found[:2].tolist() == [(3 / 4 + 1 / 2) / 2, (0 + 2 / 4) / 2]
    assert np.isnan(found[2])


def test_documents_are_the_unit_of_the_interval(planted: ActivationStore) -> None:
    data = data_of(planted)
    task = data.tasks["topic"]
    assert isinstance(task, Task)
    fitted = fit(task, data.raw["topic"], {"L": np.arange(4, 48)}, [], lambda n: None)
    estimates, draws = multi_class_figures(task, fitted.multi_class, 200, 0)
    n_documents = len(np.unique(task.test.document))
    assert estimates["probe_topic_L_k1"].n_documents == n_documents
    assert len(draws["probe_topic_L_k1"].leave_one_out) == n_documents
    assert pa.array(draws["probe_topic_L_k1"].draws).null_count == 0


# The suite -----------------------------------------------------------------------------------------------

FIELDS = ("test_accuracy", *(f"top_{k}_test_accuracy" for k in (1, 2, 5, 10, 20, 50, 100)))


def config_of(store: ActivationStore, folder: Path, **changes: Any) -> EvaluateConfig:
    """Evaluation of the SAE whose feature i is ReLU of dimension i, with block H = 0..3."""
    sae = SAE(
        architecture="standard",
        W_enc=torch.eye(48),
        b_enc=torch.zeros(48),
        W_dec=torch.eye(48),
        b_dec=torch.zeros(48),
        block_size=4,
        name="planted-s0",
    )
    save_sae(sae, folder / "sae")
    fields: dict[str, Any] = {"n_bootstrap": 100, "device": "cpu", "suites": ("probing",)} | changes
    return EvaluateConfig(saes=(folder / "sae",), out=folder / "out", store=store.path, **fields)


def test_the_suite_writes_saebenchs_file_and_ours_in_it_and_is_not_measured_twice(
    planted: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(planted, tmp_path)
    (row,) = evaluate(config).rows
    body = json.loads((tmp_path / "out" / "probing" / "planted-s0.json").read_text())
    assert body["eval_type_id"] == "sparse_probing"
    metrics = body["eval_result_metrics"]
    assert set(metrics) == {"llm", "sae"}
    for who, fields in metrics.items():
        assert tuple(fields) == tuple(f"{who}_{field}" for field in FIELDS)
        assert fields[f"{who}_top_1_test_accuracy"] == 1.0
        assert fields[f"{who}_test_accuracy"] > 0.9
        # there are 48 features
        assert fields[f"{who}_top_50_test_accuracy"] is None
    assert [one["dataset_name"] for one in body["eval_result_details"]] == ["topic"]
    assert body["eval_result_details"][0] == {"dataset_name": "topic", **metrics["llm"], **metrics["sae"]}
    ours = body["eval_result_unstructured"]["tcsae"]
    assert ours["estimates"]["probe_topic_H_k1"]["value"] == 1.0
    assert ours["tasks"]["topic"]["chosen_features"]["H"][0] == TOPIC_AT
    assert ours["tasks"]["source"] == {
        "undefined": "every document has the one source 'by hand' in the store"
    }
    assert set(ours["one_vs_rest_of_classes"]["topic"]["whole_k1"]) == {"animals", "plants"}
    found = row.estimates
    assert found["probe_source_chance"].reason == (
        "undefined, because every document has the one source 'by hand' in the store"
    )
    assert found["probe_topic_residual_k1"].value == found["probe_topic_whole_k1"].value == 1.0
    assert found["probe_position_whole_k20"].value == 1.0
    assert {"probe_topic_H_minus_random_k1", "probe_token_L_dense", "probe_previous_token_random_k2"} <= set(
        found
    )

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(probing_suite, "fit", refuse)
    (again,) = evaluate(config).rows
    assert again.estimates == row.estimates


def test_documents_that_probes_learn_from_are_refused_as_their_test(
    planted: ActivationStore, tmp_path: Path
) -> None:
    expected = "split: --suite probing trains its probes on the train split and tests them on the test split"
    with pytest.raises(ConfigError, match=expected):
        evaluate(config_of(planted, tmp_path, split="all"))


def test_an_sae_without_a_block_is_probed_whole(planted: ActivationStore, tmp_path: Path) -> None:
    config = config_of(planted, tmp_path)
    sae = load_sae(tmp_path / "sae")
    sae.block_size = 0
    assert list(probed_parts(sae, 0)) == ["whole"]
    sae.block_size = 4
    parts = probed_parts(sae, config.seed)
    assert {part: len(features) for part, features in parts.items()} == {
        "whole": 48,
        "H": 4,
        "L": 44,
        "random": 4,
    }
    assert len(set(parts["random"].tolist())) == 4
