"""The check of shape annotations is on, and finds what is wrong."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import shape_checks
from jaxtyping import Array, Float, Int
from shape_checks import WrongShapeError, checked

import esper_jax
from esper_jax.lifecycle import init_seeds, no_commands, transition
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import SeedState, record, saturating_add


def modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.walk_packages(esper_jax.__path__, "esper_jax.")]
    # Those that need a package or a backend that is not here are not imported.
    lazy = ("__main__", "triton")
    return [importlib.import_module(n) for n in names if not n.endswith(lazy)]


def test_every_module_is_checked() -> None:
    unchecked = [
        m.__name__
        for m in [esper_jax, *modules()]
        if type(m.__loader__).__module__ != shape_checks.__name__
    ]
    assert not unchecked


def test_every_annotation_of_a_function_can_be_read() -> None:
    # A name that does not exist would be found only when the function is called.
    for module in modules():
        for value in vars(module).values():
            function = getattr(value, "__wrapped__", None)
            if callable(function) and getattr(value, "__module__", "") == (
                module.__name__
            ):
                shape_checks.hints_of(function)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        # Nothing in these functions looks at what they are given.
        (
            lambda: saturating_add(jnp.zeros(3, jnp.int32), 1),
            r"total must be UInt\[\*N\]; got .*int32\[3\]",
        ),
        (
            lambda: saturating_add(jnp.zeros(3, jnp.uint8), jnp.zeros((2, 3))),
            r"more must be Shaped\[\*#N\]; got .*float32\[2, 3\]",
        ),
        (
            lambda: record(
                init_seeds(3, 2), init_seeds(3, 2).statistics, jnp.zeros((2, 2))
            ),
            r"record: reconstruction must be Float\[K\]; got .*float32\[2, 2\]",
        ),
    ],
    ids=["dtype", "shape", "number of axes"],
)
def test_a_wrong_argument_is_found(call: Any, match: str) -> None:
    with pytest.raises(WrongShapeError, match=match):
        call()


def spoiled(**fields: Any) -> SeedState:
    return init_seeds(3, 2).replace(**fields)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (spoiled(health=jnp.zeros(4)), r"state.health must be Float\[\*S\]"),
        (
            spoiled(blueprint=jnp.zeros(3, jnp.uint8)),
            r"state.blueprint must be Int\[\*S\]; got .*uint8\[3\]",
        ),
        (spoiled(gain=jnp.zeros(3)), r"state.gain must be Float\[\*K\]"),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_field_of_a_container_is_found(
    state: SeedState, match: str, jitted: bool
) -> None:
    coefficients = jax.jit(esper_jax.coefficients) if jitted else esper_jax.coefficients
    with pytest.raises(WrongShapeError, match=match):
        coefficients(state)


def test_a_wrong_result_is_found_and_letters_bind_over_all_arguments() -> None:
    @checked
    def pick(a: Float[Array, "B F"], rows: Int[Array, " N"]) -> Float[Array, "N F"]:
        return a[rows].T

    square, rows = jnp.ones((3, 2)), jnp.arange(2)
    assert pick(square, rows).shape == (2, 2)
    with pytest.raises(WrongShapeError, match=r"return must be Float\[N F\]"):
        pick(square, jnp.arange(3))


def test_layers_may_differ_but_what_is_said_of_one_must_fit() -> None:
    @checked
    def both(
        seeds: dict[str, Float[Array, " S"]], signals: dict[str, Float[Array, " S"]]
    ) -> None: ...

    both({"a": jnp.ones(2), "b": jnp.ones(3)}, {"b": jnp.ones(3), "a": jnp.ones(2)})
    with pytest.raises(WrongShapeError, match=r"signals\['a'\]"):
        both({"a": jnp.ones(2)}, {"a": jnp.ones(3)})


def test_an_error_of_the_function_itself_comes_first() -> None:
    with pytest.raises(ValueError, match=r"commands\.target must have one entry"):
        transition(
            init_seeds(3, 2), no_commands(4), Signals.unmeasured(), LifecycleConfig()
        )


def test_containers_may_hold_anything_under_a_transformation() -> None:
    state = init_seeds(3, 2)
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.ndim <= 1, state))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    alpha, _ = jax.vmap(esper_jax.coefficients)(stacked)
    assert alpha.shape == (2, 3)
    shapes = jax.eval_shape(esper_jax.coefficients, state)
    assert shapes[1].shape == (3,)
