"""Writes the model of a run, without seeds and slots, in a form that others read."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esper_jax.layers.corrections import Branch, Correction
from esper_jax.layers.harvest import Parts, harvest
from esper_jax.run.folder import RunError, RunFolder, read_config
from esper_jax.run.own import one_batch
from esper_jax.run.run import restore_run
from esper_jax.train.calls import called

__all__ = ["Format", "export_run"]

Format = Literal["safetensors", "stablehlo", "orbax"]
"""What `export_run` writes: a file of named arrays, a program for any number of rows,
or an Orbax directory."""

_PACKAGES = {"safetensors": "safetensors", "stablehlo": "flatbuffers"}
"""Optional packages, by the format that needs them."""

_PLATFORMS = ("cpu", "cuda", "tpu")


def export_run(
    run: Path, form: Format, out: Path | None = None, *, parts: Parts = "fossils"
) -> dict[str, Any]:
    """Harvests the newest sound checkpoint of a run and writes the model.

    Args:
      run: folder of the run; not changed.
      form: ``"safetensors"``: arrays by their dotted path in the model; the metadata
        say, by the path of each group of corrections, the first feature of each part's
        chunk, their width and how much they count.
        ``"stablehlo"``: what `jax.export.deserialize` reads, a function of the inputs
        with a symbolic number of rows, for cpu, cuda and tpu. ``"orbax"``: what
        `StandardCheckpointer` restores, the pure dictionary of the model.
      out: what to write; must not exist. Default: beside the run, named after it.
      parts: as in `harvest`.

    Returns:
      The path, the format, the checkpoint's step and the number of parameters.

    Raises:
      RunError: if ``run`` holds no run, ``out`` exists or cannot be written, or an
        optional package is missing. Nothing has been written then.
      CheckpointError: if there is no sound checkpoint.
    """
    if form not in get_args(Format):
        raise RunError(f"format must be one of {get_args(Format)}, got {form!r}")
    home = run.resolve()
    target = home.with_name(f"{home.name}.{form}") if out is None else out.resolve()
    if target.exists() or target.is_symlink():
        raise RunError(f"{target} exists: choose another --out, or remove it")
    package = _PACKAGES.get(form)
    if package and importlib.util.find_spec(package) is None:
        raise RunError(
            f"--format {form} needs the package {package}, which is not installed: "
            "pip install 'esper-jax[export]'"
        )
    folder = RunFolder(run)
    config = read_config(folder)
    if form == "stablehlo" and config.train.objective:
        raise RunError(
            "--format stablehlo: only train.objective knows what the model is called "
            "with; export another format, or program.model(state) with jax.export"
        )
    program, data, found = restore_run(folder)
    model = harvest(program.model(found.state), parts=parts)
    model.eval()
    batch = one_batch("train", data.train, config.train.batch_size)
    _write(target, lambda path: _WRITERS[form](path, model, batch))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return {
        "path": str(target),
        "format": form,
        "step": int(found.step),
        "parameters": sum(int(np.size(leaf)) for leaf in leaves),
    }


def _write(target: Path, write: Callable[[Path], None]) -> None:
    """Writes a file or folder as a whole or not at all."""
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(scratch)
        write(scratch)
        scratch.rename(target)
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror}): choose another --out"
        ) from None
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)


def _safetensors(path: Path, model: nnx.Module, batch: Any) -> None:
    from safetensors.numpy import save

    arrays = {
        ".".join(map(str, at)): np.asarray(variable.get_value())
        for at, variable in nnx.to_flat_state(nnx.state(model))
    }
    path.write_bytes(save(arrays, metadata=_described(model)))


def _described(model: nnx.Module) -> dict[str, str]:
    """What the arrays of each correction and branch do, as JSON by its path."""
    described = {}
    for at, node in nnx.iter_graph(model):
        if isinstance(node, Correction) and isinstance(node.seeds, tuple):
            content = {
                "blueprint": node.blueprint.name,
                "starts": node.layout.starts[list(node.seeds)].tolist(),
                "width": node.width,
                "alpha": node.alpha,
            }
            described[".".join(map(str, at))] = json.dumps(content)
        if isinstance(node, Branch):
            content = {"reads": node.reads, "activation": node.activation}
            described[".".join(map(str, at))] = json.dumps(content)
    return described


def _stablehlo(path: Path, model: nnx.Module, batch: Any) -> None:
    [rows] = jax.export.symbolic_shape("rows")
    x = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), jnp.dtype(a.dtype)),
        batch[0],
    )
    call = jax.jit(lambda x: called(model, x))
    path.write_bytes(jax.export.export(call, platforms=_PLATFORMS)(x).serialize())


def _orbax(path: Path, model: nnx.Module, batch: Any) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()


_WRITERS = {"safetensors": _safetensors, "stablehlo": _stablehlo, "orbax": _orbax}
