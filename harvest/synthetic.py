"""Activations that no model made: a known dictionary of slow, medium and fast features, document by document.

True feature f is on at token t if b_ft = 1 and then has the value v_ft; the activation is

    x_t = mean + sum_f b_ft v_ft d_f + noise

**Dictionary.** Directions d_f are random unit vectors, drawn one by one; one whose cosine with an earlier one
is beyond ``coherence`` is drawn again. With more features than dimensions they are in superposition.

**Firing.** b_f is a two-state Markov chain, stationary from a document's first token on, that runs on across its
contexts. With rate p and mean run length L it goes off with probability 1 / L and on with p / ((1 - p) L), so

    P(on) = p,    corr(b_t, b_t+d) = w^d,  w = 1 - 1 / (L (1 - p))

Fast features have L = 1 / (1 - p): then w = 0, tokens are independent. A topical feature is on in documents of
its topic only.

**Magnitude.** v_ft = exp(s g_ft - s^2 / 2), mean 1, s = ``magnitude``. Within a run g is a stationary Gaussian AR(1)
process with coefficient h = ``hold`` (0 for fast features); runs are independent. Hence

    E[x_t x_t+d] = R exp(s^2 h^d) + (p^2 + p (1 - p) w^d - R),  R = p (1 - 1 / L)^d     (x = b v)

R being the probability that both tokens are of one run (`value_autocorrelation`).

**Tokens.** A token's id is the number of the fast feature with the largest value (``n_fast`` if none is on): token
identity goes with what does not last, as it does in text.

Document n of seed s depends on s, n and the dictionary alone, so that any document's true codes can be computed
again (`truth_codes`), also those of a part of a store.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32
from scipy.sparse import csr_matrix

from tcsae.harvest.synthetic_settings import LENGTH_ONLY, SyntheticSettings
from tcsae.store.errors import ConfigError, StoreMismatch
from tcsae.store.reader import ActivationStore
from tcsae.store.spec import KINDS, Provenance
from tcsae.store.truth import Truth

GENERATOR = 1
"""Raised whenever the same parameters would give other rows."""

ID_PREFIX = "synthetic-"
"""of a document's id, which its number follows"""

TRIES = 1000
"""directions drawn for one feature before ``coherence`` counts as out of reach"""

_DICTIONARY, _DOCUMENT, _NOISE = range(3)
"""streams of random numbers, each with a seed of its own"""


class DocumentCodes(NamedTuple):
    """What is on where in one document."""

    values: csr_matrix
    """values of the true features, float32 [token, feature]"""
    topic: int
    """number of the document's topic"""


def dictionary(settings: SyntheticSettings) -> Truth:
    """Draw the dictionary that ``settings`` describe.

    Raises `ConfigError` if so many directions with so small a coherence are not found.
    """
    generator = np.random.default_rng([settings.seed, _DICTIONARY])
    n = settings.features
    directions = _directions(settings, generator)
    kinds = np.repeat(np.arange(3, dtype=np.uint8), (settings.n_slow, settings.n_medium, settings.n_fast))
    kind = generator.permutation(kinds)
    rate = _log_uniform(generator, settings.rate, n)
    run_length = np.select(
        [kind == 0, kind == 1],
        [_log_uniform(generator, settings.slow_run, n), _log_uniform(generator, settings.medium_run, n)],
        1 / (1 - rate),
    )
    topic = np.full(n, -1, dtype=np.int32)
    for one in range(3):
        members = generator.permutation(np.flatnonzero(kind == one))
        chosen = members[: round(settings.topical * len(members))]
        topic[chosen] = generator.integers(settings.topics, size=len(chosen))
    mean = generator.standard_normal(settings.d_model)
    length = settings.mean * np.sqrt(signal_energy(settings, rate, topic))
    return Truth(
        directions=directions,
        mean=(mean * length / np.linalg.norm(mean)).astype(np.float32),
        kind=kind,
        rate=rate,
        run_length=run_length,
        hold=np.where(kind == KINDS.index("fast"), 0.0, settings.hold),
        topic=topic,
    )


def signal_energy(
    settings: SyntheticSettings, rate: Float64[np.ndarray, " feature"], topic: Int32[np.ndarray, " feature"]
) -> float:
    """Sum over features of the variance of their values: what ``mean`` and ``noise`` are relative to."""
    often = rate * np.where(topic < 0, 1.0, 1 / settings.topics)
    return float(np.sum(often * np.exp(settings.magnitude**2) - np.square(often)))


def _directions(
    settings: SyntheticSettings, generator: np.random.Generator
) -> Float32[np.ndarray, "feature d_model"]:
    found = np.zeros((settings.features, settings.d_model))
    for at in range(settings.features):
        for _ in range(TRIES):
            drawn = generator.standard_normal(settings.d_model)
            drawn /= np.linalg.norm(drawn)
            if not at or np.abs(found[:at] @ drawn).max() <= settings.coherence:
                found[at] = drawn
                break
        else:
            raise ConfigError(
                f"coherence: {settings.features} directions in {settings.d_model} dimensions with cosines of at most "
                f"{settings.coherence} were not found ({at} were); raise coherence or d_model, or lower features"
            )
    return found.astype(np.float32)


def _log_uniform(
    generator: np.random.Generator, ends: tuple[float, float], n: int
) -> Float64[np.ndarray, " feature"]:
    found: Float64[np.ndarray, " feature"] = np.exp(
        generator.uniform(math.log(ends[0]), math.log(ends[1]), size=n)
    )
    return found


class SyntheticSource:
    """Documents drawn from a dictionary; equal arguments give equal documents.

    Parameters
    ----------
    settings
        the parameters
    truth
        the dictionary that they gave
    """

    def __init__(self, settings: SyntheticSettings, truth: Truth) -> None:
        self.settings = settings
        self.truth = truth
        self.token_of_feature = np.cumsum(truth.of_kind("fast")) - 1
        """token id of each fast feature; of the others meaningless"""
        energy = signal_energy(settings, truth.rate, truth.topic)
        self._noise_scale = np.sqrt(settings.noise * energy / settings.d_model)

    def codes(self, number: int) -> DocumentCodes:
        """True codes of document ``number``."""
        settings, truth = self.settings, self.truth
        generator = np.random.default_rng([settings.seed, _DOCUMENT, number])
        topic = int(generator.integers(settings.topics))
        uniform = generator.random((truth.n_features, settings.length))
        on = firing(uniform, truth.rate, truth.run_length)
        on &= ((truth.topic < 0) | (truth.topic == topic))[:, None]
        feature, token = np.nonzero(on)  # feature by feature, so a run's tokens are neighbours
        begins = np.ones(len(feature), dtype=bool)
        begins[1:] = (np.diff(feature) != 0) | (np.diff(token) != 1)
        fresh = generator.standard_normal(len(feature))
        held = truth.hold[feature] > 0
        fresh[held] = held_in_runs(fresh[held], begins[held], settings.hold)
        values = np.exp(settings.magnitude * fresh - settings.magnitude**2 / 2).astype(np.float32)
        shape = (settings.length, truth.n_features)
        return DocumentCodes(csr_matrix((values, (token, feature)), shape=shape), topic)

    def activations(self, number: int, codes: csr_matrix) -> Float32[np.ndarray, "token d_model"]:
        """Activations of document ``number`` with the codes that it has."""
        generator = np.random.default_rng([self.settings.seed, _NOISE, number])
        noise = generator.standard_normal((codes.shape[0], self.settings.d_model), dtype=np.float32)
        noise *= np.float32(self._noise_scale)
        # sparse times dense: as fast as it is sparse, and added in one order whatever the processor's threads
        signal: Float32[np.ndarray, "token d_model"] = codes @ self.truth.directions
        signal += self.truth.mean
        signal += noise
        return signal

    def tokens(self, codes: csr_matrix) -> Int32[np.ndarray, " token"]:
        """Token ids of a document with these codes."""
        entries = codes.tocoo()
        fast = self.truth.of_kind("fast")[entries.col]
        token, feature, value = entries.row[fast], entries.col[fast], entries.data[fast]
        ids = np.full(codes.shape[0], self.settings.n_fast, dtype=np.int32)
        order = np.argsort(value, kind="stable")  # of several assignments to one token the last stays
        ids[token[order]] = self.token_of_feature[feature[order]]
        return ids


def firing(
    uniform: Float64[np.ndarray, "feature token"],
    rate: Float64[np.ndarray, " feature"],
    run_length: Float64[np.ndarray, " feature"],
) -> Bool[np.ndarray, "feature token"]:
    """Stationary two-state chains from uniform numbers in [0, 1).

    A number below P(off to on) sets the chain on, one of at least P(on to on) sets it off, and one between the
    two leaves it as it is: each transition has its probability, and the state is that of the last number that
    set it, which needs no loop over tokens.

    >>> firing(np.array([[0.9, 0.01, 0.5, 0.96, 0.5]]), np.array([0.2]), np.array([20.0])).tolist()
    [[False, True, True, False, False]]
    """
    sets_on = uniform < (rate / ((1 - rate) * run_length))[:, None]
    sets_off = uniform >= (1 - 1 / run_length)[:, None]
    sets_on[:, 0] = uniform[:, 0] < rate
    sets_off[:, 0] = ~sets_on[:, 0]
    at = np.where(sets_on | sets_off, np.arange(uniform.shape[1], dtype=np.int32), 0)
    found: Bool[np.ndarray, "feature token"] = np.take_along_axis(
        sets_on, np.maximum.accumulate(at, axis=1), axis=1
    )
    return found


def held_in_runs(
    fresh: Float64[np.ndarray, " entry"], begins: Bool[np.ndarray, " entry"], hold: float
) -> Float64[np.ndarray, " entry"]:
    """Stationary AR(1) processes, one for each run, from independent normal numbers.

    >>> held_in_runs(np.array([1.0, 0.0, 3.0, 1.0]), np.array([True, False, True, False]), 0.6).round(2).tolist()
    [1.0, 0.6, 3.0, 2.6]
    """
    start = np.flatnonzero(begins)
    place = np.arange(len(fresh)) - start[np.cumsum(begins) - 1]  # in its run
    order = np.argsort(place, kind="stable")
    ends = np.cumsum(np.bincount(place))
    found = np.where(begins, fresh, np.sqrt(1 - hold**2) * fresh)
    for first, last in itertools.pairwise(ends):  # the second tokens of all runs, then the third, ...
        now = order[first:last]
        found[now] += hold * found[now - 1]
    return found


def value_autocorrelation(
    rate: Float64[np.ndarray, " feature"],
    run_length: Float64[np.ndarray, " feature"],
    hold: Float64[np.ndarray, " feature"],
    magnitude: float,
    lag: int,
) -> Float64[np.ndarray, " feature"]:
    """Autocorrelation of a feature's values at ``lag`` tokens, in documents in which it can be on; closed form.

    >>> value_autocorrelation(np.array([0.2]), np.array([5.0]), np.array([0.0]), 0.0, 1)  # 1 - 1 / (5 * 0.8)
    array([0.75])
    """
    spread = np.exp(magnitude**2)
    kept = (1 - 1 / (run_length * (1 - rate))) ** lag
    one_run = rate * (1 - 1 / run_length) ** lag
    product = (
        one_run * np.exp(magnitude**2 * hold**lag) + np.square(rate) + rate * (1 - rate) * kept - one_run
    )
    found: Float64[np.ndarray, " feature"] = (product - np.square(rate)) / (rate * spread - np.square(rate))
    return found


def process_sha256(settings: SyntheticSettings) -> str:
    """Hash of everything that decides the dictionary and the process, but not how much is drawn from them."""
    decides = {name: value for name, value in settings.to_dict().items() if name not in LENGTH_ONLY}
    return hashlib.sha256(
        json.dumps({"generator": GENERATOR, **decides}, sort_keys=True).encode()
    ).hexdigest()


def truth_of_store(store: ActivationStore) -> SyntheticSource:
    """The source that a store's rows come from; raises as `truth_source`, and `StoreCorrupt` if it is damaged."""
    return truth_source(store.url, store.provenance, store.truth())


def truth_source(where: object, made: Provenance, truth: Truth | None) -> SyntheticSource:
    """The source behind the store ``where`` with this provenance and dictionary.

    Raises
    ------
    StoreMismatch
        a model made the store, or another version of the generator did
    ConfigError
        its parameters are none
    """
    if truth is None or made.truth is None:
        raise StoreMismatch(
            f"{where}: made by model {made.model}, whose features nobody knows; a store with a truth is made by "
            "`tcsae harvest STORE --corpus synthetic`"
        )
    if made.truth.get("generator") != GENERATOR:
        raise StoreMismatch(
            f"{where}: truth: expected generator {GENERATOR}, got {made.truth.get('generator')!r}; use the "
            "tcsae that made the store, or harvest again"
        )
    settings = SyntheticSettings.from_dict(made.truth["parameters"], f"{where}: truth")
    return SyntheticSource(settings, truth)


def truth_codes(store: ActivationStore, source: SyntheticSource, document: int) -> csr_matrix:
    """True codes of document ``document`` of ``store``, float32 [token, feature], computed again.

    ``source`` is `truth_of_store`'s. The tokens that follow from the codes are compared with the stored ones.

    Raises
    ------
    StoreMismatch
        they differ: the store was altered, or this numpy draws other numbers
    """
    name = store.documents["id"][document].as_py()
    rows = slice(int(store.document_offsets[document]), int(store.document_offsets[document + 1]))
    stored = store.tokens[rows]
    number = name.removeprefix(ID_PREFIX)
    codes = source.codes(int(number)).values if number.isdecimal() else None
    if codes is None or not np.array_equal(source.tokens(codes), stored):
        raise StoreMismatch(
            f"{store.url}: document {name!r}: its tokens are not those that its truth gives (numpy {np.__version__}, "
            f"made with {store.provenance.versions.get('numpy')}); verify the store, or harvest it again"
        )
    return codes
