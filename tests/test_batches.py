"""Any batch, from arrays or an iterable; what trains; and the modes that are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from esper_jax.layers import ChunkedLayer
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.train import Stop, build, fit, over_mesh
from esper_jax.trees import state_hash

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype(np.float32)
Y = np.argmax(X[:, :3], 1).astype(np.int32)
MASK = (RNG.uniform(size=20) < 0.7).astype(np.float32)
MASK[18:] = 0  # one of the ragged batches counts nothing
SGD = optax.sgd(0.1)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = ChunkedLayer(nnx.Linear(4, 8, rngs=rngs), num_seeds=2, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def cross_entropy(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y)


def masked(model, batch):
    """A dict with a mask: the mean over the rows that count, which weighs the batch."""
    losses = cross_entropy(model, batch["x"], batch["y"])
    weight = batch["mask"].sum()
    score = (model(batch["x"]).argmax(-1) == batch["y"]) * batch["mask"]
    loss = (losses * batch["mask"]).sum() / weight
    return loss, {"weight": weight, "score": score.sum() / weight}


def batches_of(size, **arrays):
    return [
        {name: a[i : i + size] for name, a in arrays.items()}
        for i in range(0, 20, size)
    ]


def start(program):
    return program.init(jax.random.key(0))


@pytest.fixture(scope="module")
def plain():
    """A program of the plain model, for all that do not change it."""
    return build(Net(), SGD, SGD, eval_batch=8)


def test_a_masked_dict_is_evaluated_with_its_own_weights():
    program = build(Net(), SGD, SGD, objective=masked, eval_batch=8)
    arrays = {"x": X, "y": Y, "mask": MASK}
    losses = np.asarray(cross_entropy(Net(), X, Y))
    right = np.asarray(Net()(X)).argmax(-1) == Y
    want = np.average(losses, weights=MASK), np.average(right, weights=MASK)
    ragged = batches_of(6, **arrays)  # 6, 6, 6, 2
    for data in (arrays, ragged, iter(ragged), lambda: iter(ragged)):
        got = program.evaluate(start(program), data)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("scalar", [True, False])
def test_batches_count_by_their_rows(scalar):
    def objective(model, batch):
        losses = cross_entropy(model, *batch)
        return losses.mean() if scalar else losses

    program = build(Net(), SGD, SGD, objective=objective, eval_batch=8)
    want = np.asarray(cross_entropy(Net(), X, Y)).mean()
    cuts = [(X[:11], Y[:11]), (X[11:18], Y[11:18]), (X[18:], Y[18:])]
    for data in ((X, Y), cuts):
        loss, score = program.evaluate(start(program), data)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        assert np.isnan(score)


def test_graphs_of_several_sizes_train_and_count_by_their_nodes():
    class Graph(Net):
        def __call__(self, nodes, edges):
            sums = jnp.zeros_like(nodes).at[edges[1]].add(nodes[edges[0]])
            return self.b(nnx.relu(self.a(nodes + sums)))

    def objective(model, g):
        logits = model(g["nodes"], g["edges"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, g["y"])

    def graph(rows, edges):
        pairs = RNG.integers(0, len(X[rows]), size=(2, edges))
        return {"nodes": X[rows], "edges": pairs, "y": Y[rows]}

    graphs = [graph(slice(0, 12), 30), graph(slice(12, 20), 9)]
    program = build(Graph(), SGD, SGD, objective=objective)
    losses = np.concatenate([objective(Graph(), g) for g in graphs])
    got, _ = program.evaluate(start(program), graphs)
    np.testing.assert_allclose(got, losses.mean(), rtol=1e-6)
    one, _ = program.evaluate(start(program), graphs[0])
    np.testing.assert_allclose(one, losses[:12].mean(), rtol=1e-6)
    state = fit(program, start(program), graphs, graphs, ticks=2)
    assert int(state.step) == 4
    with pytest.raises(ValueError, match=r"such as graphs, give a list"):
        fit(program, start(program), graphs[0], graphs, ticks=1, batch_size=2)


class Loader:
    """As torch's: lists of two arrays, anew in each pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([[X[i : i + 8], Y[i : i + 8]] for i in (0, 8, 16)])


def test_every_kind_of_iterable_gives_the_same_run(plain):
    program = plain
    loader = Loader()
    pairs = [tuple(batch) for batch in Loader()]
    endless = (pairs[i % 3] for i in range(1000))
    state = start(program)
    for batch in pairs * 4:
        state = program.step(state, batch)
    want = state.params
    hashes = set()
    for data, steps in (
        (pairs, None),
        (loader, None),
        (lambda: (pair for pair in pairs), None),
        (endless, 3),
        (pairs, 3),
    ):
        seen = []
        state = fit(
            program,
            start(program),
            data,
            (X, Y),
            ticks=4,
            steps_per_tick=steps,
            on_tick=lambda state, report, seen=seen: seen.append(int(report.step)),
        )
        assert seen == [3, 6, 9, 12]
        hashes.add(state_hash(state))
        for name, value in state.params.items():
            np.testing.assert_array_equal(value, want[name])
    assert len(hashes) == 1
    assert loader.passes == 4
    # Ticks need not follow the passes.
    state = fit(program, start(program), pairs, (X, Y), ticks=2, steps_per_tick=5)
    assert int(state.step) == 10


def test_a_batch_is_looked_at_once_and_no_step_waits_for_the_device(plain, monkeypatch):
    program = plain
    looks, signals = [], []
    monkeypatch.setattr(
        program.check, "_check_labels", lambda name, *_: looks.append(name) or True
    )
    batches = [(X[i : i + 5], Y[i : i + 5]) for i in range(0, 20, 5)]
    common = {"ticks": 1, "steps_per_tick": 3}
    fit(program, start(program), batches, (X, Y), **common)
    assert looks.count("a batch of data") == 3
    assert "batch" not in looks
    # A step that does not count would be waited for in vain.
    still = program._replace(step=lambda state, batch: state)
    with Stop() as stop:
        monkeypatch.setattr(stop, "check_step", signals.append)
        fit(still, start(program), batches, (X, Y), **common, stop=stop)
    assert len(signals) == 2  # and not after the last, which its tick follows


def test_iterables_that_do_not_fit_are_refused_by_name(plain):
    program = plain
    pair = (X, Y)
    with pytest.raises(ValueError, match=r"data must hold batches.*ended after 1"):
        fit(program, start(program), iter([pair]), pair, ticks=2)
    with pytest.raises(ValueError, match="ended after 0"):
        fit(program, start(program), [], pair, ticks=1)
    with pytest.raises(ValueError, match="held_out must hold at least one batch"):
        fit(program, start(program), pair, iter([]), ticks=1, batch_size=4)
    with pytest.raises(ValueError, match="steps_per_tick must be at least 1, got 0"):
        fit(program, start(program), [pair], pair, ticks=1, steps_per_tick=0)
    with pytest.raises(ValueError, match="steps_per_tick is for an iterable"):
        fit(program, start(program), pair, pair, ticks=1, steps_per_tick=2)
    with pytest.raises(ValueError, match="batch_size must be at least the 20 rows"):
        fit(program, start(program), [pair], pair, ticks=1, batch_size=4)
    with pytest.raises(ValueError, match=r"batch_size must be from 1 to.*got None"):
        fit(program, start(program), pair, pair, ticks=1)
    for batch in ({"x": X, "y": Y}, (X, Y, MASK)):
        with pytest.raises(ValueError, match=r"batch must be \(x, y\).*objective=f"):
            program.step(start(program), batch)
    with pytest.raises(ValueError, match="loss and objective must not both"):
        build(Net(), SGD, SGD, loss=lambda o, y: o, objective=masked)


def test_an_objective_with_noise_grows_a_whole_life():
    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.noise = nnx.Rngs(7)

        def __call__(self, x, *, key):
            return super().__call__(x + 0.01 * jax.random.normal(key, x.shape))

    def objective(model, batch):
        logits = model(batch["x"], key=model.noise())
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return loss, {"score": logits.argmax(-1) == batch["y"], "logits": logits}

    life = LifecycleConfig(
        min_epochs=(0, 0, 2, 2, 1, 1, 1, 0, 1, 0, 1),
        reconstruction_threshold=1e9,
        min_stability=-1e9,
        min_improvement=-1e9,
        min_final_stability=-1e9,
        grafting=GraftConfig(ramp_duration=2),
    )
    program = build(
        Noisy(),
        optax.adam(1e-2),
        optax.adam(1e-3),
        objective=objective,
        lifecycle_config=life,
        controller_config=ControllerConfig(patience=1, threshold=0.9),
    )
    state, seen, data = start(program), set(), batches_of(10, x=X, y=Y)

    def watch(state, report):
        seen.update(report.layers["a"].stage.tolist())

    state = fit(program, state, data, data, ticks=40, on_tick=watch)
    assert Stage.FOSSILIZED in seen
    assert program.recompiles() == 0
    counts = [v for n, v in state.rest.items() if n.endswith("count")]
    assert 80 in [int(count) for count in counts]  # a key in each step


class Weight(nnx.Variable):
    pass


class Own(nnx.Module):
    """Weights of another type, and a bare array."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.w = Weight(jax.random.normal(rngs(), (4, 8)))
        self.grown = SeedBed(8, 2, rngs=rngs)
        self.b = jax.random.normal(rngs(), (8, 3))

    def __call__(self, x):
        return self.grown(x @ self.w[...]) @ self.b


@pytest.mark.parametrize(
    ("wrt", "moved"),
    [
        pytest.param(Weight, {"w"}, marks=pytest.mark.slow),
        pytest.param(lambda path, x: path[-1] == "b", {"b"}, marks=pytest.mark.slow),
        (nnx.Any(Weight, nnx.PathContains("b")), {"w", "b"}),
        (None, set()),
    ],
)
def test_what_the_filter_matches_trains_and_nothing_else(wrt, moved):
    program = build(Own(), SGD, SGD, wrt=wrt)
    state = start(program)
    assert set(state.params) == moved
    before = jax.device_get({**state.params, **state.rest})
    grads = jax.grad(
        lambda w, b: optax.softmax_cross_entropy_with_integer_labels(
            X @ w @ b, Y
        ).mean(),
        (0, 1),
    )(before["w"], before["b"])
    state = program.step(state, (X, Y))
    after = {**state.params, **state.rest}
    for name, grad in zip("wb", grads, strict=True):
        want = before[name] - 0.1 * grad * (name in moved)
        np.testing.assert_allclose(after[name], want, rtol=1e-5, atol=1e-7)
    state, report = program.tick(state, (X, Y))
    assert np.isfinite(report.layers["grown"].signals.drift).all() or moved
    assert np.isfinite(report.train_loss)


def test_a_filter_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"wrt=Param must match.*holds.*Weight"):
        build(Own(), SGD, SGD)
    net = Net()
    net.count = nnx.Variable(jnp.zeros((), jnp.int32))
    with pytest.raises(ValueError, match=r"wrt must match variables.*count"):
        build(net, SGD, SGD, wrt=...)


class Frozen(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.frozen = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.frozen.eval()
        self.off = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.a = ChunkedLayer(nnx.Linear(4, 8, rngs=rngs), num_seeds=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        h = self.norm(self.a(self.off(self.frozen(x))))
        self.sow(nnx.Intermediate, "h", h)
        return self.b(h)


sows = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


@sows
def test_frozen_modules_stay_frozen_and_sown_values_stay_out():
    model = Frozen()
    model(X)  # sows
    model.frozen.mean[...] += 0.5
    program = build(model, SGD, SGD)
    state = start(program)
    assert not any(name.startswith("h") for name in state.rest)
    for _ in range(3):
        state = program.step(state, (X, Y))
    assert program.recompiles() == 0
    np.testing.assert_array_equal(state.rest["frozen/mean"], model.frozen.mean[...])
    assert np.any(state.rest["norm/mean"] != model.norm.mean[...])
    assert int(state.rest["off/rngs/count"]) == int(model.off.rngs.count[...])
    out = program.model(state)
    assert out.frozen.use_running_average
    assert out.off.deterministic
    assert not out.norm.use_running_average
    assert not out.a.bed.deterministic
    assert state.seeds["a"].history is not None


@sows
def test_a_model_left_in_evaluation_mode_is_told_of():
    model = Frozen()
    model.eval()
    with pytest.warns(UserWarning, match=r"Call model.train\(\) before build"):
        program = build(model, SGD, SGD)
    state = program.step(start(program), (X, Y))
    np.testing.assert_array_equal(state.rest["norm/mean"], model.norm.mean[...])


@sows
def test_a_variable_that_grows_in_each_call_is_refused():
    class Sown(nnx.Variable):
        pass

    class Model(Net):
        def __call__(self, x):
            self.sow(Sown, "h", x)
            return super().__call__(x)

    model = Model()
    model(X)
    program = build(model, SGD, SGD)
    with pytest.raises(ValueError, match=r"'h' must keep its shape.*nnx.pop"):
        program.step(start(program), (X, Y))


@pytest.mark.slow
def test_batches_over_a_mesh_are_those_of_one_device():
    devices = len(jax.devices())
    program = build(Net(), SGD, SGD, axis_name="data", eval_batch=8)
    spread = over_mesh(program, jax.make_mesh((devices,), ("data",), (AxisType.Auto,)))
    alone = build(Net(), SGD, SGD, eval_batch=8)
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]
    states, losses = [], []
    for one in (alone, spread):
        state = fit(one, start(one), batches, batches, ticks=2)
        losses.append(one.evaluate(state, batches))
        states.append(state)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name, value in states[0].params.items():
        np.testing.assert_allclose(states[1].params[name], value, atol=1e-6)
    if devices > 1:
        odd = [(X[: devices + 1], Y[: devices + 1])]
        with pytest.raises(ValueError, match="number of rows that the"):
            fit(spread, start(spread), odd, batches, ticks=1)
        with pytest.raises(ValueError, match="number of rows that the"):
            spread.evaluate(states[1], odd)
