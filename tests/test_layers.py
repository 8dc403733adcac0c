"""`ChunkedLayer` around real layers, in NNX and in Linen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_jax import lifecycle
from esper_jax.kernels.blend import blend
from esper_jax.layers.bed import DEFAULT_STATISTICS_ROWS, SeedBed
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.variables import BlueprintParam, GraftProbe, SeedVariable
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import SeedState, slot_coefficients

HOST = nnx.All(nnx.Param, nnx.Not(BlueprintParam))


def same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def placed(seeds: SeedState, stages: dict[int, Stage], alpha: float = 0.4) -> SeedState:
    """``seeds`` with some of them in the given stages, in the first slots."""
    ids = np.array(list(stages), np.int32)
    slots = np.arange(len(ids), dtype=np.int32)
    return dataclasses.replace(
        seeds,
        stage=seeds.stage.at[ids].set(np.array(list(stages.values()), np.int8)),
        slot_of_seed=seeds.slot_of_seed.at[ids].set(slots),
        seed_of_slot=seeds.seed_of_slot.at[slots].set(ids),
        graft=dataclasses.replace(
            seeds.graft, alpha=jnp.full_like(seeds.graft.alpha, alpha)
        ),
    )


def grown(bed: SeedBed, stages: dict[int, Stage]) -> None:
    """Puts seeds of ``bed`` in stages and makes their blueprints do something."""
    bed.seeds.set_value(placed(bed.seeds.get_value(), stages))
    rng = np.random.default_rng(0)
    bank = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype),
        bed.bank.get_value(),
    )
    bed.bank.set_value(bank)


class Net(nnx.Module):
    """An MLP whose hidden layers can grow if ``seeds`` is not 0."""

    def __init__(self, seeds: int, rngs: nnx.Rngs, **options: Any) -> None:
        def layer(base: Any) -> Any:
            if not seeds:
                return base
            return ChunkedLayer(base, seeds, rngs=nnx.Rngs(9), **options)

        self.first = layer(nnx.Linear(5, 16, rngs=rngs))
        self.second = layer(nnx.Linear(16, 18, rngs=rngs))
        self.last = nnx.Linear(18, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.gelu(self.first(x))
        return self.last(nnx.relu(self.second(x)))


def step(model: Any, x: Any, target: Any) -> tuple[Any, ...]:
    """Loss, output, gradients (host, bank, probe) and new seeds, all in one jit."""
    return _step(*nnx.split(model, HOST, BlueprintParam, GraftProbe, ...), x, target)


FULLY_OPTIMIZED = {"xla_backend_optimization_level": 3}


@functools.partial(jax.jit, static_argnums=0, compiler_options=FULLY_OPTIMIZED)
def _step(
    graph: Any, host: Any, bank: Any, probe: Any, rest: Any, x: Any, target: Any
) -> Any:
    def loss(host: Any, bank: Any, probe: Any) -> Any:
        m = nnx.merge(graph, host, bank, probe, rest, copy=True)
        out = m(x)
        return jnp.mean((out - target) ** 2), (out, nnx.state(m, SeedVariable))

    (value, (out, seeds)), grads = jax.value_and_grad(
        loss, argnums=(0, 1, 2), has_aux=True
    )(host, bank, probe)
    return value, out, *grads, seeds


@pytest.fixture
def data() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.normal(size=(7, 5)), jnp.float32),
        jnp.asarray(rng.normal(size=(7, 3)), jnp.float32),
    )


@pytest.mark.parametrize("blueprint", ["residual_mlp", "group"])
def test_bounded_incubation_stays_as_small_as_the_activation(blueprint: str) -> None:
    y = jnp.asarray(np.random.default_rng(0).normal(size=(32, 6)), jnp.float32)
    towards = 100 * jnp.asarray([1.0, -1, 2, 1, -3, 1])  # a gradient that never turns
    sizes = {}
    for incubation in ("task", "bounded"):
        bed = SeedBed(
            6, 1, blueprints=[blueprint], incubation=incubation, rngs=nnx.Rngs(0)
        )
        grown(bed, {0: Stage.TRAINING})
        graph, bank, rest = nnx.split(bed, BlueprintParam, ...)

        def loss(bank: Any, graph: Any = graph, rest: Any = rest) -> Any:
            return jnp.mean(nnx.merge(graph, bank, rest, copy=True)(y) @ towards)

        def learn(bank: Any, _: None, loss: Any = loss) -> tuple[Any, None]:
            step = jax.tree.map(lambda g: 0.03 * jnp.sign(g), jax.grad(loss)(bank))
            return jax.tree.map(jnp.subtract, bank, step), None

        bank, _ = jax.lax.scan(learn, bank, None, length=200)
        nnx.update(bed, bank)
        bed(y)
        squares = bed.seeds.get_value().reconstruction[0]
        sizes[incubation] = float(jnp.sqrt(squares / jnp.mean(y**2)))
    assert sizes["task"] > 10
    assert 0.3 < sizes["bounded"] < 1.5


@pytest.mark.parametrize("incubation", ["task", "bounded", "reconstruction"])
def test_dormant_and_training_seeds_leave_the_model_bit_identical(
    data: tuple[jax.Array, jax.Array], incubation: str
) -> None:
    plain = step(Net(0, nnx.Rngs(0)), *data)
    model = Net(4, nnx.Rngs(0), incubation=incubation)
    dormant = step(model, *data)
    grown(model.first.bed, {1: Stage.TRAINING, 3: Stage.TRAINING})
    grown(model.second.bed, {0: Stage.TRAINING})
    training = step(model, *data)

    for run in (dormant, training):
        same_bits(run[:2], plain[:2])
        # The layers come in the same order in both models.
        same_bits(run[2], plain[2])
    assert not any(np.any(g) for g in jax.tree.leaves(dormant[3]))
    for bed in ("first", "second"):
        gradient = training[3][bed].bed.bank
        living = 2 if bed == "first" else 1
        assert np.all(np.any(np.asarray(gradient["w1"][:living]) != 0, axis=(1, 2)))
        assert not any(np.any(leaf[living:]) for leaf in jax.tree.leaves(gradient))


def test_the_probe_measures_and_removes_seeds(
    data: tuple[jax.Array, jax.Array],
) -> None:
    model = Net(4, nnx.Rngs(0))
    stages = {2: Stage.TRAINING, 0: Stage.GRAFTING, 3: Stage.EVALUATING}
    grown(model.first.bed, stages)
    bed = model.first.bed
    loss, _, _, _, probe, _ = step(model, *data)
    gradient = probe.first.bed.probe.get_value()
    # The gradient is the loss's slope in alpha, by central differences.
    for k in range(len(stages)):
        ends = []
        for h in (1e-2, -1e-2):
            bed.probe.set_value(jnp.zeros(4).at[k].set(h))
            ends.append(float(step(model, *data)[0]))
        np.testing.assert_allclose(
            gradient[k], (ends[0] - ends[1]) / 2e-2, rtol=2e-2, atol=1e-4
        )
    assert gradient[3] == 0
    # A probe of -alpha is the model without that seed, to the bit.
    alpha, _, _ = slot_coefficients(bed.seeds.get_value())
    bed.probe.set_value(-alpha * (jnp.arange(4) == 2))
    without = step(model, *data)[:2]
    bed.probe.set_value(jnp.zeros(4))
    seeds = bed.seeds.get_value()
    bed.seeds.set_value(
        dataclasses.replace(seeds, stage=seeds.stage.at[3].set(Stage.DORMANT))
    )
    same_bits(without, step(model, *data)[:2])
    assert without[0] != loss


@pytest.mark.parametrize(("rows", "seen"), [(256, 3), (None, 1), (600, 1), (0, None)])
def test_a_layer_measures_a_sample_of_all_its_rows(
    rows: int | None, seen: int | None
) -> None:
    options = {} if rows == DEFAULT_STATISTICS_ROWS else {"statistics_rows": rows}
    y = jax.random.normal(jax.random.key(0), (2, 300, 6))
    bed = SeedBed(6, 3, rngs=nnx.Rngs(0), **options)
    bed(y)
    sample = y.reshape(600, 6)[::seen] if seen else y.reshape(600, 6)[:0]
    got = bed.seeds.get_value().statistics
    np.testing.assert_array_equal(got.count, [2 * len(sample)] * 3)
    np.testing.assert_allclose(
        got.total, sample.reshape(-1, 3, 2).sum((0, 2)), rtol=1e-5, atol=1e-5
    )


def test_statistics_are_collected_while_training_only(
    data: tuple[jax.Array, jax.Array],
) -> None:
    x, _ = data
    layer = ChunkedLayer(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), 3, rngs=nnx.Rngs(1))
    y = layer(x)
    layer(x)
    seeds = layer.bed.seeds.get_value()
    assert seeds.steps == 2
    np.testing.assert_array_equal(seeds.statistics.count, [42, 42, 28])
    np.testing.assert_allclose(
        seeds.statistics.total,
        2 * np.add.reduceat(np.asarray(y), [0, 3, 6], axis=1).sum(0),
        rtol=1e-5,
    )
    layer.eval()
    layer(x)
    same_bits(layer.bed.seeds.get_value(), seeds)
    layer.train()
    layer(x)
    assert layer.bed.seeds.get_value().steps == 3


BASES = {
    "linear": (lambda r: nnx.Linear(5, 6, rngs=r), jnp.ones((2, 5))),
    "conv": (lambda r: nnx.Conv(2, 6, (3, 3), rngs=r), jnp.ones((2, 4, 4, 2))),
    "embed": (lambda r: nnx.Embed(10, 6, rngs=r), jnp.arange(8).reshape(2, 4)),
    "norm": (lambda r: nnx.LayerNorm(6, rngs=r), jnp.arange(12.0).reshape(2, 6)),
}


@pytest.mark.parametrize("name", BASES)
def test_any_base_layer_whose_last_axis_is_features(name: str) -> None:
    make, x = BASES[name]
    base = make(nnx.Rngs(0))
    layer = ChunkedLayer(base, 4, blueprints=["affine"], rngs=nnx.Rngs(1))
    want = base(x)
    same_bits(layer(x), want)
    # Features 2 and 3 are seed 1's: there out = y + b2, b2 = 1.
    bed = layer.bed
    bed.seeds.set_value(placed(bed.seeds.get_value(), {1: Stage.FOSSILIZED}))
    bed.bank.set_value(dataclasses.replace(bed.bank.get_value(), b2=jnp.ones((4, 2))))
    mask = np.array([0, 0, 1, 1, 0, 0], np.float32)
    np.testing.assert_array_equal(layer(x), want + mask)
    layer.enabled = False
    same_bits(layer(x), want)


def test_arguments_reach_the_base_layer_and_capacity_its_default() -> None:
    layer = ChunkedLayer(
        lambda x, *, scale: scale * x, 12, features=12, rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(layer(jnp.ones((1, 12)), scale=3.0), 3.0)
    assert layer.bed.seeds.get_value().capacity == 8
    small = ChunkedLayer(nnx.Linear(2, 12, rngs=nnx.Rngs(0)), 3, rngs=nnx.Rngs(0))
    assert small.bed.seeds.get_value().capacity == 3


def test_what_is_set_on_a_layer_is_set_where_it_is_read() -> None:
    x, linear = jnp.ones((2, 5)), nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    layer = ChunkedLayer(linear, 3, rngs=nnx.Rngs(1))
    layer.kernel = nnx.Param(jnp.zeros((5, 6)))
    layer.bias = nnx.Param(jnp.arange(6.0))
    np.testing.assert_array_equal(layer(x), [range(6)] * 2)
    assert layer.kernel is linear.kernel
    layer.set_attributes(dtype=jnp.bfloat16)
    assert layer(x).dtype == linear.dtype == jnp.bfloat16
    assert not {"kernel", "bias", "dtype"} & set(vars(layer))
    # What is the layer's own stays its own, and so does what is new.
    outer = ChunkedLayer(layer, 2, features=6, rngs=nnx.Rngs(2))
    outer.enabled = False
    outer.note = "mine"
    assert layer.enabled
    assert layer.bed is not outer.bed
    assert outer.note == "mine"
    assert not hasattr(linear, "note")
    outer.base = linear
    assert layer.base is outer.base


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_seeds": 7}, ValueError, "num_seeds must be from 1 to .*got 7"),
        ({"num_seeds": 0}, ValueError, "num_seeds must be from 1"),
        ({"capacity": 0}, ValueError, "capacity must be an int, from 1 to num_seeds"),
        ({"capacity": 5}, ValueError, r"capacity must be .*\(4\).*got 5"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of"),
        ({"implementation": []}, ValueError, "implementation must be one of"),
        ({"implementation": 3}, ValueError, "implementation must be one of.*got 3"),
        (
            {"implementation": ["xla", "no"]},
            ValueError,
            "implementation must be one of",
        ),
        ({"blueprints": ["mlp"]}, ValueError, "unknown blueprint 'mlp'"),
        ({"strategy": 7}, ValueError, "strategy must be a Strategy, got 7"),
        ({"incubation": "none"}, ValueError, "incubation must be one of"),
        ({"base": nnx.relu}, TypeError, "features must be given"),
        ({"features": 6.0}, TypeError, "features must be an integer"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_bad_arguments_are_refused_at_construction(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    given = {"base": nnx.Linear(5, 6, rngs=nnx.Rngs(0)), "num_seeds": 4} | arguments
    with pytest.raises(error, match=match):
        ChunkedLayer(**given, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("base", "got"),
    [
        (lambda x: x[:, :3], r"\(2, 3\)"),
        (lambda x: jnp.sum(x), r"\(\)"),
        (lambda x: (x[:, :3], None), r"tuple\(\(2, 3\), NoneType\)"),
    ],
)
def test_a_base_layer_of_another_width_is_refused_by_the_call(
    base: Any, got: str
) -> None:
    layer = ChunkedLayer(base, 2, features=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"base must return .* 5 features.*{got}"):
        layer(jnp.ones((2, 5)))


def test_a_whole_life_without_a_retrace() -> None:
    model = ChunkedLayer(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(1))
    grown(model.bed, {})
    graph, seeds, rest = nnx.split(model, SeedVariable, ...)
    config = lifecycle.LifecycleConfig(min_epochs=(0,) * len(Stage))
    traces = []

    @jax.jit
    def forward(seeds: Any, rest: Any, x: Any) -> Any:
        traces.append("forward")
        m = nnx.merge(graph, seeds, rest, copy=True)
        return m(x), nnx.state(m, SeedVariable)

    @jax.jit
    def tick(seeds: SeedState, commands: Any) -> Any:
        traces.append("tick")
        signals = Signals.unmeasured(
            reconstruction_loss=0.0,
            worth=1.0,
            stability=1.0,
            mean_worth=1.0,
        )
        return lifecycle.step(seeds, commands, signals, config)

    x = jnp.ones((3, 5))
    plain = model.base(x)
    for stage in range(Stage.GERMINATED, Stage.FOSSILIZED + 1):
        commands = lifecycle.commands_for(4, {2: Stage(stage)})
        nnx.update(model, seeds)
        state, outcome = tick(model.bed.seeds.get_value(), commands)
        model.bed.seeds.set_value(state)
        seeds = nnx.state(model, SeedVariable)
        assert outcome[2] == Outcome.OK
        out, seeds = forward(seeds, rest, x)
        changed = np.any(np.asarray(out) != np.asarray(plain), axis=0)
        assert list(np.flatnonzero(changed)) == (
            [4, 5] if stage >= Stage.STABILIZATION else []
        )
    assert traces == ["tick", "forward"]


def test_a_seed_bed_stands_alone_as_the_pure_function() -> None:
    bed = SeedBed(6, 3, capacity=2, rngs=nnx.Rngs(0))
    grown(bed, {1: Stage.GRAFTING})
    y = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6)), jnp.bfloat16)
    seeds = bed.seeds.get_value()
    alpha, beta, kind = slot_coefficients(seeds)
    want, statistics, loss = blend(
        y,
        bed.bank.get_value(),
        alpha,
        beta,
        kind,
        seeds.seed_of_slot,
        layout=bed.layout,
        blueprints=bed.blueprints,
    )
    same_bits(bed(y), want)
    after = bed.seeds.get_value()
    same_bits((after.statistics, after.reconstruction), (statistics, loss))
