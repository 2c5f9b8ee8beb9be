"""The synthetic process has the rates, run lengths and autocorrelations that its closed forms say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tcsae.harvest.synthetic import (
    SyntheticSource,
    dictionary,
    firing,
    held_in_runs,
    process_sha256,
    signal_energy,
    value_autocorrelation,
)
from tcsae.harvest.synthetic_settings import SyntheticSettings, parse_synthetic
from tcsae.store.errors import ConfigError, CorpusError, UnknownName

SETTINGS = SyntheticSettings(features=120, d_model=48, documents=400, length=128, topics=3, seed=1)


@pytest.fixture(scope="module")
def source() -> SyntheticSource:
    return SyntheticSource(SETTINGS, dictionary(SETTINGS))


@pytest.fixture(scope="module")
def drawn(source: SyntheticSource) -> tuple[np.ndarray, np.ndarray]:
    """Values of every feature in 400 documents, and whether each can be on in each document."""
    found = [source.codes(number) for number in range(SETTINGS.documents)]
    values = np.stack([one.values.toarray() for one in found])
    topic = np.array([one.topic for one in found])
    allowed = (source.truth.topic < 0) | (source.truth.topic == topic[:, None])
    return values, allowed


def within_sampling_error(found: np.ndarray, expected: np.ndarray, error: np.ndarray) -> None:
    """Deviations in standard errors are of mean 0 and size 1, over many features."""
    z = (found - expected) / error
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    # chi-square of len(z) degrees of freedom, within four of its standard deviations
    assert abs(np.mean(z**2) - 1) < 4 * np.sqrt(2 / len(z))


# The process


def test_features_are_on_at_their_rate(source, drawn):
    values, allowed = drawn
    truth = source.truth
    n = allowed.sum(axis=0) * SETTINGS.length
    rate = (values > 0).sum(axis=(0, 1)) / n
    # the variance of a mean of a chain with corr w^d, for documents much longer than a run
    w = 1 - 1 / (truth.run_length * (1 - truth.rate))
    d = np.arange(1, SETTINGS.length)
    inflation = 1 + 2 * ((1 - d / SETTINGS.length) * w[:, None] ** d).sum(axis=1)
    within_sampling_error(rate, truth.rate, np.sqrt(truth.rate * (1 - truth.rate) * inflation / n))


def test_a_document_begins_in_the_stationary_state(source, drawn):
    values, allowed = drawn
    n = allowed.sum()
    found = (values[:, 0] > 0).sum() / n
    rates = np.broadcast_to(source.truth.rate, allowed.shape)[allowed]
    assert abs(found - rates.mean()) < 4 * np.sqrt((rates * (1 - rates)).sum()) / n


def test_each_token_ends_a_run_with_the_probability_of_its_mean_length(source, drawn):
    on = drawn[0] > 0
    n = on[:, :-1].sum(axis=(0, 1))
    ended = (on[:, :-1] & ~on[:, 1:]).sum(axis=(0, 1)) / n
    expected = 1 / source.truth.run_length
    within_sampling_error(ended, expected, np.sqrt(expected * (1 - expected) / n))


@pytest.mark.parametrize("kind", ["slow", "medium", "fast"])
@pytest.mark.parametrize("lag", [1, 8, 32])
def test_the_autocorrelation_of_values_is_that_of_the_closed_form(source, drawn, kind, lag):
    values, allowed = drawn
    truth = source.truth
    members = truth.of_kind(kind)
    rho = value_autocorrelation(truth.rate, truth.run_length, truth.hold, SETTINGS.magnitude, lag)
    spread = truth.rate * np.exp(SETTINGS.magnitude**2) - truth.rate**2
    # per document: mean over pairs of the product, summed over the features that can be on
    product = (values[:, :-lag] * values[:, lag:]).mean(axis=1, dtype=np.float64)
    deviation = ((product - (rho * spread + truth.rate**2)) * allowed)[:, members].sum(axis=1)
    error = deviation.std() / np.sqrt(SETTINGS.documents)
    assert abs(deviation.mean()) < 4 * error
    if (kind, lag) in (("slow", 1), ("slow", 8), ("slow", 32), ("medium", 1), ("medium", 8)):
        assert (rho * spread)[members].sum() > 10 * error  # independent tokens would not have passed


def test_fast_features_are_memoryless_and_slow_ones_are_slower_than_medium_ones(source):
    truth = source.truth
    rho = value_autocorrelation(truth.rate, truth.run_length, truth.hold, SETTINGS.magnitude, 4)
    fast, medium, slow = (rho[truth.of_kind(kind)] for kind in ("fast", "medium", "slow"))
    np.testing.assert_allclose(fast, 0, atol=1e-12)
    assert medium.max() < slow.min()


def test_chains_equal_those_of_a_loop_over_tokens():
    generator = np.random.default_rng(0)
    uniform = generator.random((20, 300))
    rate, length = generator.uniform(0.01, 0.4, 20), generator.uniform(2, 30, 20)
    for at, found in enumerate(firing(uniform, rate, length)):
        on = uniform[at, 0] < rate[at]
        for t in range(300):
            if t:
                goes_on = rate[at] / ((1 - rate[at]) * length[at])
                on = uniform[at, t] < (1 - 1 / length[at] if on else goes_on)
            assert found[t] == on


def test_magnitudes_are_held_within_a_run_and_independent_of_the_run_before():
    generator = np.random.default_rng(0)
    begins = np.arange(200_000) % 10 == 0
    g = held_in_runs(generator.standard_normal(200_000), begins, 0.9).reshape(-1, 10)
    assert g.mean() == pytest.approx(0, abs=0.02)
    assert g.var(axis=0) == pytest.approx(np.ones(10), abs=0.05)
    correlation = np.corrcoef(g.T)
    assert correlation[0, 1:4] == pytest.approx([0.9, 0.81, 0.729], abs=0.02)
    assert np.corrcoef(g[:-1, 9], g[1:, 0])[0, 1] == pytest.approx(0, abs=0.03)


def test_a_topical_feature_is_silent_in_documents_of_other_topics(source, drawn):
    values, allowed = drawn
    assert (source.truth.topic >= 0).sum() == 30  # a quarter of each kind
    assert not values.sum(axis=1)[~allowed].any()
    assert values.sum(axis=(0, 1))[source.truth.topic >= 0].min() > 0


# Activations and tokens


def test_activations_are_mean_features_and_noise_of_the_stated_energy(source):
    truth = source.truth
    energy = signal_energy(SETTINGS, truth.rate, truth.topic)
    noise = []
    for number in range(50):
        values = source.codes(number).values
        signal = values.toarray() @ truth.directions
        noise.append(source.activations(number, values) - truth.mean - signal)
    assert np.square(noise).sum(axis=-1).mean() == pytest.approx(SETTINGS.noise * energy, rel=0.01)
    assert np.linalg.norm(truth.mean) == pytest.approx(np.sqrt(energy), rel=1e-5)


def test_directions_are_unit_vectors_within_the_coherence(source):
    directions = source.truth.directions
    assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(120), abs=1e-6)
    cosines = directions @ directions.T - np.eye(120)
    assert 0.3 < np.abs(cosines).max() <= SETTINGS.coherence + 1e-6


def test_a_token_is_named_after_its_strongest_fast_feature(source):
    fast = np.flatnonzero(source.truth.of_kind("fast"))
    seen = set()
    for number in range(10):
        codes = source.codes(number).values
        for row, token in zip(codes.toarray()[:, fast], source.tokens(codes), strict=True):
            assert token == (row.argmax() if row.any() else len(fast))
            seen.add(int(token))
    assert len(fast) in seen
    assert len(seen) > 20


def test_a_document_depends_on_the_seed_and_its_number_alone(source):
    other = SyntheticSource(SETTINGS, dictionary(SETTINGS))
    other.codes(3)
    again, first = other.codes(7).values, source.codes(7).values
    assert (again != first).nnz == 0
    np.testing.assert_array_equal(other.activations(7, again), source.activations(7, first))
    assert (source.codes(8).values != first).nnz > 0


def test_the_process_is_named_by_all_but_how_much_is_drawn():
    assert process_sha256(replace(SETTINGS, documents=7, length=9)) == process_sha256(SETTINGS)
    for name, value in (("seed", 2), ("hold", 0.5), ("topics", 4), ("rate", (0.003, 0.06))):
        assert process_sha256(replace(SETTINGS, **{name: value})) != process_sha256(SETTINGS)


# Parameters


def test_a_file_and_a_string_name_the_same_settings(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text("features = 64\nslow_run = [30, 40]\nslow = 0.5\n")
    expected = SyntheticSettings(features=64, slow_run=(30.0, 40.0), slow=0.5)
    assert parse_synthetic(f"synthetic:{file}") == expected
    assert parse_synthetic("synthetic:features=64, slow_run=30:40,slow=0.5") == expected
    assert parse_synthetic("synthetic") == parse_synthetic("synthetic:") == SyntheticSettings()
    assert SyntheticSettings.from_dict(expected.to_dict(), "x") == expected


REFUSED = {
    "a slip of the pen": (
        "featurs=3",
        UnknownName,
        "unknown parameter of synthetic 'featurs'; did you mean: features",
    ),
    "no value": ("features", ConfigError, "expected KEY=VALUE,... or FILE.toml"),
    "twice": ("seed=1,seed=2", ConfigError, "seed: expected once, got '1' and '2'"),
    "a fraction": ("seed=1.5", ConfigError, "seed: expected a whole number, got '1.5'"),
    "a word": ("slow=much", ConfigError, "slow: expected a number, got 'much'"),
    "not a number": ("slow=nan", ConfigError, "slow: expected 0 to 1, got nan"),
    "a negative seed": ("seed=-1", ConfigError, "seed: expected 0 to"),
    "no range": ("rate=0.1", ConfigError, "rate: expected a range such as 4:12, got '0.1'"),
    "a range backwards": ("rate=0.1:0.05", ConfigError, "rate: expected a range within"),
    "a rate above a half": ("rate=0.1:0.6", ConfigError, "within 1e-06:0.5"),
    "overlapping kinds": ("slow_run=8:60", ConfigError, "slow_run: expected to begin at 12.0"),
    "none fast": ("slow=0.6,medium=0.4", ConfigError, "at least one of 1024 features fast"),
    "sources": ("sources=9", ConfigError, "sources: expected at most the 8 topics, got 9"),
    "no file": ("nowhere.toml", CorpusError, "nowhere.toml: no such file"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_parameters_that_cannot_work_are_refused(given, error, message):
    with pytest.raises(error) as raised:
        parse_synthetic(f"synthetic:{given}")
    assert message in str(raised.value)


def test_a_file_with_a_boolean_or_no_toml_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text("features = true\n")
    with pytest.raises(ConfigError, match="features: expected a whole number, got True"):
        parse_synthetic(f"synthetic:{tmp_path / 'a.toml'}")
    (tmp_path / "b.toml").write_text("features = = 3\n")
    with pytest.raises(CorpusError, match="not TOML"):
        parse_synthetic(f"synthetic:{tmp_path / 'b.toml'}")


def test_a_coherence_out_of_reach_is_refused_with_the_numbers():
    with pytest.raises(
        ConfigError, match="coherence: 100 directions in 8 dimensions with cosines of at most 0.1"
    ):
        dictionary(SyntheticSettings(features=100, d_model=8, coherence=0.1))
