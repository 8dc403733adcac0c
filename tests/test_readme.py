"""What the README shows works."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_snippet_runs(capsys):
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 15
    short = snippet.replace("ticks=50", "ticks=2")
    assert short != snippet
    exec(compile(short, "README.md", "exec"), {})
    assert "[0 0 0 0]" in capsys.readouterr().out


def test_quick_start_is_two_commands():
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", quick_start, re.DOTALL)
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    assert "esper-jax train configs/digits.toml" in blocks[0]
    assert "pytest" in blocks[1]
