"""`ChunkedLayer`: a Flax NNX module that lets any layer grow."""

import inspect
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax.kernels.blend import takes_bias
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.bias import without_bias
from esper_jax.layers.inputs import (
    check_readers,
    features_read,
    input_of,
    input_width,
)
from esper_jax.layers.matrix_form import check_equation, form_over
from esper_jax.layers.output import Output, check_output, find_output, with_output
from esper_jax.lifecycle.state import coefficients

__all__ = ["ChunkedLayer"]


class ChunkedLayer(nnx.Module):
    """A layer that can grow.

    While all seeds are dormant or in TRAINING, output and gradients are bit-identical
    to the base layer's.

    Seeds act on the result of a call only. Other methods of the base (``attend`` of
    `nnx.Embed`, an ``encode``) work through the layer, but return what the base alone
    computes, without the seeds. Reading one warns if a seed counts or may come to
    count; read it from ``layer.base`` where that is meant. To let it grow, too, make a
    module growable whose call computes it ("Tied embeddings" in docs/blueprints.md).

    Args:
      base: any callable module whose output has its features on the last axis. You can
        read and set its attributes through the layer: ``layer.kernel = ...`` sets the
        kernel of the base, also in a subclass. The layer's own attributes are ``base``,
        ``bed`` and ``enabled``.
      num_seeds: number of chunks that the features are cut into, one seed each.
      features: width of the output; by default read from the base layer
        (``out_features``, ``features`` or ``num_features``). An `nnx.LinearGeneral` or
        `nnx.Einsum` may have several axes of features, as (heads, head_dim). If a
        blueprint reads the layer's input, all of them grow as one axis: with as many
        seeds as heads, each chunk is a head. Otherwise the last one grows, and each
        head is a row; give the product of their sizes to have one axis there, too.
      output: which array of the base's output grows, if it returns several: an index
        of a tuple or list, a key of a dictionary, the name of a dataclass's field, or a
        tuple of these that leads to a nested array, or a function from the output to
        one of its arrays. The rest is returned as it is, in
        the same containers. By default an output that is no tuple or list must be the
        array itself; of a tuple or list, the first element that is an array with
        ``features`` on its last axis grows.
      enabled: if False, a call runs the base layer alone.
      rngs: its key ``params`` draws the first bank.
      **options: further arguments of `SeedBed`. ``inputs`` is read from the layer if
        blueprints can read its input (`inputs.input_width` says of which layers). Give
        it for a layer of your own whose first argument has that many features on its
        last axis and otherwise the shape of the output.

    Raises:
      TypeError: if ``features`` is not given and the base layer does not tell it.
      TypeError, ValueError: if an argument does not fit, which the message names; by a
        call, if the base layer's output has another width or no such ``output``.
    """

    def __init__(
        self,
        base: Callable[..., Any],
        num_seeds: int,
        *,
        features: int | None = None,
        output: Output = None,
        enabled: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        blueprints = options.get("blueprints", ())
        if features is None:
            features = features_read(base, blueprints) or _output_features(base)
        check_output(output)
        options.setdefault("inputs", input_width(base, features))
        check_readers(blueprints, options["inputs"], base)
        self.base = base
        self.enabled = enabled
        # Private, since layers with an attribute called "output" are common.
        self._output = output
        self.bed = SeedBed(features, num_seeds, rngs=rngs, **options)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for attributes that the layer itself lacks.
        # nnx.view asks every module for set_view, so it finds the base's own by itself.
        if name.startswith("_") or name in ("base", "set_view"):
            raise AttributeError(name)
        value = getattr(self.base, name)
        if inspect.ismethod(value) and value.__self__ is self.base and self._counts():
            warnings.warn(
                f"{type(self.base).__name__}.{name} is a method of the base layer: it "
                "computes without the seeds, which act on the layer's calls only. Read "
                f"layer.base.{name} if that is meant. To let it grow, too, make a "
                "small module growable that computes it when called, from the same "
                "variables: 'Tied embeddings' in docs/blueprints.md",
                stacklevel=2,
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Writes go where reads look: an attribute that only the base has is set there.
        own = name in ("base", "bed", "enabled") or name in vars(self)
        own = own or name.startswith("_") or hasattr(type(self), name)
        base = vars(self).get("base")
        if own or base is None or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output on the same arguments, with the seeds blended in."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        name, features = type(self.base).__name__, self.bed.layout.features
        form, hook = form_over(self.base, features), None
        reads = self.bed.reads_input
        check_equation(self.base, form, args, kwargs, reads)
        if args and reads:
            x, hook = self.bed.tapped(form.input_rows(args[0]))
            args = args if hook is None else (form.input_from(x), *args[1:])
        y, bias = self._base_output(*args, **kwargs)
        y = form.output_rows(y)
        path = find_output(y, vars(self).get("_output"), features, name)

        def grow(y: Any) -> Any:
            if not reads:
                return self.bed(y, bias)
            x = input_of(self.base, args, kwargs, y.dtype, form)
            return self.bed(y, bias, x, hook)

        return form.output_from(with_output(y, path, grow))

    def _base_output(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The base layer's output, and None; or the output before the bias, and that.

        Kernels overwrite their input. With its bias apart, that is the matrix product
        itself, and XLA fuses the sum with what follows, as in a layer that cannot grow.
        """
        bed, apart = self.bed, None
        if len(args) == 1 and not kwargs:
            apart = without_bias(self.base, args[0], bed.layout.features)
        if apart is None or not takes_bias(
            apart[1].dtype,
            bed.probe.shape[-1],
            layout=bed.layout,
            blueprints=bed.blueprints,
            incubation=bed.incubation,
            implementation=bed.implementation,
        ):
            return self.base(*args, **kwargs), None
        layer, bias = apart
        y = layer(*args)
        if y.dtype != bias.dtype:  # by a product of the user's own
            return y + bias, None
        return y, bias

    def _repr_html_(self) -> str:
        return self.bed._repr_html_()

    def _counts(self) -> bool:
        """Whether a seed counts in the output, as far as can be known while tracing."""
        if not self.enabled:
            return False
        seeds = self.bed.seeds.get_value()
        if not isinstance(seeds.stage, jax.Array):  # a model without values
            return False
        alpha, _ = coefficients(seeds)
        return isinstance(alpha, jax.core.Tracer) or bool(np.any(np.asarray(alpha)))


def _output_features(base: Any) -> int:
    for name in ("out_features", "features", "num_features"):
        value = getattr(base, name, None)
        if isinstance(value, tuple) and value:
            value = value[-1]
        if isinstance(value, numbers.Integral):
            return int(value)
    raise TypeError(
        f"features must be given: {type(base).__name__} has none of out_features, "
        "features, num_features that tells the width of its output"
    )
