"""What can grow in a slot: small networks that correct one chunk.

A blueprint computes the correction ``r(y) = f(y) - y`` that it adds to its chunk, and a
newborn's correction is 0. The built-in ones are one form,

    r(y) = W2 act(W1 y + b1) + b2 + scale * y,

with some of its parts switched off, so that all of them share one set of arrays and one
kernel, and a seed's blueprint is a run-time number. `Custom` takes any function;
`glu`, `context` and `context_glu` are made with it. An `Adapter` (`group`, `neurons`,
`lora`) reads the whole layer's output or input, and writes the whole layer.

The `Bank` of a layer holds the parameters of its ``K`` slots.
"""

from esper_jax.blueprints.adapters import group, lora, neurons
from esper_jax.blueprints.aim import aim, aiming, aims, collect, collected
from esper_jax.blueprints.bank import (
    Bank,
    dense_masks,
    hidden_width,
    init_bank,
    init_slots,
)
from esper_jax.blueprints.costs import living_parameters, operations, param_counts
from esper_jax.blueprints.custom import context, context_glu, glu
from esper_jax.blueprints.dense import (
    affine,
    bottleneck,
    low_rank,
    noop,
    residual_mlp,
)
from esper_jax.blueprints.kinds import ACTIVATIONS, Adapter, Blueprint, Custom, Dense
from esper_jax.blueprints.registry import bound, register, registered, resolve

__all__ = [
    "ACTIVATIONS",
    "Adapter",
    "Bank",
    "Blueprint",
    "Custom",
    "Dense",
    "affine",
    "aim",
    "aiming",
    "aims",
    "bottleneck",
    "bound",
    "collect",
    "collected",
    "context",
    "context_glu",
    "dense_masks",
    "glu",
    "group",
    "hidden_width",
    "init_bank",
    "init_slots",
    "living_parameters",
    "lora",
    "low_rank",
    "neurons",
    "noop",
    "operations",
    "param_counts",
    "register",
    "registered",
    "residual_mlp",
    "resolve",
]
