"""Fossils that are linear become part of the weights of their layer.

A slot that held one is free again, and the layer costs nothing more for it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from esper_jax.blueprints import Adapter, Bank, Blueprint, Dense, dense_masks
from esper_jax.chunks import ChunkLayout
from esper_jax.growth.beds import name_of
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import Arrays
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.folding import (
    Product,
    product_of,
    references_in,
    takes_corrections,
    wide_dtype,
)
from esper_jax.layers.matrix_form import PLAIN, MatrixForm
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.lifecycle.transitions import released

__all__ = ["Fold", "Folded", "fold_fossils", "folds_of", "linear_kinds"]


@dataclasses.dataclass(frozen=True)
class Fold:
    """What is folded in a layer, and into which variables.

    Args:
      kinds: indices of the layer's blueprints whose fossils are folded.
      kernel: name of the kernel.
      bias: name of the bias; None for a layer without.
      form: how both have their features on one axis.
    """

    kinds: tuple[int, ...]
    kernel: str
    bias: str | None
    form: MatrixForm = PLAIN

    @property
    def weights(self) -> list[str]:
        """Names of the variables that change."""
        return [name for name in (self.kernel, self.bias) if name is not None]


class Folded(NamedTuple):
    """What folding gives."""

    seeds: dict[str, SeedState]
    """Of the layers in which something may be folded, by layer."""
    weights: Arrays
    """Values of their kernels and biases, by variable."""
    which: dict[str, Bool[Array, " S"]]
    """Seeds that were folded, by layer."""


def folds_of(
    model: nnx.Module, parts: ModelParts, gates: LifecycleConfig
) -> dict[str, Fold]:
    """Where the fossils of a model are folded, by layer.

    A layer is one whose output is linear in weights that nothing else uses, as for
    `harvest`: `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and `nnx.Conv`. Of its
    blueprints, those that are linear are folded, unless another one of the layer would
    then read something else: if one reads the layer's output, none is; if one reads a
    chunk, no adapter is.

    Args:
      model: the model.
      parts: of it.
      gates: say whether to fold, and into what.

    Raises:
      ValueError: if ``gates.fold`` is ``"trained"`` and a layer's weights do not train,
        or there is nothing to fold in any layer.
    """
    if gates.fold == "never":
        return {}
    nodes = [(name_of(path), node) for path, node in nnx.iter_graph(model)]
    layers = {name: node for name, node in nodes if isinstance(node, ChunkedLayer)}
    references = references_in([node for _, node in nodes])
    found: dict[str, Fold] = {}
    for name, bed in parts.beds.items():
        layer = layers.get(bed.owner)
        if layer is None or not layer.enabled or references[id(layer.base)] != 1:
            continue
        base: Any = layer.base
        features = parts.layouts[name].features
        if not takes_corrections(base, features, bed.stack, references):
            continue
        product = product_of(base, features)
        if kinds := linear_kinds(product, parts.kinds[name]):
            path = f"{bed.owner}/base" if bed.owner else "base"
            bias = None if base.bias is None else f"{path}/bias"
            found[name] = Fold(kinds, f"{path}/kernel", bias, product.form)
    # Where all run their base alone, as without a feature, no fossil counts.
    plain = layers and not any(layer.enabled for layer in layers.values())
    if not found and not plain:
        raise ValueError(
            f"fold must be 'never', got {gates.fold!r}: no layer has fossils that can "
            "be folded. They must be linear (lora, affine, low_rank) and grow in an "
            "nnx.Linear, nnx.LinearGeneral, nnx.Einsum or nnx.Conv that nothing else "
            "uses, without blueprints beside them that read what would change"
        )
    weights = {weight for fold in found.values() for weight in fold.weights}
    frozen = sorted(weights - set(parts.trained))
    if frozen and gates.fold == "trained":
        raise ValueError(
            f"fold='trained' takes weights that train, and {frozen[0]!r} does not: a "
            "frozen host keeps its bits. Give fold='frozen' to change them on purpose, "
            "or fold='never'"
        )
    return found


def linear_kinds(product: Product, kinds: tuple[Blueprint, ...]) -> tuple[int, ...]:
    """Indices of the blueprints that can be folded while the others may live."""
    if any(kind.reads == "layer" for kind in kinds):
        return ()
    chunks = any(kind.reads == "chunk" for kind in kinds)
    return tuple(
        i
        for i, kind in enumerate(kinds)
        if product.takes(kind) and not (chunks and isinstance(kind, Adapter))
    )


def fold_fossils(
    parts: ModelParts,
    folds: Mapping[str, Fold],
    seeds: Mapping[str, SeedState],
    banks: Mapping[str, Bank],
    weights: Arrays,
) -> Folded:
    """Adds what fossils compute to the weights of their layers; pure and jittable.

    Computed in float32 (float64 for float64 weights) and rounded once to the weights'
    dtype. Such a seed leaves its slot and is DORMANT. One whose parameters are not
    finite stays a fossil. Where nothing is folded, every bit stays.

    Args:
      parts: of the model.
      folds: as `folds_of` returns them.
      seeds: by layer.
      banks: by layer.
      weights: of the kernels and biases, by variable.
    """
    new, seeds = dict(weights), dict(seeds)
    which: dict[str, Array] = {}
    for names in _alike(parts, folds, weights):
        fold, first = folds[names[0]], names[0]
        slots = jnp.stack([_slots(seeds[n], banks[n], folds[n]) for n in names])
        old = [
            tuple(new[w][parts.beds[n].index] for w in folds[n].weights) for n in names
        ]
        lives = [(seeds[n], banks[n]) for n in names]
        kinds = parts.kinds[first]
        place = _Place(parts.layouts[first], kinds, fold.kinds, fold.form)

        def folded(
            place: _Place = place, old: Any = old, lives: Any = lives, of: Any = slots
        ) -> list[tuple[Array, ...]]:
            own, living = (
                jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (old, lives)
            )
            found = jax.vmap(place.fold)(own, living, of)
            return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(old))]

        each = jax.lax.cond(jnp.any(slots), folded, lambda old=old: old)
        for name, values, mine in zip(names, each, slots, strict=True):
            index = parts.beds[name].index
            for weight, value in zip(folds[name].weights, values, strict=True):
                new[weight] = new[weight].at[index].set(value) if index else value
            seeds[name], which[name] = _released(seeds[name], mine)
    return Folded({name: seeds[name] for name in folds}, new, which)


def _alike(
    parts: ModelParts, folds: Mapping[str, Fold], weights: Arrays
) -> list[list[str]]:
    """Layers by shape, for each of which the program is written once."""
    groups, found = parts.groups.names(), dict[Any, list[str]]()
    for name, fold in folds.items():
        own = [weights[w] for w in fold.weights]
        depth = len(parts.beds[name].stack)
        shapes = tuple((w.shape[depth:], jnp.dtype(w.dtype).name) for w in own)
        found.setdefault((groups[name], fold.kinds, fold.form, shapes), []).append(name)
    return list(found.values())


def _released(
    seeds: SeedState, slots: Bool[Array, " K"]
) -> tuple[SeedState, Bool[Array, " S"]]:
    """The seeds without those of some slots, and which these are."""
    owner = jnp.where(slots, seeds.seed_of_slot, seeds.num_seeds)
    gone = jnp.zeros(seeds.num_seeds, bool).at[owner].set(True, mode="drop")
    return released(seeds, gone), gone


def _slots(seeds: SeedState, bank: Bank, fold: Fold) -> Bool[Array, " K"]:
    """Slots whose fossils are folded."""
    owner = jnp.maximum(seeds.seed_of_slot, 0)
    fossil = (seeds.seed_of_slot >= 0) & (seeds.stage[owner] == Stage.FOSSILIZED)
    taken = jnp.isin(seeds.blueprint[owner].astype(jnp.int32), np.array(fold.kinds))
    finite = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(bank)
    ]
    return fossil & taken & jnp.all(jnp.stack(finite), axis=0)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where layers of one shape fold.

    Args:
      layout: their chunks.
      kinds: their blueprints.
      folds: indices of those that are folded.
      form: of their weights.
    """

    layout: ChunkLayout
    kinds: tuple[Blueprint, ...]
    folds: tuple[int, ...]
    form: MatrixForm

    def fold(
        self,
        weights: tuple[Array, ...],
        living: tuple[SeedState, Bank],
        slots: Bool[Array, " K"],
    ) -> tuple[Array, ...]:
        """A layer's kernel, and bias if it has one, with the slots' corrections."""
        seeds, bank = living
        dtype = wide_dtype(weights[0].dtype)
        kernel, *biases = (w.astype(dtype) for w in weights)
        kernel, biases = self.form.matrix(kernel), [*map(self.form.vector, biases)]
        owner = jnp.maximum(seeds.seed_of_slot, 0)
        kind = seeds.blueprint[owner].astype(jnp.int32)
        if any(isinstance(self.kinds[i], Dense) for i in self.folds):
            columns = self.layout.columns(jnp.where(slots, seeds.seed_of_slot, -1))
            matrix, offset = self._affine(bank, kind, dtype)

            def with_chunks(x: Array, offset: Any = 0) -> Array:
                own = x.at[..., columns].get(mode="fill", fill_value=0)
                more = jnp.einsum("...kc,kcd->...kd", own, matrix, **_EXACT)
                return x.at[..., columns].set(own + more + offset, mode="drop")

            kernel, biases = (
                with_chunks(kernel),
                [with_chunks(b, offset) for b in biases],
            )
        for i in self.folds:
            if isinstance(adapter := self.kinds[i], Adapter):
                mine = slots & (kind == i)
                p = {
                    name: jnp.where(_per_slot(mine, leaf), leaf.astype(dtype), 0)
                    for name, leaf in bank.custom[adapter.name].items()
                }
                matrix, offset = _product(adapter, p)
                more = kernel + matrix.reshape(kernel.shape)
                kernel = jnp.where(jnp.any(mine), more, kernel)
                if adapter.bias:
                    biases = [jnp.where(jnp.any(mine), b + offset, b) for b in biases]
        new = (self.form.kernel_from(kernel), *biases)
        return tuple(
            x.reshape(w.shape).astype(w.dtype)
            for x, w in zip(new, weights, strict=True)
        )

    def _affine(
        self, bank: Bank, kind: Array, dtype: Any
    ) -> tuple[Float[Array, "K C C"], Float[Array, "K C"]]:
        """The correction of each slot's chunk ``y`` as ``y @ matrix + offset``."""
        hidden, has_bias, has_scale = (
            jnp.asarray(mask)[kind]
            for mask in dense_masks(self.kinds, self.layout.width)
        )
        used = {
            "w1": hidden[:, None, :],
            "w2": hidden[:, :, None],
            "b1": has_bias[:, None] & hidden,
            "b2": has_bias[:, None],
            "scale": has_scale[:, None],
        }
        p = {
            name: jnp.where(mask, getattr(bank, name).astype(dtype), 0)
            for name, mask in used.items()
        }
        matrix = jnp.einsum("kch,khd->kcd", p["w1"], p["w2"], **_EXACT)
        matrix += jax.vmap(jnp.diag)(p["scale"])
        offset = jnp.einsum("kh,khd->kd", p["b1"], p["w2"], **_EXACT) + p["b2"]
        return matrix, offset


def _product(adapter: Adapter, p: Mapping[str, Array]) -> tuple[Array, Array]:
    """What slots of an adapter add to a kernel, (D, F), and to a bias, (F,)."""
    w2 = p["w2"] * adapter.scaling
    matrix = jnp.einsum("kdh,khf->df", p["w1"], w2, **_EXACT)
    if not adapter.bias:
        return matrix, jnp.zeros(w2.shape[-1], w2.dtype)
    offset = jnp.einsum("kh,khf->f", p["b1"], w2, **_EXACT)
    return matrix, offset + adapter.scaling * jnp.sum(p["b2"], axis=0)


_EXACT: dict[str, Any] = {"precision": "highest"}


def _per_slot(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
