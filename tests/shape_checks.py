"""Checks the shape annotations of esper_jax while the tests run.

`install` puts an import hook in place that decorates every function and method of the
package with `checked`. It has to be called before esper_jax is imported.

jaxtyping's own hook also checks the fields of dataclasses whenever one is made. That
breaks flax's containers: `jax.tree.map`, `jax.vmap` and `jax.eval_shape` rebuild them
with leaves that are no arrays. Here containers are looked into only where a function
takes or returns them. Arguments are checked after the call, so that a function's own
error for a bad argument comes first; a call that succeeds must match its annotations.
"""

import ast
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "esper_jax"


class WrongShapeError(AssertionError):
    """An array does not match its annotation."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """An array inside an argument, and the annotations of which one must hold."""

    path: str
    hints: tuple[Any, ...]
    value: Any


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _is_struct(hint: Any) -> bool:
    """Whether it is a flax dataclass or a named tuple."""
    return isinstance(hint, type) and (
        hasattr(hint, "_flax_dataclass") or hasattr(hint, "_fields")
    )


@functools.cache
def _field_hints(struct: type) -> dict[str, Any]:
    """Annotations of the fields that speak of arrays."""
    hints = typing.get_type_hints(struct, include_extras=True)
    names = getattr(struct, "_fields", None) or [
        field.name for field in dataclasses.fields(struct)
    ]
    return {n: hints[n] for n in names if n in hints and _says_something(hints[n])}


def _says_something(hint: Any) -> bool:
    """Whether an annotation names the shape of any array."""
    if _is_array(hint):
        return True
    if _is_struct(hint):
        return bool(_field_hints(hint))
    if typing.get_origin(hint) in (Callable, typing.Annotated):
        return False  # what is annotated so has other shapes than its class says
    return any(_says_something(part) for part in typing.get_args(hint))


def _pieces(hint: Any, value: Any, path: str, scope: Any) -> Iterator[Any]:
    """Every array of ``value`` that ``hint`` speaks of, as ``(scope, _Piece)``.

    Within a scope a letter is one size. A container is a scope, and so is a key of a
    mapping, in all arguments together: layers differ in their numbers of seeds.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if _is_array(hint):
        yield scope, _Piece(path, (hint,), value)
    elif _is_struct(hint):
        if isinstance(value, hint):
            for name, field in _field_hints(hint).items():
                yield from _pieces(field, getattr(value, name), f"{path}.{name}", path)
    elif origin in (typing.Union, types.UnionType):
        arrays = tuple(part for part in parts if _is_array(part))
        if arrays and hasattr(value, "shape"):
            yield scope, _Piece(path, arrays, value)
        for part in parts:
            if not _is_array(part):
                yield from _pieces(part, value, path, scope)
    elif origin is tuple and isinstance(value, tuple):
        each = parts[:1] * len(value) if parts[-1:] == (...,) else parts
        for i, (part, item) in enumerate(zip(each, value, strict=True)):
            yield from _pieces(part, item, f"{path}[{i}]", scope)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from _pieces(parts[1], item, f"{path}[{key!r}]", key)
    elif (
        isinstance(origin, type)
        and issubclass(origin, Sequence)
        and isinstance(value, list | tuple)
    ):
        for i, item in enumerate(value):
            yield from _pieces(parts[0], item, f"{path}[{i}]", scope)


def _check(name: str, hints: dict[str, Any], values: dict[str, Any]) -> None:
    scopes: dict[Any, list[_Piece]] = {}
    for argument, hint in hints.items():
        if argument in values:
            for scope, piece in _pieces(hint, values[argument], argument, None):
                scopes.setdefault(scope, []).append(piece)
    for pieces in scopes.values():
        with jaxtyped("context"):
            for piece in pieces:
                if not any(_matches(piece.value, hint) for hint in piece.hints):
                    expected = " or ".join(map(_spelled, piece.hints))
                    others = ", ".join(f"{p.path}: {_shown(p.value)}" for p in pieces)
                    raise WrongShapeError(
                        f"{name}: {piece.path} must be {expected}; got "
                        f"{_shown(piece.value)}, beside {others}"
                    )


@functools.cache
def _of_any_class(hint: Any) -> Any:
    # Of numpy or of jax, or a ShapeDtypeStruct: mypy looks at the class.
    return hint.dtype[Any, hint.dim_str]


def _matches(value: Any, hint: Any) -> bool:
    return hasattr(value, "shape") and isinstance(value, _of_any_class(hint))


def _spelled(hint: Any) -> str:
    return f"{hint.dtype.__name__}[{hint.dim_str}]"


def _shown(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {value.dtype}{list(value.shape)}"
    return repr(value)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the arguments and of the result that speak of arrays."""
    resolved = typing.get_type_hints(function, include_extras=True)
    hints = {name: h for name, h in resolved.items() if _says_something(h)}
    for kind in inspect.signature(function).parameters.values():
        if kind.name in hints and kind.kind is kind.VAR_POSITIONAL:
            hints[kind.name] = tuple[hints[kind.name], ...]
        if kind.name in hints and kind.kind is kind.VAR_KEYWORD:
            hints[kind.name] = list[hints[kind.name]]
    return hints


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which raises `WrongShapeError` where a call that succeeded does not
    match the annotations of its arguments and its result."""
    if not getattr(function, "__annotations__", None) or inspect.isgeneratorfunction(
        function
    ):
        return function
    signature = inspect.signature(function)
    name = f"{function.__module__}.{function.__qualname__}"
    hints: dict[str, Any] | None = None

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal hints
        result = function(*args, **kwargs)
        if hints is None:  # only now can names be resolved that come later in the file
            hints = hints_of(function)
        if hints:
            values = signature.bind(*args, **kwargs).arguments
            for kind in signature.parameters.values():
                if kind.name in values and kind.kind is kind.VAR_KEYWORD:
                    values[kind.name] = list(values[kind.name].values())
            _check(name, hints, {**values, "return": result})
        return result

    return wrapper


class _Decorate(ast.NodeTransformer):
    """Decorates functions of modules and classes; not those inside of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        # Innermost, so that jit, vmap and properties stay what they are.
        path = ast.parse(
            f"__import__('sys').modules[{__name__!r}].checked", mode="eval"
        )
        node.decorator_list.append(path.body)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        # Never from or into a .pyc file, which would outlive the tests.
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if type(spec.loader) is importlib.machinery.SourceFileLoader:
                    spec.loader = _Loader(spec.loader.name, spec.loader.path)
                return spec
        return None


def install() -> None:
    """Has every module of the package that is imported from now on checked."""
    already = [n for n in sys.modules if n.partition(".")[0] == PACKAGE]
    if already:
        raise RuntimeError(f"{already[0]} was imported before its shapes are checked")
    sys.meta_path.insert(0, _Finder())
