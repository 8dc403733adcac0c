"""What README, docs and CONTRIBUTING say is true: snippets, links, keys, figures."""

import importlib.metadata
import io
import re
import runpy
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from esper_jax.run.config import RunConfig, load_config, to_dict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]
SUBJECTS = (
    "ab",
    "blueprints",
    "bus",
    "checkpoints",
    "command-line",
    "design",
    "devices",
    "flags",
    "learned",
    "lifecycle",
    "monitoring",
    "policies",
    "rollout",
    "shipping",
    "tutorial",
    "your-loop",
)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


SNIPPETS = [page for page in PAGES if blocks(page, "python")]


def printed(block):
    """What the block says that it prints: ``print(...)  # this``."""
    return re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)


@pytest.mark.parametrize("page", SNIPPETS)
def test_the_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """In one namespace, with fewer ticks, and print what their comments say."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page, "python"):
        # Two ticks at most, and two more for a second call of fit on the same state.
        short = re.sub(r"ticks=20\b|ticks=50\b", "ticks=2", block)
        short = short.replace("ticks=40", "ticks=4")
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(short, page, "exec"), names)
        lines = out.getvalue().splitlines()
        for expected in printed(block):
            assert expected in lines
    if page == "README.md":
        assert list(names["state"].seeds["layers/0"].stage) == [0, 0, 0, 0]
    if page == "docs/tutorial.md":
        check_pictures(names["history"], tmp_path)
    if page == "docs/checkpoints.md":
        assert (tmp_path / "checkpoints" / "7").is_dir()


def check_pictures(history, tmp_path):
    """The tutorial's pictures can be drawn again, show the run, and are small."""
    tutorial = runpy.run_path(str(ROOT / "examples" / "tutorial.py"))
    for name in ("accuracy", "lives"):
        tutorial[f"draw_{name}"](tmp_path / f"{name}.svg", history)
        for folder in (tmp_path, ROOT / "docs" / "pictures"):
            drawn = (folder / f"{name}.svg").read_text()
            assert len(drawn) < 50_000
            assert "tick (epoch)" in drawn
    assert "F FOSSILIZED" in (tmp_path / "lives.svg").read_text()


def test_the_snippet_is_short():
    first = blocks("README.md", "python")[0]
    assert len([line for line in first.splitlines() if line]) <= 15
    assert len(README.splitlines()) <= 150


def test_every_subject_has_a_page_that_readme_links():
    assert PAGES[1:] == [f"docs/{subject}.md" for subject in SUBJECTS]
    assert all(f"]({page})" in README for page in PAGES[1:])


def test_quick_start_is_two_commands():
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    commands = re.findall(r"```bash\n(.*?)```", quick_start, re.DOTALL)
    assert [len(command.strip().splitlines()) for command in commands] == [1, 1]
    assert "esper-jax train configs/digits.toml" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_paths_lead_somewhere(page):
    text = (ROOT / page).read_text()
    here = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [
        link
        for link in links
        if not link.startswith("http") and not _exists(here, link, text)
    ]
    assert not broken
    named = re.findall(
        r"`((?:esper_jax|examples|configs|benchmarks|docs)/[\w./-]+)`( \(new\))?", text
    )
    # A file that a change would add is not there yet.
    wrong = [path for path, new in named if (ROOT / path).exists() == bool(new)]
    assert not wrong


def _exists(here, link, text):
    path, _, anchor = link.partition("#")
    if path and not (here / path).exists():
        return False
    return not anchor or anchor in _anchors((here / path).read_text() if path else text)


def _anchors(text):
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_config_of_the_docs_has_every_key_at_its_default(tmp_path):
    [block] = blocks("docs/command-line.md", "toml")
    path = tmp_path / "all.toml"
    path.write_text(block)
    assert load_config(path) == RunConfig()
    missing = _keys(to_dict(RunConfig())) - _keys(tomllib.loads(block))
    # Stages without a minimum are left out.
    assert {key for key in missing if "min_epochs" not in key} == set()


def _keys(table, prefix=""):
    keys = set()
    for key, value in table.items():
        inner = isinstance(value, dict)
        keys |= _keys(value, f"{prefix}{key}.") if inner else {prefix + key}
    return keys


def test_the_figures_of_readme_stand_in_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    figures = re.findall(
        r"\d+\.\d+", README.split("## Does it pay?")[1].split("\n## ")[0]
    )
    assert len(figures) >= 6
    assert [f for f in figures if not re.search(rf"\b{f}\b", results)] == []


def test_the_benchmarks_of_results_exist():
    commands = re.findall(
        r"benchmarks/\w+\.py", (ROOT / "benchmarks" / "RESULTS.md").read_text()
    )
    assert {Path(c).name for c in commands} == {
        f"{name}.py"
        for name in (
            "adapt",
            "blend",
            "bus",
            "bus_faults",
            "change",
            "checks",
            "durability",
            "faults",
            "growth",
            "incubation",
            "lifecycle",
            "model",
            "monitor",
            "policy",
            "scaling",
            "worth",
        )
    }
    assert all((ROOT / command).exists() for command in commands)


def test_the_changelog_knows_the_version():
    version = importlib.metadata.version("esper-jax")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
