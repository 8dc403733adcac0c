"""A/B tests: their statistics against independent truths, and tests of real runs."""

import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from esper_jax.cli import main
from esper_jax.rollout.ab import anytime, paired, run_ab
from esper_jax.rollout.ab.design import Design, pairs_for, power_with, told
from esper_jax.rollout.ab.metrics import parse_metric, read_metric
from esper_jax.rollout.ab.plan import Plan, plan_of
from esper_jax.rollout.ab.verdict import Pair, advised, findings, is_decided, table
from esper_jax.run.config import ConfigError, load_config, parse_config
from esper_jax.run.folder import RunError, RunFolder
from esper_jax.run.run import train_run
from esper_jax.train.stop import Stop

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"
A = parse_config({"train": {"ticks": 1}})
B = parse_config({"train": {"ticks": 2}})


TWO = ("final_loss", "final_accuracy")


def design(pairs=10, metrics=TWO[:1], **more):
    return Design(pairs=pairs, metrics=metrics, **more)


def pairs_of(*metrics):
    """Pairs whose run of A has 0 in each metric, and that of B these values."""
    return [
        Pair(seed, dict.fromkeys(TWO, 0.0), dict(zip(TWO, values, strict=False)))
        for seed, values in enumerate(zip(*metrics, strict=True))
    ]


# Differences of two runs of the same config: equally likely with either sign.
ALIKE = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "heavy": lambda rng, size: rng.standard_t(2, size),
    "coarse": lambda rng, size: rng.integers(-2, 3, size).astype(float),
    "signs": lambda rng, size: rng.choice([-1.0, 1.0], size),
    "rare": lambda rng, size: rng.choice([-1.0, 0, 1], size, p=[0.1, 0.8, 0.1]),
}


def test_the_t_test_is_scipys():
    d = np.random.default_rng(0).normal(0.3, 2, (5, 9))
    test = paired.t_test(d, 0.1)
    np.testing.assert_allclose(test.p, stats.ttest_1samp(d, 0, axis=1).pvalue)
    low, high = stats.t.interval(0.9, 8, d.mean(axis=1), stats.sem(d, axis=1))
    np.testing.assert_allclose([test.low, test.high], [low, high])
    flat = paired.t_test(np.full(4, 0.1), 0.05)
    assert (flat.low, flat.high, flat.p) == (flat.mean, flat.mean, 0.125)
    assert paired.t_test(np.zeros(4), 0.05).p == 1
    with pytest.raises(ValueError, match="at least 2 pairs"):
        paired.t_test(np.zeros(1), 0.05)


@pytest.mark.parametrize("d", [[1, 2, 3, -4, 5], [1, 1, -2, 3, 3, 3], [0, 0, 2, -1, 3]])
def test_wilcoxons_p_value_is_exact_for_few_pairs(d):
    """Against all signs, each as likely."""
    kept = [abs(x) for x in d if x]
    ranks = stats.rankdata(kept)
    middle = ranks.sum() / 2

    def away(signs):
        return abs(sum(r for r, s in zip(ranks, signs, strict=True) if s) - middle)

    seen = away([x > 0 for x in d if x])
    every = [away(s) for s in itertools.product((0, 1), repeat=len(kept))]
    expected = np.mean([e >= seen - 1e-9 for e in every])
    assert paired.wilcoxon_p(np.array(d, float)) == pytest.approx(expected)
    assert paired.wilcoxon_p(np.zeros(3)) == 1


@pytest.mark.parametrize("number", [1, 6, 23, 50, 80])
def test_wilcoxons_p_value_is_scipys_without_ties(number):
    d = np.random.default_rng(number).normal(0.4, 1, number)
    expected = stats.wilcoxon(d, method="exact" if number <= 50 else "asymptotic")
    assert paired.wilcoxon_p(d) == pytest.approx(expected.pvalue)


def test_holm_steps_down():
    # Holm's procedure by hand: 4 * 0.01, 3 * 0.013, 2 * 0.03 after the larger, 0.9.
    p = np.array([[0.03, 0.9, 0.01, 0.013], [0.5, 0.5, 0.5, 0.5]])
    expected = [[0.06, 0.9, 0.04, 0.04], [1, 1, 1, 1]]
    np.testing.assert_allclose(paired.holm(p), expected)


def test_power_is_that_of_the_noncentral_t_distribution():
    # G*Power 3.1, paired t-test, two-sided: 34 and 15 pairs.
    assert paired.pairs_needed(0.5, 0.8, 0.05) == 34
    assert paired.pairs_needed(0.8, 0.8, 0.05) == 15
    for pairs, effect in ((2, 1.0), (7, -0.4), (40, 0.6), (300, 0.1)):
        bound = stats.f.isf(0.05, 1, pairs - 1)
        exact = stats.ncf.sf(bound, 1, pairs - 1, pairs * effect**2)
        assert paired.power_of(pairs, effect, 0.05) == pytest.approx(exact)
    least = paired.detectable(12, 0.9, 0.01)
    assert paired.power_of(12, least, 0.01) == pytest.approx(0.9)
    assert paired.pairs_needed(0.001, 0.8, 0.05) is None
    assert paired.power_of(10_000, 5, 0.05) == 1


def test_the_evidence_is_the_wealth_of_bets_on_signs():
    """Against the bets one by one: 2 f(d) / (f(d) + f(-d)) under the t-mixture."""
    d = np.random.default_rng(0).normal(0.5, 1, 6)
    scale, grid = 0.7, np.linspace(-5, 5, 401)

    def likelihood(x):
        """Of the t-mixture with the prior 1 / sigma, by sums over effect and sigma."""
        sigma = np.exp(np.linspace(-4, 4, 201))[:, None]
        terms = stats.norm.pdf(x[:, None, None], grid * sigma, sigma).prod(axis=0)
        return (terms * stats.norm.pdf(grid, 0, scale)).sum()

    wealth = 1.0
    for number in range(2, len(d) + 1):
        x = d[:number].copy()
        came = likelihood(x)
        x[-1] *= -1
        wealth *= 2 * came / (came + likelihood(x))
        seen = anytime.log_evidence(d[:number], scale)[-1]
        assert seen == pytest.approx(math.log(wealth), abs=1e-3)


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("scale", [0.3, 0.8, 2.0])
def test_looking_after_each_pair_raises_at_most_the_alarms_that_it_may(kind, scale):
    d = ALIKE[kind](np.random.default_rng(1), (20_000, 50))
    assert np.isfinite(anytime.crossing(d, 0.05, scale)).mean() <= 0.04
    # A t-test after each pair would raise these.
    looked = [paired.t_test(d[:1000, :n], 0.05).p <= 0.05 for n in range(2, 51)]
    assert np.any(looked, axis=0).mean() > 0.055 or kind == "rare"


@pytest.mark.parametrize("kind", ["normal", "signs"])
def test_2000_tests_of_a_config_with_itself_raise_at_most_55_alarms_in_1000(kind):
    """Through all that judges: both tests, and Holm over two metrics."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(2000):
        found = findings(design(8, TWO), pairs_of(*ALIKE[kind](rng, (2, 8))))
        alarms += any(f.verdict != "no difference shown" for f in found)
    assert alarms <= 0.055 * 2000


def test_planned_pairs_have_the_power_that_was_wanted():
    rng = np.random.default_rng(3)
    for effect in (0.8, 1.5):
        number = pairs_for(effect, 0.8, 0.05, False)
        d = rng.normal(effect, 1, (1500, number))
        both = stats.wilcoxon(d, axis=1, method="exact").pvalue <= 0.05
        both &= paired.t_test(d, 0.05).p <= 0.05
        assert 0.77 <= both.mean() <= 0.9
        most = pairs_for(effect, 0.8, 0.05, True)
        drawn = rng.normal(effect, 1, (4000, most))
        stopped = anytime.crossing(drawn, 0.05, effect)
        assert 0.77 <= np.isfinite(stopped).mean() <= 0.9
        assert number <= most <= 2 * number
        # It pays: most tests end before.
        assert np.median(stopped) < most
    assert pairs_for(5, 0.8, 0.05, False) == 6  # fewer cannot reject, whatever comes


def test_a_confidence_sequence_holds_what_the_evidence_does_not_reject():
    rng = np.random.default_rng(4)
    for number, scale in ((7, 2.0), (12, 0.8), (40, 0.3)):
        d = rng.normal(0.3, 2, number)
        low, high = anytime.interval(d, 0.1, scale)
        for end, inside in ((low, 1), (high, -1)):
            for step, held in ((1e-6, True), (-1e-6, False), (-1, False)):
                centre = end + inside * step
                assert (anytime.p_value(d - centre, scale) > 0.1) == held
    assert anytime.interval(d[:3], 0.05, 0.8) == (-math.inf, math.inf)
    low, high = anytime.interval(np.array([0.0] * 8 + [1]), 0.05, 0.8)
    assert low <= 0 < high  # ties with 0 are no evidence against it
    assert anytime.interval(np.full(12, 0.1), 0.05, 0.8) == pytest.approx((0.1, 0.1))


def test_a_sequential_test_stops_when_the_corrected_evidence_is_enough():
    rng = np.random.default_rng(5)
    one = design(40, sequential=True)
    two = design(40, TWO, sequential=True)
    d, noise = rng.normal(1.2, 1, 40), rng.normal(0, 1, 40)
    at = {}
    for name, of, metrics in (("one", one, [d]), ("two", two, [d, noise])):
        at[name] = next(
            n for n in range(41) if is_decided(of, pairs_of(*(m[:n] for m in metrics)))
        )
    assert at["one"] == anytime.crossing(d, 0.05, 0.8)
    assert at["two"] == anytime.crossing(d, 0.025, 0.8) > at["one"]
    [found] = findings(one, pairs_of(d[: at["one"]]))
    assert found.verdict == "B is higher"
    assert found.interval[0] > 0
    # Without a number fixed beforehand these would be too small.
    assert found.t_p is None
    assert found.wilcoxon_p is None
    assert not is_decided(design(40), pairs_of(d))


def test_runs_that_failed_are_not_left_out_silently():
    nan = math.nan
    of = design(8, TWO)
    pairs = pairs_of(np.arange(1.0, 9), [5.0, nan, 6, 7, nan, 8, 9, 10])
    first, second = findings(of, pairs)
    assert (first.verdict, second.verdict) == ("B is higher", "not judged")
    assert second.lost == (0, 2, 0)
    assert (second.p, second.adjusted_p) == (None, None)
    assert second.difference == pytest.approx(7.5)
    # What failed counts for the correction: another pair might not have.
    assert first.adjusted_p == 2 * first.p
    assert "not finite in 0 runs of A and 2 of B" in table(of, [first, second])[-1]
    # What no run measures counts for nothing.
    pairs = pairs_of(np.arange(1.0, 9), [nan] * 8)
    pairs = [p._replace(a=p.a | {"final_accuracy": nan}) for p in pairs]
    first, second = findings(of, pairs)
    assert first.adjusted_p == first.p
    assert "no run has a finite value" in second.why
    for few, why in ((0, "there are no pairs"), (1, "one pair has no spread")):
        [found] = findings(design(8), pairs[:few])
        assert (found.verdict, found.p) == ("not judged", None)
        assert found.why == f"{why}: run at least 2"
    # A run that the governor stopped has no metric at all.
    failed = [p._replace(b={}) if p.seed == 3 else p for p in pairs]
    assert findings(of, failed)[0].verdict == "not judged"


def test_words_give_the_interval_with_every_verdict():
    of = design(8, TWO)
    d = np.arange(1.0, 9)
    found = findings(of, pairs_of(-d, d * (-1) ** d))
    lines = table(of, found)
    assert len({line.index("95% interval") for line in lines[:1]}) == 1
    low, high = found[0].interval
    told_p = f"(p {found[0].adjusted_p:.4f})"
    assert lines[-2] == (
        f"final_loss: B is lower: -4.5, [{low:.4g}, {high:.4g}] {told_p}"
    )
    assert lines[-1].startswith("final_accuracy: no difference shown; B - A lies in [")
    one = advised(design(8), findings(design(8), pairs_of(d - 4))[0])
    # 8 pairs of both tests are 7 of the t-test.
    least = one.detectable / one.spread
    assert paired.power_of(7, least, 0.05) == pytest.approx(0.8)
    assert one.pairs_for_this == pairs_for(0.5 / one.spread, 0.8, 0.05, False)
    assert (
        f"8 pairs find {one.detectable:.4g} with a power of 0.8"
        in table(design(8), [one])[-1]
    )
    ties = findings(design(8), pairs_of(np.zeros(8)))
    assert table(design(8), ties)[-1].endswith("every pair is a tie")
    few = [advised(design(3), f) for f in findings(design(3), pairs_of(d[:3]))]
    assert few[0].detectable is None
    assert "3 pairs are too few to tell" in table(design(3), few)[-1]
    assert "fewer than 6 pairs" in told(design(3))[-1]
    assert power_with(design(3)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"pairs": 0},
            "pairs (--seeds): expected at least 2 pairs of runs, since nothing",
        ),
        ({"pairs": 1}, "since one pair has no spread; got 1. The command works"),
        ({"pairs": 10**6}, "pairs (--seeds): expected at most 10000"),
        ({"alpha": 0.0}, "alpha: expected above 0"),
        ({"power": 0.01}, "power: expected above alpha"),
        ({"effect": math.nan}, "effect: expected from 0.02"),
        ({"metrics": ()}, "metrics (--metric): expected different metrics, got none"),
        ({"metrics": ("final_loss",) * 2}, "got 'final_loss' twice"),
        ({"metrics": ("los",)}, "--metric los: expected one of final_accuracy"),
        ({"metrics": ("ticks:los",)}, "expected one of train_loss, loss, accuracy"),
        ({"metrics": ("ticks:loss:best",)}, "expected one of last, first, min"),
        ({"metrics": ("metrics:esper_seeds",)}, "the form metrics:esper_seeds/STAGE"),
        ({"metrics": ("metrics:esper_seeds/X",)}, "expected one of DORMANT"),
        ({"metrics": ("static.loss",)}, "expected compare.static = true in both"),
        (
            {"b": parse_config({"seed": 3, "train": {"ticks": 1}})},
            "that differ in more",
        ),
        ({"b": parse_config({"data": {"seed": 3}})}, "data.seed: expected the same"),
        (
            {"b": parse_config({"features": {"ab_testing": False}})},
            "features.ab_testing of B is off",
        ),
        (
            {
                "b": parse_config({"monitor": {"writers": []}}),
                "metrics": ("metrics:esper_seeds/TRAINING",),
            },
            "expected 'jsonl' in monitor.writers of both",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(more, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Plan(**{"a": A, "b": B, "pairs": 8} | more)


def test_metrics_are_read_by_name(tmp_path):
    folder = RunFolder(tmp_path)
    summary = {"final_loss": 0.5, "final_accuracy": None, "rollbacks": [{}, {}]}
    folder.summary.write_text(json.dumps(summary | {"static": {"loss": 2}}))
    ticks = [{"tick": i, "loss": x} for i, x in enumerate([3.0, 1.0, 2.0, None])]
    folder.ticks.write_text("".join(json.dumps(t) + "\n" for t in ticks[:3]))
    lines = [
        {"esper_step_seconds": None, "esper_seeds": {}},
        {"esper_step_seconds": 0.2, "esper_seeds": {"TRAINING": 2}},
        {
            "esper_step_seconds": 0.4,
            "esper_seeds": {"DORMANT": 4},
            "esper_layer_living_seeds": {"layers/0": 1},
        },
    ]
    folder.metrics.write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = parse_config({"compare": {"static": True}})

    def read(name):
        return read_metric(parse_metric(name, [config]), folder)

    expected = {
        "final_loss": 0.5,
        "rollbacks": 2,
        "static.loss": 2,
        "ticks:loss": 2,
        "ticks:loss:min": 1,
        "ticks:loss:first": 3,
        "metrics:esper_step_seconds:mean": 0.3,  # not of the tick without one
        "metrics:esper_seeds/TRAINING:max": 2,
        "metrics:esper_seeds/FOSSILIZED:sum": 0,  # left out where it is 0
        "metrics:esper_layer_living_seeds/layers/0": 1,
    }
    assert {name: read(name) for name in expected} == pytest.approx(expected)
    for name in ("final_accuracy", "static.accuracy", "ticks:accuracy"):
        assert math.isnan(read(name))
    assert math.isnan(read("metrics:esper_layer_living_seeds/layers/9"))
    folder.ticks.write_text("".join(json.dumps(t) + "\n" for t in ticks))
    assert math.isnan(read("ticks:loss:min"))  # not finite once is not finite


# Runs of a moment: both arms share one program, since they differ in length alone.
TINY = (
    "train.ticks=1",
    "model.hidden=[4]",
    "growth.num_seeds=2",
    "growth.capacity=1",
    'growth.blueprints=["affine"]',
    "train.batch_size=512",
    "governor.enabled=false",
    "seed=7",
)
METRICS = ("final_loss", "metrics:esper_ticks_total")


def tiny(**more):
    given = {
        "a": load_config(SMOKE, TINY),
        "b": load_config(SMOKE, [*TINY, "train.ticks=2"]),
        "pairs": 3,
        "metrics": METRICS,
    }
    return Plan(**given | more)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A test that a signal stopped after its first pair, and that then went on."""
    out = tmp_path_factory.mktemp("ab") / "test"
    said = []

    def say(line):
        said.append(line)
        if line.startswith("pair 1"):
            # A shell that starts the tests in the background has SIGINT ignored.
            os.kill(os.getpid(), signal.SIGTERM)

    with Stop(signal.SIGTERM) as stop, pytest.raises(KeyboardInterrupt) as stopped:
        run_ab(tiny(), out, stop=stop, say=say)
    ids = {p.parent.name: p.read_text() for p in out.glob("*/run.json")}
    more = []
    return out, str(stopped.value), ids, run_ab(tiny(), out, say=more.append), more


def test_a_test_that_was_stopped_goes_on(ran):
    out, stopped, ids, result, said = ran
    assert stopped == (
        f"1 of 3 pairs are done; the same command with --out {out} goes on"
    )
    assert sorted(ids) == ["a-7", "b-7"]
    # These runs were not made again.
    for name, text in ids.items():
        assert (out / name / "run.json").read_text() == text
    assert [p.seed for p in result.pairs] == [7, 8, 9]
    assert sum(line.startswith("pair ") for line in said) == 3
    assert said[0].startswith("B differs from A in train.ticks 1 -> 2")
    loss, ticks = result.findings
    assert (ticks.a, ticks.b, ticks.interval) == (1, 2, (1, 1))
    assert loss.pairs == 3
    assert loss.difference == pytest.approx(
        np.mean([p.b["final_loss"] - p.a["final_loss"] for p in result.pairs])
    )
    written = json.loads((out / "result.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["differs"] == {"train.ticks": {"a": 1, "b": 2}}
    assert "3 pairs (seeds 7 to 9): as many as were planned" in result.lines()


def test_each_run_is_the_one_that_train_would_make(ran, tmp_path):
    """To the last bit, though all of them share one compiled program."""
    out, *_ = ran
    config = load_config(SMOKE, [*TINY, "seed=9", "train.ticks=2"])
    alone = train_run(config, tmp_path / "alone", console=Console(quiet=True))
    shared = json.loads((out / "b-9" / "summary.json").read_text())
    assert shared["state_hash"] == alone["state_hash"]
    assert shared["recompiles"] == 0


def test_a_test_goes_on_with_its_own_plan_alone(ran, tmp_path):
    out, _, _, result, _ = ran
    assert plan_of(json.loads((out / "plan.json").read_text())["plan"]) == result.plan
    for other, message in (
        (tiny(pairs=4), "--seeds: expected 3, as .* known makes its error larger"),
        (tiny(alpha=0.1), "--alpha: expected 0.05"),
        (tiny(metrics=METRICS[:1]), "--metric: expected"),
        (tiny(sequential=True), "--sequential: expected False"),
        (
            tiny(b=load_config(SMOKE, [*TINY, "train.ticks=3"])),
            "train.ticks of B: expected 2",
        ),
    ):
        before = sorted(out.rglob("*"))
        with pytest.raises(ConfigError, match=message):
            run_ab(other, out)
        assert sorted(out.rglob("*")) == before
    note = tmp_path / "note"
    note.touch()
    with pytest.raises(RunError, match="holds no A/B test"):
        run_ab(tiny(), tmp_path)
    with pytest.raises(RunError, match="note is no folder"):
        run_ab(tiny(), note)
    (tmp_path / "plan.json").write_text('{"plan": {"a": {}}}')
    with pytest.raises(RunError, match="damaged"):
        run_ab(tiny(), tmp_path)


def test_the_command_tells_its_plan_its_result_and_what_is_wrong(
    ran, tmp_path, monkeypatch, capsys
):
    out, *_ = ran

    def esper(*arguments):
        words = ["ab", SMOKE, SMOKE, *arguments]
        monkeypatch.setattr(sys, "argv", ["esper-jax", *map(str, words)])
        main()
        return capsys.readouterr().out

    named = [word for name in METRICS for word in ("--metric", name)]
    sets = ["--set", *TINY, "--set-b", "train.ticks=2"]
    # All runs are there, so it only reads them; the failed one is told.
    (out / "a-8" / "stopped.json").write_text("{}")
    printed = esper("--seeds", 3, *named, *sets, "--out", out)
    assert "final_loss: not judged; not finite in 1 runs of A and 0 of B" in printed
    assert "pair 2 of 3, seed 8: final_loss: A failed, B " in printed
    (out / "a-8" / "stopped.json").unlink()
    monkeypatch.chdir(tmp_path)
    for wrong, message in (
        ([], "A and B: expected configs that differ"),
        (["--seeds", 1, *sets], "one pair has no spread"),
        (["--effect", 0.02, *sets], "effect: expected one that at most 10000"),
        (["--set-b", "train.batch_size=5000"], "B: train.batch_size: expected at most"),
    ):
        with pytest.raises(SystemExit) as ended:
            esper(*wrong)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
