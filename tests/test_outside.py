"""Requests from outside join the policy's at a tick, by the same gates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import ControllerConfig, Growth, LifecycleConfig, Outcome, Stage, build
from esper_jax.growth.outside import nothing_asked, outside_for
from esper_jax.growth.reports import By
from esper_jax.hosts import MLP
from esper_jax.lifecycle.commands import commands_for
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.monitor.news import News
from esper_jax.policy.memory import Reason
from esper_jax.trees import state_hash

RULES = LifecycleConfig(
    min_epochs=tuple(5 if s is Stage.TRAINING else 0 for s in Stage),
    reconstruction_threshold=1e9,
)
EAGER = ControllerConfig(when="period", period=1, where="round_robin")
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
SEEDS = {"layers/0": 4, "layers/1": 4}
A, B = SEEDS
D, G, T = Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING


def model() -> MLP:
    # Two layers of one shape, which are one group, with two slots each.
    return MLP(4, (8, 8), 2, num_seeds=4, capacity=2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def eager() -> Any:
    """A program whose policy lets something germinate whenever it can."""
    return build(
        model(),
        optax.sgd(1e-2),
        optax.adam(1e-2),
        lifecycle_config=RULES,
        controller_config=EAGER,
    )


def asked(*, atomic: Any = (), germination: bool = False, **layers: Any) -> Any:
    """What is asked of the layers ``a`` and ``b``: commands by seed.

    The policy lets nothing germinate, unless ``germination``.
    """
    names = {"a": A, "b": B}
    made = outside_for(
        {names[n]: commands_for(4, *c[:1], **c[1]) for n, c in layers.items()}, SEEDS
    )
    flags = {n: np.isin(np.arange(4), [s for m, s in atomic if m == n]) for n in SEEDS}
    return dataclasses.replace(made, atomic=flags, germination=np.asarray(germination))


def moves(**targets: Any) -> dict[str, Any]:
    return {layer: (of, {}) for layer, of in targets.items()}


def ticked(program: Any, state: Any, outside: Any) -> tuple[Any, Any]:
    state, report = program.tick(state, (X, Y), outside)
    return state, jax.device_get(report)


def stages(state: Any) -> list[list[int]]:
    return [np.asarray(state.seeds[name].stage).tolist() for name in SEEDS]


def test_what_is_asked_is_judged_by_the_same_gates_in_one_tick(eager: Any) -> None:
    state = eager.init(jax.random.key(0))
    state, report = ticked(eager, state, asked(**moves(a={0: G, 1: G, 2: G}, b={3: T})))
    assert stages(state) == [[G, G, D, D], [D, D, D, D]]
    outcome = [report.layers[n].outcome.tolist() for n in SEEDS]
    none, ok, full = Outcome.NONE, Outcome.OK, Outcome.NO_CAPACITY
    assert outcome == [[ok, ok, full, none], [none, none, none, Outcome.ILLEGAL]]
    assert report.layers[A].by.tolist() == [By.OUTSIDE] * 3 + [By.POLICY]
    # The policy lets both go on, whoever asked for them; the embargo holds for all.
    state, _ = ticked(eager, state, asked())
    state, report = ticked(eager, state, asked(**moves(a={0: Stage.CULLED})))
    assert report.layers[A].outcome.tolist()[0] == Outcome.TOO_EARLY
    [event] = [e for e in News(RULES).tick(report) if e["layer"] == A and not e["seed"]]
    assert event["by"] == "OUTSIDE"
    assert event["text"] == (
        "seed 0 stays in TRAINING: epochs_in_stage 1 is not at least 5, asked from "
        "outside"
    )
    assert eager.recompiles() == 0


def test_where_nothing_is_asked_the_tick_is_the_policy_s(eager: Any) -> None:
    """Bit for bit, and as one program: only the first without arrays is another."""
    hashes = []
    for given in ((), (asked(germination=True),)):
        state = eager.init(jax.random.key(0))
        for _ in range(3):
            state, report = eager.tick(state, (X, Y), *given)
        hashes.append(state_hash(state))
    assert hashes[0] == hashes[1]
    assert not np.any(jax.device_get(report).layers[A].by)


def test_the_outside_wins_where_both_ask_and_the_report_says_so(eager: Any) -> None:
    state, _ = ticked(eager, eager.init(jax.random.key(0)), asked(germination=True))
    assert stages(state) == [[G, D, D, D], [D, D, D, D]]
    # The policy asks for TRAINING.
    wish = asked(**moves(a={0: Stage.CANCELLED, 1: G}))
    state, report = ticked(eager, state, wish)
    assert report.layers[A].target.tolist()[0] == Stage.CANCELLED
    assert report.layers[A].by.tolist()[:2] == [By.OVERRULING, By.OUTSIDE]
    assert stages(state)[0][:2] == [Stage.CANCELLED, G]
    told = {e["seed"]: e["text"] for e in News(RULES).tick(report) if e["layer"] == A}
    assert told[0] == (
        "seed 0: GERMINATED -> CANCELLED, asked from outside, where the policy asked "
        "for something else"
    )
    # A request that is refused is not replaced by the policy's.
    state, report = ticked(eager, state, asked(**moves(a={1: Stage.FOSSILIZED})))
    assert report.layers[A].outcome.tolist()[1] == Outcome.ILLEGAL
    assert stages(state)[0][1] == G


def test_an_atomic_batch_is_carried_out_whole_or_refused_whole(eager: Any) -> None:
    start = eager.init(jax.random.key(0))
    flags = [(A, 0), (A, 1), (B, 2)]
    batch = moves(a={0: G, 1: G}, b={2: G})
    done, report = ticked(
        eager, jax.tree.map(jnp.copy, start), asked(atomic=flags, **batch)
    )
    assert stages(done) == [[G, G, D, D], [D, D, G, D]]
    # One part of it is illegal: the parts of the other layer stay as they were too, and
    # the slot that they would have taken goes to who else asked.
    batch = moves(a={0: G, 1: G, 2: G, 3: G}, b={2: T})
    refused, report = ticked(eager, start, asked(atomic=flags, **batch))
    assert stages(refused) == [[D, D, G, G], [D, D, D, D]]
    ok, batched = Outcome.OK, Outcome.BATCH
    assert report.layers[A].outcome.tolist() == [batched, batched, ok, ok]
    assert report.layers[B].outcome.tolist()[2] == Outcome.ILLEGAL
    texts = [e["text"] for e in News(RULES).tick(report)]
    assert texts[0] == (
        "seed 0 stays in DORMANT: another request of its batch was refused, asked from "
        "outside"
    )


def test_a_strategy_may_be_asked_for_alone_and_leaves_the_policy_s_move(
    eager: Any,
) -> None:
    state, _ = ticked(eager, eager.init(jax.random.key(0)), asked(germination=True))
    style = {"strategies": {0: Strategy.MOMENTUM}}
    kept = asked(a=(None, style), atomic=[(A, 0), (B, 1)], b=({1: T}, {}))
    state, _ = ticked(eager, state, kept)
    assert state.seeds[A].strategy[0] == Strategy.LINEAR  # its batch was refused
    assert stages(state)[0][0] == T  # the policy was heard
    state, report = ticked(eager, state, asked(a=(None, style)))
    assert state.seeds[A].strategy[0] == Strategy.MOMENTUM
    assert report.layers[A].by.tolist()[0] == By.OUTSIDE
    # Where the policy moves the seed at that tick, the move is its own.
    state, _ = ticked(eager, eager.init(jax.random.key(0)), asked(germination=True))
    state, report = ticked(eager, state, asked(a=(None, style)))
    assert state.seeds[A].strategy[0] == Strategy.MOMENTUM
    assert stages(state)[0][0] == T
    assert report.layers[A].by.tolist()[0] == By.POLICY
    [told] = [e for e in News(RULES).tick(report) if e["seed"] == 0]
    assert told["text"] == "seed 0: GERMINATED -> TRAINING"


def test_nothing_germinates_by_the_policy_while_the_outside_forbids_it(
    eager: Any,
) -> None:
    state = eager.init(jax.random.key(0))
    tried = np.asarray(state.memory.tried)
    for _ in range(2):
        state, report = ticked(eager, state, asked())
    assert stages(state) == [[D] * 4, [D] * 4]
    assert int(report.reason) == int(state.memory.reason) == Reason.DISABLED
    np.testing.assert_array_equal(state.memory.tried, tried)  # it did not grow
    # The outside still may.
    state, _ = ticked(eager, state, asked(b=({1: G}, {})))
    assert stages(state)[1] == [D, G, D, D]
    state, _ = ticked(eager, state, asked(b=({1: Stage.CANCELLED}, {})))
    state, report = ticked(eager, state, asked(germination=True))
    assert int(report.reason) == Reason.GERMINATED
    assert stages(state)[0] == [G, D, D, D]


def test_a_loop_of_ones_own_asks_as_the_program_does(eager: Any) -> None:
    net = model()
    growth = Growth(
        net,
        optax.adam(1e-2),
        lifecycle_config=RULES,
        controller_config=ControllerConfig(enabled=False),
    )

    def evaluate(net: Any) -> Any:
        logits = net(X)
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    wish = {A: commands_for(4, {0: G, 1: T})}
    report = growth.tick(net, evaluate, commands=wish)
    _, other = ticked(eager, eager.init(jax.random.key(0)), asked(a=({0: G, 1: T}, {})))
    for field in ("stage", "outcome", "by", "target", "slot"):
        own, wanted = (getattr(r.layers[A], field) for r in (report, other))
        np.testing.assert_array_equal(own, wanted)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"layer/0": commands_for(4)}, ValueError, "no layer 'layer/0'; the layers"),
        ({A: commands_for(3)}, ValueError, r"each of the 4 seeds; got shape \(3,\)"),
        ({A: {2: Stage.CULLED}}, TypeError, "must be Commands.* got dict"),
        ([commands_for(4)], TypeError, "Commands by layer.* got list"),
        (
            dataclasses.replace(nothing_asked(SEEDS), atomic={A: np.zeros(4, bool)}),
            ValueError,
            "'layers/1' is missing",
        ),
    ],
)
def test_what_does_not_fit_the_layers_is_refused_by_name(
    given: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        outside_for(given, SEEDS)
