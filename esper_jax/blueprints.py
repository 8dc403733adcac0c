"""What can grow in a slot: small networks that correct one chunk.

A blueprint computes the correction ``r(y) = f(y) - y`` that it adds to its chunk, and a
newborn's correction is 0. The built-in ones are one form,

    r(y) = W2 act(W1 y + b1) + b2 + scale * y,

with some of its parts switched off, so that all of them share one set of arrays and one
kernel, and a seed's blueprint is a run-time number. `Custom` takes any function; `glu`,
`context` and `context_glu` are made of it.

The `Bank` of a layer holds the parameters of its ``K`` slots.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = [
    "ACTIVATIONS",
    "Bank",
    "Blueprint",
    "Custom",
    "Dense",
    "affine",
    "bottleneck",
    "context",
    "context_glu",
    "glu",
    "hidden_width",
    "init_bank",
    "init_slots",
    "low_rank",
    "noop",
    "operations",
    "param_counts",
    "register",
    "residual_mlp",
    "resolve",
]


@struct.dataclass
class Bank:
    """Parameters of the blueprints of one layer, float32, a slot on the leading axis.

    ``C`` is the chunk width, ``H`` the largest hidden width of the blueprints.
    """

    w1: Float[Array, "*K C H"]
    b1: Float[Array, "*K H"]
    w2: Float[Array, "*K H C"]
    b2: Float[Array, "*K C"]
    scale: Float[Array, "*K C"]
    custom: dict[str, Any]
    """A pytree for each `Custom` blueprint, by name."""


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}
"""Activations of the built-in blueprints; each maps 0 to 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A built-in blueprint: which parts of the common form it uses.

    Args:
      name: its name.
      expansion: hidden width over chunk width; 0 for no hidden layer.
      activation: a key of `ACTIVATIONS`.
      bias: whether ``b1`` and ``b2`` are used.
      scale: whether ``scale`` is used.
    """

    name: str
    expansion: float = 0.0
    activation: str = "identity"
    bias: bool = False
    scale: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, "
                f"got {self.activation!r}"
            )
        if not (math.isfinite(self.expansion) and self.expansion >= 0):
            raise ValueError(
                f"expansion must be a finite number, at least 0; got {self.expansion}"
            )

    def hidden(self, width: int) -> int:
        """Hidden width over a chunk of ``width`` features."""
        return max(1, round(self.expansion * width)) if self.expansion else 0

    def param_count(
        self, width: int, widest: int | None = None, features: int | None = None
    ) -> int:
        """Number of parameters over a chunk of ``width`` features.

        The hidden layer is as wide as the layer's ``widest`` chunk asks for (default:
        ``width``), in all its chunks.
        """
        h = self.hidden(width if widest is None else widest)
        biases = (h + width) if self.bias else 0
        return 2 * h * width + biases + (width if self.scale else 0)


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


def residual_mlp(*, expansion: float = 2.0, activation: str = "gelu") -> Dense:
    """``W2 act(W1 y + b1) + b2`` with a hidden layer wider than the chunk."""
    return Dense(
        name="residual_mlp", expansion=expansion, activation=activation, bias=True
    )


def bottleneck(*, reduction: float = 4.0, activation: str = "gelu") -> Dense:
    """``W2 act(W1 y + b1) + b2`` with a hidden layer ``reduction`` times narrower."""
    if not reduction > 0:
        raise ValueError(f"reduction must be above 0, got {reduction}")
    return Dense(
        name="bottleneck", expansion=1 / reduction, activation=activation, bias=True
    )


def low_rank(*, reduction: float = 4.0) -> Dense:
    """``U V y`` of rank ``C / reduction``, at least 1 (LoRA, arXiv:2106.09685)."""
    if not reduction > 0:
        raise ValueError(f"reduction must be above 0, got {reduction}")
    return Dense(name="low_rank", expansion=1 / reduction)


def affine() -> Dense:
    """``scale * y + b2``, feature by feature."""
    return Dense(name="affine", bias=True, scale=True)


def noop() -> Dense:
    """Nothing: a control that costs a slot and changes nothing."""
    return Dense(name="noop")


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


_REGISTRY: dict[str, Callable[[], Blueprint]] = {
    f.__name__: f
    for f in (
        residual_mlp,
        bottleneck,
        low_rank,
        affine,
        noop,
        glu,
        context,
        context_glu,
    )
}


def register(name: str, make: Callable[[], Blueprint]) -> None:
    """Makes ``make()`` available under ``name``.

    Raises:
      ValueError: if the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"there is already a blueprint named {name!r}; choose another")
    _REGISTRY[name] = make


def resolve(blueprints: Sequence[str | Blueprint]) -> tuple[Blueprint, ...]:
    """Blueprints from names and blueprints; a seed's id is the index into them.

    Raises:
      ValueError: if there are none or more than 127, a name is unknown, or two
        custom ones share a name.
      TypeError: if an entry is neither.
    """
    if isinstance(blueprints, str):
        raise TypeError(
            f"blueprints must be a sequence of names or blueprints, "
            f"got {blueprints!r}; write [{blueprints!r}]"
        )
    resolved: list[Blueprint] = []
    for entry in blueprints:
        if isinstance(entry, str):
            if entry not in _REGISTRY:
                raise ValueError(
                    f"blueprints: unknown blueprint {entry!r}; expected one of "
                    f"{sorted(_REGISTRY)}"
                )
            resolved.append(_REGISTRY[entry]())
        elif isinstance(entry, (Dense, Custom)):
            resolved.append(entry)
        else:
            raise TypeError(
                f"blueprints must hold names, Dense or Custom, got {entry!r}"
            )
    if not 1 <= len(resolved) <= 127:
        raise ValueError(f"blueprints must number 1 to 127, got {len(resolved)}")
    names = [b.name for b in resolved if isinstance(b, Custom)]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"blueprints: two custom blueprints are named {twice[0]!r}; give one "
            "another name"
        )
    return tuple(resolved)


def hidden_width(blueprints: Sequence[Blueprint], width: int) -> int:
    """``H``: hidden width of the shared arrays, at least 1."""
    dense = [b.hidden(width) for b in blueprints if isinstance(b, Dense)]
    return max([1, *dense])


def _init_slot(
    key: Any,
    kind: Any,
    blueprints: Sequence[Blueprint],
    width: int,
    features: int | None,
) -> Bank:
    """One slot for the blueprint with id ``kind`` (traced): ``W1`` LeCun-normal in the
    hidden units that it uses, all else of the common form 0."""
    hidden = hidden_width(blueprints, width)
    used = jnp.asarray(dense_masks(blueprints, width)[0])[kind]
    w1 = jax.random.normal(key, (width, hidden), jnp.float32) / math.sqrt(width)
    return Bank(
        w1=jnp.where(used, w1, 0.0),
        b1=jnp.zeros(hidden, jnp.float32),
        w2=jnp.zeros((hidden, width), jnp.float32),
        b2=jnp.zeros(width, jnp.float32),
        scale=jnp.zeros(width, jnp.float32),
        custom={
            b.name: b.fresh(key, width, features)
            for b in blueprints
            if isinstance(b, Custom)
        },
    )


def init_slots(
    keys: Key[Array, " K"],
    kinds: Int[Array, " K"],
    blueprints: Sequence[Blueprint],
    width: int,
    features: int | None = None,
) -> Bank:
    """Fresh parameters for ``K`` slots.

    Args:
      keys: a random key for each slot.
      kinds: the blueprint id of each slot; a run-time value.
      blueprints: the layer's blueprints, as `resolve` returns them.
      width: chunk width ``C``.
      features: width of the layer ``F``; needed where a blueprint reads all of it.

    Returns:
      The bank.
    """
    return jax.vmap(
        lambda key, kind: _init_slot(key, kind, blueprints, width, features)
    )(keys, kinds)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def init_bank(
    key: Key[Array, ""],
    capacity: int,
    blueprints: Sequence[Blueprint],
    width: int,
    features: int | None = None,
) -> Bank:
    """A bank of ``capacity`` fresh slots, each with the first blueprint."""
    keys = jax.random.split(key, capacity)
    kinds = jnp.zeros(capacity, jnp.int32)
    return init_slots(keys, kinds, blueprints, width, features)


def param_counts(
    blueprints: Sequence[Blueprint], sizes: np.ndarray
) -> Int[np.ndarray, "N S"]:
    """Parameters that each blueprint would have on each chunk, for every (id, seed)."""
    widths = [int(w) for w in sizes]
    counts = {
        w: [b.param_count(w, max(widths), sum(widths)) for b in blueprints]
        for w in set(widths)
    }
    return np.stack([counts[w] for w in widths], axis=1)


def operations(parameters: Any) -> Any:
    """Floating-point operations of one forward pass of a row through a blueprint.

    A multiplication and an addition for each parameter, which every network that uses
    each of its parameters once comes to; activations are not counted.
    """
    return 2 * parameters


def dense_masks(
    blueprints: Sequence[Blueprint], width: int
) -> tuple[Bool[np.ndarray, "N H"], Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Which parts of the common form each blueprint uses: hidden units, biases, scale.

    All false for a custom blueprint.
    """
    hidden = np.arange(hidden_width(blueprints, width))
    return (
        np.stack(
            [
                hidden < (b.hidden(width) if isinstance(b, Dense) else 0)
                for b in blueprints
            ]
        ),
        np.array([isinstance(b, Dense) and b.bias for b in blueprints]),
        np.array([isinstance(b, Dense) and b.scale for b in blueprints]),
    )
