"""The rules of the house: what may import what, how long things are, what is public.

They are read from the source, so that a rule which is broken names the line.
"""

import ast
import functools
import importlib
import json
import pathlib
import re
from collections.abc import Iterator

import pytest

import esper_jax

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (
    ("_early", "chunks", "groups", "trees", "bits", "markup", "optim", "data"),
    ("lifecycle",),
    ("blueprints",),
    ("parallel",),
    ("kernels",),
    ("layers", "hosts"),
    ("policy",),
    ("growth",),
    ("train",),
    ("migrations",),
    ("checkpoint",),
    ("monitor",),
    ("bus",),
    ("run",),
    ("learning",),
    ("rollout",),
    ("commands", "cli"),
    # The package's own names, its command, and the import paths of version 0.1.
    ("__init__", "__main__", "_old_paths"),
)
"""From the ground up. A module imports from its own floor and from those below."""

FILE_LINES, FUNCTION_LINES, PARAMETERS, INIT_LINES = 420, 65, 7, 60

CONSTRUCTORS = "a public entry point: each parameter is a choice of the user's, by name"
LONG_LISTS = {
    "esper_jax/layers/bed.py:SeedBed.__init__": CONSTRUCTORS,
    "esper_jax/layers/growable.py:make_growable": CONSTRUCTORS,
    "esper_jax/growth/transformation.py:Growth.__init__": CONSTRUCTORS,
    "esper_jax/train/program.py:build": CONSTRUCTORS,
    "esper_jax/train/loop.py:fit": CONSTRUCTORS,
    "esper_jax/train/scan.py:scan_fit": CONSTRUCTORS,
    "esper_jax/run/run.py:train_run": CONSTRUCTORS,
    "kernels/blend/api.py:blend": CONSTRUCTORS,
}
"""Functions with more than `PARAMETERS` parameters, and why they may."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def sources(*folders: str) -> dict[str, ast.Module]:
    """Every file of the folders by its path from the root, parsed."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text())
        for path in sorted(files)
        if not path.is_relative_to(ROOT / "esper_jax" / "kernels")  # a link
    }


def package() -> dict[str, ast.Module]:
    """Every module of esper_jax by its dotted name without the package's."""
    named = {}
    for path, tree in sources("esper_jax", "kernels").items():
        parts = pathlib.PurePath(path.removeprefix("esper_jax/")).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        named[".".join(parts)] = tree
    return named


def imports(tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[str]:
    """The modules of esper_jax that a module imports from, wherever in it."""

    def module(name: str) -> str:
        return name.removeprefix("esper_jax").removeprefix(".") or "__init__"

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "esper_jax":
                    yield module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            if (node.module or "").split(".")[0] == "esper_jax":
                for alias in node.names:
                    inner = module(f"{node.module}.{alias.name}")
                    yield inner if inner in modules else module(node.module or "")


def floor(module: str) -> int:
    """The number of the floor that a module stands on."""
    room = module.split(".")[0]
    [number] = [i for i, rooms in enumerate(FLOORS) if room in rooms] or [-1]
    return number


def test_every_module_stands_on_a_floor() -> None:
    assert not [name for name in package() if floor(name) < 0]


def test_no_import_reaches_up() -> None:
    modules = package()
    reach = [
        f"{name} imports {other}"
        for name, tree in modules.items()
        for other in imports(tree, modules)
        if floor(other) > floor(name)
    ]
    assert not reach, "\n".join(reach)


def test_no_imports_go_in_a_circle() -> None:
    modules = package()
    above = {
        name: set(imports(tree, modules)) - {name} for name, tree in modules.items()
    }
    # Takes away what imports nothing of the rest, and what nothing of it imports.
    while True:
        needed = set().union(*above.values())
        free = {n for n, others in above.items() if not others or n not in needed}
        if not free:
            break
        above = {n: others - free for n, others in above.items() if n not in free}
    assert not above, f"imports go in a circle: {above}"


def test_no_import_is_for_the_type_checker_alone() -> None:
    guarded = [
        name
        for name, tree in package().items()
        if any(
            getattr(node, "id", getattr(node, "attr", "")) == "TYPE_CHECKING"
            for node in ast.walk(tree)
        )
    ]
    assert not guarded


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Every function of a module, those of classes and of functions too, by name."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, Function | ast.ClassDef):
            name = f"{inside}.{node.name}" if inside else node.name
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, name)


def everything() -> Iterator[tuple[str, Function]]:
    for path, tree in sources("esper_jax", "kernels", "benchmarks").items():
        for name, function in functions(tree):
            yield f"{path}:{name}", function


def length(function: Function) -> int:
    """Lines from ``def`` to the end, without those of the docstring."""
    lines = function.end_lineno - function.lineno + 1  # type: ignore[operator]
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1  # type: ignore[operator]
    return lines


def parameters(function: Function) -> int:
    of = function.args
    names = [a.arg for a in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    more = [a for a in (of.vararg, of.kwarg) if a is not None]
    return len([n for n in names if n not in ("self", "cls")]) + len(more)


def test_files_are_short() -> None:
    lengths = {
        path: len((ROOT / path).read_text().splitlines())
        for path in sources("esper_jax", "kernels", "benchmarks")
    }
    long = [f"{path}: {n} lines" for path, n in lengths.items() if n > FILE_LINES]
    assert not long, "\n".join(long)


def test_functions_are_short() -> None:
    long = [
        f"{name}: {length(function)} lines"
        for name, function in everything()
        if length(function) > FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_lists_of_parameters_are_short() -> None:
    counts = {name: parameters(function) for name, function in everything()}
    long = [
        f"{name}: {n} parameters"
        for name, n in counts.items()
        if n > PARAMETERS and name not in LONG_LISTS
    ]
    assert not long, "\n".join(long)
    needless = [name for name in LONG_LISTS if counts.get(name, 0) <= PARAMETERS]
    assert not needless, f"take out of the list of exceptions: {needless}"


def public(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def test_what_is_public_is_documented() -> None:
    bare = [
        f"{path}:{node.lineno} {node.name}"  # type: ignore[attr-defined]
        for path, tree in sources("esper_jax", "kernels").items()
        for node in public(tree)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    bare += [
        f"{path}: the module"
        for path, tree in sources("esper_jax", "kernels", "benchmarks").items()
        if not ast.get_docstring(tree)
    ]
    assert not bare, "\n".join(bare)


def listed(tree: ast.Module) -> list[str] | None:
    """``__all__`` of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [
            t.id for t in node.targets if isinstance(t, ast.Name)
        ] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


def test_what_is_public_is_in_all_and_is_there() -> None:
    wrong = []
    for name, tree in package().items():
        names = listed(tree)
        if names is None:
            wrong += [f"{name}: no __all__" for _ in list(public(tree))[:1]]
            continue
        dotted = "esper_jax" if name == "__init__" else f"esper_jax.{name}"
        if "triton" not in name:  # Its backend of JAX may be gone.
            module = importlib.import_module(dotted)
            wrong += [f"{name}: no {n}" for n in names if not hasattr(module, n)]
        wrong += [
            f"{name}: {node.name} is not in __all__"  # type: ignore[attr-defined]
            for node in public(tree)
            if node.name not in names  # type: ignore[attr-defined]
        ]
    assert not wrong, "\n".join(wrong)


def test_the_package_s_own_file_is_short() -> None:
    lines = (ROOT / "esper_jax" / "__init__.py").read_text().splitlines()
    assert len(lines) <= INIT_LINES


PATHS = json.loads((ROOT / "tests" / "fixtures" / "paths_v0.1.json").read_text())
"""Each module of version 0.1, and the names that were public in it."""


@pytest.mark.parametrize("module", PATHS)
def test_import_paths_of_version_0_1_still_work(module: str) -> None:
    imported = importlib.import_module(module)
    gone = [name for name in PATHS[module] if not hasattr(imported, name)]
    assert not gone
    if module == "esper_jax":
        assert set(PATHS[module]) <= set(esper_jax.__all__)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_table_or_a_link_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    rows = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    named = [
        word
        for row in rows
        for word in re.findall(r"`([^`\s]+)`", row)
        if not word.startswith(".")
        and ("/" in word or word.endswith((".py", ".md", ".toml")))
    ]
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", text)
    if page == "CONTRIBUTING.md":
        assert named, "the table of changes and the files that they take is missing"
    # A path may begin at the root or in the package, and may leave a name or the
    # number of the next schema open.
    homes = (ROOT, ROOT / "esper_jax")
    named = [re.sub(r"\bNAME\b|(?<=/v)[0-9]+(?=\.py)", "*", name) for name in named]
    gone = [
        name
        for name in [*named, *links]
        if not any((home / name).exists() or [*home.glob(name)] for home in homes)
    ]
    assert not gone
