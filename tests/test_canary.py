"""The canary: its evidence, its decisions, 1,000 rollouts, and crashes at any byte."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from esper_jax.rollout import Canary, CanaryError, Observer, Plan
from esper_jax.rollout.canary.canary import BlindError, report
from esper_jax.rollout.canary.decisions import begin, decide, from_json, to_json
from esper_jax.rollout.canary.evidence import (
    BETS,
    MOST,
    MOST_NEEDED,
    Evidence,
    Yardstick,
    compare,
    needed,
    with_comparisons,
)
from esper_jax.rollout.canary.journal import Journal, read_journal
from esper_jax.rollout.canary.observations import (
    Batch,
    batch_of,
    observation,
    read_from,
)
from esper_jax.rollout.canary.watches import Watch

ERROR = Yardstick(0.1, 1.0, True)
LATENCY = Yardstick(math.log(1.5), 0.0)
ACCURACY = Yardstick(0.1, 1.0)
RUNS = Yardstick(0.02, 0.1)
ALL = pytest.mark.parametrize(
    "yardstick", [ERROR, LATENCY, ACCURACY, RUNS], ids=["error", "time", "acc", "runs"]
)


def drawn(yardstick, rng, shape, moved):
    """Values of an arm, higher for worse, and worse by ``moved`` than the baseline."""
    if yardstick is ERROR:
        return (rng.random(shape) < 0.05 + moved) * 1.0
    if yardstick is LATENCY:
        return rng.normal(-2 + moved, 0.4, shape)
    if yardstick is ACCURACY:
        return (rng.random(shape) < 0.1 + moved) - 1.0
    return rng.normal(-0.9 + moved, 0.02, shape)


def slow_comparisons(values, candidate):
    """What `compare` says of itself, one observation after the other."""
    run, of, found = [], None, []
    for value, arm in zip(values, candidate, strict=True):
        if run and arm != of:
            found.append([(value - v) if arm else (v - value) for v in run[-MOST:]])
            run = []
        else:
            run, of = [*run, value], arm
    return found, run[-MOST:]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_comparisons_are_those_of_a_slow_oracle_however_they_are_cut(share):
    rng = np.random.default_rng(1)
    values, candidate = rng.random(900), rng.random(900) < share
    expected, waits = slow_comparisons(values, candidate)
    found = compare(values, candidate)
    parts = np.split(found.differences, found.firsts[1:])
    assert len(parts) == len(expected) > 5
    for part, of_oracle in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, of_oracle)
    assert values[found.rest :].tolist() == waits
    # A cut leaves what waits to the next call, and loses nothing.
    cut, pieces = 0, []
    for end in (100, 101, 350, 900):
        part = compare(values[cut:end], candidate[cut:end])
        pieces += np.split(part.differences, part.firsts[1:])
        cut += part.rest
    assert [p.tolist() for p in pieces if len(p)] == [p.tolist() for p in parts]


def wealth(scores):
    """Log of the mean wealth of all bets after each score: [..., N] -> [..., N]."""
    each = np.log1p(scores[..., None] * BETS).cumsum(axis=-2)
    return np.logaddexp.reduce(each, axis=-1) - np.log(len(BETS))


@ALL
def test_evidence_errs_at_most_as_often_as_stated_looking_after_each(yardstick):
    """2,000 A/A tests, and 2,000 of a candidate that is worse by just the margin."""
    rng = np.random.default_rng(2)
    shape = (2000, 300)
    baseline = drawn(yardstick, rng, shape, 0.0)
    same = drawn(yardstick, rng, shape, 0.0) - baseline
    worse = drawn(yardstick, rng, shape, yardstick.margin) - baseline
    scored = {
        "alarm": wealth(yardstick.scores(same, 0.0)),
        "cleared": wealth(-yardstick.scores(worse, yardstick.margin)),
    }
    for each in scored.values():
        assert (each.max(axis=1) >= -math.log(0.05)).mean() <= 0.05
    # The same numbers come out of the evidence that is kept, look after look.
    evidence = Evidence()
    for part in np.split(np.arange(300), [7, 8, 150]):
        pairs = np.stack([baseline[0, part], baseline[0, part] + worse[0, part]], 1)
        new = compare(pairs.ravel(), np.tile([False, True], len(part)))
        evidence = with_comparisons(evidence, new, yardstick, yardstick.margin)
    assert evidence.number == 300
    assert evidence.log_clear() == pytest.approx(scored["cleared"][0, -1])
    assert evidence.log_within() == evidence.log_clear()
    plain = wealth(yardstick.scores(worse[0], 0.0))
    assert evidence.log_harm() == pytest.approx(plain[-1])


@ALL
def test_so_many_comparisons_find_a_regression_with_the_stated_power(yardstick):
    rng = np.random.default_rng(3)
    alpha, power = 0.01, 0.9
    pairs = drawn(yardstick, rng, 400, 0.0), drawn(yardstick, rng, 400, 0.0)
    new = compare(np.stack(pairs, 1).ravel(), np.tile([False, True], 400))
    seen = with_comparisons(Evidence(), new, yardstick, yardstick.margin)
    most = needed(seen, yardstick, alpha, power)
    shape = (1000, most)
    baseline = drawn(yardstick, rng, shape, 0.0)
    worse = drawn(yardstick, rng, shape, yardstick.margin) - baseline
    bound = -math.log(alpha)
    found = (wealth(yardstick.scores(worse, 0.0)).max(axis=1) >= bound).mean()
    assert found >= power - 0.03  # three standard errors
    few = wealth(yardstick.scores(worse[:, : most // 4], 0.0)).max(axis=1)
    assert (few >= bound).mean() < power  # nor are they far too many
    assert needed(Evidence(), yardstick, alpha, power) == MOST_NEEDED


PLAN = Plan(watch=60.0, error_increase=0.15, latency_ratio=1.5, accuracy_drop=0.15)


def traffic(rng, percent, number, worse=(), times=1.0):
    """Observations in which the candidate is worse by the margins, or a multiple."""
    # Who records only some of a large baseline loses little: `MOST` are compared.
    candidate = rng.random(number) < max(percent / 100, 0.1)
    moved = {name: candidate * (name in worse) for name in PLAN.yardsticks}
    return Batch(
        candidate,
        np.zeros(number, bool),
        (rng.random(number) < 0.05 + 0.15 * moved["error"]) * 1.0,
        rng.lognormal(-2 + times * math.log(1.5) * moved["latency"], 0.4),
        (rng.random(number) < 0.9 - 0.15 * moved["accuracy"]) * 1.0,
    )


def rolled_out(rng, worse=(), late=0, most=120):
    """A rollout of a candidate that is worse, from percentage ``late`` on."""
    state, action = begin(PLAN, 0.0), None
    for look in range(1, most):
        per_candidate = {1: 10, 10: 10, 25: 4, 50: 2, 100: 4}[state.percent]
        number = int(rng.integers(100, 200)) * per_candidate
        faults = worse if state.percent >= late else ()
        times = 2.0 if state.percent == 100 else 1.0
        batch = traffic(rng, state.percent, number, faults, times)
        state, action = decide(state, batch, 20.0 * look)
        if state.status != "watching":
            break
    return state, action


@pytest.mark.parametrize(
    ("good", "bad"), [(160, 280), pytest.param(400, 600, marks=pytest.mark.slow)]
)
def test_of_1000_rollouts_good_ones_come_through_and_bad_ones_do_not_pass_25(good, bad):
    rng = np.random.default_rng(4)
    ends = [rolled_out(rng)[0].status for _ in range(good)]
    assert np.mean([status != "finished" for status in ends]) <= PLAN.alpha
    for name in PLAN.yardsticks:
        ends = [rolled_out(rng, {name}) for _ in range(bad)]
        passed = np.mean([state.percent > PLAN.prove_at for state, _ in ends])
        assert passed <= PLAN.miss
        assert np.mean([state.status == "rolled back" for state, _ in ends]) >= 0.95
        assert {action.reason.split()[0] for _, action in ends} == {name}


@pytest.mark.parametrize(
    ("name", "late"),
    [("error", 50), ("latency", 50), ("accuracy", 50), ("latency", 100)],
)
def test_a_fault_that_only_more_load_brings_is_found_there(name, late):
    """A good past does not outweigh it, and at 100% the last baseline is remembered."""
    state, action = rolled_out(np.random.default_rng(5), {name}, late)
    assert (state.status, state.percent) == ("rolled back", late)
    assert action.reason.startswith(name)


def test_what_moves_all_traffic_does_not_roll_back_at_100():
    """Load that comes and goes, by less than the margin of 1.5, with little noise."""
    rng = np.random.default_rng(7)
    state, looks, kept = begin(PLAN, 0.0), 0, []
    state = dataclasses.replace(state, stage=3)  # 50%
    while state.status == "watching":
        looks += 1
        batch = traffic(rng, state.percent, 1500)
        load = 1.3 if state.percent == 100 else np.linspace(0.8, 1.2, 1500)
        latency = 0.1 * load * rng.lognormal(0, 0.05, 1500)
        if state.percent == 50:
            kept = [*kept, *np.log(latency[~batch.candidate])]
        state, action = decide(state, batch._replace(latency=latency), 20.0 * looks)
        if state.percent == 100 and state.seen == (0, 0):
            remembered = state.watches["latency"].baseline
            # Of all that the baseline did at 50%, and not of the last moment alone.
            assert 256 <= len(remembered) <= 512
            every = -(-len(kept) // len(remembered))
            assert remembered == tuple(kept[::every])
    assert (state.status, action.kind) == ("finished", "finish")


def rows(candidate, number=1, **fields):
    arm = "candidate" if candidate else "baseline"
    return [observation({"arm": arm, **fields})] * number


def mixed(number, bad=0, **fields):
    """As many observations of both arms, by turns, of which some candidates fail."""
    return [
        row
        for i in range(number)
        for row in (
            *rows(False, error=False, **fields),
            *rows(True, error=i < bad, **fields),
        )
    ]


ERRORS = Plan(
    percents=(10, 50, 100),
    watch=60.0,
    error_increase=0.2,
    latency_ratio=None,
    accuracy_drop=None,
)


def test_each_decision_says_why():
    state = begin(ERRORS, 0.0)

    def next_(observations, now):
        return decide(state, batch_of(observations), now)

    assert next_(mixed(200), 59.0)[1].reason == "1s of 1m are left"
    assert (
        "no observation of the candidate" in next_(rows(False, 99, error=0), 60)[1][1]
    )
    assert "no observation of the baseline" in next_(rows(True, 99, error=0), 60)[1][1]
    blind = next_([*rows(True, 9, loss=1.0), *rows(False, error=False)], 60.0)[1]
    assert blind.blind
    assert "error watches nothing: none of 9 observations of the cand" in blind.reason
    assert next_(mixed(20), 60.0)[1].reason == "20 of 59 observations of the candidate"
    assert "comparisons" in next_(mixed(60), 60.0)[1].reason
    on, action = next_(mixed(200), 60.0)
    assert (action.kind, on.percent, on.since, on.before) == ("advance", 50, 60.0, 200)
    assert (on.seen, on.watches["error"].evidence) == ((0, 0), Evidence())
    off, action = next_(mixed(40, bad=30), 1.0)
    assert (off.status, action.kind) == ("rolled back", "roll back")
    assert action.reason.startswith("error 0.75 against 0; evidence ")
    off, action = next_([*mixed(5), *rows(True, loss=math.nan)], 1.0)
    assert action == ("roll back", action.reason, False)
    assert "nan: in 1 of the candidate's observations" in action.reason
    assert next_(rows(False, loss=math.inf), 1.0)[1].kind == "hold"
    # Where it is as certain that the harm is below the margin, it may go on.
    small = [*mixed(600, bad=60)] * 4
    assert next_(small, 60.0)[1].kind == "advance"
    # Having looked at enough does not do: a regression must be excluded.
    seen = Evidence(number=9000, squares=900.0, shifted=-1800.0)
    watches = {"error": Watch(evidence=seen, seen=(9000, 9000), sums=(900.0, 450.0))}
    known = dataclasses.replace(state, watches=watches, seen=(9000, 9000))
    action = decide(known, batch_of([]), 60.0)[1]
    assert action.kind == "hold"
    assert action.reason == (
        "error 0.1 against 0.05; evidence 1 to 1 that it is no regression, of 20 that "
        "are needed"
    )
    # Without an end, a stage that is not decided is held; with one, rolled back.
    assert next_(mixed(20), 9e9)[1].kind == "hold"
    state = begin(dataclasses.replace(ERRORS, patience=120.0), 0.0)
    assert next_(mixed(20), 119.0)[1].kind == "hold"
    off, action = next_(mixed(20), 120.0)
    assert off.status == "rolled back"
    assert action.reason.startswith("not decided after 2m: 20 of 59")
    # NaN alone needs no baseline: as many observations as show one in 20.
    alone = Plan(
        percents=(100,),
        error_increase=None,
        latency_ratio=None,
        accuracy_drop=None,
    )
    state = begin(alone, 0.0)
    assert next_(rows(True, 58, loss=1.0), 3600.0)[1].reason.startswith("58 of 59 obs")
    assert next_(rows(True, 59, loss=1.0), 3600.0)[0].status == "finished"
    assert next_(rows(True, nan=True), 1.0)[0].status == "rolled back"
    for wrong, message in ((math.nan, "expected seconds"), (-1.0, "ran backwards")):
        with pytest.raises(CanaryError, match=message):
            next_([], wrong)
    with pytest.raises(CanaryError, match=r"is over \(rolled back\): start another"):
        decide(off, batch_of([]), 200.0)


def test_what_is_slow_counts_as_an_error_and_a_state_is_kept_exactly():
    plan = dataclasses.replace(ERRORS, slow_after=1.0, latency_ratio=1.5)
    batch = batch_of(
        [
            *rows(True, 3, latency=2.0),
            *rows(True, 2, latency=0.1, error=False),
            *rows(True, latency=0.5),
            *rows(False, 4, latency=0.0),
            *rows(True, nan=0),
        ]
    )
    state, _ = decide(begin(plan, 0.0), batch, 1.0)
    assert state.watches["error"].seen == (6, 4)
    assert state.watches["error"].sums == (3.0, 0.0)
    again = from_json(plan, json.loads(json.dumps(to_json(state))))
    assert again == state
    rng = np.random.default_rng(6)
    state, _ = decide(begin(PLAN, 0.0), traffic(rng, 1, 500), 1.0)
    again = from_json(PLAN, json.loads(json.dumps(to_json(state))))
    more = traffic(rng, 1, 500)
    assert decide(again, more, 2.0) == decide(state, more, 2.0)


def test_evidence_does_not_depend_on_when_one_looks():
    batch = traffic(np.random.default_rng(9), 50, 400)
    once, _ = decide(begin(PLAN, 0.0), batch, 1.0)
    often = begin(PLAN, 0.0)
    for cut in range(0, 400, 3):
        some = Batch(*(column[cut : cut + 3] for column in batch))
        often, _ = decide(often, some, 1.0)
    for name, watch in once.watches.items():
        other = often.watches[name]
        assert (other.seen, other.waiting) == (watch.seen, watch.waiting)
        assert other.evidence.number == watch.evidence.number > 90
        np.testing.assert_allclose(other.evidence.harm, watch.evidence.harm)
        np.testing.assert_allclose(other.evidence.clear, watch.evidence.clear)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"percents": ()}, "percents: expected at least one stage"),
        ({"percents": (1, 10, 10)}, "expected each above the one before, got 10 after"),
        ({"percents": (50, 25)}, "expected each above the one before, got 25 after 50"),
        ({"percents": (0, 10)}, "above 0 and up to 100, got 0"),
        ({"percents": (10, 101)}, "above 0 and up to 100, got 101"),
        ({"percents": (-5, 101)}, "above 0 and up to 100, got -5"),
        ({"percents": (1.5,)}, "expected whole numbers above 0 and up to 100, got 1.5"),
        (
            {"percents": (True,)},
            "expected whole numbers above 0 and up to 100, got Tru",
        ),
        ({"percents": "1,10"}, "percents: expected whole numbers such as"),
        ({"percents": 10}, "percents: expected whole numbers such as"),
        ({"percents": (100,)}, "expected a stage below 100, where there is a baseline"),
        ({"watch": 0}, "watch: expected seconds above 0, got 0"),
        ({"watch": math.nan}, "watch: expected seconds above 0, got nan"),
        ({"error_increase": 0.0}, "error_increase: expected a share above 0"),
        ({"latency_ratio": 1.0}, "latency_ratio: expected a factor above 1, or none"),
        ({"accuracy_drop": 1.5}, "accuracy_drop: expected a share"),
        (
            {"accuracy_drop": 0.2, "accuracy_spread": 0.1},
            "expected more than accuracy_d",
        ),
        ({"accuracy_spread": 1.1}, "accuracy_spread: expected above 0 and at most 1"),
        ({"alpha": 1}, "alpha: expected a chance above 0 and below 1, got 1"),
        ({"power": "high"}, "power: expected a chance above 0 and below 1, got 'high'"),
        ({"prove_at": 100}, "prove_at: expected a percentage above 0 and below 100"),
        ({"patience": 3600.0}, "patience: expected more than watch, which is 3600 sec"),
        ({"slow_after": 1.0, "error_increase": None}, "slow_after: expected error_inc"),
        (
            dict.fromkeys(
                ("error_increase", "latency_ratio", "accuracy_drop", "nan_rate")
            ),
            "expected at least one trigger, got none: set error_increase",
        ),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(changed, message):
    with pytest.raises(CanaryError, match=message):
        Plan(**changed)


def test_stages_before_the_proof_exclude_regressions_of_the_same_total_harm():
    plan = Plan(accuracy_drop=None)
    of_latency = [
        plan.excluded(stage, plan.yardsticks["latency"]) for stage in range(5)
    ]
    factors = np.array(of_latency) / math.log(1.2)
    np.testing.assert_allclose(factors, [25, 2.5, 1, 1, 1])
    of_errors = [plan.excluded(stage, plan.yardsticks["error"]) for stage in range(5)]
    np.testing.assert_allclose(of_errors, [0.5, 0.05, 0.02, 0.02, 0.02])
    # As many as in which one of 20 (of 8, of 2) would have shown up: (1 - p)^n <= 5%.
    assert [plan.sightings(stage) for stage in range(3)] == [5, 23, 59]
    # The last stage up to `prove_at` is the one that proves.
    early = Plan(percents=(5, 20, 60))
    assert early.excluded(1, early.yardsticks["error"]) == 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"arm": "new", "error": True},
            "arm: expected candidate or baseline, got 'new'",
        ),
        ({"arm": "candidate"}, "expected something measured .* got the arm alone"),
        (
            {"arm": "candidate", "latancy": 1.0},
            "latancy: unknown; expected arm, latency",
        ),
        (
            {"arm": "candidate", "latency": -1.0},
            "latency: expected seconds from 0, got -1",
        ),
        (
            {"arm": "candidate", "accuracy": 90},
            "accuracy: expected a number from 0 to 1",
        ),
        (
            {"arm": "candidate", "accuracy": "0.9"},
            "accuracy: expected a number .* '0.9'",
        ),
        (
            {"arm": "candidate", "error": "no"},
            "error: expected true or false, got 'no'",
        ),
        ({"arm": "candidate", "loss": [1]}, r"loss: expected a number, got \[1\]"),
    ],
)
def test_an_observation_that_is_none_is_refused_and_not_written(
    fields, message, tmp_path
):
    with Observer(tmp_path / "seen") as observer:
        with pytest.raises(CanaryError, match=message):
            observer.add(fields)
        assert (tmp_path / "seen").read_bytes() == b""


def test_observations_are_read_on_where_reading_ended(tmp_path, caplog):
    path = tmp_path / "seen.jsonl"
    assert read_from(path, 0) == ([], 0)
    with Observer(path) as observer:
        observer.observe("candidate", latency=np.float32(0.5), error=np.bool_(True))
        observer.observe("baseline", accuracy=math.nan, loss=1e999, model_id="m")
        found, offset = read_from(path, 0)
        assert [{k: v for k, v in o.items() if k != "time"} for o in found] == [
            {"arm": "candidate", "latency": 0.5, "error": True},
            {"arm": "baseline", "model_id": "m", "nan": True},
        ]
        observer.observe("baseline", error=False)
    with path.open("ab") as file:  # a process is killed, another one goes on
        file.write(b'{"arm": "cand')
    assert len(read_from(path, offset)[0]) == 1  # the half line is left
    with Observer(path) as observer:
        observer.observe("candidate", error=False)
    with path.open("ab") as file:
        file.write(b'\n[1]\n{"arm": "old", "error": 1}\n\xff\n{"arm":"baseline",')
    found, end = read_from(path, offset)
    assert [o["arm"] for o in found] == ["baseline", "candidate"]
    assert path.read_bytes()[end:] == b'{"arm":"baseline",'
    warned = [record.getMessage() for record in caplog.records]
    assert "a line is passed over at byte" in warned[0]
    assert "arm: expected candidate or baseline, got 'old'" in warned[2]
    assert "so are 1 lines more" in warned[3]
    path.write_bytes(b"")
    with pytest.raises(CanaryError, match="was cut or replaced"):
        read_from(path, end)


class FakeFlag:
    """A flag in memory, which outlives the process that turns it."""

    where = {"flag": "wide", "kept": "in memory"}  # noqa: RUF012

    def __init__(self):
        self.percent = 0

    def percentage(self):
        return self.percent

    def turn(self, percent):
        self.percent = percent


class Killed(BaseException):
    """The process is gone."""


STEPS = [mixed(100), mixed(300), mixed(20), mixed(300), mixed(40, bad=30), mixed(9)]
CLOCKS = [30.0, 61.0, 70.0, 130.0, 131.0, 140.0]
"""A rollout that is held, advances to 50 and 100%, and is rolled back there."""


def one_life(folder, flag):
    """What a process does with a canary, from wherever the one before was killed."""
    path = folder / "journal.jsonl"
    if not path.exists() or not read_journal(path):
        Canary.start(folder, flag, ERRORS, now=0.0).close()
    while True:
        with Canary(folder, flag) as canary:
            found = canary.report()
            if found.state.status != "watching":
                return
            # Another program has recorded what was seen meanwhile.
            lines = "".join(
                json.dumps(o) + "\n" for seen in STEPS[: found.looks + 1] for o in seen
            )
            found.observations.write_text(lines)
            canary.step(now=CLOCKS[found.looks])


def decisions(folder):
    """All that was decided: every entry but those that only say "done"."""
    return [
        {k: v for k, v in e.items() if k not in ("entry", "sum", "observations")}
        for e in read_journal(folder / "journal.jsonl")
        if e["kind"] != "turned"
    ]


def explained(folder):
    """The percentages that a flag may have, as the journal says."""
    path = folder / "journal.jsonl"
    percents = [0, *(e["percent"] for e in read_journal(path) if path.exists())]
    return {percents[-1]} if len(percents) == 1 else set(percents[-2:])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, flag = tmp_path_factory.mktemp("undisturbed"), FakeFlag()
    one_life(folder, flag)
    return decisions(folder), len(read_journal(folder / "journal.jsonl"))


def test_a_rollout_in_all_its_decisions(undisturbed):
    told = [(e["action"], e["percent"]) for e in undisturbed[0]]
    assert told == [
        ("start", 10),
        ("hold", 10),
        ("advance", 50),
        ("hold", 50),
        ("advance", 100),
        ("roll back", 0),
    ]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_killed_at_any_write_a_canary_goes_on_to_the_same_decisions(
    share, undisturbed, tmp_path, monkeypatch
):
    """After some bytes of an entry, or before or after the flag is turned."""
    whole, writes = undisturbed
    write = os.write
    left = [0]

    def dying(number, data):
        if b'"entry": ' not in data:
            return write(number, data)
        left[0] -= 1
        if not left[0]:
            write(number, data[: int(share * len(data))])
            raise Killed
        return write(number, data)

    monkeypatch.setattr(os, "write", dying)
    for count in range(1, writes + 1):
        folder, flag = tmp_path / str(count), FakeFlag()
        left[0] = count
        with pytest.raises(Killed):
            one_life(folder, flag)
        assert flag.percent in explained(folder)
        one_life(folder, flag)
        assert decisions(folder) == whole
        assert flag.percent == 0


@pytest.mark.parametrize("after", [False, True])
def test_killed_while_the_flag_is_turned_a_canary_goes_on(
    after, undisturbed, tmp_path, monkeypatch
):
    turn = FakeFlag.turn
    left = [0]

    def dying(self, percent):
        left[0] -= 1
        if left[0] or after:
            turn(self, percent)
        if not left[0]:
            raise Killed

    monkeypatch.setattr(FakeFlag, "turn", dying)
    for count in range(1, 5):
        folder, flag = tmp_path / str(count), FakeFlag()
        left[0] = count
        with pytest.raises(Killed):
            one_life(folder, flag)
        assert flag.percent in explained(folder)
        assert not report(folder).turned
        with Canary(folder, flag) as canary:
            assert canary.mended == f"wide was turned to {flag.percent}%"
            assert flag.percent == canary.report().percent
        one_life(folder, flag)
        assert decisions(folder) == undisturbed[0]


def test_a_journal_survives_a_cut_at_every_byte_and_names_other_damage(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    ends = [0]
    for number in range(4):
        journal.append("look", percent=number, reason="é\n")
        ends.append(path.stat().st_size)
    with pytest.raises(CanaryError, match="another process is at work"):
        Journal(path)
    journal.close()
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends) - 1
        assert [e["percent"] for e in read_journal(path)] == [*range(whole)]
    path.write_bytes(data[: ends[3] + 9])
    journal = Journal(path)
    assert path.stat().st_size == ends[3]
    journal.append("look", percent=3, reason="é\n")
    journal.close()
    assert path.read_bytes() == data
    for at in (ends[1] + 30, ends[2] - 1):  # a digit or a letter; the end of a line
        path.write_bytes(data[:at] + b"#" + data[at + 1 :])
        with pytest.raises(
            CanaryError, match="line 2 is damaged: put the journal back"
        ):
            read_journal(path)
    path.write_bytes(data[: ends[3]] + bytes(20) + b"\n")  # the power failed
    assert len(read_journal(path)) == 3


def test_a_full_disk_leaves_journal_and_flag_as_they_were(tmp_path, monkeypatch):
    flag = FakeFlag()
    with Canary.start(tmp_path, flag, ERRORS, now=0.0) as canary:
        before = (tmp_path / "journal.jsonl").read_bytes()
        (tmp_path / "observations.jsonl").write_text(
            "".join(json.dumps(o) + "\n" for o in mixed(200))
        )
        write = os.write
        monkeypatch.setattr(os, "write", lambda n, data: write(n, data[:50]))
        with pytest.raises(CanaryError, match="the disk is full; make room"):
            canary.step(now=60.0)
        assert (tmp_path / "journal.jsonl").read_bytes() == before
        assert flag.percent == 10
        monkeypatch.setattr(os, "write", write)
        assert canary.step(now=60.0).kind == "advance"
        assert flag.percent == 50


def test_a_flag_that_cannot_be_turned_is_turned_by_the_next_step(tmp_path):
    """Also in the process that failed to: no bad candidate is left where it was."""
    flag = FakeFlag()
    with Canary.start(tmp_path, flag, ERRORS, now=0.0) as canary:
        with Observer(canary.report().observations) as observer:
            observer.observe("candidate", loss=math.nan)

        def broken(percent):
            raise OSError("the service that keeps it is gone")

        flag.turn = broken
        for _ in range(2):
            with pytest.raises(OSError, match="is gone"):
                canary.step(now=1.0)
            assert (flag.percent, canary.report().turned) == (10, False)
        del flag.turn
        with pytest.raises(CanaryError, match=r"is over \(rolled back\)"):
            canary.step(now=1.0)
        assert flag.percent == 0


def test_what_others_do_to_the_flag_is_found_out_and_can_be_undone(tmp_path):
    flag = FakeFlag()
    flag.percent = 10
    with pytest.raises(CanaryError, match="wide is at 10%: expected less than the fi"):
        Canary.start(tmp_path / "no", flag, ERRORS)
    assert not (tmp_path / "no").exists()
    flag.percent = 5
    with Canary.start(tmp_path, flag, ERRORS, now=0.0) as canary:
        with pytest.raises(CanaryError, match="holds a canary already; go on with it"):
            Canary.start(tmp_path, flag, ERRORS)
        assert canary.resume() == ""
        flag.percent = 40
        with pytest.raises(
            CanaryError, match="is at 40%, but its canary left it at 10"
        ):
            canary.step(now=1.0)
        assert canary.resume() == "wide was turned back to 10%"
        with pytest.raises(
            BlindError, match="wide stays at 10%: no observation of the"
        ):
            canary.step(now=60.0)
        with pytest.raises(CanaryError, match="the clock ran backwards"):
            canary.step(now=59.0)
        canary.abort("enough", now=3.0)
        assert flag.percent == 5
        assert canary.report().state.status == "aborted"
        for act in (canary.abort, canary.step):
            with pytest.raises(CanaryError, match=r"is over \(aborted\)"):
                act()
        flag.percent = 7  # no business of a canary that is over
        assert canary.resume() == ""
    other = FakeFlag()
    other.where = {"flag": "deep"}
    with pytest.raises(CanaryError, match=r"is a canary of .*wide.*, not of .*deep"):
        Canary(tmp_path, other)
    with pytest.raises(CanaryError, match="holds no canary; begin one with"):
        Canary(tmp_path / "none", flag)
