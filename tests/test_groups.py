"""Layers of one shape as one group: the same as each layer on its own.

The reference takes the same steps with a group for every bed. A stack of `nnx.scan` is
compared with the same layers written out.
"""

import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import QUICK, products, rows

from esper_jax import (
    ChunkedLayer,
    ControllerConfig,
    Growth,
    Stage,
    build,
)
from esper_jax.checkpoint import Checkpointer
from esper_jax.groups import Group, Groups, flat_slots, slots_of_layers
from esper_jax.growth import parts as parts_module
from esper_jax.growth.parts import values_of
from esper_jax.policy import decide, heuristic
from esper_jax.policy.interface import SAMPLED
from esper_jax.trees import is_key

WIDTH, ROWS, STEPS, TICKS = 8, 16, 3, 9
X = rows(ROWS, 4)
DATA = (X, products(X))
KINDS = ("residual_mlp", "low_rank")
POLICY = ControllerConfig(
    when="period",
    period=1,
    births=3,
    max_training=4,
    where="gradient",
    what="hybrid",
    how="conditions",
    keep_tolerance=1e6,
)


# --- Groups of plain arrays

STACKED = Groups(
    of={
        "b": Group((("b/bed", ()), ("s/bed", (2, 3))), ("b", *"stuvwx")),
        "a": Group((("a/bed", ()),), ("a",)),
        "y": Group((("y/bed", ()), ("c/bed", ())), ("y", "c")),
    },
    order=("a", "b", "c", *"stuvwx", "y"),
)
WIDTHS = {"b": 4, "a": 1, "y": 2}


def of_layers() -> dict[str, Any]:
    """Two arrays a layer, of the width of its group, no number twice."""
    names, count = STACKED.names(), iter(range(1000))

    def array(*shape: int) -> np.ndarray:
        return np.array(
            [next(count) for _ in range(np.prod(shape, dtype=int))]
        ).reshape(shape)

    return {
        n: {"x": array(WIDTHS[g]), "y": array(2, WIDTHS[g])} for n, g in names.items()
    }


def same(one: Any, other: Any) -> None:
    """Equal bit for bit, keys and their order included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)

    def equal(a: Any, b: Any) -> None:
        if is_key(a):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes(), (a, b)

    jax.tree.map(equal, one, other)


def close(one: Any, other: Any) -> None:
    """Stages, counts and keys equal bit for bit, what is measured to rounding."""
    assert jax.tree.structure(one) == jax.tree.structure(other)

    def equal(path: Any, a: Any, b: Any) -> None:
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(
                a, b, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )
        else:
            same(a, b)

    jax.tree_util.tree_map_with_path(equal, one, other)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_stack_and_split_are_inverse_and_keep_the_kind_of_array(kind: Any) -> None:
    layers = jax.tree.map(kind, of_layers())
    stacked = STACKED.stack(layers)
    assert {key: x["y"].shape for key, x in stacked.items()} == {
        "b": (7, 2, 4),
        "a": (1, 2, 1),
        "y": (2, 2, 2),
    }
    for key, group in STACKED.of.items():
        for i, name in enumerate(group.layers):
            same(stacked[key]["x"][i], layers[name]["x"])
    split = STACKED.split(stacked)
    assert tuple(split) == STACKED.order
    same(split, layers)
    expected = type(kind(0))
    assert all(isinstance(x, expected) for x in jax.tree.leaves((stacked, split)))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_join_and_part_are_inverse_and_agree_with_stack(kind: Any) -> None:
    layers = jax.tree.map(kind, of_layers())
    stack = jax.tree.map(
        lambda *x: kind(np.stack(x).reshape(2, 3, *x[0].shape)),
        *(layers[name] for name in "stuvwx"),
    )
    beds = {f"{name}/bed": layers[name] for name in "abcy"} | {"s/bed": stack}
    joined = STACKED.join(beds)
    same(joined, STACKED.stack(layers))
    parted = STACKED.part(joined)
    same(parted, beds)
    expected = type(kind(0))
    assert all(isinstance(x, expected) for x in jax.tree.leaves((joined, parted)))
    assert STACKED.names()["v"] == "b"


def test_flat_follows_the_order_of_layers_whatever_their_widths() -> None:
    layers = {name: x["x"] for name, x in of_layers().items()}
    stacked = STACKED.stack(layers)
    flat = STACKED.flat(stacked)
    want = np.concatenate([layers[name] for name in STACKED.order])
    assert np.any(want != np.concatenate([x.reshape(-1) for x in stacked.values()]))
    np.testing.assert_array_equal(flat, want)
    back = STACKED.unflat(flat, WIDTHS)
    assert list(back) == list(STACKED.of)
    jax.tree.map(np.testing.assert_array_equal, back, stacked)
    alone = Groups.alone(("n", "m"))
    two = {"n": np.arange(3)[None], "m": np.arange(4)[None]}
    np.testing.assert_array_equal(alone.flat(two), [0, 1, 2, 0, 1, 2, 3])
    same(alone.names(), {"n": "n", "m": "m"})


def test_layers_that_differ_are_taken_apart() -> None:
    assert STACKED.apart(dict.fromkeys(STACKED.order, 2)) is STACKED
    apart = STACKED.apart({name: 3 if name in "ac" else 2 for name in STACKED.order})
    assert apart.order == STACKED.order
    assert apart.of == {
        "b": STACKED.of["b"],
        "a": STACKED.of["a"],
        "y": Group((("y/bed", ()),), ("y",)),
        "c": Group((("c/bed", ()),), ("c",)),
    }
    alone = STACKED.apart({name: name == "b" for name in STACKED.order})
    assert alone.of["s"] == Group((("s/bed", (2, 3)),), tuple("stuvwx"))


def test_slots_of_layers_is_the_inverse_of_flat_slots() -> None:
    tree = {"w": np.arange(24).reshape(2, 3, 4), "s": np.arange(6).reshape(2, 3)}
    flat = flat_slots(tree)
    assert (flat["w"].shape, flat["s"].shape) == ((6, 4), (6,))
    np.testing.assert_array_equal(flat["w"][4], tree["w"][1, 1])
    same(slots_of_layers(flat, 2), tree)


# --- A whole model


def layer(inputs: int, features: int, seeds: int, rngs: nnx.Rngs) -> ChunkedLayer:
    return ChunkedLayer(
        nnx.Linear(inputs, features, rngs=rngs),
        seeds,
        capacity=2,
        blueprints=KINDS,
        rngs=rngs,
    )


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.mlp = layer(WIDTH, WIDTH, 3, rngs)

    def __call__(self, x: Any) -> Any:
        return x + nnx.tanh(self.mlp(x))


class Net(nnx.Module):
    """Two layers of one shape, one of another between them, and a stack of three.

    The stack has the shape of the two. ``written`` writes it out: the same layers with
    the same values, under names of the same order.
    """

    def __init__(self, written: bool = False) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        rngs = nnx.Rngs(0)
        self.enter = layer(4, WIDTH, 3, rngs)
        self.odd = layer(WIDTH, 7, 4, rngs)
        self.back = layer(7, WIDTH, 3, rngs)
        self.blocks = make(rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.written = written
        if written:
            graph, state = nnx.split(self.blocks)
            self.blocks = nnx.List(
                nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state), copy=True)
                for i in range(3)
            )

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block: Any, x: Any) -> Any:
            return block(x)

        x = self.back(nnx.tanh(self.odd(nnx.tanh(self.enter(x)))))
        if not self.written:
            return self.head(run(self.blocks, x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STACK = [f"blocks/mlp[{i}]" for i in range(3)]
WRITTEN = [f"blocks/{i}/mlp" for i in range(3)]


def loss_fn(model: Any, batch: Any) -> Any:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def beds_alone(groups: Groups) -> Groups:
    """The same layers with a group for each bed, which is as small as they get."""
    names = {name: path for path, _, name in _members(groups)}
    of: dict[str, Group] = {}
    for path, stack, _ in _members(groups):
        layers = tuple(n for n in names if names[n] == path)
        of[layers[0]] = Group(((path, stack),), layers)
    return Groups(of, groups.order)


def _members(groups: Groups) -> Any:
    for group in groups.of.values():
        left = list(group.layers)
        for path, stack in group.beds:
            for _ in range(int(np.prod(stack, dtype=int))):
                yield path, stack, left.pop(0)


def alone(patch: pytest.MonkeyPatch) -> None:
    """From here on, models are taken apart with each bed on its own."""
    found = parts_module.group_layers

    def group(*given: Any) -> Groups:
        return beds_alone(found(*given))

    patch.setattr(parts_module, "group_layers", group)


Run = tuple[list[Any], dict[str, Any], Any]
"""Reports, the model's values, and what growth remembers, by layer."""


def growth_run(model: Any, **options: Any) -> Run:
    options = {"controller_config": POLICY} | options
    growth = Growth(
        model,
        optax.adam(2e-2),
        lifecycle_config=QUICK,
        measure=SAMPLED,
        measure_every=2,
        **options,
    )
    optimizer, reports = nnx.Optimizer(model, optax.sgd(5e-2), wrt=nnx.Param), []

    @nnx.jit
    def train_step(model: Any, optimizer: Any, growth: Growth) -> None:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model, DATA)
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)

    evaluate = nnx.jit(lambda model: loss_fn(model, DATA))
    for _ in range(TICKS):
        for _ in range(STEPS):
            train_step(model, optimizer, growth)
        reports.append(growth.tick(model, evaluate))
    remembered, groups = growth.state.get_value(), growth.recipe.parts.groups
    moments = {
        key: slots_of_layers(of, len(groups.of[key].layers))
        for key, of in remembered.moments.items()
    }
    sums = tuple(groups.split(of) for of in remembered.sums)
    kept = remembered.growth, groups.split(moments), sums
    values, parts = values_of(model), growth.recipe.parts
    seeds = parts.take_beds(values, "seeds")  # numbers, where the model has words
    others = {name: x for name, x in values.items() if "/seeds/" not in name}
    return reports, {**others, **seeds}, kept


@functools.cache
def grouped() -> Run:
    return growth_run(Net())


def lived(reports: list[Any]) -> set[str]:
    """Layers that had a seed that counted."""
    return {
        name
        for report in reports
        for name, of in report.layers.items()
        if np.any(of.stage >= Stage.GRAFTING)
    }


def test_shapes_are_groups_and_every_kind_of_layer_grows() -> None:
    growth = Growth(Net(), optax.sgd(0.1))
    groups = growth.recipe.parts.groups
    found = sorted(sorted(group.layers) for group in groups.of.values())
    assert found == [["back", *STACK, "enter"], ["odd"]]
    assert groups.order == ("back", *STACK, "enter", "odd")
    reports, _, _ = grouped()
    assert list(reports[0].layers) == list(groups.order)
    assert {"odd", STACK[1]} < lived(reports)
    assert {"enter", "back"} & lived(reports)
    stages = [of.stage for of in reports[-1].layers.values()]
    assert Stage.FOSSILIZED in np.concatenate(stages)
    ratios = [of.signals.gradient_ratio for of in reports[-3].layers.values()]
    assert {np.any(r > 0) for r in ratios} == {True, False}  # so that layers differ


def test_growth_is_that_of_each_bed_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding, as XLA fuses other shapes differently."""
    alone(monkeypatch)
    model = Net()
    assert len(Growth(model, optax.sgd(0.1)).recipe.parts.groups.of) == 4
    close(growth_run(model), grouped())


def test_a_policy_by_layer_decides_as_the_stacked_one() -> None:
    """The heuristic as a `decide` of one's own is by layer."""
    policy = heuristic(POLICY, decide=decide)
    close(growth_run(Net(), controller_config=None, policy=policy), grouped())


def in_order(by_layer: Any) -> Any:
    """What is by layer, with those of the written stack named as those of the stack."""
    names = dict(zip(WRITTEN, STACK, strict=True))

    def rename(node: Any) -> Any:
        if isinstance(node, dict) and WRITTEN[0] in node:
            return {names.get(name, name): of for name, of in node.items()}
        return node

    return jax.tree.map(
        rename, by_layer, is_leaf=lambda x: isinstance(x, dict) and WRITTEN[0] in x
    )


def test_a_scanned_stack_is_the_same_layers_written_out() -> None:
    """To rounding: newborns, moments and the policy's memory, too."""
    reports, values, kept = growth_run(Net(written=True))
    growth, moments, sums = kept
    wanted, expected, memory = grouped()
    close(in_order(reports), wanted)
    close(in_order((moments, sums)), memory[1:])
    close(in_order(growth.memory), memory[0].memory)
    close(in_order(growth.monitor.gradients), memory[0].monitor.gradients)
    for name in (n for n in expected if n.startswith("blocks/")):
        of = [values[name.replace("blocks/", f"blocks/{i}/")] for i in range(3)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *of)
        close(stacked, jax.tree.map(np.asarray, expected[name]))


def program_of(model: Any) -> Any:
    return build(
        model,
        optax.sgd(5e-2),
        optax.adam(2e-2),
        lifecycle_config=QUICK,
        controller_config=POLICY,
        objective=loss_fn,
    )


def go_on(program: Any, state: Any, ticks: int) -> tuple[Any, list[Any]]:
    reports = []
    for _ in range(ticks):
        for _ in range(STEPS):
            state = program.step(state, DATA)
        state, report = program.tick(state, DATA)
        reports.append(report)
    return state, reports


@pytest.mark.slow
def test_build_goes_on_where_one_layer_of_a_group_has_more_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As each bed on its own does, to rounding."""
    program = program_of(Net())
    state, _ = go_on(program, program.init(jax.random.key(0)), 4)
    state = program.grow_capacity(state, dict.fromkeys(("enter", *STACK), 3))
    slots = {name: seeds.capacity for name, seeds in state.seeds.items()}
    assert slots == dict.fromkeys(("enter", *STACK), 3) | {"back": 2, "odd": 2}
    after = go_on(program, jax.tree.map(jnp.copy, state), 3)
    living = [np.sum(seeds.seed_of_slot >= 0) for seeds in after[0].seeds.values()]
    assert sum(living) > 6
    alone(monkeypatch)
    close(go_on(program_of(Net()), state, 3), after)


OLD = pathlib.Path(__file__).parent / "fixtures" / "stack_before_groups"
"""`Net` after five ticks, saved when each layer was on its own (c1a1445)."""


def test_a_stack_saved_before_there_were_groups_goes_on(tmp_path: pathlib.Path) -> None:
    run = shutil.copytree(OLD, tmp_path / "run")
    found = json.loads((run / "summary.json").read_text())
    program = program_of(Net())
    state = Checkpointer(run).restore(program.init(jax.random.key(1))).state
    stages = {name: seeds.stage.tolist() for name, seeds in state.seeds.items()}
    assert stages == found["stages"]
    loss, _ = program.evaluate(state, DATA)
    assert float(loss) == pytest.approx(found["loss"], rel=1e-5)
    state, reports = go_on(program, state, 2)
    stages = {name: seeds.stage.tolist() for name, seeds in state.seeds.items()}
    assert stages == found["later_stages"]
    losses = [float(report.loss) for report in reports]
    assert losses == pytest.approx(found["later_loss"], rel=1e-3)
