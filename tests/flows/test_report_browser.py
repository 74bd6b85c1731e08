"""Reports as a person opens them: from disk, in a browser, light and dark, on a screen and on a phone."""

from __future__ import annotations

import pytest
from report_records import EVIL, comparison, layer, run, run_page, sweep, sweep_page

from tasks.report import page

DRAWN = """scheme => [...document.querySelectorAll("[data-figure]")].every(place => place.dataset.drawn === scheme)"""
MARKS = """() => Object.fromEntries([...document.querySelectorAll("[data-figure]")].map(place => [place.dataset.figure,
    {traces: place.data.length, drawn: place.querySelectorAll(".main-svg .trace, .main-svg .hm image").length,
     width: place.querySelector(".main-svg").getBoundingClientRect().width}]))"""


def large():
    """As of a mixture of 32 blocks, with a name that no screen is wide enough for."""
    names = ["self_attn.q_proj", "mlp.experts.0.down_proj", "mlp.experts.1.down_proj", "a_very_long_name_of_a_module." * 3 + "proj"]
    return run(
        blocks=[
            {"block": block, "seconds": 1.0, "layers": [layer(f"model.layers.{block}.{name}", 0.001 * (block + 1)) for name in names]}
            for block in range(32)
        ]
    )


def evil():
    record = run(out=f"runs/{EVIL}", notes=[EVIL], stage_seconds={EVIL: 2.0})
    record["blocks"][0]["layers"][0]["name"] = f"model.layers.0.{EVIL}"
    record["evaluation"]["measures"][0]["name"] = EVIL
    return record


PAGES = {
    "run": lambda: run_page(run()),
    "large": lambda: run_page(large()),
    "evil": lambda: run_page(evil()),
    "sweep": lambda: sweep_page(sweep()),
    "screening": lambda: sweep_page(sweep(mode="screening")),
    "comparison": lambda: comparison(run(), run(out="runs/other", seconds=9.0)),
}


@pytest.fixture(scope="module", params=PAGES)
def made(request, tmp_path_factory):
    drawn = PAGES[request.param]()
    return drawn, page.write(tmp_path_factory.mktemp("report") / "r.html", drawn)


@pytest.fixture(scope="module")
def opened(browser, made):
    """The page in a light browser, what its console said, and the addresses that it asked."""
    context = browser.new_context(color_scheme="light", viewport={"width": 1100, "height": 800})
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(made[1].as_uri())
    tab.wait_for_function(DRAWN, arg="light", timeout=60_000)
    yield tab, said, asked
    context.close()


def test_all_figures_are_drawn_without_an_error_and_without_the_network(made, opened):
    tab, said, asked = opened
    assert said == [] and [url for url in asked if not url.startswith(("data:", "blob:"))] == [made[1].as_uri()]
    found = tab.evaluate(MARKS)
    assert found.keys() == {figure.key for figure in made[0].figures} and found
    for figure in made[0].figures:
        assert found[figure.key]["traces"] == len(figure.plot["data"]) <= found[figure.key]["drawn"], figure.key
    assert tab.evaluate("window.evil") is None and tab.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, scheme):
    from axe_playwright_python.sync_playwright import Axe

    tab, _, _ = opened
    tab.emulate_media(color_scheme=scheme)
    tab.wait_for_function(DRAWN, arg=scheme, timeout=60_000)
    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    found = Axe().run(tab).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")] == []


def test_figures_take_the_colours_of_the_theme(opened):
    tab, _, _ = opened
    colours = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function(DRAWN, arg=scheme, timeout=60_000)
        colours[scheme] = tab.evaluate(
            "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.querySelector('.main-svg text')).fill]"
        )
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"] and colours["dark"] == ["rgb(20, 23, 26)", "rgb(232, 234, 237)"]


def test_on_a_phone_nothing_is_wider_than_the_screen(opened):
    tab, said, _ = opened
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_function("() => [...document.querySelectorAll('.main-svg')].every(one => one.getBoundingClientRect().right <= 390)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390 and said == []
    tab.set_viewport_size({"width": 1100, "height": 800})


def test_it_is_used_by_keyboard(opened):
    tab, _, _ = opened
    tab.reload()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # seen once it has the focus
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.getElementById('main').contains(document.activeElement)")
    first = tab.locator("summary").first
    first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("details").first.evaluate("one => one.open") and tab.locator("details table").first.is_visible()


def test_without_scripts_the_tables_tell_it(browser, made):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(made[1].as_uri())
    assert tab.locator("noscript p").is_visible() and tab.locator("details table").count() == len(made[0].figures)
    context.close()
