"""What a backend of blend is: a name, what it takes, and two passes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from esper_jax.blueprints import Bank
from esper_jax.kernels.blend.static import Slots, Static, wide
from esper_jax.lifecycle.signals import Statistics

__all__ = [
    "AddProduct",
    "Backend",
    "BackwardPass",
    "ForwardPass",
    "Product",
    "Products",
    "Results",
    "RowsProduct",
    "SumsProduct",
    "TangentPass",
    "once_differentiable",
]

Results = tuple[Float[Array, "N F"], Statistics, Float[Array, " K"]]
"""Output, statistics, and mean of ``r(y_c)**2`` of each slot."""


class Product(NamedTuple):
    """``left @ right + row``: a low-rank array of the size of a layer's output."""

    left: Float[Array, "N M"]
    right: Float[Array, "M F"]
    row: Float[Array, " F"]
    """In the dtype of the sums."""

    def value(self) -> Float[Array, "N F"]:
        """The array itself, in the dtype of the sums."""
        of = wide(self.left)
        return (
            jnp.matmul(self.left, self.right, preferred_element_type=of)
            + self.row[None]
        )


class RowsProduct(Protocol):
    """A product of rows, or nothing."""

    def __call__(
        self,
        s: Any,
        x: Float[Array, "N D"],
        w: Float[Array, "D M"],
        where: Bool[Array, ""],
        /,
    ) -> Float[Array, "N M"]:
        """``x @ w`` in float32 if ``where``; else anything, NaN too."""


class SumsProduct(Protocol):
    """A product over all rows, or nothing."""

    def __call__(
        self,
        s: Any,
        a: Float[Array, "N M"],
        x: Float[Array, "N D"],
        where: Bool[Array, ""],
        /,
    ) -> tuple[Float[Array, "M D"], Float[Array, " D"]]:
        """``a.T @ x`` and the sum of ``x`` over the rows if ``where``; else anything.

        In float32, in an order that is always the same.
        """


class AddProduct(Protocol):
    """Adds a product to an array in place, or does nothing."""

    def __call__(
        self,
        s: Any,
        to: Float[Array, "N F"],
        product: Product,
        where: Bool[Array, ""],
        /,
    ) -> Float[Array, "N F"]:
        """``to + product`` in its dtype, if ``where``; else ``to``, bit for bit.

        Args:
          s: what `Backend.prepare` returned.
          to: of any float dtype.
          product: added in at least float32.
          where: whether to add.
        """


class Products(NamedTuple):
    """The products of adapters, none of which costs much where nothing lives."""

    rows: RowsProduct
    sums: SumsProduct
    add: AddProduct


class ForwardPass(Protocol):
    """Computes the results, and what the backward pass needs of ``y``."""

    def __call__(
        self,
        s: Any,
        save: bool,
        y: Array,
        bias: Array | None,
        bank: Bank,
        slots: Slots,
        /,
    ) -> tuple[Array, Statistics, Array, Any]:
        """`Results`, and what `BackwardPass` gets as ``saved``; None unless ``save``.

        Args:
          s: what `Backend.prepare` returned.
          save: whether a backward pass follows.
          y: (N, F).
          bias: (F,), in the dtype of ``y``: all results are those of ``y + bias``, but
            that the output lacks the bias again. None unless `Backend.takes_bias`.
          bank: parameters of the blueprints.
          slots: coefficients, kinds and owners.
        """


class BackwardPass(Protocol):
    """Computes the gradients."""

    def __call__(
        self,
        s: Any,
        g: Array,
        total: Array | None,
        saved: Any,
        bank: Bank,
        slots: Slots,
        /,
    ) -> tuple[Array, Array | None, Bank, Array]:
        """Gradients of ``y``, its bias, ``bank`` and ``slots.alpha``, in their dtypes.

        That of the bias is ``total`` where no slot with an alpha reads ``y``, bit for
        bit; None without a bias.

        Args:
          s: what `Backend.prepare` returned.
          g: cotangent of the output, (N, F), in the dtype of ``y``.
          total: sum of ``g`` over the rows, (F,); None without a bias.
          saved: what the forward pass saved.
          bank: parameters of the blueprints.
          slots: coefficients, kinds and owners.
        """


class TangentPass(Protocol):
    """Computes the tangent of the output: the transpose of `BackwardPass`."""

    def __call__(
        self,
        s: Any,
        y: Array,
        bank: Bank,
        slots: Slots,
        dots: tuple[Array | None, Bank | None, Array | None],
        /,
    ) -> Array:
        """Tangent of the output, in the dtype of ``y``.

        Args:
          s: what `Backend.prepare` returned.
          y: (N, F).
          bank: parameters of the blueprints.
          slots: coefficients, kinds and owners.
          dots: tangents of ``y``, ``bank`` and ``slots.alpha``; None for those of 0.
        """


def once_differentiable(
    f: Callable[..., Any], name: str, static: int = 0
) -> Callable[..., Any]:
    """A function of a derivative rule that cannot be differentiated, which says so.

    Args:
      f: the function.
      name: of its backend.
      static: number of its first arguments that are no arrays.
    """

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"blend with implementation={name!r} has no second derivative; "
            "pass implementation='xla'"
        )

    once = jax.custom_vjp(f, nondiff_argnums=tuple(range(static)))
    once.defvjp(refuse, refuse)
    return once


def _as_given(s: Static, rows: int) -> Static:
    return s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute blend.

    Args:
      name: what ``implementation=`` calls it; the name of its folder.
      preference: the automatic choice tries higher numbers first. Plain JAX is 0.
      platforms: JAX platforms on which the automatic choice may take it; None is all.
      refusal: ``refusal(s, rows, slots)``: why it does not take a call over that many
        rows and slots, or None if it does.
      slow: ``slow(s, rows, slots)``: whether a backend with a lower preference is
        faster. The automatic choice then skips this one.
      prepare: ``prepare(s, rows)``: the same call with the backend's block sizes. May
        return a subclass of `Static`.
      forward: the forward pass.
      backward: the backward pass.
      differentiable: whether the backward pass is plain JAX, which may be
        differentiated again. Such a forward pass saves nothing: the backward pass gets
        ``y`` as ``saved``.
      takes_bias: whether the passes take a bias of ``y`` apart. For others it is added
        first.
      tangent: the pass of forward-mode derivatives, plain JAX, which JAX can also
        transpose; None if there is none.
      products: those of adapters; None leaves them to plain JAX.
    """

    name: str
    preference: int
    platforms: tuple[str, ...] | None
    refusal: Callable[[Static, int, int], str | None]
    slow: Callable[[Static, int, int], bool]
    forward: ForwardPass
    backward: BackwardPass
    prepare: Callable[[Static, int], Static] = _as_given
    differentiable: bool = False
    takes_bias: bool = False
    tangent: TangentPass | None = None
    products: Products | None = None
