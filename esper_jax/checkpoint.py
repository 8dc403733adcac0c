"""Saving and restoring the training state with Orbax."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from esper_jax.functional import is_key

__all__ = ["restore", "save", "steps"]


def save(directory: Path, step: int, state: Any, keep: int) -> None:
    """Saves ``state`` as ``directory/step`` and removes all but the newest ``keep``.

    Blocks until it is on disk; a save that is cut off leaves no ``directory/step``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ocp.save(directory.resolve() / str(step), _plain(state), overwrite=True)
    for old in steps(directory)[:-keep]:
        shutil.rmtree(directory / str(old))


def steps(directory: Path) -> list[int]:
    """The steps that were saved, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit()
    )


def restore(directory: Path, step: int, like: Any) -> Any:
    """The state saved as ``directory/step``.

    Args:
      directory: as given to `save`.
      step: as given to `save`.
      like: a state of the same structure, shapes and dtypes.

    Raises:
      ValueError: if a leaf on disk has another shape or dtype than in ``like``.
    """
    path = directory.resolve() / str(step)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        _plain(like),
    )
    saved = ocp.load(path, abstract)
    for (where, want), got in zip(
        jax.tree_util.tree_leaves_with_path(abstract),
        jax.tree.leaves(saved),
        strict=True,
    ):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"checkpoint {path}: {jax.tree_util.keystr(where)} must be "
                f"{want.dtype}{want.shape}, got {got.dtype}{got.shape}"
            )

    def typed(leaf: Any, got: Any) -> Any:
        if is_key(leaf):
            return jax.random.wrap_key_data(got, impl=jax.random.key_impl(leaf))
        return jnp.asarray(got)

    return jax.tree.map(typed, like, saved)


def _plain(state: Any) -> Any:
    """Random keys as their data, which Orbax can save."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state
    )
