"""The report in a real Chromium: it renders, is quiet, and its tooltips work."""

import pytest
from browser import CHROMIUM, browser
from report_pages import STAGES, hostile, many_seeds, nothing

from esper_jax.monitor.page import Records, page
from esper_jax.monitor.page.records import items

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed: no page of a report was opened"
)

TIP = "document.getElementById('tip')"


@pytest.fixture(scope="module")
def tab():
    with browser() as found:
        yield found


def seed_of(number, start, grafting):
    """The events of a seed's life."""
    spans = [1, 4, grafting, 2, 3, 4, 0]
    tick, events = start, []
    for stage, length in zip(STAGES, spans, strict=True):
        event = {"tick": tick, "layer": "layers/0", "seed": number, "slot": number}
        told = {"from": "", "to": stage, "outcome": "OK", "text": f"enters {stage}"}
        events.append({**event, **told, "measured": {}})
        tick += length
    return events


def lived():
    """A run of 40 ticks with two fossils, and a twin."""
    events = sorted(seed_of(0, 5, 4) + seed_of(1, 9, 4), key=lambda e: e["tick"])
    ticks = [
        {"tick": t, "loss": 2 / t, "train_loss": 1.8 / t, "accuracy": 1 - 0.9 / t}
        for t in range(1, 41)
    ]
    for n in range(4):
        ticks[9 + n]["seeds"] = {"layers/0": {"seed": [0], "alpha": [n / 4]}}
    for n in range(19, 24):
        row = {"seed": [0], "alpha": [1.0], "worth": [0.01 * n], "parameters": [76]}
        ticks[n]["seeds"] = {"layers/0": row}
    return Records(
        name="lived",
        config={"model": {"hidden": [16]}, "growth": {"blueprints": ["residual_mlp"]}},
        layers={"layers/0": {"features": 16, "num_seeds": 4}},
        ticks=ticks,
        events=events,
        summary={"final_accuracy": 0.9, "static": {"history": [0.5] * 40}},
    )


def opened(tab, tmp_path, records):
    path = tmp_path / "report.html"
    path.write_text(page(records), encoding="utf-8")
    taken = tab.open(path)
    assert tab.errors == []
    assert tab.requests == [path.as_uri()]  # itself alone
    return taken


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_run_renders(tab, tmp_path, dark):
    tab.dark(dark)
    opened(tab, tmp_path, lived())
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(", "))) < 200) == dark
    sizes = tab.run(
        "[...document.querySelectorAll('.plot > svg path.held, .bar, .mark, .cell')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert len(sizes) > 20
    assert all(width > 0 and height > 0 for width, height in sizes)
    # Nothing is wider than the page, and bars lie where their ticks are on the axis.
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")
    bar, mark = tab.run(
        "['.bar.s-grafting', '.mark.k-grafted'].map(s => "
        "document.querySelector(s).getBoundingClientRect())"
        ".map((r, n) => n ? (r.left + r.right) / 2 : r.left)"
    )
    assert bar == pytest.approx(mark, abs=1.5)
    tab.picture(tmp_path / "phone.png", width=400)
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    tab.dark(False)


def test_a_tooltip_comes_with_the_pointer_and_goes(tab, tmp_path):
    opened(tab, tmp_path, lived())
    assert tab.run(f"{TIP}.hidden")
    tab.point(".bar.s-grafting")
    said = tab.run(f"{TIP}.innerText").splitlines()
    assert said[:3] == [
        "layers/0 seed 0: GRAFTING",
        "tick 10 to tick 14 (4 ticks)",
        "alpha from 0 to 0.75",
    ]
    assert tab.run(f"{TIP}.getBoundingClientRect().height") > 20
    assert tab.run(  # within the window
        f"(r => r.left >= 0 && r.right <= innerWidth && r.top >= 0 && "
        f"r.bottom <= innerHeight)({TIP}.getBoundingClientRect())"
    )
    tab.press("Escape")
    assert tab.run(f"{TIP}.hidden")
    tab.point(".mark.k-kept")
    assert "enters FOSSILIZED" in tab.run(f"{TIP}.innerText")
    tab.point("h1")
    assert tab.run(f"{TIP}.hidden")


def test_a_tooltip_comes_with_the_focus_and_arrows_move_it(tab, tmp_path):
    opened(tab, tmp_path, lived())

    def said():
        label = tab.run("document.activeElement.getAttribute('aria-label')")
        assert label == tab.run(f"{TIP}.textContent")
        assert not tab.run(f"{TIP}.hidden")
        return label.splitlines()[0].removeprefix("layers/0 ")

    for _ in range(40):  # two stops of Tab for all marks and bars, not one for each
        tab.press("Tab")
        if tab.run("document.activeElement.matches('.bar')"):
            break
    assert said() == "seed 0: GERMINATED"
    for key, expected in (
        ("ArrowRight", "seed 0: TRAINING"),
        ("ArrowRight", "seed 0: GRAFTING"),
        ("ArrowDown", "seed 1: TRAINING"),
        ("ArrowUp", "seed 0: GRAFTING"),
        ("End", "seed 0: FOSSILIZED"),
        ("ArrowRight", "seed 0: FOSSILIZED"),
        ("Home", "seed 0: GERMINATED"),
    ):
        tab.press(key)
        assert said() == expected
    tab.press("Escape")
    assert tab.run(f"{TIP}.hidden")
    tab.press("Tab")
    assert not tab.run("document.activeElement.matches('.bar')")


def test_a_screen_reader_finds_names_heads_and_tables(tab, tmp_path):
    opened(tab, tmp_path, lived())
    nodes = [
        (node["role"]["value"], items(node.get("name")).get("value", ""))
        for node in tab.send("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]
    images = [name for role, name in nodes if role in ("image", "img")]
    assert all(images)
    assert any(
        name.startswith("Accuracy by tick. held-out data: 0.1") for name in images
    )
    assert any(name.startswith("layers/0 seed 0: GRAFTING") for name in images)
    assert [n for r, n in nodes if r == "heading"][:3] == [
        "lived",
        "Result",
        "Accuracy and loss",
    ]
    assert "Fossils" in [name for role, name in nodes if role == "table"]
    assert {"rowheader", "columnheader", "main", "navigation"} <= {r for r, _ in nodes}


def test_without_scripts_charts_tables_and_words_are_there(tab, tmp_path):
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(tab, tmp_path, lived())
        assert "GRAFTING" in tab.run("document.querySelector('.bar.s-grafting').title")
        assert tab.run("document.querySelector('.plot > svg').clientHeight") > 100
        assert tab.run("document.querySelectorAll('#fossils tbody tr').length") == 2
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("records", [nothing(), hostile()], ids=["nothing", "hostile"])
def test_odd_records_render_without_a_word_of_the_console(tab, tmp_path, records):
    opened(tab, tmp_path, records)
    assert tab.run("document.querySelectorAll('img, iframe, b[onload]').length") == 0
    assert tab.run("document.querySelectorAll('section').length") == 9
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("seeds", [715, 10_000])
def test_a_run_of_many_events_opens_in_a_second(tab, tmp_path, seeds):
    records = many_seeds(seeds)
    assert len(records.events) >= 5_000
    taken: list[float] = []
    # The machine does other things, too, and the best tells how long the page takes.
    while min(taken, default=1) >= 1 and len(taken) < 10:
        taken.append(opened(tab, tmp_path, records))
    assert min(taken) < 1, taken
