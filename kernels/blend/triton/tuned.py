"""What was measured on devices: the tuned block sizes of the Triton kernels."""

from esper_jax.kernels.blend.triton.blocks import Blocks

__all__ = ["PACKED", "TUNED"]

_H100 = "NVIDIA H100 80GB HBM3"

TUNED: dict[tuple[str, str, int, int], dict[str, Blocks]] = {
    (_H100, "bfloat16", 64, 128): {
        "forward": Blocks(rows=64, across=128, programs=264, warps=4, stages=4),
        "backward": Blocks(rows=32, across=128, programs=132, warps=8, stages=4),
    },
    (_H100, "bfloat16", 128, 256): {
        "forward": Blocks(rows=64, across=64, programs=264, warps=4, stages=3),
        "backward": Blocks(rows=64, across=32, programs=264, warps=4, stages=3),
        "input": Blocks(rows=128, across=64, programs=264, warps=8, stages=3),
    },
}
"""Measured blocks by device kind, dtype, chunk width and hidden width.

Each entry holds the fields of `Config` that differ from those of the rule in
`esper_jax.kernels.blend.triton.config`. ``benchmarks/blend.py --tune`` finds them.
"""

PACKED = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")
"""First words of the kinds of devices that compute two activations an instruction."""
