"""The kinds of blueprint: `Dense` and `Custom` write a chunk, `Adapter` the layer."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = [
    "ACTIVATIONS",
    "Adapter",
    "Blueprint",
    "Custom",
    "Dense",
    "whole_number",
]

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

    @property
    def reads(self) -> Literal["chunk"]:
        """What it reads: the seed's chunk."""
        return "chunk"

    def hidden(self, width: int) -> int:
        """Hidden width over a chunk of ``width`` features."""
        return max(1, round(self.expansion * width)) if self.expansion else 0

    def param_count(
        self,
        width: int,
        widest: int | None = None,
        features: int | None = None,
    ) -> int:
        """Number of parameters over a chunk of ``width`` features.

        All chunks of a layer have the hidden width of its ``widest`` chunk (default:
        ``width``).
        """
        h = self.hidden(width if widest is None else widest)
        biases = (h + width) if self.bias else 0
        return 2 * h * width + biases + (width if self.scale else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom:
    """A blueprint of your own. It runs through the plain JAX path of `blend`.

    Args:
      name: its name.
      init: ``init(key, width) -> params``, a pytree of float arrays. If ``reads`` is
        ``"layer"``, ``init(key, width, features)``. Fresh parameters should give a
        correction of 0, so that a newborn is the identity.
      apply: ``apply(params, y) -> correction``, float32 of shape (N, C). Where chunks
        are uneven, a narrow chunk has a last column of zeros; the correction in that
        column is dropped.
      reads: what ``y`` is: the seed's ``"chunk"``, (N, C), or the whole ``"layer"``,
        (N, F), float32. The blueprint writes its chunk either way.
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
        self,
        width: int,
        widest: int | None = None,
        features: int | None = None,
    ) -> int:
        """Number of parameters over a chunk of ``width`` of a layer's ``features``.

        Parameters are made for the layer's ``widest`` chunk (default: ``width``). How
        many of them a narrower chunk leaves idle is not known here, so all count.
        """
        made_for = width if widest is None else widest
        shapes = jax.eval_shape(
            lambda: self.fresh(jax.random.key(0), made_for, features)
        )
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A blueprint that writes the whole layer: ``scaling * (W2 act(W1 x + b1) + b2)``.

    The seed watches its chunk; what grows from it is added to every feature. All slots
    of a layer are computed as two matrix products over their hidden units together.

    Args:
      name: its name.
      hidden: number of hidden units, the rank where the activation is the identity.
      reads: what ``x`` is: the whole ``"layer"``'s output, or the layer's ``"input"``.
      activation: a key of `ACTIVATIONS`.
      bias: whether ``b1`` and ``b2`` are used.
      scaling: of the correction.
      start: what a newborn begins from. ``"random"``: ``W1`` LeCun-normal. Or
        ``"gradient"``, without activation and bias: ``W1`` is the left singular vectors
        of the gradient of the layer's kernel, summed over the steps in which the seed
        is GERMINATED; see `blueprints.aim`. ``W2`` is 0 when it begins to train.
      inputs: width of the layer's input, which a layer fills in if it knows.
    """

    name: str
    hidden: int
    reads: Literal["layer", "input"] = "layer"
    activation: str = "identity"
    bias: bool = False
    scaling: float = 1.0
    start: Literal["random", "gradient"] = "random"
    inputs: int | None = None

    def __post_init__(self) -> None:
        if self.reads not in ("layer", "input"):
            raise ValueError(f"reads must be 'layer' or 'input', got {self.reads!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, "
                f"got {self.activation!r}"
            )
        object.__setattr__(self, "hidden", whole_number("hidden", self.hidden))
        real = isinstance(self.scaling, numbers.Real)
        if not (real and math.isfinite(self.scaling) and self.scaling != 0):
            raise ValueError(
                f"scaling must be a finite number other than 0, got {self.scaling!r}"
            )

        if self.start not in ("random", "gradient"):
            raise ValueError(
                f"start must be 'random' or 'gradient', got {self.start!r}"
            )
        if self.start == "gradient" and (self.bias or self.activation != "identity"):
            raise ValueError(
                "start='gradient' takes a part of two matrices: bias must be False and "
                f"activation 'identity'; got {self.bias} and {self.activation!r}"
            )

    def bound(self, inputs: int | None) -> "Adapter":
        """The same for a layer whose input has that width, if it reads the input."""
        if self.reads == "layer" or self.inputs is not None:
            return self
        return dataclasses.replace(self, inputs=inputs)

    def width_read(self, features: int) -> int:
        """Width of what it reads, ``D``, in a layer of ``features``.

        Raises:
          ValueError: if it reads the input, and ``inputs`` is not known.
        """
        width = features if self.reads == "layer" else self.inputs
        if width is None:
            raise ValueError(
                f"inputs must be given: blueprint {self.name!r} reads the layer's "
                "input, whose width is not known. Give Adapter(inputs=...), or use it "
                "in a layer that tells"
            )
        return width

    def fresh(self, key: Any, width: int, features: int | None) -> dict[str, Array]:
        """New parameters: ``W1`` is LeCun-normal, all else 0.

        One that starts in the gradient's direction has ``W1`` 0 and ``W2`` random.
        """
        written = width if features is None else features
        read = self.width_read(written)
        if self.start == "gradient":
            return {
                "w1": jnp.zeros((read, self.hidden), jnp.float32),
                "w2": jax.random.normal(key, (self.hidden, written), jnp.float32),
            }
        w1 = jax.random.normal(key, (read, self.hidden), jnp.float32)
        params = {
            "w1": w1 / math.sqrt(read),
            "w2": jnp.zeros((self.hidden, written), jnp.float32),
        }
        if self.bias:
            params["b1"] = jnp.zeros(self.hidden, jnp.float32)
            params["b2"] = jnp.zeros(written, jnp.float32)
        return params

    def param_count(
        self, width: int, widest: int | None = None, features: int | None = None
    ) -> int:
        """Number of parameters in a layer of ``features``, on whatever chunk."""
        written = width if features is None else features
        biases = self.hidden + written if self.bias else 0
        return self.hidden * (self.width_read(written) + written) + biases


Blueprint = Dense | Custom | Adapter
"""What may grow in a slot."""


def whole_number(name: str, value: Any) -> int:
    """A number of hidden units.

    Raises:
      ValueError: naming the argument, if it is no integer of at least 1.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} must be an int, at least 1 unit; got {value!r}")
    return int(value)
