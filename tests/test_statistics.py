"""Statistics: intervals that cover, tests that err as often as they say, and exact answers where there is one. Studies are simulated with fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from kit import resampling
from kit.errors import UserError
from kit.metrics import METRICS, Array, Metric, as_is, ratio
from kit.resampling import Estimate, influence, moments, resampled, student, variance
from kit.statistics import PAIRED_FROM, compare, holm, intervals

MEAN = Metric("mean", True, lambda _: np.empty(0), ratio, str, show=as_is, margin=1.0)
OPEN = Metric("mean without a margin", True, lambda _: np.empty(0), ratio, str, show=as_is)
BLEU, PERPLEXITY = METRICS["bleu4"], METRICS["perplexity"]
N = 300
Make = Callable[[np.random.Generator, int], tuple[Array, Array]]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many data sets at once, as the metrics of one call, with fewer resamples."""
    monkeypatch.setattr(resampling, "RESAMPLES", 1000)


def column(values: Array) -> Array:
    return np.stack([values, np.ones(len(values))], axis=1)


def error(share: float, trials: int) -> float:
    """Three standard errors of a share seen in so many trials."""
    return 3 * math.sqrt(share * (1 - share) / trials)


def lognormal(rng: np.random.Generator, n: int) -> Array:
    """Of skewness 6."""
    return 10 * np.exp(rng.normal(0, 1, n))


def difficulties(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """A reference length and a log odds of matching for each row, heavy-tailed and shared by systems."""
    return np.maximum(8, rng.lognormal(4, 0.8, n)).astype(int), rng.normal(-0.3, 1, n)


def bleu_like(rng: np.random.Generator, lengths: Array, odds: Array) -> Array:
    """BLEU's statistics of a made system."""
    replies = np.maximum(4, lengths * rng.uniform(0.5, 1.2, len(lengths))).astype(int)
    total = replies[:, None] - np.arange(4)
    share = 1 / (1 + np.exp(-odds - rng.normal(0, 0.5, len(odds))))
    return np.column_stack([replies, lengths, rng.binomial(total, share[:, None] ** (1 + 0.6 * np.arange(4))), total]).astype(np.float64)


def named(tables: Sequence[Array]) -> dict[str, Array]:
    return {str(i): table for i, table in enumerate(tables)}


def coverage(tables: Sequence[Array], metric: Metric, truth: float) -> float:
    made = intervals([named(tables)], [""] * len(tables[0]), dict.fromkeys(named(tables), metric))["all"]
    return float(np.mean([score["low"] <= truth <= score["high"] for score in made.values()]))


def one(a: Array, b: Array, metric: Metric = MEAN, sources: Sequence[str] | None = None) -> dict[str, object]:
    return compare({"a": [{"x": a}], "b": [{"x": b}]}, sources or [""] * len(a), {"x": metric})[0]


def test_resamples_are_of_the_size_of_each_source_and_paired() -> None:
    sources = ["a"] * 30 + ["b"] * 10
    table = np.stack([np.ones(40), np.arange(40.0)], axis=1)
    drawn = resampled([table, table[:, 1:] * 2], sources)
    assert (drawn["a"][0][:, 0] == 30).all()
    assert (drawn["b"][0][:, 0] == 10).all()
    assert (drawn["a"][1][:, 0] == 2 * drawn["a"][0][:, 1]).all()
    assert drawn["b"][0][0].tolist() == [10, sum(range(30, 40))]
    assert drawn["a"][0][1:, 1].var() == pytest.approx(30 * np.arange(30).var(), rel=0.05)


def test_resampling_in_parts_gives_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "CHUNK", 1000)
    assert resampled([np.ones((30, 1))], ["a"] * 30)["a"][0].tolist() == [[30.0]] * 10_001


def test_differences_between_sources_do_not_widen_a_stratified_interval() -> None:
    values = np.random.default_rng(0).normal(0, 1, 200)
    apart = column(values + np.repeat([0, 100], 100))
    made = intervals([{"x": apart}], ["a"] * 100 + ["b"] * 100, {"x": MEAN})
    assert made["all"]["x"]["high"] - made["all"]["x"]["low"] < 0.5
    assert made["per_source"]["b"]["x"]["value"] == pytest.approx(100 + values[100:].mean())
    assert (made["all"]["x"]["n"], made["per_source"]["b"]["x"]["n"]) == (200, 100)


def test_a_small_source_weighs_as_much_as_it_has_rows() -> None:
    values = np.random.default_rng(19).normal(0, 1, 404)
    made = intervals([{"x": column(values)}], ["a"] * 4 + ["b"] * 400, {"x": MEAN})["all"]["x"]
    assert made["high"] - made["low"] == pytest.approx(2 * 1.96 * values.std() / math.sqrt(404), rel=0.05)


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize("n", [100, 200])
def test_intervals_of_a_skewed_mean_cover_the_truth(n: int) -> None:
    """A bootstrap that is not studentised covers 91% and 93%."""
    rng = np.random.default_rng(n + 1)
    tables = [column(lognormal(rng, n)) for _ in range(1000)]
    assert coverage(tables, MEAN, 10 * math.exp(0.5)) == pytest.approx(0.95, abs=0.02)


@pytest.mark.usefixtures("study")
def test_intervals_of_scores_that_are_often_0_cover_the_truth() -> None:
    rng = np.random.default_rng(16)
    tables = [column((rng.random(200) < 0.4) * rng.beta(2, 5, 200)) for _ in range(1000)]
    assert coverage(tables, MEAN, 0.4 * 2 / 7) == pytest.approx(0.95, abs=0.02)


@pytest.mark.usefixtures("study")
def test_intervals_of_a_corpus_score_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    truth = float(BLEU.score(bleu_like(rng, *difficulties(rng, 1_000_000)).sum(axis=0)))
    tables = [bleu_like(rng, *difficulties(rng, 100)) for _ in range(1000)]
    assert coverage(tables, BLEU, truth) == pytest.approx(0.95, abs=0.02)


def skewed_scores(rng: np.random.Generator, n: int, shift: float = 0.0) -> tuple[Array, Array]:
    shared = rng.normal(50, 20, n)
    return column(shared + lognormal(rng, n) + shift), column(shared + lognormal(rng, n))


def skewed_differences(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Means are equal and systems are not."""
    shared = rng.normal(50, 20, n)
    return column(shared + lognormal(rng, n) - 10 * math.exp(0.5)), column(shared)


def equal_systems(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    lengths, odds = difficulties(rng, n)
    return bleu_like(rng, lengths, odds), bleu_like(rng, lengths, odds)


def found(pairs: Sequence[tuple[Array, Array]], metric: Metric) -> list[dict[str, object]]:
    a, b = (named(tables) for tables in zip(*pairs, strict=True))
    sources = [str(i % 3) for i in range(len(pairs[0][0]))]
    return compare({"a": [a], "b": [b]}, sources, dict.fromkeys(a, metric))


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(
    ("make", "metric", "n"), [(skewed_scores, MEAN, 8), (skewed_scores, MEAN, 200), (skewed_differences, MEAN, 200), (equal_systems, BLEU, 100)]
)
def test_equal_methods_are_told_apart_at_most_one_time_in_twenty(make: Make, metric: Metric, n: int) -> None:
    """The bootstrap moved to no difference errs in 7% of the skewed ones."""
    rng = np.random.default_rng(3)
    wrong = np.mean([c["p"] < 0.05 for c in found([make(rng, n) for _ in range(1000)], metric)])
    assert 0.01 < wrong < 0.05 + error(0.05, 1000) * 2 / 3


@pytest.mark.parametrize(("differ", "p"), [(3, 0.25), (4, 0.125), (5, 0.0625)])
def test_few_rows_that_differ_are_told_as_the_sign_test_does(differ: int, p: float) -> None:
    a = np.zeros(100)
    a[:differ] = 100
    assert one(column(a), column(np.zeros(100)))["p"] == pytest.approx(p, abs=3 * math.sqrt(p / 10_000))


def test_an_interval_that_leaves_out_0_has_a_small_p_unless_rows_exchanged_differ_as_much() -> None:
    rng = np.random.default_rng(17)
    moved, still = rng.exponential(1, resampling.RESAMPLES) - 1, np.zeros(resampling.RESAMPLES)
    for value in np.linspace(-4, 4, 81):
        made = Estimate(float(value), moved, still, 1, 0, 1, 0, "")
        low, high = made.interval()
        assert (made.p() < 0.05) == (low > 0 or high < 0)
        assert Estimate(float(value), moved, 9 * moved, 1, 0, 1, 0, "").p() > 0.1


@pytest.mark.parametrize("metric", [BLEU, PERPLEXITY, MEAN])
def test_the_variance_of_a_score_is_the_bootstraps(metric: Metric) -> None:
    rng, sources = np.random.default_rng(18), ["a"] * 200 + ["b"] * 100
    table = bleu_like(rng, *difficulties(rng, N))
    drawn = resampled([table, moments(influence(metric, table.sum(axis=0), table), sources)], sources)
    scores = metric.score(drawn["a"][0] + drawn["b"][0])
    spread = variance({source: sums[1] for source, sums in drawn.items()}, {"a": 200, "b": 100})
    assert spread[0] == pytest.approx(scores.var(), rel=0.06)
    assert spread[1:].mean() == pytest.approx(spread[0], rel=0.02)
    few = column(np.arange(5.0))
    assert variance({"": moments(influence(MEAN, few.sum(axis=0), few), [""] * 5).sum(axis=0)[None]}, {"": 5})[0] == pytest.approx(2.5 / 5, rel=0.05)


@pytest.mark.usefixtures("study")
def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    """At the level that the number of comparisons leaves for each, whatever the others show."""
    rng, family = np.random.default_rng(4), 10
    detectable = float(np.mean([c["detectable"] for _ in range(20) for c in found([skewed_scores(rng, N) for _ in range(family)], MEAN)]))
    tables = [[skewed_scores(rng, N, detectable) for _ in range(family)] for _ in range(100)]
    assert np.mean([c["p"] < 0.05 / family for those in tables for c in found(those, MEAN)]) == pytest.approx(0.8, abs=0.04)


@pytest.mark.usefixtures("study")
def test_a_family_of_equal_methods_has_one_error_in_twenty() -> None:
    rng, trials = np.random.default_rng(5), 400
    shared = rng.normal(50, 20, (trials, N))
    methods = {name: [named([column(row + lognormal(rng, N)) for row in shared])] for name in "abcd"}
    made = compare(methods, [""] * N, dict.fromkeys(methods["a"][0], OPEN))
    families = np.array([c["p"] for c in made]).reshape(trials, 6)
    assert np.mean([min(ps) < 0.05 for ps in families]) > 0.1
    assert np.mean([min(holm(ps)) < 0.05 for ps in families]) < 0.05 + error(0.05, trials)


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize("n", [2, 5, 8])
def test_intervals_of_a_few_rows_cover_the_truth(n: int) -> None:
    """Of two rows, half the resamples have no variance."""
    tables = [column(values) for values in np.random.default_rng(14).normal(0, 1, (1000, n))]
    assert coverage(tables, MEAN, 0) == pytest.approx(0.95, abs=0.02)


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(("seeds", "between", "by_row", "by_both"), [(2, 5, 10, 5), (3, 1, 10, 5), (5, 1, 10, 5), (5, 0, 10, 5), (3, 0, 0, 15)])
def test_intervals_over_few_seeds_cover_the_truth(seeds: int, between: float, by_row: float, by_both: float) -> None:
    """Standard deviations of a method's means between seeds, of its rows, and of its rows between seeds."""
    rng, trials = np.random.default_rng(seeds), 400
    shared = rng.normal(50, 20, (trials, N))

    def runs() -> list[dict[str, Array]]:
        own = shared + rng.normal(0, by_row, shared.shape)
        return [named([column(row + rng.normal(0, between) + rng.normal(0, by_both, N)) for row in own]) for _ in range(seeds)]

    a, b = runs(), runs()
    metrics = dict.fromkeys(a[0], MEAN)
    alone = list(intervals(a, [""] * N, metrics)["all"].values())
    paired = compare({"a": a, "b": b}, [""] * N, metrics)
    assert {made["over"] for made in alone + paired} == {"seeds and examples"}
    covered = [np.mean([made["low"] <= truth <= made["high"] for made in found]) for found, truth in ((alone, 50), (paired, 0))]
    # A sum of a normal and a t part covers rather more than 95%.
    assert 0.95 - error(0.95, trials) < min(covered)
    assert covered[1] < 0.985


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(("seeds", "shared", "own"), [(PAIRED_FROM, 5, 1), (PAIRED_FROM, 0, 2), (PAIRED_FROM - 1, 5, 1)])
def test_methods_with_the_same_seeds_are_compared_seed_by_seed(seeds: int, shared: float, own: float) -> None:
    """Standard deviations of what a seed does to both methods alike, and to each by itself."""
    rng, trials = np.random.default_rng(seeds), 400
    rows, both = rng.normal(50, 20, (trials, N)), rng.normal(0, shared, (seeds, trials, 1))
    a, b = ([named([column(row) for row in rows + seed + rng.normal(0, own, (trials, 1)) + rng.normal(0, 5, rows.shape)]) for seed in both] for _ in "ab")
    metrics = dict.fromkeys(a[0], MEAN)
    paired, unpaired = (compare({"a": a, "b": b}, [""] * N, metrics, seeds=s) for s in ({m: range(seeds) for m in "ab"}, None))
    covered = np.mean([made["low"] <= 0 <= made["high"] for made in paired])
    assert 0.95 - error(0.95, trials) < covered
    width, wide = (np.median([made["high"] - made["low"] for made in found]) for found in (paired, unpaired))
    assert (width < wide / 2) == (shared > 0 and seeds == PAIRED_FROM)


def test_pairs_that_nobody_may_rank_weigh_on_no_other() -> None:
    rng = np.random.default_rng(16)
    runs = {m: [{"x": column(rng.normal(shift, 1, 50))}] for m, shift in (("a", 0), ("b", 0.3), ("c", 9))}
    metrics = {"x": OPEN}
    alone = compare(runs, [""] * 50, metrics, pairs=[("a", "b")])
    assert [c for c in compare(runs, [""] * 50, metrics, apart={("a", "c"), ("b", "c")}) if "c" not in (c["a"], c["b"])] == alone
    assert compare(runs, [""] * 50, metrics)[0]["p_holm"] == alone[0]["p_holm"]  # the last one to be decided
    assert compare(runs, [""] * 50, metrics)[0]["detectable"] > alone[0]["detectable"]
    noise = {"d": [{"x": column(rng.normal(0, 1, 50))}]}
    assert compare(runs | noise, [""] * 50, metrics)[0]["p_holm"] > alone[0]["p_holm"]


def test_seeds_that_hardly_differ_make_no_p_smaller() -> None:
    """Of 5 rows that differ, all one way, exchanging rows makes as much of a difference one time in 16."""
    values = np.zeros(100)
    values[:5] = 100
    for seeds in (1, 2, 3):
        runs = {m: [{"x": column(v + 0.01 * i)} for i in range(seeds)] for m, v in (("a", values), ("b", 0 * values))}
        found = compare(runs, [""] * 100, {"x": OPEN})[0]
        assert found["p"] == pytest.approx(1 / 16, abs=0.01)
        assert found["verdict"] == "cannot tell"


def test_a_single_run_borrows_the_variance_of_seeds_unless_it_has_none() -> None:
    rng = np.random.default_rng(6)
    shared = rng.normal(50, 10, N)
    runs = [{"x": column(shared + shift + rng.normal(0, 1, N))} for shift in (-2, 0, 2)]
    single = [{"x": column(shared + rng.normal(0, 1, N))}]
    widths = []
    for untrained in ((), ("b",)):
        made = compare({"a": runs, "b": single}, [""] * N, {"x": MEAN}, untrained=untrained)[0]
        assert (made["over"], made["seeds"]) == ("seeds and examples", [3, 1])
        widths.append(made["high"] - made["low"])
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.05)  # variances 1 + 1/3 and 1/3 of the seeds'
    assert compare({"a": single, "b": runs[:1]}, [""] * N, {"x": MEAN})[0]["over"] == "examples"


@pytest.mark.parametrize("metric", [BLEU, replace(MEAN, margin=0.1), PERPLEXITY])
def test_identical_systems_are_equivalent(metric: Metric) -> None:
    rng = np.random.default_rng(7)
    table = bleu_like(rng, *difficulties(rng, N))
    made = one(table, table.copy(), metric, ["s", "t", "u"] * (N // 3))
    assert (made["delta"], made["p"], made["p_holm"], made["verdict"], made["needed"]) == (0, 1, 1, "equivalent", None)


def test_without_a_margin_identical_systems_stay_open() -> None:
    table = column(np.arange(50.0))
    made = one(table, table, OPEN)
    assert (made["p"], made["verdict"], made["needed"]) == (1, "cannot tell", None)


def test_exchanging_the_methods_turns_everything_round() -> None:
    rng = np.random.default_rng(8)
    worse, better = (bleu_like(rng, np.full(N, 50), np.full(N, odds)) for odds in (0.0, 1.0))
    forth, back = one(better, worse, BLEU), one(worse, better, BLEU)
    assert (forth["verdict"], back["verdict"]) == ("better", "worse")
    assert (forth["delta"], forth["low"], forth["high"]) == pytest.approx((-back["delta"], -back["high"], -back["low"]))
    assert forth["p"] == back["p"] == 1 / 10_001
    a, b = (bleu_like(rng, np.full(8, 50), np.full(8, odds)) for odds in (0.0, 1.0))
    assert 1 / 10_001 < one(a, b, BLEU)["p"] == one(b, a, BLEU)["p"]  # the exchange of so few rows is felt


def test_lower_perplexity_is_better_and_its_difference_is_per_cent() -> None:
    tokens = np.random.default_rng(9).integers(5, 50, N).astype(np.float64)
    a, b = (np.stack([nll * tokens, tokens], axis=1) for nll in (2.0, 2.1))
    made = one(a, b, PERPLEXITY)
    assert (made["verdict"], made["unit"], made["margin"]) == ("better", "log %", 2.0)
    assert made["delta"] == pytest.approx(-10)
    assert one(a, a + np.array([0.005, 0]), PERPLEXITY)["verdict"] == "equivalent"


def test_a_metric_without_a_better_side_only_tells_differences() -> None:
    made = one(column(np.arange(50.0) + 20), column(np.arange(50.0) % 7), METRICS["length_ratio"])
    assert made["verdict"] == "different"


def tiled(table: Array, wanted: float) -> Array:
    """The same rows, repeated to about so many."""
    return np.tile(table, (round(wanted / len(table)), 1))


def spread_round(mean: float) -> Array:
    """Values with a standard error of 0.58."""
    values = np.random.default_rng(10).normal(0, 1, N)
    return 10 * (values - values.mean()) / values.std() + mean


def test_the_examples_needed_make_an_open_difference_detectable() -> None:
    a, b = column(spread_round(0.8)), column(np.zeros(N))
    made = one(a, b, OPEN)
    assert made["verdict"] == "cannot tell"
    then = one(tiled(a, made["needed"]), tiled(b, made["needed"]), OPEN)
    assert then["detectable"] == pytest.approx(abs(made["delta"]), rel=0.05)
    assert then["verdict"] == "better"


def test_the_examples_needed_fit_a_small_difference_into_the_margin() -> None:
    a, b = column(spread_round(50.3)), column(np.full(N, 50.0))
    made = one(a, b)
    assert made["verdict"] == "cannot tell"
    # With 4 chances in 5: half of them do when chance is with them, as it is in copies.
    verdicts = [one(tiled(a, share * made["needed"]), tiled(b, share * made["needed"]))["verdict"] for share in (0.4, 0.6)]
    assert verdicts == ["cannot tell", "equivalent"]


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize("difference", [0.0, 0.2])
def test_the_examples_needed_show_equivalence_four_times_in_five(difference: float) -> None:
    made = one(column(spread_round(50 + difference)), column(np.full(N, 50.0)))
    rng = np.random.default_rng(20)
    a = named([column(rng.normal(50 + difference, 10, made["needed"])) for _ in range(400)])
    b = dict.fromkeys(a, column(np.full(made["needed"], 50.0)))
    found = compare({"a": [a], "b": [b]}, [""] * made["needed"], dict.fromkeys(a, MEAN))
    assert abs(np.mean([c["verdict"] == "equivalent" for c in found]) - 0.8) < error(0.8, 400)


def test_seeds_of_one_mean_leave_an_interval_no_width_and_are_no_error() -> None:
    values = np.arange(N, dtype=np.float64)
    a, b = ([{"x": column(np.roll(values, i * shift))} for i in range(2)] for shift in (1, 7))
    made = compare({"a": a, "b": b}, [""] * N, {"x": OPEN})[0]
    assert (made["delta"], made["low"], made["high"], made["verdict"], made["needed"]) == (0, 0, 0, "cannot tell", None)


def test_nothing_measured_is_nothing_shown() -> None:
    """Scores at the floor, or a few rows that happen to agree, are no proof of equality; many that agree are."""
    metrics = {"x": replace(MEAN, margin=1.0)}
    for n, value, verdict in ((100, 0.0, "cannot tell"), (29, 50.0, "cannot tell"), (30, 50.0, "equivalent")):
        runs = {m: [{"x": column(np.full(n, value))}] for m in "ab"}
        assert compare(runs, [""] * n, metrics)[0]["verdict"] == verdict


@pytest.mark.parametrize(("metric", "verdict"), [(MEAN, "cannot tell"), (replace(MEAN, margin=0.05), "equivalent"), (PERPLEXITY, "equivalent")])
def test_scores_within_the_margin_of_0_are_no_measurement(metric: Metric, verdict: str) -> None:
    """Of 0.9 and 0.9 points nobody says that the difference does not matter; a perplexity near 1 has been measured."""
    values = np.random.default_rng(17).normal(0.9, 3, N) / (100 if metric is PERPLEXITY else 1)
    assert one(column(values), column(values + 1e-6), metric)["verdict"] == verdict


def test_examples_do_make_up_for_what_varies_by_seed_and_row() -> None:
    """Seeds whose means lie as far apart as rows alone explain."""
    noise = np.random.default_rng(15).normal(0, 1, (4, N))
    noise = 10 * (noise - noise.mean(axis=1, keepdims=True)) / noise.std(axis=1, keepdims=True)
    apart = math.sqrt(100 / N / 2)
    runs = {m: [{"x": column(noise[i] + shift - apart)}, {"x": column(noise[i + 1] + shift + apart)}] for m, i, shift in (("a", 0, 0.8), ("b", 2, 0))}
    made = compare(runs, [""] * N, {"x": OPEN})[0]
    assert made["verdict"] == "cannot tell"
    assert N < made["needed"] < 50 * N


def test_no_number_of_examples_makes_up_for_seeds() -> None:
    rng = np.random.default_rng(12)
    runs = {m: [{"x": column(rng.normal(shift, 1, N))} for shift in (-20, 0, 20 + extra)] for m, extra in (("a", 9), ("b", 0))}
    made = compare(runs, [""] * N, {"x": OPEN})[0]
    assert (made["verdict"], made["needed"]) == ("cannot tell", None)
    # Of 4 degrees of freedom: the interval reaches 2.776 standard errors, and 80% power takes 0.842 more.
    assert made["detectable"] == pytest.approx((made["high"] - made["low"]) / 2 * (1 + 0.842 / 2.776), rel=0.03)


@pytest.mark.usefixtures("study")
def test_the_seeds_needed_decide_an_open_difference() -> None:
    rng = np.random.default_rng(18)
    rows = rng.normal(50, 1, N)

    def compared(gains: Array) -> list[dict[str, object]]:
        """[seeds, data sets]: what each seed gains."""
        a, b = ([named([column(rows + gain + rng.normal(0, 0.1, N)) for gain in seed]) for seed in shift] for shift in (gains, 0 * gains))
        return compare({"a": a, "b": b}, [""] * N, dict.fromkeys(a[0], OPEN), seeds={m: range(len(gains)) for m in "ab"})

    [few] = compared(np.array([[-2.0], [0.0], [2.0], [4.0], [6.0]]))
    assert (few["verdict"], few["needed"]) == ("cannot tell", None)
    found = np.mean([c["p"] < 0.05 for c in compared(rng.normal(2, 10**0.5, (few["needed_seeds"], 200)))])
    assert abs(found - 0.8) < error(0.8, 200)
    [three] = compared(np.array([[-1.0], [2.0], [5.0]]))
    assert 3 < three["needed_seeds"] < few["needed_seeds"]  # of which both methods' vary
    assert compared(np.array([[-9.0], [0.1], [9.0]]))[0]["needed_seeds"] is None  # more than anybody trains


@pytest.mark.parametrize(("share", "df", "point"), [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.999, 10, 4.1437), (0.9995, 2, 31.5991)])
def test_the_points_of_students_t_are_the_tables(share: float, df: int, point: float) -> None:
    assert student(share, df) == pytest.approx(point, rel=1e-5)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_verdicts_and_needs_are_the_familys() -> None:
    noise = {f"noise {i}": column(np.random.default_rng(i).normal(0, 10, N)) for i in range(5)}
    zeros = column(np.zeros(N))

    def judged(mean: float, others: dict[str, Array]) -> dict[str, object]:
        runs = {"x": column(spread_round(mean)), **others}
        return compare({"a": [runs], "b": [dict.fromkeys(runs, zeros)]}, [""] * N, dict.fromkeys(runs, OPEN))[0]

    assert judged(1.4, {})["verdict"] == "better"
    assert judged(1.4, noise)["verdict"] == "cannot tell"
    assert judged(0.8, noise)["needed"] > 1.2 * judged(0.8, {})["needed"]


def test_one_call_is_one_family_of_the_pairs_asked_for() -> None:
    rng = np.random.default_rng(13)
    runs = {m: [{"x": column(rng.normal(0, 1, 50)), "y": column(rng.normal(0, 1, 50))}] for m in "abc"}
    metrics = {"x": OPEN, "y": OPEN}
    assert [(c["metric"], c["a"], c["b"]) for c in compare(runs, [""] * 50, metrics)][:4] == [
        ("x", "a", "b"),
        ("x", "a", "c"),
        ("x", "b", "c"),
        ("y", "a", "b"),
    ]
    some = compare(runs, [""] * 50, metrics, pairs=[("c", "a"), ("c", "b")])
    assert len(some) == 4
    assert [c["p_holm"] for c in some] == holm([c["p"] for c in some])


def test_what_cannot_be_compared_is_an_error() -> None:
    table = column(np.arange(4.0))
    with pytest.raises(UserError, match="too few"):
        one(table[:1], table[:1])
    with pytest.raises(UserError, match="too few"):
        one(table, table, sources=list("abcd"))
    with pytest.raises(UserError, match="a: mean is not finite"):
        one(column(np.full(4, math.inf)), table)
    with pytest.raises(UserError, match="a: mean is not finite"):  # nor is it of the resamples without the one row that counts
        one(table * (table[:, :1] == 1), table)
    with pytest.raises(UserError, match="same test rows"):
        compare({"a": [{"x": table}], "b": [{"x": table[:3]}]}, [""] * 4, {"x": MEAN})


def test_one_row_of_a_source_has_a_score_and_no_interval() -> None:
    made = intervals([{"x": column(np.arange(5.0))}], ["a"] * 4 + ["b"], {"x": MEAN})
    assert made["per_source"]["b"]["x"] == {"value": 4, "low": None, "high": None, "n": 1, "seeds": 1, "over": "examples"}
    assert made["all"]["x"]["low"] < 2 < made["all"]["x"]["high"]
