"""Blueprints with a function of their own."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esper_jax.blueprints.dense import ACTIVATIONS, Dense

__all__ = ["Blueprint", "Custom", "context", "context_glu", "glu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom:
    """A blueprint of one's own. It runs through the plain path of `blend`.

    Args:
      name: its name.
      init: ``init(key, width) -> params``, a pytree of float arrays; where it reads the
        layer, ``init(key, width, features)``. The correction of fresh parameters should
        be 0, so that a newborn is the identity.
      apply: ``apply(params, y) -> correction``, float32 of shape (N, C). Over uneven
        chunks a narrow chunk has a last column of zeros, and what the correction holds
        there is dropped.
      reads: what ``y`` is: the seed's ``"chunk"``, (N, C), or the whole ``"layer"``,
        (N, F), float32. It writes its chunk either way.
    """

    name: str
    init: Callable[..., Any]
    apply: Callable[[Any, Any], Any]
    reads: Literal["chunk", "layer"] = "chunk"

    def __post_init__(self) -> None:
        if self.reads not in ("chunk", "layer"):
            raise ValueError(f"reads must be 'chunk' or 'layer', got {self.reads!r}")

    def fresh(self, key: Any, width: int, features: int | None) -> Any:
        """New parameters for a chunk of ``width`` of a layer's ``features``."""
        if self.reads == "chunk":
            return self.init(key, width)
        if features is None:
            raise ValueError(
                f"features must be given: blueprint {self.name!r} reads the whole layer"
            )
        return self.init(key, width, features)

    def param_count(
        self, width: int, widest: int | None = None, features: int | None = None
    ) -> int:
        """Number of parameters over a chunk of ``width`` of a layer's ``features``.

        They are made for the layer's ``widest`` chunk (default: ``width``), and how
        many of them a narrower one leaves idle is not known here.
        """
        made_for = width if widest is None else widest
        shapes = jax.eval_shape(
            lambda: self.fresh(jax.random.key(0), made_for, features)
        )
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


Blueprint = Dense | Custom


@functools.cache
def _hidden_layer(
    name: str,
    expansion: float,
    activation: str,
    gated: bool,
    reads: Literal["chunk", "layer"],
) -> Custom:
    """One hidden layer, gated or not. Cached: equal arguments give an equal blueprint,
    as static arguments of jitted functions need."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )
    if not (math.isfinite(expansion) and expansion > 0):
        raise ValueError(f"expansion must be a finite number above 0, got {expansion}")

    def init(key: Any, width: int, features: int | None = None) -> dict[str, Array]:
        inputs = width if features is None else features
        hidden = max(1, round(expansion * width))
        keys = jax.random.split(key)
        scale = 1 / math.sqrt(inputs)
        params = {
            "w1": scale * jax.random.normal(keys[0], (inputs, hidden), jnp.float32),
            "b1": jnp.zeros(hidden, jnp.float32),
            "w2": jnp.zeros((hidden, width), jnp.float32),
            "b2": jnp.zeros(width, jnp.float32),
        }
        if gated:
            gate = jax.random.normal(keys[1], (inputs, hidden), jnp.float32)
            params |= {"v": scale * gate, "c": jnp.zeros(hidden, jnp.float32)}
        return params

    def apply(params: dict[str, Array], y: Array) -> Array:
        hidden = ACTIVATIONS[activation](y @ params["w1"] + params["b1"])
        if gated:
            hidden = hidden * (y @ params["v"] + params["c"])
        return hidden @ params["w2"] + params["b2"]

    return Custom(name=name, init=init, apply=apply, reads=reads)


def glu(*, expansion: float = 2.0, activation: str = "silu") -> Custom:
    """``W2 (act(W1 y + b1) * (V y + c)) + b2``, a gated unit (arXiv:2002.05202)."""
    return _hidden_layer("glu", expansion, activation, True, "chunk")


def context(*, expansion: float = 2.0, activation: str = "gelu") -> Custom:
    """``W2 act(W1 x + b1) + b2`` of the whole layer's output ``x``.

    Args:
      expansion: hidden width over the width of the chunk that it writes.
      activation: a key of `ACTIVATIONS`.
    """
    return _hidden_layer("context", expansion, activation, False, "layer")


def context_glu(*, expansion: float = 2.0, activation: str = "silu") -> Custom:
    """`glu` of the whole layer's output: reads all, writes its chunk."""
    return _hidden_layer("context_glu", expansion, activation, True, "layer")
