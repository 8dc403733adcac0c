"""Several devices come to the same numbers, decisions and seeds as one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from esper_jax.growth.parts import values_of
from esper_jax.hosts import MLP
from esper_jax.kernels.blend import blend
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.lifecycle import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.parallel import collectives
from esper_jax.parallel.replicas import check_replicas, split_rows
from esper_jax.policy.config import ControllerConfig
from esper_jax.train.faults import GovernorConfig
from esper_jax.train.governor import Governor
from esper_jax.train.loop import fit
from esper_jax.train.mesh import over_mesh
from esper_jax.train.program import build
from esper_jax.train.retreat import retreat
from esper_jax.trees import state_hash

P = PartitionSpec
DEVICES = 4
GATES = LifecycleConfig(
    min_epochs=(0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    cull_delta=-1e9,
    # Never reached: what gets as far as FINE_TUNING is culled there.
    min_improvement=1e9,
    grafting=GraftConfig(ramp_duration=2),
)
# A plateau in every tick, so that no decision hangs on the last bit of a loss.
POLICY = ControllerConfig(patience=1, threshold=0.9, tuning_limit=2)
BATCH, TICKS = 32, 16


def rows(count, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return x, np.argmax(x[:, :3] * x[:, 3:], axis=1).astype(np.int32)


TRAIN, HELD_OUT = rows(64, 1), rows(40, 2)


def host(**options):
    return MLP(6, (12,), 3, num_seeds=4, capacity=2, rngs=nnx.Rngs(0), **options)


def make(axis_name=None, debug=False, **options):
    return build(
        host(**options),
        optax.adam(1e-2),
        optax.adam(1e-2),
        lifecycle_config=GATES,
        controller_config=POLICY,
        axis_name=axis_name,
        debug=debug,
    )


def mesh_of(*sizes, names=("data",)):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def run(step, tick, state, wrap, ticks=TICKS):
    """Reports and states of some ticks of two steps each."""
    reports = []
    for _ in range(ticks):
        for i in range(2):
            part = slice(i * BATCH, (i + 1) * BATCH)
            state = step(state, wrap((TRAIN[0][part], TRAIN[1][part])))
            jax.block_until_ready(state)
        state, report = tick(state, wrap(HELD_OUT))
        reports.append(jax.device_get(report))
    return reports, state


@pytest.fixture(scope="module")
def alone():
    program = make()
    state = program.init(jax.random.key(0))
    reports, state = run(program.step, program.tick, state, lambda x: x)
    stages = np.concatenate([r.layers["layers/0"].stage for r in reports])
    # Growth and culling did happen.
    assert {Stage.FINE_TUNING, Stage.CULLED, Stage.GRAFTING} <= set(stages.tolist())
    return reports, state


def without_keys(state):
    memory = dataclasses.replace(state.memory, key=0)
    return dataclasses.replace(state, rng=0, memory=memory)


def assert_same(reports, state, expected, first=lambda x: x):
    for got, want in zip(reports, expected[0], strict=True):
        got = jax.tree.map(first, got)
        for name in (
            "outcome",
            "source",
            "target",
            "slot",
            "stage",
            "epochs",
            "errors",
        ):
            for layer, report in want.layers.items():
                np.testing.assert_array_equal(
                    getattr(got.layers[layer], name), getattr(report, name), name
                )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5),
            (got.loss, got.train_loss, got.layers),
            (want.loss, want.train_loss, want.layers),
        )
    got = jax.tree.map(first, jax.device_get(without_keys(state)))
    want = jax.device_get(without_keys(expected[1]))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=5e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path)
        )


@pytest.fixture(scope="module")
def under_pmap():
    """A program, a state on all devices, to be copied, and its mapped step and tick."""
    program = make("data", debug=True)
    state = jax.tree.map(
        lambda x: jnp.stack([x] * DEVICES), program.init(jax.random.key(0))
    )
    step = jax.pmap(program.step, axis_name="data")
    return program, state, step, jax.pmap(program.tick, axis_name="data")


@pytest.fixture(scope="module")
def meshed():
    """A program over a mesh, by `jax.shard_map(check_vma=True)`."""
    return over_mesh(make("data", debug=True), mesh_of(DEVICES))


def test_pmap_equals_one_device(alone, under_pmap):
    _, state, step, tick = under_pmap
    wrap = functools.partial(split_rows, "batch", devices=DEVICES)
    reports, state = run(step, tick, state, wrap)
    assert np.all([r.replicas_agree for r in reports])
    check_replicas(state, stacked=True)
    assert_same(reports, state, alone, first=lambda x: x[0] if np.ndim(x) else x)


def test_a_mesh_equals_one_device(alone, meshed):
    reports, state = run(
        meshed.step,
        meshed.tick,
        meshed.init(jax.random.key(0)),
        lambda x: meshed.place("batch", x, True),
    )
    check_replicas(state)
    assert_same(reports, state, alone)


# With the check it is what `over_mesh` does.
@pytest.mark.parametrize(
    "check_vma", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_shard_map_equals_one_device(alone, check_vma):
    program, mesh = make("data", debug=True), mesh_of(DEVICES)

    def mapped(function):
        return jax.jit(
            jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P(),
                check_vma=check_vma,
            )
        )

    state = jax.device_put(program.init(jax.random.key(0)), NamedSharding(mesh, P()))
    reports, state = run(mapped(program.step), mapped(program.tick), state, lambda x: x)
    check_replicas(state)
    assert_same(reports, state, alone)


def test_plain_jit_on_sharded_rows_equals_one_device(alone):
    program, mesh = make(), mesh_of(DEVICES)
    state = jax.device_put(program.init(jax.random.key(0)), NamedSharding(mesh, P()))
    reports, state = run(
        program.step,
        program.tick,
        state,
        lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    check_replicas(state)
    assert program.recompiles() == 0
    assert_same(reports, state, alone)


def test_replicas_never_drift_apart_over_a_mesh(meshed):
    """50 ticks of `fit` with growth, culling and a rollback in between."""
    program, compiled = meshed, meshed.recompiles()
    rollbacks, stages, poisoned = [], set(), []

    def on_tick(state, report):
        stages.update(np.asarray(report.layers["layers/0"].stage).tolist())

    governor = Governor(
        program, GovernorConfig(deviations=1e6), on_rollback=rollbacks.append
    )
    tick = program.tick

    def faulty(state, held_out):
        if int(state.ticks) == 20 and not poisoned:
            poisoned.append(True)
            state = dataclasses.replace(
                state, params={n: p * jnp.nan for n, p in state.params.items()}
            )
        return tick(state, held_out)

    state = fit(
        program._replace(tick=faulty),
        program.init(jax.random.key(0)),
        TRAIN,
        HELD_OUT,
        ticks=50,
        batch_size=BATCH,
        governor=governor,
        on_tick=on_tick,
    )
    assert [r.failed_tick for r in rollbacks] == [21]
    assert {Stage.CULLED, Stage.FINE_TUNING} <= stages
    assert Stage.ROLLED_BACK in rollbacks[0].layers["layers/0"].target
    check_replicas(state)
    copies = [jax.tree.map(lambda x, i=i: _shard(x, i), state) for i in range(DEVICES)]
    assert len({state_hash(copy) for copy in copies}) == 1
    assert program.recompiles() == compiled


def _shard(x, i):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return x.addressable_shards[i].data


def test_replicas_under_pmap_never_drift_apart(under_pmap):
    _, state, step, tick = under_pmap
    back = jax.pmap(lambda state: retreat(state, jnp.int32(1), jnp.int32(1), GATES)[0])
    wrap = functools.partial(split_rows, "batch", devices=DEVICES)
    _, state = run(step, tick, state, wrap, ticks=25)
    good = jax.tree.map(jnp.copy, state)
    _, state = run(step, tick, state, wrap, ticks=2)
    _, state = run(step, tick, back(good), wrap, ticks=25)
    assert np.all(np.asarray(state.ticks) == 50)
    check_replicas(state, stacked=True)
    copies = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(DEVICES)]
    assert len({state_hash(copy) for copy in copies}) == 1


def mapped_over(how, function, mesh):
    """``function(params, x)`` on parameters that are the same on all devices."""
    if how == "pmap":
        inner = jax.pmap(function, axis_name="data", in_axes=(None, 0))
        return lambda params, x: jax.tree.map(
            lambda a: a[0], inner(params, x.reshape(DEVICES, -1, *x.shape[1:]))
        )
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=how == "checked",
        )
    )


@pytest.mark.parametrize("how", ["pmap", "checked", "unchecked"])
def test_mean_of_gradients_of_varying_parameters_is_right_everywhere(how):
    def local(params, x):
        own = collectives.varying(params, "data")
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p)))(own)
        return collectives.mean(grads, "data")

    rng = np.random.default_rng(0)
    p, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 3), (16, 6)))
    expected = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p)))(p)
    got = mapped_over(how, local, mesh_of(DEVICES))(p, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_without_it_shard_map_sums_what_pmap_does_not():
    """The trap that `varying` is there for; if this fails, JAX has changed."""

    def local(params, x):
        return jax.lax.pmean(jax.grad(lambda p: jnp.mean(x @ p))(params), "data")

    p, x = jnp.ones((6, 3)), jnp.ones((16, 6))
    mesh = mesh_of(DEVICES)
    right = mapped_over("pmap", local, mesh)(p, x)
    wrong = mapped_over("checked", local, mesh)(p, x)
    np.testing.assert_allclose(wrong, DEVICES * right)


def bed_arguments(bed, living):
    """Arguments of `blend` with ``living`` seeds, in slots out of order."""
    rng = np.random.default_rng(3)
    bank = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        bed.bank.get_value(),
    )
    k = bed.seeds.get_value().capacity
    seed_of_slot = np.full(k, -1, np.int32)
    seed_of_slot[: len(living)] = living
    alpha = np.where(seed_of_slot >= 0, np.linspace(0.0, 1.0, k), 0.7)
    beta = np.where(seed_of_slot >= 0, np.linspace(1.0, 0.0, k), 0.7)
    return (
        bank,
        jnp.asarray(alpha, jnp.float32),
        jnp.asarray(beta, jnp.float32),
        jnp.zeros(k, jnp.int32),
        jnp.asarray(seed_of_slot),
    )


@functools.partial(jax.jit, static_argnames=("layout", "kinds", "rows", "sharding"))
def loss_and_gradients(y, target, arguments, layout, kinds, rows=None, sharding=None):
    def loss(y, bank, alpha):
        out, statistics, reconstruction = blend(
            y,
            bank,
            alpha,
            *arguments[2:],
            layout=layout,
            blueprints=kinds,
            statistics_rows=rows,
            sharding=sharding,
        )
        return jnp.mean((out - target) ** 2), (out, statistics, reconstruction)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(y, *arguments[:2])


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, ("data", "model"))])
def test_blend_shard_by_shard_equals_blend_of_the_whole(spec, rows):
    bed = SeedBed(32, 8, capacity=6, rngs=nnx.Rngs(1))
    arguments = bed_arguments(bed, [5, 0, 7, 2])
    rng = np.random.default_rng(4)
    y, target = (jnp.asarray(rng.normal(size=(12, 32)), jnp.float32) for _ in "ab")
    static = {"layout": bed.layout, "kinds": bed.blueprints, "rows": rows}
    whole = loss_and_gradients(y, target, arguments, **static)
    sharding = NamedSharding(mesh_of(2, 2, names=("data", "model")), spec)
    parts = loss_and_gradients(
        *jax.device_put((y, target), sharding), arguments, **static, sharding=sharding
    )
    assert parts[0][1][0].sharding.is_equivalent_to(sharding, 2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        parts,
        whole,
    )


@pytest.mark.parametrize(
    ("features", "num_seeds", "sizes"),
    [(24, 3, "8 features do not fit into shards of 12"), (30, 8, "4 .* of 15")],
)
def test_a_chunk_on_two_devices_is_refused_with_both_sizes(features, num_seeds, sizes):
    mesh = mesh_of(2, 2, names=("data", "model"))
    layer = ChunkedLayer(
        nnx.Linear(4, features, rngs=nnx.Rngs(0)),
        num_seeds,
        sharding=NamedSharding(mesh, P("data", "model")),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match=sizes):
        layer(jnp.ones((8, 4)))


def test_a_sharding_that_does_not_fit_is_refused():
    mesh = mesh_of(2, 2, names=("data", "model"))
    with pytest.raises(TypeError, match=r"sharding must be a .*NamedSharding"):
        SeedBed(8, 2, sharding=P("data"), rngs=nnx.Rngs(0))
    bed = SeedBed(8, 2, sharding=NamedSharding(mesh, P("data", None)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="7 rows cannot be cut into 2 equal shards"):
        bed(jnp.ones((7, 8)))
    with pytest.raises(ValueError, match="at most 1 entries"):
        bed(jnp.ones(8))


def test_tensor_parallel_training_equals_one_device(alone):
    """Kernels, activations and chunks sharded over two devices, rows over two."""
    mesh = mesh_of(2, 2, names=("data", "model"))
    program = make(sharding=NamedSharding(mesh, P("data", "model")))
    specs = {
        "layers/0/base/linear/kernel": P(None, "model"),
        "layers/0/base/linear/bias": P("model"),
        "readout/kernel": P("model", None),
    }

    def place(path, leaf):
        name = next((n for n in specs if n in jax.tree_util.keystr(path)), None)
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(name, P())))

    state = jax.tree_util.tree_map_with_path(place, program.init(jax.random.key(0)))
    reports, state = run(
        program.step,
        program.tick,
        state,
        lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    assert_same(reports, state, alone)


def test_rows_that_the_devices_do_not_divide_are_refused(meshed):
    program = meshed
    state = program.init(jax.random.key(0))
    odd = (TRAIN[0][:30], TRAIN[1][:30])
    with pytest.raises(ValueError, match=r"batch must .* 4 devices divide; got 30"):
        program.step(state, odd)
    with pytest.raises(ValueError, match=r"held_out must have .* got 30"):
        program.tick(state, odd)
    with pytest.raises(ValueError, match=r"batch must have .* got 30"):
        split_rows("batch", odd, DEVICES)
    with pytest.raises(ValueError, match="multiple of the 4 devices, got 30"):
        fit(program, state, TRAIN, HELD_OUT, ticks=1, batch_size=30)


def test_an_axis_that_does_not_exist_is_named():
    program = make("rows")
    state = program.init(jax.random.key(0))
    with pytest.raises(ValueError, match="axis_name 'rows' is not an axis"):
        program.step(state, TRAIN)
    with pytest.raises(ValueError, match="axis_name 'rows' is not an axis"):
        program.tick(state, HELD_OUT)
    with pytest.raises(ValueError, match=r"mesh must have one axis, .*\('rows'\)"):
        over_mesh(program, mesh_of(DEVICES))


def test_replicas_that_were_given_different_seeds_are_found(under_pmap, meshed):
    program, _, _, tick = under_pmap
    same = program.init(jax.random.key(0))
    seeds = same.seeds["layers/0"]
    grown = dataclasses.replace(
        seeds,
        stage=seeds.stage.at[0].set(Stage.EVALUATING),
        slot_of_seed=seeds.slot_of_seed.at[0].set(0),
        seed_of_slot=seeds.seed_of_slot.at[0].set(0),
    )
    # One device would evaluate without that seed, and the others would not.
    other = dataclasses.replace(same, seeds={"layers/0": grown})
    states = [same, same, same, other]
    state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    with pytest.raises(ValueError, match=r"seeds.*replica 3 differs"):
        check_replicas(state, stacked=True)
    wrap = functools.partial(split_rows, "held_out", devices=DEVICES)
    _, report = tick(state, wrap(HELD_OUT))
    assert not np.any(report.replicas_agree)

    mesh = mesh_of(DEVICES)
    leaves = [jax.tree.leaves(s) for s in states]
    apart = [
        jax.make_array_from_single_device_arrays(
            same[0].shape,
            NamedSharding(mesh, P()),
            [jax.device_put(x, d) for x, d in zip(same, mesh.devices, strict=True)],
        )
        for same in zip(*leaves, strict=True)
    ]
    state = jax.tree.unflatten(jax.tree.structure(states[0]), apart)
    with pytest.raises(ValueError, match=r"state.* must be the same on all devices"):
        fit(meshed, state, TRAIN, HELD_OUT, ticks=1, batch_size=BATCH)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint16, bool, np.float64])
def test_a_fingerprint_changes_with_any_bit(dtype):
    rng = np.random.default_rng(5)
    tree = {"a": (rng.integers(0, 2, (5, 3))).astype(dtype), "b": np.zeros(4, dtype)}
    expected = collectives.fingerprint(jax.tree.map(jnp.asarray, tree))
    for name, leaf in tree.items():
        for i in range(leaf.size):
            flipped = {k: v.copy() for k, v in tree.items()}
            flipped[name].flat[i] = 1 - flipped[name].flat[i]
            got = collectives.fingerprint(jax.tree.map(jnp.asarray, flipped))
            assert got != expected


class Noisy(nnx.Module):
    """What a model may hold besides parameters."""

    def __init__(self, count):
        rngs = nnx.Rngs(0, dropout=1)
        linear = nnx.Linear(6, 12, rngs=rngs)
        self.layer = ChunkedLayer(linear, 4, capacity=2, rngs=rngs)
        self.norm = nnx.BatchNorm(12, axis_name="data", rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(12, 3, rngs=rngs)
        self.mask = nnx.Variable(jnp.zeros((4, 12)))
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))
        self.count = count

    def __call__(self, x):
        y = self.norm(self.layer(x))
        kept = self.dropout(jnp.ones((4, 12)))
        self.mask[...] = kept / 2 if y.shape[0] == 4 else self.mask[...]
        if self.count:
            self.seen[...] += jnp.sum(x > 0)
        return self.out(y)


@pytest.mark.parametrize("count", [False, True])
def test_other_variables_of_a_model_stay_shared(count):
    program = build(
        Noisy(count), optax.sgd(0.1), optax.sgd(0.1), axis_name="data", debug=True
    )
    mesh = mesh_of(DEVICES)
    # `BatchNorm` of the first values needs the axis as well.
    spread = over_mesh(program, mesh)
    state = spread.init(jax.random.key(0))
    before = jax.device_get(state.rest)
    batch = (TRAIN[0][:16], TRAIN[1][:16])
    if count:
        with pytest.raises(ValueError, match=r"variable 'seen/?.*' \(int32\) must"):
            spread.step(state, batch)
        return
    state = spread.step(state, batch)
    check_replicas(state)
    # Each device drew a mask of its own: their mean has values between 0 and 1.
    assert len(np.unique(np.asarray(state.rest["mask"]))) > 2
    # Normalized with the rows of all devices.
    y = TRAIN[0][:16] @ np.asarray(before_kernel(program))
    np.testing.assert_allclose(
        state.rest["norm/mean"], 0.01 * y.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    assert set(before) == set(state.rest)


def before_kernel(program):
    return program.init(jax.random.key(0)).params["layer/base/kernel"]


def test_a_model_is_left_as_it_was():
    model = MLP(6, (12,), 3, num_seeds=4, rngs=nnx.Rngs(0))
    program = build(model, optax.sgd(0.1), optax.sgd(0.1), axis_name="data")
    model(TRAIN[0])  # in training mode, with no axis
    program.model(program.init(jax.random.key(0)))(TRAIN[0])
    with pytest.raises(ValueError, match="axes of the mesh must be Auto"):
        over_mesh(program, jax.make_mesh((4,), ("data",), (AxisType.Explicit,)))


def test_a_program_over_a_mesh_starts_from_other_values_as_any_does():
    program, mesh = make("data"), mesh_of(DEVICES)
    other = {name: x + 1 for name, x in values_of(host()).items() if "bed" not in name}
    values = values_of(host()) | other
    key = jax.random.key(3)
    state = over_mesh(program, mesh).init(key, values)
    assert state_hash(state) == state_hash(program.init(key, values))
    assert state_hash(state) != state_hash(program.init(key))
    check_replicas(state)
    assert state.step.sharding == NamedSharding(mesh, P())


def test_debug_compares_devices_along_an_axis_or_says_that_it_cannot():
    with pytest.raises(ValueError, match=r"debug .* axis_name must be given.*got None"):
        make(debug=True)


@pytest.mark.parametrize("variable", [nnx.Variable, nnx.RngKey])
def test_a_key_without_a_type_is_refused_where_each_device_draws_its_own(variable):
    def held(value):
        model = host()
        model.noise = variable(value, tag="noise")
        model.count = nnx.RngCount(jnp.zeros(2, jnp.uint32), tag="noise")
        return model

    legacy = jax.random.PRNGKey(0)
    message = r"'noise' must hold a typed random key.*uint32\[2\].*wrap_key_data"
    with pytest.raises(ValueError, match=message):
        build(held(legacy), optax.sgd(0.1), optax.sgd(0.1), axis_name="data")
    build(held(legacy), optax.sgd(0.1), optax.sgd(0.1))
    typed = held(jax.random.wrap_key_data(legacy))
    build(typed, optax.sgd(0.1), optax.sgd(0.1), axis_name="data")
