"""`harvest`: a plain model, with what has grown as ordinary parameters."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from esper_jax.blueprints import Adapter, Bank, Blueprint, Custom, Dense
from esper_jax.layers.bed import SeedBed, stack_of
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.corrections import (
    Branch,
    CorrectedLayer,
    Correction,
    Corrections,
)
from esper_jax.layers.folding import (
    LinearPart,
    fold_branch,
    fold_into,
    product_of,
    references_in,
    takes_corrections,
)
from esper_jax.layers.matrix_form import form_over
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import coefficients

__all__ = ["Parts", "harvest"]

Parts = Literal["fossils", "counting"]
"""Which grown parts a harvested model keeps."""


def harvest(
    model: nnx.Module, *, parts: Parts = "fossils", fold: bool = True
) -> nnx.Module:
    """A plain copy of a grown model: no seeds, no slots, no probes.

    A `ChunkedLayer` becomes its base where nothing is kept, or where all that is kept
    can be folded into the base's weights. Otherwise it becomes a `CorrectedLayer`: the
    base, and the kept blueprints as `nnx.Param` arrays of their true size; those of an
    `Adapter` stand side by side in a `Branch`. A bare `SeedBed` becomes `Corrections`.
    A layer whose ``enabled`` is False becomes its base, as it runs. Shared layers stay
    shared.

    Blueprints without an activation are linear in the base's output (`affine`,
    `low_rank`) or its input (`lora`). Those over an `nnx.Linear`, `nnx.LinearGeneral`,
    `nnx.Einsum` (which has a `matrix_form.matrix_form`, all of whose features grow as
    one axis) or `nnx.Conv` are folded into its kernel and bias: exact in real
    arithmetic, computed in float32 (float64 for float64 weights), then rounded once to
    the weights' dtype. They are
    kept as corrections where that would change something else: another part of the
    model uses the same base or weights, a kept blueprint of the layer reads the whole
    of its output, the base has no bias for theirs, or (`lora`) a correction that is not
    folded reads a chunk. Code of yours that reads the layer's weights directly (as
    tied embeddings do) reads the folded ones; pass ``fold=False`` there.

    If every part that counts is kept, the outputs are those of the grown model in
    evaluation mode: bit for bit where nothing counts. Where something does, a layer's
    outputs differ by rounding: relative to the largest, by up to about 1e-5 in float32
    and 2e-2 in bfloat16, whose unit is 8e-3. (A device that multiplies float32
    matrices in a narrower format by default, such as TF32, rounds as that does.)

    In a stack (`nnx.vmap`, `nnx.scan`) each layer may have other parts. Their arrays
    are as many as the layer with the most parts of a blueprint needs, padded with
    zeros, and as wide as the widest chunk. A `PartVariable` tells each layer its
    chunks. It has the stack's axes, so a transform with filters must map it, too.

    Args:
      model: holds `ChunkedLayer` or `SeedBed` modules; not changed. Without any, the
        result is a copy. The copy shares the arrays of the rest of the model.
      parts: ``"fossils"`` keeps what is FOSSILIZED. ``"counting"`` also keeps whatever
        counts in the output now; one in GRAFTING keeps its present alpha.
      fold: whether to fold what can be folded.

    Raises:
      TypeError: if the model is no `nnx.Module`, or is traced or abstract.
      ValueError: if ``parts`` is none of the above, or a layer cannot be harvested; the
        message names it.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    if parts not in get_args(Parts):
        raise ValueError(f"parts must be one of {get_args(Parts)}, got {parts!r}")
    plain = nnx.clone(model)
    nodes = [(_name(path), node) for path, node in nnx.iter_graph(plain)]
    beds = {
        id(node): _kept(node, parts, name)
        for name, node in nodes
        if isinstance(node, SeedBed)
    }
    for name, node in nodes:
        _check_class(node, name)
    references = references_in([node for _, node in nodes])
    new: dict[int, Any] = {}
    # Inner layers come first: iter_graph yields a node after what it holds.
    for _, node in nodes:
        if isinstance(node, SeedBed):
            new[id(node)] = _corrections(node, beds[id(node)])
    for _, node in nodes:
        if isinstance(node, ChunkedLayer):
            base = new.get(id(node.base), node.base)
            kept = beds[id(node.bed)] if node.enabled else []
            stack = node.bed.probe.get_value().shape[:-1]
            folds = (
                fold
                and references[id(node.base)] == 1
                and takes_corrections(base, node.bed.layout.features, stack, references)
            )
            new[id(node)] = _plain_layer(base, node.bed, kept, folds)
    for _, node in nodes:
        if id(node) not in new:
            _replace_children(node, new)
    result = new.get(id(plain), plain)
    for path, node in nnx.iter_graph(result):
        if isinstance(node, ChunkedLayer | SeedBed):
            raise ValueError(
                f"layer {_name(path)!r} cannot be replaced where it is; hold it in an "
                "attribute, a list, a tuple, a dictionary, nnx.List or nnx.Dict"
            )
    return result


@dataclasses.dataclass(frozen=True)
class _Part:
    """A grown part that is kept: layer of the stack, seed, slot and what it grew."""

    at: tuple[int, ...]
    seed: int
    slot: int
    kind: int
    alpha: float


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _check_class(node: Any, name: str) -> None:
    for kind in (ChunkedLayer, SeedBed):
        if isinstance(node, kind) and type(node).__call__ is not kind.__call__:
            raise ValueError(
                f"layer {name!r}: {type(node).__name__} has a __call__ of its own, "
                f"which harvest cannot keep. Wrap a layer in a plain {kind.__name__}, "
                "and hold that in a module that does the rest"
            )


def _kept(bed: SeedBed, parts: Parts, name: str) -> list[_Part]:
    """The parts of a bed that are kept, in the order of stack and seeds."""
    seeds = bed.seeds.get_value()
    traced = isinstance(seeds.stage, jax.core.Tracer)
    if traced or not isinstance(seeds.stage, jax.Array | np.ndarray):
        raise TypeError(
            f"layer {name!r} is {'traced' if traced else 'abstract'}: call harvest on "
            "a model with values, outside of jax.jit and other transforms, since the "
            "shapes of its result depend on the seeds"
        )
    stack_of(bed, f"layer {name!r}")
    alpha = np.asarray(coefficients(seeds)[0])
    chosen = alpha != 0
    if parts == "fossils":
        chosen &= np.asarray(seeds.stage) == Stage.FOSSILIZED
    owners, kinds = np.asarray(seeds.seed_of_slot), np.asarray(seeds.blueprint)
    found = []
    for *at, slot in np.argwhere(owners >= 0).tolist():
        seed = int(owners[(*at, slot)])
        here = (*at, seed)
        kind = int(np.clip(kinds[here], 0, len(bed.blueprints) - 1))
        if chosen[here] and not _is_empty(bed.blueprints[kind]):
            found.append(_Part(tuple(at), seed, slot, kind, float(alpha[here])))
    return sorted(found, key=lambda part: (part.at, part.seed))


def _is_empty(blueprint: Blueprint) -> bool:
    """Whether it is one like `noop`, which changes nothing."""
    return isinstance(blueprint, Dense) and not (
        blueprint.expansion or blueprint.bias or blueprint.scale
    )


def _plain_layer(base: Any, bed: SeedBed, kept: list[_Part], folds: bool) -> Any:
    """What a `ChunkedLayer` becomes.

    Args:
      base: of the layer, itself plain already. Its weights are changed where something
        is folded.
      bed: of the layer.
      kept: parts to keep.
      folds: whether to fold into the base what it takes.
    """
    kinds = {part.kind for part in kept}
    # What reads the whole output must find it without the others' corrections.
    whole = any(bed.blueprints[kind].reads == "layer" for kind in kinds)
    folded = {
        kind
        for kind in kinds
        if folds
        and not whole
        and product_of(base, bed.layout.features).takes(bed.blueprints[kind])
    }
    # An adapter writes every feature: folded, what reads a chunk would find it there.
    if any(bed.blueprints[kind].reads == "chunk" for kind in kinds - folded):
        adapters = {k for k in kinds if isinstance(bed.blueprints[k], Adapter)}
        folded -= adapters
    if folded:
        taken = [part for part in kept if part.kind in folded]
        of_chunks = [p for p in taken if isinstance(bed.blueprints[p.kind], Dense)]
        form = form_over(base, bed.layout.features)
        fold_into(base, [_linear(bed, part) for part in of_chunks], form)
        for _, params in _branches(bed, [p for p in taken if p not in of_chunks]):
            fold_branch(base, params, form)
        kept = [part for part in kept if part.kind not in folded]
    return CorrectedLayer(base, _corrections(bed, kept)) if kept else base


def _linear(bed: SeedBed, part: _Part) -> LinearPart:
    width = int(bed.layout.sizes[part.seed])
    at = (*part.at, part.slot)
    slot = jax.tree.map(lambda leaf: leaf[at], bed.bank.get_value())
    return LinearPart(
        at=part.at,
        start=int(bed.layout.starts[part.seed]),
        width=width,
        alpha=part.alpha,
        params=_own(slot, bed.blueprints[part.kind], width, bed.layout.width),
    )


def _corrections(bed: SeedBed, kept: list[_Part]) -> Corrections:
    """Parts of one blueprint and width together, so that each group is one batch."""
    layout = bed.layout
    stack = bed.probe.get_value().shape[:-1]
    groups: dict[tuple[int, int], list[_Part]] = {}
    of_chunks = [p for p in kept if not isinstance(bed.blueprints[p.kind], Adapter)]
    for part in of_chunks:
        # Custom blueprints are made for the widest chunk, and stacks share one shape.
        cut = isinstance(bed.blueprints[part.kind], Dense) and not stack
        width = int(layout.sizes[part.seed]) if cut else layout.width
        groups.setdefault((part.kind, width), []).append(part)
    return Corrections(
        layout.features,
        [
            _group(bed, stack, width, _of_chunks(bed.blueprints[kind]), parts)
            for (kind, width), parts in groups.items()
        ],
        [
            Branch(adapter.reads, adapter.activation, params)
            for adapter, params in _branches(
                bed, [part for part in kept if part not in of_chunks]
            )
        ],
    )


def _of_chunks(blueprint: Blueprint) -> Dense | Custom:
    assert not isinstance(blueprint, Adapter)
    return blueprint


def _branches(bed: SeedBed, kept: list[_Part]) -> list[tuple[Adapter, dict[str, Any]]]:
    """What writes the whole layer: each adapter, with the arrays of its `Branch`."""
    found = []
    for kind in sorted({part.kind for part in kept}):
        blueprint = bed.blueprints[kind]
        assert isinstance(blueprint, Adapter)
        parts = [part for part in kept if part.kind == kind]
        found.append((blueprint, _side_by_side(bed, blueprint, parts)))
    return found


def _side_by_side(
    bed: SeedBed, blueprint: Adapter, parts: list[_Part]
) -> dict[str, Array]:
    """The hidden units of parts of one adapter."""
    bank, _, alpha = _taken(bed, bed.probe.get_value().shape[:-1], parts)
    params = bank.custom[blueprint.name]
    weight = jnp.asarray(alpha * blueprint.scaling)[..., None]
    w1, w2 = jnp.swapaxes(params["w1"], -3, -2), params["w2"] * weight[..., None]
    joined = {
        "w1": w1.reshape(*w1.shape[:-2], -1),
        "w2": w2.reshape(*w2.shape[:-3], -1, w2.shape[-1]),
    }
    if blueprint.bias:
        joined["b1"] = params["b1"].reshape(*params["b1"].shape[:-2], -1)
        joined["b2"] = jnp.sum(params["b2"] * weight, axis=-2)
    return joined


def _group(
    bed: SeedBed,
    stack: tuple[int, ...],
    width: int,
    blueprint: Dense | Custom,
    parts: list[_Part],
) -> Correction:
    """The given parts as one batch, padded where layers of a stack have fewer."""
    bank, seeds, alpha = _taken(bed, stack, parts)
    params = _own(bank, blueprint, width, bed.layout.width)
    return Correction(blueprint, bed.layout, width, (seeds, alpha), params)


def _taken(
    bed: SeedBed, stack: tuple[int, ...], parts: list[_Part]
) -> tuple[Bank, np.ndarray, np.ndarray]:
    """Parameters, seeds and alphas of parts, padded where layers of a stack have fewer.

    The padding has parameters of 0, seed -1 and alpha 0.
    """
    of_layer = collections.Counter(part.at for part in parts)
    shape = (*stack, max(of_layer.values()))
    slots, seeds = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    alpha = np.zeros(shape, np.float32)
    filled: collections.Counter[tuple[int, ...]] = collections.Counter()
    for part in parts:
        index = (*part.at, filled[part.at])
        slots[index], seeds[index], alpha[index] = part.slot, part.seed, part.alpha
        filled[part.at] += 1
    rows = (*(axis[..., None] for axis in np.indices(stack)), slots)

    def take(leaf: Array) -> Array:
        taken = leaf[rows]
        used = (seeds >= 0).reshape(*shape, *[1] * (taken.ndim - len(shape)))
        return taken if used.all() else jnp.where(used, taken, 0)

    return jax.tree.map(take, bed.bank.get_value()), seeds, alpha


def _own(bank: Bank, blueprint: Blueprint, width: int, widest: int) -> Any:
    """The parameters that a blueprint has over a chunk of ``width``, and no others."""
    if not isinstance(blueprint, Dense):
        return bank.custom[blueprint.name]
    hidden = blueprint.hidden(widest)
    own = {}
    if hidden:
        own["w1"] = bank.w1[..., :width, :hidden]
        own["w2"] = bank.w2[..., :hidden, :width]
    if hidden and blueprint.bias:
        own["b1"] = bank.b1[..., :hidden]
    if blueprint.bias:
        own["b2"] = bank.b2[..., :width]
    if blueprint.scale:
        own["scale"] = bank.scale[..., :width]
    return own


def _replace_children(parent: Any, new: Mapping[int, Any]) -> None:
    """Puts what ``new`` holds by id in the place of a node's children."""
    if isinstance(parent, list | nnx.List):
        for index, child in enumerate(parent):
            if (swapped := _swapped(child, new)) is not child:
                parent[index] = swapped
    elif isinstance(parent, dict):
        for key, child in parent.items():
            if (swapped := _swapped(child, new)) is not child:
                parent[key] = swapped
    elif isinstance(parent, nnx.Pytree):
        for key, child in list(vars(parent).items()):
            if (swapped := _swapped(child, new)) is not child:
                setattr(parent, key, swapped)


def _swapped(child: Any, new: Mapping[int, Any]) -> Any:
    """``child``, or what stands for it; tuples cannot be changed in place."""
    if isinstance(child, tuple) and not hasattr(child, "_fields"):
        swapped = tuple(_swapped(each, new) for each in child)
        same = all(a is b for a, b in zip(swapped, child, strict=True))
        return child if same else nnx.data(swapped)
    return new.get(id(child), child)
