"""Grown corrections as ordinary parameters: what `harvest` puts after a layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import ACTIVATIONS, Custom, Dense
from esper_jax.chunks import ChunkLayout
from esper_jax.layers.folding import wide_dtype
from esper_jax.layers.inputs import input_of
from esper_jax.layers.matrix_form import check_equation, form_over
from esper_jax.layers.variables import VariableTree
from esper_jax.parallel import collectives

__all__ = ["Branch", "CorrectedLayer", "Correction", "Corrections", "PartVariable"]


class PartVariable(nnx.Variable):
    """What each layer of a stack writes and how much it counts; not trained."""


nnx.register_variable_name("part", PartVariable)


class Correction(nnx.Module):
    """Parts of one blueprint, computed as one batch.

    The parameters are float32 with an axis of the ``N`` parts before their own. A stack
    of layers has its axes before that.

    Args:
      blueprint: computes the corrections; no `Adapter`.
      layout: chunks of the layer.
      width: features that each part reads and writes.
      where: of the parts, ``seeds`` (int32, the chunk that each one writes, -1 for
        none) and ``alpha`` (float32, how much it counts): numpy arrays of shape (N,),
        or with the axes of the stack before that.
      params: pytree of the parameters; for `Dense`, a dictionary of the arrays that the
        blueprint uses.
    """

    def __init__(
        self,
        blueprint: Dense | Custom,
        layout: ChunkLayout,
        width: int,
        where: tuple[np.ndarray, np.ndarray],
        params: Any,
    ) -> None:
        self.blueprint = blueprint
        self.layout = layout
        self.width = width
        seeds, alpha = where
        self.seeds: Any
        self.alpha: Any
        if seeds.ndim == 1:
            self.seeds = tuple(int(seed) for seed in seeds)
            self.alpha = tuple(float(a) for a in alpha)
        else:  # nnx.vmap and nnx.scan take each layer's own from a variable
            self.seeds = PartVariable(jnp.asarray(seeds, jnp.int32))
            self.alpha = PartVariable(jnp.asarray(alpha, jnp.float32))
        # With a name before them, a user's own keys cannot meet the tree's attributes.
        named = params if isinstance(blueprint, Dense) else {blueprint.name: params}
        self.params = VariableTree(nnx.Param, named)

    def write(self, out: Float[Array, "R F"], y: Float[Array, "R F"]) -> Array:
        """``out`` with ``y + alpha r(y)`` in the parts' chunks."""
        columns = self._columns()
        chunks = y.at[:, columns].get(mode="fill", fill_value=0)
        wide = wide_dtype(y.dtype)
        alpha = self.alpha
        if isinstance(alpha, nnx.Variable):
            alpha = alpha.get_value()
        a = jnp.asarray(alpha, jnp.float32)[None, :, None]
        r = jnp.swapaxes(self._corrections(jnp.swapaxes(chunks, 0, 1), y), 0, 1)
        mixed = chunks.astype(wide) + a.astype(wide) * r.astype(wide)
        return out.at[:, columns].set(mixed.astype(y.dtype), mode="drop")

    def _columns(self) -> Int[Array | np.ndarray, "N W"]:
        """Features of each part; one past the last where there is none."""
        layout = self.layout
        if isinstance(self.seeds, nnx.Variable):
            return layout.columns(self.seeds.get_value())[:, : self.width]
        seeds, offset = np.array(self.seeds)[:, None], np.arange(self.width)[None]
        inside = offset < layout.sizes[seeds]
        return np.where(inside, layout.starts[seeds] + offset, layout.features)

    def _corrections(
        self, chunks: Float[Array, "N R W"], y: Float[Array, "R F"]
    ) -> Float[Array, "N R W"]:
        params = self.params.get_value()
        b = self.blueprint
        if isinstance(b, Dense):
            return _dense(b, params, chunks)
        layer = b.reads == "layer"
        x = (y if layer else chunks).astype(jnp.float32)
        return jax.vmap(b.apply, in_axes=(0, None if layer else 0))(params[b.name], x)


def _dense(
    blueprint: Dense, params: dict[str, Array], chunks: Float[Array, "N R W"]
) -> Float[Array, "N R W"]:
    """``W2 act(W1 y + b1) + b2 + scale * y`` of the arrays that there are.

    Multiplies matrices in the dtype of ``chunks`` and sums in at least float32, as
    `blend` does.
    """
    wide = wide_dtype(chunks.dtype)

    def matmul(x: Array, w: Array) -> Array:
        return jnp.einsum(
            "nri,nij->nrj", x, w.astype(x.dtype), preferred_element_type=wide
        )

    out = jnp.zeros(chunks.shape, wide)
    if "w1" in params:
        before = matmul(chunks, params["w1"])
        if "b1" in params:
            before = before + params["b1"][:, None].astype(wide)
        after = ACTIVATIONS[blueprint.activation](before)
        out = matmul(after.astype(chunks.dtype), params["w2"])
    if "b2" in params:
        out = out + params["b2"][:, None].astype(wide)
    if "scale" in params:
        out = out + params["scale"][:, None].astype(wide) * chunks.astype(wide)
    return out


class Branch(nnx.Module):
    """Hidden units beside a layer: ``W2 act(W1 x + b1) + b2``, added to its output.

    The units of all kept parts of one `Adapter` stand side by side; how much each part
    counts, and its scaling, is in ``w2`` and ``b2``.

    Args:
      reads: the ``"layer"``'s output or its ``"input"``: an array (..., D), or integer
        ids (...).
      activation: a key of `ACTIVATIONS`.
      params: ``w1`` (D, N), ``w2`` (N, F), and ``b1`` (N,), ``b2`` (F,) if there are;
        a stack of layers has its axes before that.
    """

    def __init__(
        self,
        reads: Literal["layer", "input"],
        activation: str,
        params: Mapping[str, Array],
    ) -> None:
        self.reads = reads
        self.activation = activation
        self.w1 = nnx.Param(params["w1"])
        self.w2 = nnx.Param(params["w2"])
        biased = "b1" in params
        self.b1 = nnx.data(nnx.Param(params["b1"]) if biased else None)
        self.b2 = nnx.data(nnx.Param(params["b2"]) if biased else None)

    def __call__(self, x: Any, dtype: Any) -> Float[Array, "*B F"]:
        """The correction, in at least float32; products of ``dtype``."""
        wide = wide_dtype(dtype)

        def matmul(x: Array, w: Array) -> Array:
            return jnp.matmul(x, w.astype(dtype), preferred_element_type=wide)

        w1 = self.w1[...]
        if jnp.issubdtype(x.dtype, jnp.integer):
            z = jnp.take(w1, x, axis=0, mode="fill", fill_value=0).astype(wide)
        else:
            z = matmul(x.astype(dtype), w1)
        if self.b1 is not None:
            z = z + _row(self.b1[...].astype(wide), z.ndim)
        out = matmul(ACTIVATIONS[self.activation](z).astype(dtype), self.w2[...])
        if self.b2 is None:
            return out
        return out + _row(self.b2[...].astype(wide), out.ndim)


def _row(bias: Array, ndim: int) -> Array:
    """A bias with the axes that an activation of so many has before its features."""
    return bias.reshape((1,) * (ndim - 1) + bias.shape)


class Corrections(nnx.Module):
    """Adds corrections to an activation; the identity without any.

    Args:
      features: width of the last axis.
      groups: corrections of chunks. Each reads the activation as it came; their chunks
        are disjoint.
      branches: what is added to all features. Each reads the activation as it came, or
        the layer's input.
    """

    def __init__(
        self,
        features: int,
        groups: Sequence[Correction] = (),
        branches: Sequence[Branch] = (),
    ) -> None:
        self.features = features
        self.groups = nnx.List(groups)
        self.branches = nnx.List(branches)

    def __call__(self, y: Float[Array, "*B F"], *, x: Any = None) -> Any:
        """``y`` with the corrections added, of the same shape and dtype.

        Args:
          y: the activation.
          x: the layer's input, for branches that read it.
        """
        if not hasattr(y, "shape") or y.shape[-1:] != (self.features,):
            raise ValueError(
                f"y must be an array with {self.features} features on its last axis, "
                f"got {getattr(y, 'shape', type(y).__name__)}"
            )
        if not self.groups and not self.branches:
            return y
        return collectives.automatic(_written, y, x, self.groups, self.branches)


def _written(
    y: Float[Array, "*B F"],
    x: Any,
    groups: Sequence[Correction],
    branches: Sequence[Branch],
) -> Float[Array, "*B F"]:
    flat = out = y.reshape(-1, y.shape[-1])
    for group in groups:
        out = group.write(out, flat)
    out = out.reshape(y.shape)
    if not branches:
        return out
    total = out.astype(wide_dtype(y.dtype))
    for branch in branches:
        total += branch(x if branch.reads == "input" else y, y.dtype)
    return total.astype(y.dtype)


class CorrectedLayer(nnx.Module):
    """A layer and the corrections of its output.

    Attributes of the base can be read and set through the layer, as on `ChunkedLayer`.

    Args:
      base: the layer.
      corrections: of its output.
    """

    def __init__(self, base: Any, corrections: Corrections) -> None:
        self.base = base
        self.corrections = corrections

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for attributes that the layer itself lacks.
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Writes go where reads look: an attribute that only the base has is set there.
        own = name in ("base", "corrections") or name.startswith("_")
        base = vars(self).get("base")
        if own or hasattr(type(self), name) or base is None or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output on the same arguments, with the corrections added."""
        form = form_over(self.base, self.corrections.features)
        reads = any(branch.reads == "input" for branch in self.corrections.branches)
        check_equation(self.base, form, args, kwargs, reads)
        y = form.output_rows(self.base(*args, **kwargs))
        x = None
        if reads:
            x = input_of(self.base, args, kwargs, y.dtype, form)
        return form.output_from(self.corrections(y, x=x))
