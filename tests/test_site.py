"""The site of the docs: every page is in it, and links lead to where pages stand."""

import posixpath
import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
KNOWN = HOOKS["targets"]()


def nav(entries):
    """The pages of a table of contents."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from nav(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_table_of_contents():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [*nav(config["nav"])]
    assert len(listed) == len({*listed})
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {*listed}
    assert {f"api/{room}.md" for room in HOOKS["ROOMS"]} <= {*listed}
    assert "api/monitor.md" in listed  # docs/monitoring.md names its writers
    there = {*KNOWN.values(), *(f"api/{room}.md" for room in HOOKS["ROOMS"])}
    assert {*listed} <= there


@pytest.mark.parametrize("page", [p for p in KNOWN if p.endswith(".md")])
def test_links_lead_to_files_of_the_site(page):
    """As they lead to files of the repository, which tests/test_readme.py checks."""
    text = HOOKS["content"](page, KNOWN)
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    before = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (ROOT / page).read_text())
    assert len(links) == len(before)
    here = posixpath.dirname(KNOWN[page])
    gone = [
        link
        for link in links
        if posixpath.normpath(posixpath.join(here, link)) not in KNOWN.values()
    ]
    assert not gone


def test_readme_is_the_front_page_and_sources_are_pages():
    home = HOOKS["content"]("README.md", KNOWN)
    assert "](tutorial.md)" in home
    assert "](source/examples/pure.py.md)" in home
    page = HOOKS["content"]("docs/your-loop.md", KNOWN)
    assert "](source/examples/frozen_host.py.md)" in page
    source = HOOKS["content"]("examples/frozen_host.py", KNOWN)
    assert source.startswith("# examples/frozen_host.py\n\n````python\n")
