"""What blueprints that write a whole layer add to it, by implementation.

`blend.py --adapters` prints it. A layer is a dense base in bfloat16 with slots of one
adapter, forward and backward: gradients of kernel, bias, input and adapters. As in a
model, its input and its cotangent are the results of other work.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blend_calls import SETS, Run
from blend_errors import error_against, wide
from blend_times import added_time, in_one_call
from flax import nnx

from esper_jax import ChunkedLayer
from esper_jax.blueprints import Adapter, group, lora, neurons
from esper_jax.kernels.blend.registry import backends
from esper_jax.layers.variables import BlueprintParam, GraftProbe
from esper_jax.lifecycle.stages import Stage

SLOTS, CHUNK = 8, 64
LIVING = (0, 1, SLOTS)
_LEARNED = (nnx.Param, BlueprintParam, GraftProbe)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer and its batch."""

    rows: int
    inputs: int
    features: int

    def __str__(self) -> str:
        return f"{self.inputs} to {self.features}"


SHAPES = (Shape(16384, 3072, 768), Shape(16384, 768, 3072))
SMOKE = (Shape(24, 16, 512),)


def kinds() -> list[Adapter]:
    """What grows: about as many parameters of each."""
    return [group(hidden=8), neurons(hidden=8), lora(rank=4)]


def implementations() -> list[str]:
    """Those that run here, plain JAX first."""
    here = jax.default_backend()
    ways = reversed(backends().items())
    return [n for n, b in ways if b.platforms is None or here in b.platforms]


def base_layer(shape: Shape) -> nnx.Linear:
    """The layer alone."""
    return nnx.Linear(
        shape.inputs, shape.features, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )


def grown_layer(shape: Shape, kind: Adapter, way: str, living: int) -> ChunkedLayer:
    """The layer with slots of an adapter, of which some live, with random weights."""
    layer = ChunkedLayer(
        base_layer(shape),
        shape.features // CHUNK,
        capacity=SLOTS,
        blueprints=[kind],
        implementation=way,
        rngs=nnx.Rngs(1),
    )
    seeds, index = layer.bed.seeds.get_value(), jnp.arange(living)
    layer.bed.seeds.set_value(
        dataclasses.replace(
            seeds,
            stage=seeds.stage.at[:living].set(Stage.FINE_TUNING),
            slot_of_seed=seeds.slot_of_seed.at[:living].set(index),
            seed_of_slot=seeds.seed_of_slot.at[:living].set(index),
        )
    )
    rng = np.random.default_rng(0)
    layer.bed.bank.set_value(
        jax.tree.map(
            lambda a: jnp.asarray(0.05 * rng.normal(size=a.shape), a.dtype),
            layer.bed.bank.get_value(),
        )
    )
    return layer


def there_and_back(layer: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """``f(state, x, g)``: output and gradients; and the state."""
    graph, state = nnx.split(layer)

    def f(state: Any, x: Any, g: Any) -> Any:
        x, g = jax.lax.optimization_barrier((x * 1.5, g * 0.5))
        _, params, rest = nnx.split(nnx.merge(graph, state), _LEARNED, ...)

        def run(params: Any, x: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            return model(x), None

        out, pull, _ = jax.vjp(run, params, x, has_aux=True)
        # The next layer needs the output before it can tell its gradient.
        out, g = jax.lax.optimization_barrier((out, g))
        return out, pull(g.astype(out.dtype))

    return f, state


def adapters_table(run: Run) -> None:
    """Time added to the layer alone, and errors against float32, of each adapter."""
    for shape in SMOKE if run.smoke else SHAPES:
        plain, state = there_and_back(base_layer(shape))
        base = in_one_call(lambda states, x, g, plain=plain: plain(states[0], x, g))
        sizes = [(shape.rows, n) for n in (shape.inputs, shape.features)]
        sets = [
            tuple(
                jax.random.normal(jax.random.key(10 * i + j), size, jnp.bfloat16)
                for j, size in enumerate(sizes)
            )
            for i in range(SETS)
        ]
        timed = base, state, sets
        alone = [((state,), *pair) for pair in sets]
        run.attempt(
            "adapters",
            {"layer": str(shape), "what": "dense base"},
            lambda base=base, alone=alone: {
                "us": round(added_time(base, base, alone)[0], 1)
            },
        )
        for kind in kinds():
            for living in LIVING:
                _rows(run, shape, (kind, living), timed)


def _rows(run: Run, shape: Shape, what: tuple[Adapter, int], timed: Any) -> None:
    """The rows of an adapter: each implementation, with so many slots living."""
    (kind, living), (base, plain_state, sets) = what, timed
    found: dict[str, float] = {}

    def measure(way: str) -> Any:
        layer = grown_layer(shape, kind, way, living)
        f, state = there_and_back(layer)
        error = _error(layer, f, state, [a[:500] for a in sets[0]])
        both = [((plain_state, state), *pair) for pair in sets]
        grown = in_one_call(lambda states, x, g: f(states[1], x, g))
        us, more = added_time(grown, base, both)
        found[way] = more
        return {
            "adds us": round(more, 1),
            "percent": round(100 * more / us, 1),
            "to xla": round(more / found.get("xla", float("nan")), 2),
            "error": f"{error:.1e}",
        }

    for way in implementations():
        label = {"layer": str(shape), "what": way, "adapter": kind.name}
        label |= {"living": living}
        run.attempt("adapters", label, lambda way=way: measure(way))


def _error(layer: Any, f: Callable[..., Any], state: Any, few: list[Any]) -> float:
    """The worst of output and gradients, against plain JAX in float32."""
    layer.bed.implementation, layer.base.dtype = "xla", jnp.float32
    exact, same = there_and_back(layer)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(exact)(same, *map(wide, few))
    return error_against(jax.jit(f), lambda *_: want, (state, *few))
