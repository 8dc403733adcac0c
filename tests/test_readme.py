"""What the README shows works."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class State(NamedTuple):
    """Enough of one for the snippets."""

    step: jax.Array


def test_the_snippet_runs(capsys):
    snippet = SNIPPETS[0]
    assert len([line for line in snippet.splitlines() if line]) <= 15
    short = snippet.replace("ticks=50", "ticks=2")
    assert short != snippet
    exec(compile(short, "README.md", "exec"), {})
    assert "[0 0 0 0]" in capsys.readouterr().out


def test_the_snippet_of_checkpoints_runs(tmp_path, monkeypatch):
    [snippet] = [s for s in SNIPPETS if "Checkpointer" in s]
    monkeypatch.chdir(tmp_path)
    names = {"state": State(jnp.asarray(7))}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["state"] == State(jnp.asarray(7))
    assert (tmp_path / "checkpoints" / "7").is_dir()


def test_quick_start_is_two_commands():
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", quick_start, re.DOTALL)
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    assert "esper-jax train configs/digits.toml" in blocks[0]
    assert "pytest" in blocks[1]
