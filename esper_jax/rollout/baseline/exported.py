"""Programs that can be run again: a step and a tick as StableHLO, with their inputs.

`jax.export` writes a program as it was traced. Later code, and a later JAX within its
six months of compatibility, can compile and run it as it stands, so an old step can be
timed beside today's without the old code. What is not in it: the time to trace it,
Python's overhead of a call, and the versions of XLA that it was once compiled with.
"""

import contextlib
import dataclasses
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.run.folder import RunError
from esper_jax.trees import is_key

__all__ = ["Compiled", "Exported", "compiled", "export_program", "load", "occupied"]

_PLATFORMS = {"gpu": ("cuda", "rocm")}
"""What `jax.export` calls a backend, where it is something else."""

_TRITON = ("__gpu$xla.gpu.triton", "triton_kernel_call")
"""Custom calls without a promise for the future, which our own kernels are."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program of a state and data, and what it is called with.

    Args:
      program: a function of two lists of arrays; the first is donated.
      state: the arrays of the state.
      data: the arrays of a batch, or of the held-out data.
    """

    program: jax.export.Exported
    state: Sequence[np.ndarray]
    data: Sequence[np.ndarray]

    @property
    def text(self) -> str:
        """The program in words, without the places of the source that it came from."""
        return self.program.mlir_module()

    def save(self, path: Path) -> None:
        """Writes ``path.stablehlo`` and ``path.npz``. Needs flatbuffers."""
        path.with_suffix(".stablehlo").write_bytes(self.program.serialize())
        arrays = [*self.state, *self.data]
        # Bytes, as NumPy does not know all of JAX's dtypes again.
        raw = {
            f"{i:06d}": np.frombuffer(a.tobytes(), np.uint8)
            for i, a in enumerate(arrays)
        }
        np.savez(path.with_suffix(".npz"), **raw)  # type: ignore[arg-type]


def load(path: Path) -> Exported:
    """Reads what `Exported.save` has written.

    Raises:
      RunError: if it is not there, damaged, or of a JAX that this one cannot read.
    """
    try:
        data = path.with_suffix(".stablehlo").read_bytes()
        program = jax.export.deserialize(bytearray(data))
        with path.with_suffix(".npz").open("rb") as file, np.load(file) as raw:
            arrays = [
                raw[f"{i:06d}"].view(jnp.dtype(aval.dtype)).reshape(aval.shape)
                for i, aval in enumerate(program.in_avals)
            ]
    except (OSError, KeyError, ValueError, struct.error, zipfile.BadZipFile) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise RunError(
            f"{path}.stablehlo and .npz cannot be used: {first}. A program can be read "
            "for six months, and by its own JAX for ever; save the baseline again from "
            "the code that it was of"
        ) from None
    (state, data_in), _ = jax.tree.unflatten(program.in_tree, arrays)
    return Exported(program, state, data_in)


def export_program(function: Callable[..., Any], state: Any, data: Any) -> Exported:
    """Exports ``function(state, data)`` for this platform.

    Args:
      function: as `train.Program.step`; the new state is the first that it returns.
      state: pytree of arrays and random keys; not used up.
      data: the same.

    Raises:
      RunError: if the program holds something that cannot be exported.
    """
    trees = jax.tree.structure(state), jax.tree.structure(data)
    leaves = jax.tree.leaves(state), jax.tree.leaves(data)
    keys = [
        [jax.random.key_impl(x) if is_key(x) else None for x in of] for of in leaves
    ]

    def call(*bare: Sequence[Any]) -> list[Any]:
        whole = [
            jax.tree.unflatten(
                tree,
                [
                    x if key is None else jax.random.wrap_key_data(x, impl=key)
                    for x, key in zip(of, impls, strict=True)
                ],
            )
            for tree, of, impls in zip(trees, bare, keys, strict=True)
        ]
        return [_bare(x) for x in jax.tree.leaves(function(*whole))]

    given = [[_bare(x) for x in of] for of in leaves]
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _TRITON]
    try:
        program = jax.export.export(
            jax.jit(call, donate_argnums=0), disabled_checks=checks
        )(*given)
    except (ValueError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0][:300]
        raise RunError(f"this program cannot be exported: {first}") from error
    held = [[np.asarray(x) for x in of] for of in given]
    return Exported(program, *held)


def _bare(x: Any) -> Any:
    """An array; of a random key its words."""
    return jax.random.key_data(x) if is_key(x) else jnp.asarray(x)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An `Exported` program on this machine.

    Args:
      exported: where it came from.
      run: the executable.
      seconds: that XLA took to compile it.
      memory: bytes that it needs at once: arguments, results and scratch; 0 where XLA
        does not tell.
    """

    exported: Exported
    run: Callable[..., Any]
    seconds: float
    memory: int

    def replay(self, count: int) -> list[Callable[[], Any]]:
        """The first ``count`` steps, from the saved state on; see `timing.Replay`."""
        data = [jnp.asarray(x) for x in self.exported.data]
        # Copies: the first step uses its state up, and must not share NumPy's memory.
        held = jax.block_until_ready([jnp.array(x) for x in self.exported.state])
        size = len(held)

        def call() -> Any:
            nonlocal held
            result = self.run(held, data)
            held = result[:size]
            return result

        return [call] * count


def compiled(exported: Exported) -> Compiled:
    """Compiles a program, without JAX's cache of compiled ones.

    Raises:
      RunError: if the program is of another kind of device.
    """
    here = jax.default_backend()
    platforms = exported.program.platforms
    if not {here, *_PLATFORMS.get(here, ())} & {*platforms}:
        raise RunError(
            f"the program is for {', '.join(platforms)}, and this device is {here}"
        )
    call = jax.jit(exported.program.call, donate_argnums=0)
    lowered = call.lower(list(exported.state), list(exported.data))
    with _no_cache():
        start = time.perf_counter()
        run = lowered.compile()
        seconds = time.perf_counter() - start
    needs = run.memory_analysis()
    memory = (
        0
        if needs is None
        else (
            needs.argument_size_in_bytes
            + needs.output_size_in_bytes
            - needs.alias_size_in_bytes
            + needs.temp_size_in_bytes
        )
    )
    return Compiled(exported, run, seconds, memory)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def occupied(state: TrainState) -> TrainState:
    """The state with a living seed in every slot, in FINE_TUNING: it counts and learns.

    A fresh model has none, and a slower blueprint would not be seen.
    """

    def alive(seeds: SeedState) -> SeedState:
        living = jnp.arange(seeds.capacity, dtype=seeds.seed_of_slot.dtype)
        number = seeds.capacity
        return dataclasses.replace(
            seeds,
            stage=seeds.stage.at[:number].set(int(Stage.FINE_TUNING)),
            slot_of_seed=seeds.slot_of_seed.at[:number].set(living),
            seed_of_slot=seeds.seed_of_slot.at[:number].set(living),
        )

    return dataclasses.replace(
        state, seeds={name: alive(s) for name, s in state.seeds.items()}
    )
