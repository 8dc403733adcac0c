"""What blend refuses, by the name of the argument."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blend import EVEN, KINDS, arguments

from esper_jax.blueprints import Custom, init_bank, resolve
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import blend, check_statistics_rows


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: {"y": a["y"][:, :-1]}, r"y must have \d+ features"),
        (lambda a: {"y": jnp.float32(1)}, "y must have"),
        (lambda a: {"y": a["y"].astype(jnp.int32)}, "y must be one of float32"),
        (lambda a: {"alpha": a["alpha"][:-1]}, "alpha must be"),
        (lambda a: {"alpha": a["alpha"].astype(jnp.int32)}, "alpha must be floating"),
        (lambda a: {"beta": a["beta"][:, None]}, "beta must be"),
        (lambda a: {"blueprint": a["alpha"]}, "blueprint must be integer"),
        (lambda a: {"seed_of_slot": a["alpha"]}, "seed_of_slot must be integer"),
        (lambda a: {"seed_of_slot": jnp.int32(0)}, "seed_of_slot must have shape"),
        (
            lambda a: {"bank": jax.tree.map(lambda x: x[:-1], a["bank"])},
            r"bank\.w1 must have shape",
        ),
        (
            lambda a: {"bank": dataclasses.replace(a["bank"], b2=a["bank"].b1)},
            r"bank\.b2 must have shape",
        ),
        (
            lambda a: {"bank": dataclasses.replace(a["bank"], custom={})},
            "bank must have the leaves",
        ),
        (
            lambda a: {
                "bank": dataclasses.replace(
                    a["bank"], scale=a["bank"].scale.astype(jnp.int32)
                )
            },
            r"bank\.scale must be floating",
        ),
        (lambda a: {"statistics_rows": -1}, "statistics_rows must be an integer"),
        (lambda a: {"statistics_rows": 2.5}, "statistics_rows must be an integer"),
        (lambda a: {"implementation": "fast"}, "implementation must be one of"),
        (lambda a: {"implementation": ["xla", "fast"]}, "implementation must be"),
        (lambda a: {"implementation": []}, "implementation must be one of"),
        (lambda a: {"bias": a["y"]}, r"bias must be floating point of shape \(\d+,\)"),
        (lambda a: {"bias": jnp.zeros(EVEN.features, int)}, "bias must be floating"),
        (lambda a: {"incubation": "none"}, "incubation must be one of"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: Any, match: str) -> None:
    args = arguments(EVEN, (2,), "float32")
    with pytest.raises(ValueError, match=match):
        blend(**(args | change(args)), layout=EVEN, blueprints=KINDS)


@pytest.mark.parametrize("rows", [-1, 2.5, True, "all", np.float32(2), np.int64(-1)])
def test_a_number_of_rows_is_an_integer(rows: Any) -> None:
    with pytest.raises(ValueError, match="statistics_rows must be an integer"):
        check_statistics_rows(rows)
    for good in (None, 0, 3, np.int64(3)):
        check_statistics_rows(good)


def test_a_custom_blueprint_of_another_shape_is_refused() -> None:
    odd = Custom(
        name="odd", init=lambda k, w: jnp.zeros(w), apply=lambda p, y: y[:, :1]
    )
    kinds = resolve([odd])
    layout = ChunkLayout(4, 2)
    bank = init_bank(jax.random.key(0), 1, kinds, 2)
    one, zero = jnp.ones(1), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="blueprint 'odd': apply must return"):
        blend(
            jnp.ones((3, 4)),
            bank,
            one,
            one,
            zero,
            zero,
            layout=layout,
            blueprints=kinds,
        )
