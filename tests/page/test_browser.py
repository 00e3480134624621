"""The page in a browser: fast at forty thousand weights, usable by keyboard and screen reader, asking no host for anything.

Needs the package playwright and a Chromium; without them these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.page.reports import EVIL, moe, other, synthetic

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and this machine has none")

SEARCHES = ("experts.17", "proj1", "layers.3", "triton", "nothing at all", "")
# Sets a control as a user does, and waits until what comes of it is on the screen.
TIMED = """async ([id, value, event]) => {
  const control = document.getElementById(id), start = performance.now();
  control.value = value;
  control.dispatchEvent(new Event(event));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - start;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages that are looked at."""
    folder = tmp_path_factory.mktemp("pages")
    one, two = moe(), other()
    return {
        "moe": one.html(folder / "moe.html"),
        "two": one.html(folder / "two.html", other=two),
        "evil": synthetic(120).html(folder / "evil.html"),
    }


class Opened:
    """A page that is open, and what it said and asked for on the way."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(120_000)  # of a machine that others use too
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = file.as_uri()
        self.page.goto(self.url)

    def close(self) -> None:
        """Close it; nothing was said, and nothing asked for but the file."""
        self.page.close()
        assert not self.said and [url for url in self.asked if url not in (self.url, "data:,")] == []

    def texts(self) -> list[str]:
        """Names in the rows of the tree."""
        return self.page.locator("#tree .row .text").all_text_contents()


def serious(page: Any) -> list[str]:
    """axe-core's findings that keep somebody out."""
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="needs the package axe-core-python")
    found = axe.Axe().run(page)["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(("name", "scheme"), [("moe", "light"), ("moe", "dark"), ("two", "light")])
def test_nobody_is_kept_out(browser: Any, files: dict[str, Path], name: str, scheme: str) -> None:
    opened = Opened(browser, files[name], scheme)
    assert serious(opened.page) == []
    opened.page.locator("#tree .row", has_text="q_proj").first.click()
    assert opened.page.locator("figure svg").count() >= 2
    assert serious(opened.page) == []
    opened.close()


def test_axe_can_find(browser: Any, files: dict[str, Path]) -> None:
    """A list without a label, and text without contrast, are found."""
    opened = Opened(browser, files["moe"])
    opened.page.evaluate(
        "document.getElementById('by-scheme').parentElement.replaceWith(document.getElementById('by-scheme'))"
    )
    opened.page.evaluate("document.querySelector('h1').style.color = '#eee'")
    assert {text.split(":")[0] for text in serious(opened.page)} == {"color-contrast", "select-name"}
    opened.page.close()


def test_names_that_are_markup_are_text(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["evil"])
    opened.page.fill("#search", "onerror")
    assert opened.texts() == [f"{EVIL}.weight"]
    opened.page.locator("#tree .row").first.click()
    assert EVIL in opened.page.inner_text("#details") and EVIL in opened.page.inner_text(".warnings")
    assert opened.page.locator("img").count() == 0 and opened.page.title() == "made up – sglquant report"
    opened.close()


def test_the_tree_by_keyboard(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["moe"])
    page = opened.page

    def active() -> Any:
        return page.locator(f"[id='{page.get_attribute('#tree', 'aria-activedescendant')}']")

    page.focus("#tree")
    page.keyboard.press("Home")
    assert active().get_attribute("aria-level") == "1" and active().get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#tree .row").count() == 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert active().locator(".text").inner_text() == "norm.weight"
    page.keyboard.press("Enter")
    assert page.inner_text("#details h2") == "norm.weight" and active().get_attribute("aria-selected") == "true"
    page.keyboard.type("lay")
    assert active().locator(".text").inner_text() == "layers"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    opened.close()


def test_filters_count_aloud_and_come_together(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["moe"])
    page = opened.page
    page.select_option("#by-scheme", "FP8_DYNAMIC")
    assert page.inner_text("[role=status]") == "24 of 46 weights match"
    page.select_option("#by-kernel", "triton_moe")
    assert page.inner_text("[role=status]") == "8 of 46 weights match"
    page.fill("#search", "down")
    assert page.inner_text("[role=status]") == "4 of 46 weights match"
    page.fill("#search", "downn")
    assert page.inner_text("[role=status]") == "0 of 46 weights match" and "Reset" in page.inner_text("#tree")
    page.click("#reset")
    assert page.inner_text("[role=status]") == "46 weights"
    opened.close()


def test_a_weight_shows_what_became_of_it(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["moe"])
    opened.page.fill("#search", "layers.1.self_attn.q_proj")
    opened.page.locator("#tree .row", has_text="q_proj").click()
    text = opened.page.inner_text("#details")
    for part in (
        "FP8_DYNAMIC",
        "131,072 → 66,560",
        "default of the policy",
        "m<=4: triton_gemv",
        "quantize",
        "k_proj.weight",
    ):
        assert part in text or part in opened.page.text_content("#details"), part
    assert "one product of 3 weights that read one input" in text and "the kernels' own estimates" in text
    assert "modeling_qwen3_moe.py" in text and "self.q_proj(" in text
    opened.close()


def test_what_was_replayed_shows_its_error(browser: Any, tmp_path: Path) -> None:
    errors = {"model.layers.1.self_attn.q_proj.weight": 0.00123, "model.layers.1.self_attn.o_proj.weight": None}
    lines = tuple(replace(line, verified=errors.get(line.names[0])) for line in moe().lines)
    opened = Opened(browser, replace(moe(), lines=lines).html(tmp_path / "replayed.html"))
    for name, error in errors.items():
        part = name.split(".")[-2]
        opened.page.fill("#search", f"layers.1.self_attn.{part}")
        opened.page.locator("#tree .row", has_text=part).click()
        text = opened.page.inner_text("#details")
        assert name in text
        assert ("at most 1.2e-3 off, relative to the unfused reference" in text) is (error is not None)
    opened.close()


def test_two_reports_show_what_changed(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["two"])
    assert opened.page.inner_text("[role=status]") == "24 of 46 weights match"
    opened.page.locator("#tree .row", has_text="o_proj").first.click()
    differing = opened.page.locator("td.differs").all_text_contents()
    assert differing[:2] == ["FP8_DYNAMIC", "W4A16"]
    opened.close()


def test_a_module_of_two_reports_has_both(browser: Any, files: dict[str, Path]) -> None:
    """Bytes by scheme of A and of B, in the details and in the treemap of each; none of them are the other's."""
    page = Opened(browser, files["two"])
    one, two = moe(), other()
    rows = page.page.locator("#details table[aria-label='By scheme'] tbody tr").all_text_contents()
    heads = page.page.locator("#details table[aria-label='By scheme'] th").all_text_contents()
    assert heads == ["scheme", "weights in A", "bytes", "weights in B", "bytes"]
    schemes = {line.scheme or "kept" for report in (one, two) for line in report.lines}
    assert len(rows) == len(schemes) and all(any(row.startswith(scheme) for row in rows) for scheme in schemes)
    labels = set()
    for letter in "AB":
        page.page.locator("#bytes-side").get_by_role("button", name=letter, exact=True).click()
        labels.add(page.page.locator("#treemap svg").get_attribute("aria-label"))
    assert len(labels) == 2
    page.close()


def test_a_step_up_keeps_the_keyboard(browser: Any, files: dict[str, Path]) -> None:
    page = Opened(browser, files["moe"])
    page.page.locator("#tree").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "Enter"):
        page.page.keyboard.press(key)
    page.page.locator("#details .crumbs button").first.focus()
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.activeElement.id") == "tree"
    page.close()


def test_colours_may_be_chosen(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["moe"])
    background = "getComputedStyle(document.body.parentElement).backgroundColor"
    light = opened.page.evaluate(background)
    opened.page.click("#theme >> text=Dark")
    assert opened.page.evaluate(background) != light
    opened.page.reload()
    assert opened.page.evaluate(background) != light  # it is remembered
    opened.close()


def test_few_rows_are_elements_whatever_the_size(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["evil"])
    opened.page.fill("#search", "proj")
    assert opened.page.evaluate("document.getElementById('tree').offsetHeight / 28") > 120
    assert opened.page.locator("#tree .row").count() < 60
    opened.page.evaluate("document.getElementById('scroll').scrollTop = 1e6")
    opened.page.wait_for_function("document.querySelector('#tree').textContent.includes('proj1')")
    opened.close()


@pytest.mark.slow
def test_forty_thousand_weights_are_quick(browser: Any, tmp_path: Path) -> None:
    """Bounds of what feels at once; medians, since the machine may be busy."""
    file = synthetic(40_000).html(tmp_path / "large.html")
    ready: list[float] = []
    for _ in range(3):
        opened = Opened(browser, file)
        ready.append(opened.page.evaluate("performance.getEntriesByName('ready')[0].startTime"))
        if len(ready) < 3:
            opened.close()
    found = [opened.page.evaluate(TIMED, ["search", text, "input"]) for text in SEARCHES for _ in range(3)]
    filters = [("by-scheme", "W4A16"), ("by-kernel", "sgl_fp8"), ("by-scheme", ""), ("by-kernel", "")]
    picked = [opened.page.evaluate(TIMED, [control, value, "change"]) for control, value in filters for _ in range(3)]
    assert opened.page.inner_text("[role=status]") == "40,001 weights"
    opened.close()
    middles = [sorted(times)[len(times) // 2] for times in (ready, found, picked)]
    print(f"ready {middles[0]:.0f} ms, search {middles[1]:.0f} ms, filter {middles[2]:.0f} ms")
    assert middles[0] < 3000 and middles[1] < 200 and middles[2] < 200
