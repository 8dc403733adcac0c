"""What every blueprint, every grafting strategy and every policy must do.

The tables are read from the package, so that a new entry is tested without a new test.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from esper_jax import blueprints as bp
from esper_jax import lifecycle
from esper_jax.chunks import ChunkLayout
from esper_jax.hosts import MLP
from esper_jax.kernels.blend import blend
from esper_jax.lifecycle import grafting
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import GraftConfig, GraftMemory, Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, NUM_STAGES, Outcome, Stage
from esper_jax.lifecycle.state import SeedState, init_seeds
from esper_jax.policy import config as policy_config
from esper_jax.policy import decide, init_memory
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import Reason
from esper_jax.train.program import build

SIGNALS = [field.name for field in dataclasses.fields(Signals)]

# --- Blueprints that write their chunk: each of the registry, and one that a user would
# write. Those that write the layer are in test_adapters.py.

GATE = bp.Custom(
    name="gate",
    init=lambda key, width: {"gate": jnp.zeros(width), "slope": jnp.ones(())},
    apply=lambda p, y: p["gate"] * jnp.tanh(p["slope"] * y),
)
NAMES = [
    *(n for n, b in bp.registered().items() if not isinstance(b, bp.Adapter)),
    "gate",
]
KINDS = bp.resolve([*NAMES[:-1], GATE])
N, WIDTH = len(KINDS), 5
LAYOUT = ChunkLayout(2 * N * WIDTH - N, 2 * N)
WIDE, NARROW = np.arange(N, dtype=np.int32), np.arange(N, 2 * N, dtype=np.int32)
"""Seeds with chunks of 5 and of 4 features; slot ``i`` holds blueprint ``i``."""
PLACES = {"wide": WIDE, "narrow": NARROW}


def correct(y: Any, g: Any, bank: bp.Bank, seeds: Any) -> Any:
    """Output, reconstruction loss, and gradients of ``sum(out * g)``."""

    def loss(y: Any, bank: bp.Bank) -> Any:
        ones = jnp.ones(N)
        out, _, reconstruction = blend(
            y, bank, ones, ones, jnp.arange(N), seeds, layout=LAYOUT, blueprints=KINDS
        )
        return jnp.sum((out * g).astype(jnp.float32)), (out, reconstruction)

    (_, (out, reconstruction)), grads = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(y, bank)
    return out, reconstruction, *grads


compiled = jax.jit(correct)


def rows(dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y, g = (rng.normal(size=(64, LAYOUT.features)) for _ in range(2))
    return jnp.asarray(y, dtype), jnp.asarray(g, dtype)


@functools.cache
def banks() -> dict[str, bp.Bank]:
    """Of newborns, and with no entry 0, so that nothing hides from the gradient."""
    keys = jax.random.split(jax.random.key(3), N)
    newborn = jax.jit(
        lambda k, i: bp.init_slots(k, i, KINDS, LAYOUT.width, LAYOUT.features)
    )(keys, jnp.arange(N))
    rng = np.random.default_rng(1)
    ripe = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), newborn
    )
    return {"newborn": newborn, "ripe": ripe}


@functools.cache
def corrected(age: str, place: str, dtype: str = "float32") -> Any:
    return jax.device_get(compiled(*rows(dtype), banks()[age], PLACES[place]))


def of_slot(tree: Any, slot: int) -> list[np.ndarray]:
    return [np.asarray(leaf[slot]) for leaf in jax.tree.leaves(tree)]


def columns(place: str, slot: int) -> slice:
    seed = PLACES[place][slot]
    start = int(LAYOUT.starts[seed])
    return slice(start, start + int(LAYOUT.sizes[seed]))


each_blueprint = pytest.mark.parametrize("slot", range(N), ids=NAMES)
each_place = pytest.mark.parametrize("place", PLACES)


@each_blueprint
@each_place
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_newborn_corrects_nothing_and_can_learn(
    slot: int, place: str, dtype: str
) -> None:
    y, g = rows(dtype)
    out, reconstruction, dy, d_bank = corrected("newborn", place, dtype)
    chunk = columns(place, slot)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[:, chunk], np.asarray(y)[:, chunk])
    np.testing.assert_array_equal(dy[:, chunk], np.asarray(g)[:, chunk])
    assert reconstruction[slot] == 0
    grads = of_slot(d_bank, slot)
    assert all(np.isfinite(grad).all() for grad in grads)
    has_parameters = KINDS[slot].param_count(WIDTH, WIDTH, LAYOUT.features) > 0
    assert any(grad.any() for grad in grads) == has_parameters


@each_blueprint
@each_place
def test_parameters_are_the_entries_that_learn(slot: int, place: str) -> None:
    *_, dy, d_bank = corrected("ripe", place)
    assert np.isfinite(dy).all()
    learning = sum(np.count_nonzero(grad) for grad in of_slot(d_bank, slot))
    count = bp.param_counts(KINDS, LAYOUT.sizes)[slot, PLACES[place][slot]]
    width = LAYOUT.sizes[PLACES[place][slot]]
    assert count == KINDS[slot].param_count(width, WIDTH, LAYOUT.features)
    if place == "narrow" and isinstance(KINDS[slot], bp.Custom):
        # Only its own apply knows what a narrow chunk leaves idle.
        assert 0 < learning <= count
    else:
        assert learning == count
    if place == "narrow" and NAMES[slot] == "gate":
        assert learning == 4 + 1  # four of the five gates, and the slope


@each_blueprint
@each_place
def test_half_precision_is_the_same_network(slot: int, place: str) -> None:
    chunk = columns(place, slot)
    full, half = (
        np.asarray(corrected("ripe", place, dtype)[0], np.float32)[:, chunk]
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(half, full, rtol=0.03, atol=0.03 * np.abs(full).max())
    assert (
        NAMES[slot] == "noop" or np.abs(full - rows("float32")[0][:, chunk]).max() > 0.1
    )


def test_which_blueprint_grows_where_is_a_run_time_value() -> None:
    dtypes = ("float32", "bfloat16")
    for age, place, dtype in itertools.product(banks(), PLACES, dtypes):
        corrected(age, place, dtype)
    assert compiled._cache_size() == len(dtypes)


def test_blueprints_under_vmap_are_a_loop() -> None:
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks().values())
    y, g = rows("float32")
    run = jax.jit(jax.vmap(correct, in_axes=(None, None, 0, None)))
    got = jax.device_get(run(y, g, both, WIDE))
    for i, age in enumerate(banks()):
        expected = corrected(age, "wide")
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(b).max())
            ),
            jax.tree.map(lambda leaf, i=i: leaf[i], got),
            expected,
        )


# --- Grafting strategies: every one of them with several settings, all at once.

SETTINGS = [
    {
        "ramp_duration": duration,
        "min_alpha": low,
        "max_alpha": high,
        "pause_duration": pause,
        "stability_window": window,
        "momentum_factor": factor,
    }
    for duration, (low, high), pause, window, factor in itertools.product(
        (1, 8, 50), ((0.0, 1.0), (0.125, 0.75)), (0, 3), (1, 4), (0.0, 0.875)
    )
]
ROWS = [(strategy, fields) for strategy in Strategy for fields in SETTINGS]
STRATEGIES = np.array([strategy for strategy, _ in ROWS], np.int8)
GRAFT = GraftConfig(**{k: np.array([f[k] for _, f in ROWS]) for k in SETTINGS[0]})
EPOCHS, TRIALS = 60, 6
CALM = {"grad_norm": 0.5, "reconstruction_loss": 0.25}
"""All other signals are 0."""
ODD = [0.0, 0.01, 0.07, 0.13, 0.3, 1.0, 15.0, -0.3, -5.0, np.nan, np.inf, -np.inf]


def climb(signals: dict[str, Any], strategies: Any) -> GraftMemory:
    """Memory at each epoch, the entry first: [EPOCHS, rows]."""
    n = len(ROWS)
    first = grafting.begin(init_seeds(n, n).graft, jnp.ones(n, bool), GRAFT)

    def epoch(memory: GraftMemory, xs: Any) -> Any:
        t, now = xs
        now = Signals.unmeasured(**now)
        memory = grafting.update(memory, strategies, now, t, GRAFT)
        return memory, memory

    t = jnp.arange(1, EPOCHS, dtype=jnp.uint16)[:, None] * jnp.ones(n, jnp.uint16)
    later = jax.lax.scan(epoch, first, (t, signals))[1]
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)


climb_all = jax.jit(jax.vmap(climb, in_axes=(0, None)))


def series(kind: str) -> dict[str, np.ndarray]:
    """Signals by name, [TRIALS, EPOCHS - 1, rows]."""
    shape = (TRIALS, EPOCHS - 1, len(ROWS))
    calm = {name: np.full(shape, CALM.get(name, 0.0), np.float32) for name in SIGNALS}
    if kind == "calm":
        return calm
    if kind == "unmeasured":
        return {name: np.full(shape, np.nan, np.float32) for name in SIGNALS}
    rng = np.random.default_rng(5)
    share = rng.choice([0.3, 0.6, 0.9], (TRIALS, 1, 1))
    return {
        name: np.where(rng.random(shape) < share, quiet, rng.choice(ODD, shape)).astype(
            np.float32
        )
        for name, quiet in calm.items()
    }


@functools.cache
def climbed(kind: str) -> GraftMemory:
    return jax.device_get(climb_all(series(kind), STRATEGIES))


each_strategy = pytest.mark.parametrize("strategy", Strategy, ids=lambda s: s.name)


@each_strategy
def test_calm_signals_give_the_linear_ramp(strategy: Strategy) -> None:
    mine = strategy == STRATEGIES
    alpha = climbed("calm").alpha
    t = np.arange(EPOCHS)[:, None]
    ramp = np.asarray(GRAFT.min_alpha) + t / np.asarray(GRAFT.ramp_duration)
    expected = np.minimum(ramp, np.asarray(GRAFT.max_alpha))
    np.testing.assert_allclose(
        alpha[:, :, mine], [expected[:, mine]] * TRIALS, rtol=0, atol=1e-5
    )
    linear = alpha[:, :, Strategy.LINEAR == STRATEGIES]
    np.testing.assert_array_equal(alpha[:, :, mine], linear)


@each_strategy
@pytest.mark.parametrize("kind", ["odd", "unmeasured"])
def test_alpha_stays_in_its_range_and_only_stability_steps_back(
    strategy: Strategy, kind: str
) -> None:
    mine = strategy == STRATEGIES
    alpha = climbed(kind).alpha
    assert np.all((alpha >= np.float32(GRAFT.min_alpha))[..., mine])
    assert np.all((alpha <= np.float32(GRAFT.max_alpha))[..., mine])
    falls = np.diff(alpha[..., mine], axis=1) < 0
    assert np.any(falls) == (strategy == Strategy.STABILITY)


@each_strategy
@pytest.mark.parametrize("kind", ["odd", "unmeasured"])
def test_what_is_not_finite_never_reaches_the_memory(
    strategy: Strategy, kind: str
) -> None:
    mine = strategy == STRATEGIES
    memory = climbed(kind)
    for field in dataclasses.fields(GraftMemory):
        values = getattr(memory, field.name)[..., mine]
        if field.name == "previous_loss":
            # NaN before the first that was measured, and never again.
            losses = series(kind)["reconstruction_loss"][..., mine]
            known = np.logical_or.accumulate(np.isfinite(losses), axis=1)
            np.testing.assert_array_equal(np.isfinite(values[:, 1:]), known)
        else:
            assert np.isfinite(values).all(), field.name


def test_which_strategy_it_is_is_a_run_time_value_and_vmap_is_a_loop() -> None:
    fresh = jax.jit(climb)
    odd = series("odd")
    for trial, codes in enumerate((STRATEGIES, STRATEGIES[::-1].copy())):
        one = fresh({name: value[trial] for name, value in odd.items()}, codes)
        if trial == 0:
            jax.tree.map(
                lambda got, all_of_them: np.testing.assert_allclose(
                    got, all_of_them[0], rtol=1e-5, atol=1e-6
                ),
                jax.device_get(one),
                climbed("odd"),
            )
    assert fresh._cache_size() == 1


# --- Policies: the heuristic with each of its choices, and one that a user would write.


@struct.dataclass
class InTurn:
    """The memory of `in_turn`: nothing like the heuristic's."""

    asked: Int[Array, ""]
    losses: Float[Array, " 3"]
    """The last that were measured, newest first."""
    reason: Int[Array, ""]


def first_in_turn() -> InTurn:
    return InTurn(
        asked=jnp.zeros((), jnp.int32),
        losses=jnp.zeros(3, jnp.float32),
        reason=jnp.asarray(Reason.NOT_YET, jnp.int8),
    )


def in_turn(
    seeds: Any, signals: Any, memory: InTurn, config: Any, rules: Any, costs: Any
) -> Any:
    """Germinates the chunks one after another, and lets each train for good."""
    loss = next(iter(signals.values())).held_out_loss
    commands = {}
    for name, state in seeds.items():
        number = jnp.arange(state.num_seeds)
        now = (number == memory.asked % state.num_seeds) & (
            state.stage == Stage.DORMANT
        )
        target = jnp.select(
            [now, state.stage == Stage.GERMINATED],
            [jnp.int8(Stage.GERMINATED), jnp.int8(Stage.TRAINING)],
            jnp.int8(NO_REQUEST),
        )
        nothing = jnp.full(target.shape, NO_REQUEST, jnp.int8)
        commands[name] = Commands(target=target, blueprint=nothing, strategy=nothing)
    shifted = jnp.concatenate([loss[None], memory.losses[:-1]])
    return commands, InTurn(
        asked=memory.asked + 1,
        losses=jnp.where(jnp.isfinite(loss), shifted, memory.losses),
        reason=jnp.asarray(Reason.GERMINATED, jnp.int8),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A policy of the table."""

    name: str
    decide: Callable[..., Any]
    memory: Callable[[], Any]
    config: ControllerConfig = dataclasses.field(default_factory=ControllerConfig)


LAYERS = {"a": (4, 2), "b": (3, 3)}
POLICY_KINDS = bp.resolve(["affine", "low_rank", "noop"])
COSTS = {
    name: bp.param_counts(POLICY_KINDS, ChunkLayout(4 * s - 1, s).sizes)
    for name, (s, _) in LAYERS.items()
}
RULES = LifecycleConfig(
    min_epochs=(0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_final_stability=-1e9,
    grafting=GraftConfig(ramp_duration=2),
)


def choices(name: str) -> tuple[str, ...]:
    """What a choice of the heuristic may be: read from its config's module."""
    return get_args(getattr(policy_config, name))


def heuristics() -> list[Row]:
    """As few as have each value of each choice."""
    words = {n.lower(): choices(n) for n in ("When", "Where", "What", "How")}
    found = []
    for i in range(max(map(len, words.values()))):
        chosen = {name: values[i % len(values)] for name, values in words.items()}
        config = ControllerConfig(
            **chosen,
            patience=2,
            period=2,
            births=2,
            max_training=3,
            blueprint=1,
            budget=200 if i % 2 else -1,
            shift_tolerance=0.5 if i % 3 == 0 else -1.0,
        )
        found.append(Row("-".join(chosen.values()), decide, memory_of, config))
    return found


def memory_of() -> Any:
    return init_memory(
        {name: s for name, (s, _) in LAYERS.items()},
        key=jax.random.key(1),
        blueprints=len(POLICY_KINDS),
    )


POLICIES = [*heuristics(), Row("custom", in_turn, first_in_turn)]
each_policy = pytest.mark.parametrize(
    "index", range(len(POLICIES)), ids=[row.name for row in POLICIES]
)


def measured(tick: int, odd: bool) -> dict[str, Signals]:
    """A tick's signals of all layers; ``odd`` ones are mostly not finite."""
    rng = np.random.default_rng(tick)
    shared = ("held_out_loss", "held_out_accuracy", "loss_variance", "grad_norm")
    common = {name: np.float32(rng.uniform(0.4, 0.6)) for name in shared}
    found = {}
    for layer, (s, _) in LAYERS.items():
        own = {n: rng.uniform(0.1, 1, s).astype(np.float32) for n in SIGNALS}
        values = own | common
        if odd:
            bad = np.array([np.nan, np.inf, -np.inf], np.float32)
            values = {n: rng.choice(bad, np.shape(v)) for n, v in values.items()}
        found[layer] = Signals.unmeasured(
            **{n: jnp.asarray(v, jnp.float32) for n, v in values.items()}
        )
    return found


@functools.partial(jax.jit, static_argnums=3)
def carried_out(
    seeds: dict[str, SeedState], commands: Any, signals: Any, rules: LifecycleConfig
) -> Any:
    results = {
        name: lifecycle.transition(
            lifecycle.age(seeds[name], signals[name], rules),
            commands[name],
            signals[name],
            rules,
        )
        for name in seeds
    }
    return {n: r[0] for n, r in results.items()}, {n: r[1] for n, r in results.items()}


def compiled_policy(row: Row) -> Any:
    return jax.jit(
        lambda seeds, signals, memory: row.decide(
            seeds, signals, memory, row.config, RULES, COSTS
        )
    )


@functools.cache
def lived(index: int) -> Any:
    """Each tick's seeds, commands, outcomes and memory of a policy's whole run, of
    which every third tick measured nothing; and how often it was compiled."""
    row = POLICIES[index]
    policy = compiled_policy(row)
    seeds = {n: init_seeds(*size) for n, size in LAYERS.items()}
    seeds = {
        n: dataclasses.replace(s, health=jnp.linspace(0.1, 0.9, s.num_seeds))
        for n, s in seeds.items()
    }
    memory, ticks = row.memory(), []
    for tick in range(24):
        signals = measured(tick, odd=tick % 3 == 2)
        before = memory
        commands, memory = policy(seeds, signals, memory)
        seeds, outcome = carried_out(seeds, commands, signals, RULES)
        ticks.append((before, commands, memory, seeds, outcome))
    return ticks, policy._cache_size()


@each_policy
def test_a_policy_asks_for_what_there_is(index: int) -> None:
    limits = {
        "target": NUM_STAGES,
        "blueprint": len(POLICY_KINDS),
        "strategy": len(Strategy),
    }
    ticks, _ = lived(index)
    for _, commands, _, _, outcome in ticks:
        assert commands.keys() == LAYERS.keys()
        for layer, (s, _) in LAYERS.items():
            for name, limit in limits.items():
                value = np.asarray(getattr(commands[layer], name))
                assert (value.shape, value.dtype) == ((s,), np.int8)
                assert np.all((value >= NO_REQUEST) & (value < limit))
            # It knows which stage may follow which, whatever was measured.
            assert not np.any(outcome[layer] == Outcome.ILLEGAL)


@each_policy
def test_a_policy_germinates_and_moves_seeds_on(index: int) -> None:
    ticks, _ = lived(index)
    stages = {int(s) for *_, seeds, _ in ticks for x in seeds.values() for s in x.stage}
    assert {Stage.GERMINATED, Stage.TRAINING} <= stages
    reasons = {int(memory.reason) for _, _, memory, _, _ in ticks}
    assert Reason.GERMINATED in reasons
    assert reasons <= set(Reason)


@each_policy
def test_a_policy_s_memory_keeps_its_structure(index: int) -> None:
    ticks, _ = lived(index)

    def layout(memory: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), memory)

    first = layout(ticks[0][0])
    assert all(layout(memory) == first for _, _, memory, _, _ in ticks)


@each_policy
def test_what_is_not_measured_never_reaches_a_policy_s_memory(index: int) -> None:
    def not_finite(memory: Any) -> set[str]:
        return {
            f"{jax.tree_util.keystr(path)}[{i}]"
            for path, leaf in jax.tree_util.tree_leaves_with_path(memory)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            for i, value in enumerate(np.ravel(leaf))
            if np.isnan(value) and "before" not in jax.tree_util.keystr(path)
        }

    ticks, _ = lived(index)
    for tick, (before, _, after, _, _) in enumerate(ticks):
        assert not_finite(after) <= not_finite(before), tick
    assert not not_finite(ticks[-1][2])


@each_policy
def test_a_policy_is_compiled_once(index: int) -> None:
    assert lived(index)[1] == 1


# --- A policy of one's own through `build`.


def test_every_choice_of_the_heuristic_is_in_the_table() -> None:
    for name in ("When", "Where", "What", "How"):
        used = {getattr(row.config, name.lower()) for row in POLICIES}
        assert used == set(choices(name))


def test_a_policy_of_one_s_own_grows_a_model() -> None:
    seen: list[Any] = []

    def watched(seeds: Any, signals: Any, memory: Any, *recipe: Any) -> Any:
        seen.append((seeds, signals, recipe))
        return in_turn(seeds, signals, memory, *recipe)

    model = MLP(4, (6,), 2, num_seeds=3, capacity=2, rngs=nnx.Rngs(0))
    config = ControllerConfig(patience=7)
    program = build(
        model,
        optax.sgd(0.1),
        optax.sgd(0.1),
        controller_config=config,
        lifecycle_config=RULES,
        decide=watched,
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    batch = x, (x[:, 0] > 0).astype(jnp.int32)
    state = program.init(jax.random.key(0))
    state = dataclasses.replace(state, memory=first_in_turn())
    stages, reports = [], []
    for _ in range(3):
        state = program.step(program.step(state, batch), batch)
        state, report = program.tick(state, batch)
        stages.append(state.seeds["layers/0"].stage.tolist())
        reports.append(jax.device_get(report))
    dormant, germinated, training = Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING
    # The third finds no free slot.
    assert stages == [
        [germinated, dormant, dormant],
        [training, germinated, dormant],
        [training, training, dormant],
    ]
    assert reports[2].layers["layers/0"].outcome.tolist() == [
        Outcome.NONE,
        Outcome.OK,
        Outcome.NO_CAPACITY,
    ]
    assert isinstance(state.memory, InTurn)
    assert int(state.memory.asked) == 3
    losses = [float(report.loss) for report in reports]
    np.testing.assert_allclose(state.memory.losses, losses[::-1])
    assert {int(report.reason) for report in reports} == {Reason.GERMINATED}
    # It was traced once, with what a policy is promised.
    [(seeds, signals, (own_config, rules, costs))] = seen
    assert program.recompiles() == 0
    assert (own_config, rules) == (config, RULES)
    assert seeds["layers/0"].stage.shape == (3,)
    assert {getattr(signals["layers/0"], n).shape for n in SIGNALS} <= {(3,), ()}
    np.testing.assert_array_equal(
        costs["layers/0"], bp.param_counts(program.kinds["layers/0"], np.full(3, 2))
    )
