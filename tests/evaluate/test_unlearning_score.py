"""The score, its honest form and its resamples, on sums written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tcsae.evaluate.unlearning.clamp import Setting
from tcsae.evaluate.unlearning.score import (
    FIGURES,
    NO_CONTROL,
    NO_FEATURE,
    TopicSums,
    chosen_setting,
    score_bootstraps,
    setting_rows,
    strata_of,
    stratified_counts,
    topic_estimates,
    undefined_figures,
)


def topic_of(
    forget: list[list[float]],
    retain: list[list[float]],
    kinds: str = "ssc",
    n: float = 1.0,
) -> TopicSums:
    """Documents with ``n`` predictions each; rows are their rises, one column a setting."""
    rise = np.array(forget + retain)
    settings = tuple(
        Setting("selected" if kind in "sS" else "control", 0.01, 10, 1.0 + at, (at,) if kind in "sc" else ())
        for at, kind in enumerate(kinds)
    )
    return TopicSums(
        settings=settings,
        is_forget=np.arange(len(rise)) < len(forget),
        n=np.full(len(rise), n),
        loss=np.full(len(rise), 3.0 * n),
        hits=np.full(len(rise), 0.5 * n),
        rise=rise,
        hits_with=np.full(rise.shape, 0.25 * n),
    )


def values_of(topic: TopicSums, n_bootstrap: int = 100) -> dict[str, float]:
    boots = score_bootstraps(topic, strata_of([topic.is_forget]), n_bootstrap, 0)
    return {name: float(boots[name].value[0]) for name in FIGURES}


def test_the_score_is_the_largest_rise_among_settings_within_the_retain_limit() -> None:
    # setting 1 raises more, but costs 0.021 outside; of the control's only one counts
    forget = [[0.1, 0.5, 0.03], [0.3, 0.7, 0.05]] * 2
    retain = [[0.01, 0.021, 0.0], [0.03, 0.021, 0.01]] * 2
    topic = topic_of(forget, retain)
    found = values_of(topic)
    assert found["score"] == pytest.approx(0.2)
    assert found["control"] == pytest.approx(0.04)
    assert found["gain"] == pytest.approx(0.16)
    assert chosen_setting(topic, "selected") == 0
    assert chosen_setting(topic, "control") == 2


def test_means_are_over_tokens_not_over_documents() -> None:
    topic = topic_of([[4.0], [0.0]] * 2, [[0.0]] * 4, kinds="s")
    long = np.array([1.0, 9.0] * 2 + [1.0] * 4)
    topic = TopicSums(
        topic.settings, topic.is_forget, long, topic.loss, topic.hits, topic.rise, topic.hits_with
    )
    assert values_of(topic)["score"] == pytest.approx(8 / 20)


def test_if_no_setting_is_allowed_or_none_helps_the_untouched_model_scores_0() -> None:
    for forget, retain in (([[1.0]] * 4, [[0.03]] * 4), ([[-0.1]] * 4, [[0.0]] * 4)):
        topic = topic_of(forget, retain, kinds="s")
        assert values_of(topic)["score"] == 0
        assert chosen_setting(topic, "selected") is None


def test_the_honest_score_chooses_on_one_half_and_scores_on_the_other_both_ways() -> None:
    # halves: documents 0, 2 and 1, 3 of each domain. Half A likes setting 0 (rise 1.0; 0.2 on B), half B
    # setting 1 (rise 0.8; 0.1 on A): (0.2 + 0.1) / 2; the score chooses setting 0: (1.0 + 0.2) / 2
    forget = [[1.0, 0.1], [0.2, 0.8]] * 2
    retain = [[0.0, 0.004], [0.01, 0.0]] * 2
    found = values_of(topic_of(forget, retain, kinds="ss"))
    assert found["score"] == pytest.approx(0.6)
    assert found["honest"] == pytest.approx(0.15)
    assert found["honest_retain"] == pytest.approx((0.01 + 0.004) / 2)


def test_the_interpolated_score_walks_along_m_from_the_untouched_model_to_the_limit() -> None:
    # one curve, rises (forget, retain) of (0.3, 0.03) and (0.5, 0.05): on its first leg the limit is at
    # two thirds, 0.2; no setting itself is allowed. The control's only one costs less: 0.1, no further
    topic = topic_of([[0.3, 0.5, 0.1]] * 4, [[0.03, 0.05, 0.01]] * 4)
    found = values_of(topic)
    assert found["score"] == 0
    assert found["interpolated"] == pytest.approx(0.2)
    assert found["interpolated_control"] == pytest.approx(0.1)
    assert found["interpolated_gain"] == pytest.approx(0.1)


def test_the_interpolated_score_follows_a_curve_that_comes_back_under_the_limit() -> None:
    # 0 -> 0.04 -> 0.01: above the limit between, crossed upwards at 1/2 (0.2) and downwards at 2/3 (0.8)
    topic = topic_of([[0.4, 1.0]] * 4, [[0.04, 0.01]] * 4, kinds="ss")
    assert values_of(topic)["interpolated"] == pytest.approx(1.0)
    lower = topic_of([[1.0, 0.1]] * 4, [[0.04, 0.01]] * 4, kinds="ss")
    assert values_of(lower)["interpolated"] == pytest.approx(0.5)


def test_a_setting_that_one_half_allows_may_cost_more_on_the_other_and_that_is_said() -> None:
    retain = [[0.0], [0.05]] * 2
    found = values_of(topic_of([[1.0]] * 4, retain, kinds="s"))
    # half B forbids it, so its choice is the untouched model: (1.0 + 0) / 2
    assert found["honest"] == pytest.approx(0.5)
    assert found["honest_retain"] == pytest.approx(0.025)


def test_pure_noise_scores_above_0_and_honestly_about_0() -> None:
    generator = np.random.default_rng(0)
    scores, honest = [], []
    for _ in range(60):
        forget = generator.normal(0, 0.1, size=(40, 24)).tolist()
        found = values_of(topic_of(forget, [[0.0] * 24] * 40, kinds="s" * 24), n_bootstrap=100)
        scores.append(found["score"])
        honest.append(found["honest"])
    # the standard error of a mean of 40 is 0.016, the largest of 24 such about 2 of them
    assert 0.024 < np.mean(scores) < 0.04
    assert abs(np.mean(honest)) < 4 * np.std(honest) / np.sqrt(60)


def test_the_setting_is_chosen_again_inside_every_resample() -> None:
    forget = [[1.0, 0.0], [0.0, 1.0]] * 3
    topic = topic_of(forget, [[0.0, 0.0]] * 6, kinds="ss")
    strata = strata_of([topic.is_forget])
    boot = score_bootstraps(topic, strata, 500, 7)["score"]
    counts = stratified_counts(strata, 500, 7)
    share = counts[:, :6:2].sum(axis=1) / 6
    np.testing.assert_allclose(boot.draws[:, 0], np.maximum(share, 1 - share))
    assert boot.draws[:, 0].min() == pytest.approx(0.5)


def test_resamples_keep_the_size_of_every_stratum_and_are_equal_for_equal_documents() -> None:
    strata = np.array([0, 2, 0, 0, 1, 1, 2, 2, 2])
    counts = stratified_counts(strata, 50, seed=1)
    for stratum, size in ((0, 3), (1, 2), (2, 4)):
        assert (counts[:, strata == stratum].sum(axis=1) == size).all()
    assert np.array_equal(counts, stratified_counts(strata, 50, seed=1))
    # two strata of one size are not resampled alike
    twice = stratified_counts(np.array([0, 0, 0, 1, 1, 1]), 50, seed=1)
    assert not np.array_equal(twice[:, :3], twice[:, 3:])


def test_what_cannot_be_had_has_a_reason_and_makes_the_mean_over_topics_undefined() -> None:
    whole = topic_of([[0.1, 0.0]] * 4, [[0.0, 0.0]] * 4, kinds="sc")
    no_feature = topic_of([[0.0, 0.0]] * 4, [[0.0, 0.0]] * 4, kinds="SC")
    no_control = topic_of([[0.1, 0.0]] * 4, [[0.0, 0.0]] * 4, kinds="sC")
    strata = strata_of([whole.is_forget])
    topics = {"a": whole, "b": no_control}
    boots = {name: score_bootstraps(topic, strata, 100, 0) for name, topic in topics.items()}
    undefined = {name: undefined_figures(topic) for name, topic in topics.items()}
    estimates, draws = topic_estimates(boots, undefined, {"a": 8, "b": 8})
    assert estimates["unlearning_score_a"].value == pytest.approx(0.1)
    assert estimates["unlearning_score"].value == pytest.approx(0.1)
    assert estimates["unlearning_control_b"].reason == NO_CONTROL
    assert estimates["unlearning_gain_b"].value is None
    assert estimates["unlearning_gain"].reason == "undefined, because it is for b"
    assert "unlearning_gain" not in draws
    assert set(undefined_figures(no_feature).values()) == {NO_FEATURE}
    assert set(undefined_figures(no_feature)) == set(FIGURES)


def test_the_mean_over_topics_has_the_mean_of_their_draws() -> None:
    one = topic_of([[0.1], [0.4]] * 2, [[0.0]] * 4, kinds="s")
    other = topic_of([[0.0], [0.2]] * 2, [[0.0]] * 4, kinds="s")
    strata = strata_of([one.is_forget])
    boots = {name: score_bootstraps(t, strata, 200, 0) for name, t in (("a", one), ("b", other))}
    estimates, draws = topic_estimates(boots, {"a": {}, "b": {}}, {"a": 8, "b": 8})
    mean = (draws["unlearning_score_a"].draws + draws["unlearning_score_b"].draws) / 2
    np.testing.assert_allclose(draws["unlearning_score"].draws, mean)
    assert estimates["unlearning_score"].value == pytest.approx(0.175)
    assert estimates["unlearning_score"].low is not None


def test_every_setting_has_a_row_with_intervals_and_accuracies() -> None:
    topic = topic_of([[0.1, 0.5], [0.3, 0.7]] * 2, [[0.01, 0.02]] * 4, kinds="sc", n=4.0)
    rises = score_bootstraps(topic, strata_of([topic.is_forget]), 200, 0)["rises"]
    rows = setting_rows(topic, rises)
    assert rows[0]["forget_rise"] == pytest.approx(0.2 / 4)
    assert rows[0]["forget_rise_low"] < 0.2 / 4 < rows[0]["forget_rise_high"]
    assert rows[1]["retain_rise"] == pytest.approx(0.02 / 4)
    assert rows[1]["retain_accuracy"] == pytest.approx(0.25)
    assert [row["kind"] for row in rows] == ["selected", "control"]
    assert rows[0]["features"] == [0]
    assert rows[0]["n_used"] == 1
