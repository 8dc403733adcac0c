"""What makes a site of pages that also read well in the repository.

The README is the front page, other files that pages link to come along as pages of
their own, and the API pages are made of docstrings.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

ROOMS = (
    "esper_jax",
    "growth",
    "layers",
    "lifecycle",
    "blueprints",
    "policy",
    "learning",
    "train",
    "monitor",
    "rollout",
    "rollout.canary",
    "rollout.provider",
    "rollout.ab",
    "rollout.baseline",
    "bus",
    "checkpoint",
    "kernels.blend",
)
"""Packages whose public names have a page."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def targets() -> dict[str, str]:
    """Where files of the repository stand in the site, by their path in it."""
    known = {"README.md": "index.md"}
    known |= {
        str(path.relative_to(ROOT)): str(path.relative_to(ROOT / "docs"))
        for path in (ROOT / "docs").rglob("*")
        if path.is_file()
    }
    pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(known)]
    for page in dict.fromkeys(pages):
        if not page.endswith(".md"):
            continue
        for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = _joined(page, link)
            if (ROOT / path).is_file():
                known.setdefault(
                    path, path if path.endswith(".md") else f"source/{path}.md"
                )
    return known


def moved(text: str, page: str, known: dict[str, str]) -> str:
    """A page's text with its links as they are in the site.

    Args:
      text: of the page.
      page: its path in the repository.
      known: as `targets` returns them.
    """
    here = posixpath.dirname(known[page])

    def link(found: re.Match[str]) -> str:
        target = known.get(_joined(page, found[1]))
        return found[1] if target is None else posixpath.relpath(target, here or ".")

    return _LINK.sub(link, text)


def _joined(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def content(path: str, known: dict[str, str]) -> str:
    """A file of the repository as a page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return moved(text, path, known)
    language = {".py": "python", ".toml": "toml"}.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text}````\n"


def api(room: str) -> str:
    """The page of a package's public names."""
    path = room if room == "esper_jax" else f"esper_jax.{room}"
    return f"# {path}\n\n::: {path}\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds what is not in ``docs``."""
    from mkdocs.structure.files import File

    known = targets()
    pages = {
        target: content(path, known)
        for path, target in known.items()
        if not path.startswith("docs/")
    }
    pages |= {f"api/{room}.md": api(room) for room in ROOMS}
    for target, text in pages.items():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links of pages of ``docs`` to where files stand in the site."""
    if page.file.generated_by is not None:
        return markdown
    return moved(markdown, f"docs/{page.file.src_uri}", targets())
