"""The app in a real browser, with the bundled models: every tab, by mouse and by keyboard, and what never shifts."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from softvq.app.studio import Studio
from softvq.commands.app import bundled_photographs
from softvq.pipeline import GenerationPipeline
from tests.app import served
from tests.browser import CHROMIUM, Browser, browser
from tests.program import photograph
from tests.test_app_runs import make_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium or google-chrome on the path")
SETTLED = "!document.body.classList.contains('busy')"
WATCH_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    runs = tmp_path_factory.mktemp("runs")
    run = make_run(runs / "first")
    (run / "samples").mkdir()
    photograph(64, 64).save(run / "samples/step-3.png")
    pipeline = GenerationPipeline.from_pretrained("flowers-dit")
    studio = Studio(pipeline.tokenizer, pipeline, bundled_photographs()[:4], ("photos-64", "flowers-dit"))
    studio.about()
    with served(studio, runs) as port, browser(tmp_path_factory.mktemp("profile")) as page:
        page.look(1280, 900)
        page.command("Page.addScriptToEvaluateOnNewDocument", source=WATCH_SHIFTS)
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.getElementById('copy').src.startsWith('data:') && " + SETTLED)
        yield page


def test_the_app_does_in_a_browser_what_it_says(page: Browser, tmp_path: Path) -> None:
    # one test, since models, server and browser take longer than all that is done with them
    a_slider_takes_tokens_away_and_only_the_last_request_counts(page)
    a_photograph_is_dropped_and_what_is_none_is_a_sentence(page, tmp_path)
    a_token_is_looked_at_and_changed(page)
    a_slider_goes_from_one_photograph_to_another(page)
    a_picture_appears_step_by_step(page)
    a_run_is_drawn(page)
    tabs_answer_to_arrow_keys_and_show_where_they_are(page)
    for width in (1280, 390):
        for dark in (False, True):
            every_tab_fits_and_can_be_read(page, width, dark)
    nothing_shifts_nothing_fails_and_nothing_is_fetched_from_elsewhere(page)


def set_to(page: Browser, name: str, value: object, event: str = "input") -> None:
    element = f"document.getElementById('{name}')"
    page.run(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('{event}')); 0")


def text(page: Browser, name: str) -> str:
    return page.run(f"document.getElementById('{name}').textContent")


def source(page: Browser, name: str) -> str:
    return page.run(f"document.getElementById('{name}').src")


def open_tab(page: Browser, name: str) -> None:
    page.run(f"document.getElementById('tab-{name}').click()")
    page.wait(SETTLED)  # a tab is drawn when it is opened


def a_slider_takes_tokens_away_and_only_the_last_request_counts(page: Browser) -> None:
    open_tab(page, "reconstruct")
    set_to(page, "count", 64)
    page.wait(SETTLED)
    full, figure = source(page, "copy"), float(text(page, "psnr").split()[0])
    for count in range(63, 15, -1):  # faster than they can be answered
        set_to(page, "count", count)
    page.wait("document.getElementById('copy-caption').textContent.includes('16 tokens') && " + SETTLED)
    assert page.cancelled > 0
    assert source(page, "copy") != full
    assert float(text(page, "psnr").split()[0]) < figure
    assert text(page, "ratio") == "192.0 : 1"
    set_to(page, "count", 64)
    page.wait(f"document.getElementById('copy').src === {json.dumps(full)}")


def a_photograph_is_dropped_and_what_is_none_is_a_sentence(page: Browser, tmp_path: Path) -> None:
    open_tab(page, "reconstruct")
    wrong = tmp_path / "letter.png"
    wrong.write_bytes(b"Dear reader")
    page.choose_file("#file", wrong)
    page.wait("!document.getElementById('message').hidden")
    assert "letter.png: is not a JPEG, PNG or WebP image" in text(page, "message")
    page.complaints[:] = [each for each in page.complaints if "400" not in each]  # the console tells of it too
    before = source(page, "original")
    photograph(300, 200).save(tmp_path / "mine.png")
    page.choose_file("#file", tmp_path / "mine.png")
    page.wait(f"document.getElementById('original').src !== {json.dumps(before)} && {SETTLED}")
    assert text(page, "credit").startswith("mine.png · ")
    assert page.run("document.getElementById('message').hidden")
    page.run("document.querySelectorAll('#photographs button')[1].click()")


def a_token_is_looked_at_and_changed(page: Browser) -> None:
    open_tab(page, "tokens")
    page.wait("document.querySelectorAll('#maps img').length === 64 && document.querySelectorAll('.bar').length === 8")
    page.wait(SETTLED)
    whole = source(page, "t-edited")
    page.run("document.querySelectorAll('#maps button')[0].focus()")
    page.key("ArrowDown")
    page.wait("document.getElementById('t-number').textContent === '9'")
    set_to(page, "t-kind", "mean", "change")
    page.wait("document.getElementById('t-caption').textContent.startsWith('1 token changed')")
    dropped = source(page, "t-edited")
    assert dropped != whole
    page.run("const slider = document.querySelector('#t-moves input'); slider.value = 4;"
             "slider.dispatchEvent(new Event('input')); 0")  # fmt: skip
    page.wait(f"document.getElementById('t-edited').src !== {json.dumps(dropped)} && {SETTLED}")
    page.run("document.getElementById('t-reset').click()")
    page.wait(f"document.getElementById('t-edited').src === {json.dumps(whole)}")
    assert "of 13 bits" in text(page, "t-entropy")


def a_slider_goes_from_one_photograph_to_another(page: Browser) -> None:
    open_tab(page, "between")
    page.wait("document.getElementById('b-picture').src !== '' && " + SETTLED)
    half = source(page, "b-picture")
    set_to(page, "b-share", 0)
    page.wait(f"document.getElementById('b-picture').src !== {json.dumps(half)} && {SETTLED}")
    assert text(page, "b-value") == "0 %"


def a_picture_appears_step_by_step(page: Browser) -> None:
    open_tab(page, "generate")
    assert page.run("document.getElementById('g-class').options.length") == 5
    page.run("""
      window.seen = [];
      new MutationObserver(() => window.seen.push(document.getElementById('g-caption').textContent))
        .observe(document.getElementById('g-caption'), { childList: true });
    """)
    set_to(page, "g-steps", 3)
    page.run("document.getElementById('g-go').click()")
    page.wait("document.getElementById('g-caption').textContent.includes('seed 1, 3 steps')")
    seen = page.run("window.seen")
    assert seen[0] == "Waiting for the first step"
    assert "Step 3 of 3" in seen
    set_to(page, "g-steps", 100)
    page.run("document.getElementById('g-go').click()")
    page.wait("document.getElementById('g-caption').textContent.startsWith('Step')")
    page.run("document.getElementById('g-stop').click()")
    page.wait("document.getElementById('g-caption').textContent === 'Stopped'")


def a_run_is_drawn(page: Browser) -> None:
    open_tab(page, "runs")
    page.wait("document.querySelectorAll('#r-curves svg path').length === 2")
    page.wait("document.querySelector('#r-samples img').naturalWidth === 64")
    labels = page.run("[...document.querySelectorAll('#r-curves svg')].map((each) => each.getAttribute('aria-label'))")
    assert labels[0] == "loss: from 1 at step 1 to 0.333 at step 3"


def tabs_answer_to_arrow_keys_and_show_where_they_are(page: Browser) -> None:
    page.run("document.getElementById('tab-reconstruct').focus(); document.getElementById('tab-reconstruct').click()")
    for key, tab in (("ArrowRight", "tokens"), ("End", "runs"), ("ArrowRight", "reconstruct"), ("ArrowLeft", "runs")):
        page.key(key)
        assert page.run("document.activeElement.id") == f"tab-{tab}"
        assert page.run("[...document.querySelectorAll('main > [role=tabpanel]:not([hidden])')].map((p) => p.id)") == [
            f"panel-{tab}"
        ]
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    unnamed = """[...document.querySelectorAll('input, select, button, img')].filter((each) =>
      !(each.labels?.length || each.textContent.trim() || each.getAttribute('aria-label') || each.hasAttribute('alt'))
    ).filter((each) => !each.disabled).map((each) => each.outerHTML)"""
    assert page.run(unnamed) == []


def every_tab_fits_and_can_be_read(page: Browser, width: int, dark: bool) -> None:
    page.look(width, 844, dark)
    for tab in ("reconstruct", "tokens", "between", "generate", "runs"):
        open_tab(page, tab)
        page.wait(SETTLED)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), tab
        assert page.run("document.querySelector('[role=tablist]').scrollWidth <= innerWidth"), tab
        assert page.run(CONTRAST) >= 4.5, tab
    page.look(1280, 900)


CONTRAST = """(() => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const names = "h1, h2, h3, p, label, dt, dd, figcaption, legend, small, [role=tab], button";
  const words = [...document.querySelectorAll(names)];
  const seen = words.filter((each) => each.offsetParent && each.textContent.trim() && !each.disabled
    && !each.closest("#maps"));
  return Math.min(...seen.map((each) => {
    const [a, b] = [light(getComputedStyle(each).color), light(ground(each))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
})()"""  # the smallest contrast of any words that are seen, as WCAG 2 defines it


def nothing_shifts_nothing_fails_and_nothing_is_fetched_from_elsewhere(page: Browser) -> None:
    assert page.complaints == []
    assert {address.split("/")[2].split(":")[0] for address in page.requested if "://" in address} == {"127.0.0.1"}
    open_tab(page, "reconstruct")
    page.command("Page.reload")
    page.wait("document.getElementById('copy')?.src.startsWith('data:') && " + SETTLED)
    for tab in ("tokens", "between", "generate", "runs", "reconstruct"):
        open_tab(page, tab)
        page.wait(SETTLED)
        page.run(
            "window.shifts.push(0); new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
    assert sum(page.run("window.shifts")) < 0.01
