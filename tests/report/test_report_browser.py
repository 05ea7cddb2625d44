"""The report in a real headless Chromium: what readers see and what the page does."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_cases import EVIL, SECRET, write_demo
from test_audit_page import random_rows, run_audit

from perta.data.rows import write_jsonl
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.report.settings import ReportConfig
from perta.report.write import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESKTOP = (390, 844), (1180, 900)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: install it or set CHROMIUM")


@dataclass
class Visit:
    """A page with what it complained about and asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright_api.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same hostile results with texts withheld and with texts shown."""
    folder = tmp_path_factory.mktemp("reports")
    demo = str(write_demo(folder / "demo", evil=True))
    config = ReportConfig(results=(demo,), output=folder / "withheld.html", figures=False)
    shown = ReportConfig(
        results=(demo,), output=folder / "shown.html", figures=False, show_texts=True
    )
    return {"withheld": write_report(config), "shown": write_report(shown)}


def visit(
    browser: Browser,
    file: Path,
    size: tuple[int, int] = DESKTOP,
    scheme: str = "light",
    scripts: bool = True,
) -> Visit:
    """Open a page from disk and listen."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        java_script_enabled=scripts,
    )
    found = Visit(context.new_page())
    found.page.on("console", lambda message: found.complaints.append(message.text))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.goto(file.as_uri())
    return found


@pytest.mark.parametrize("kind", ["withheld", "shown"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_renders_quietly_and_asks_for_nothing(
    browser: Browser, reports: dict[str, Path], kind: str, size: tuple[int, int], scheme: str
) -> None:
    seen = visit(browser, reports[kind], size, scheme)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [reports[kind].as_uri()]
    assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert seen.page.evaluate("window.stolen") is None
    heading = seen.page.get_by_role("heading", level=1)
    assert heading.inner_text() == "Forgotten as far as measured, and the rest is kept."


def test_withheld_texts_are_nowhere_and_shown_ones_under_a_banner(
    browser: Browser, reports: dict[str, Path]
) -> None:
    hidden = visit(browser, reports["withheld"]).page
    assert SECRET not in hidden.content()
    assert hidden.get_by_role("alert").count() == 0
    assert EVIL not in hidden.locator("#answers").inner_text()
    shown = visit(browser, reports["shown"]).page
    assert SECRET in shown.locator("#answers").inner_text()
    assert EVIL in shown.locator("#answers").inner_text()
    assert "printed" in shown.get_by_role("alert").inner_text().replace("prints", "printed")
    assert shown.get_by_role("alert").is_visible()


def test_tables_sort_up_and_down(browser: Browser, reports: dict[str, Path]) -> None:
    page = visit(browser, reports["withheld"]).page
    table = page.locator("#measures table").nth(1)

    def column(number: int) -> list[str]:
        texts = table.locator(f"tbody tr td:nth-of-type({number})").all_inner_texts()
        return [text.split("\n")[0] for text in texts]

    button = table.get_by_role("button", name="Answer prob.")
    button.click()
    assert column(1) == sorted(column(1), key=float)
    assert table.locator('th[aria-sort="ascending"]').count() == 1
    button.press("Enter")
    assert column(1) == sorted(column(1), key=float, reverse=True)
    table.get_by_role("button", name="model").click()
    names = table.locator("tbody th .model").all_inner_texts()
    assert names == ["base", "full", "perta-grad", "retrained", "tv"]


def test_methods_can_be_hidden_everywhere(browser: Browser, reports: dict[str, Path]) -> None:
    page = visit(browser, reports["withheld"]).page
    marks = page.locator("#trade-off .wide .mark.t-1:visible")
    rows = page.locator("#measures tr.t-1:visible")
    before = marks.count(), rows.count()
    assert min(before) > 0
    toggle = page.locator(".toggles").get_by_role("button", name="tv")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "false"
    assert (marks.count(), rows.count()) == (0, 0)
    toggle.click()
    assert (marks.count(), rows.count()) == before


def test_measures_of_the_trade_off_switch_with_and_without_scripts(
    browser: Browser, reports: dict[str, Path]
) -> None:
    for scripts in (True, False):
        page = visit(browser, reports["withheld"], scripts=scripts).page
        figures = page.locator("#trade-off figure.panel")
        assert [f.is_visible() for f in figures.all()] == [True, False, False]
        page.get_by_text("Extraction strength", exact=True).and_(page.locator("label")).click()
        assert [f.is_visible() for f in figures.all()] == [False, False, True]


def test_readable_without_scripts(browser: Browser, reports: dict[str, Path]) -> None:
    page = visit(browser, reports["withheld"], scripts=False).page
    for section in ("verdict", "asked", "done", "measures", "cost", "limits"):
        assert len(page.locator(f"#{section}").inner_text()) > 100
    assert page.locator("#trade-off svg.figure").first.is_visible()
    assert not page.locator("#theme").is_visible()
    assert not page.locator(".toggles").is_visible()


def test_tooltips_follow_pointer_and_keyboard(browser: Browser, reports: dict[str, Path]) -> None:
    page = visit(browser, reports["withheld"]).page
    tip = page.get_by_role("tooltip")
    mark = page.locator("#trade-off .wide:visible .mark").last
    mark.scroll_into_view_if_needed()
    mark.hover()
    assert tip.is_visible()
    assert "Answer prob." in tip.inner_text()
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    # One stop for a figure; arrows move within it, in a map by row and column.
    cells = page.locator("#where .panel:visible .hue-w [data-tip]")
    assert cells.and_(page.locator('[tabindex="0"]')).count() == 1
    cells.first.focus()
    assert "layer 0, self_attn.q_proj" in tip.inner_text()
    page.keyboard.press("ArrowDown")
    assert "layer 1, self_attn.q_proj" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "layer 1, mlp.up_proj" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_light_and_dark_follow_the_system_until_chosen(
    browser: Browser, reports: dict[str, Path]
) -> None:
    page = visit(browser, reports["withheld"], scheme="dark").page
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Switch between light and dark").click()
    light = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == light
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Browser, reports: dict[str, Path], scheme: str) -> None:
    # WCAG 2.2, 1.4.3: 4.5 to 1 for text; 1.4.11: 3 to 1 for marks.
    page = visit(browser, reports["withheld"], scheme=scheme).page
    ratio = """(name) => {
      const style = getComputedStyle(document.documentElement);
      const light = (hex) => {
        const c = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
      };
      const grounds = ["--paper", "--surface", "--soft"];
      return Math.min(...grounds.map((ground) => {
        const pair = [name, ground].map((n) => light(style.getPropertyValue(n).trim()));
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
      }));
    }"""
    texts = ["ink", "muted", "accent", "met", "partly", "not", "unclear", "unknown"]
    for name in [*texts, *(f"s{i}" for i in range(8))]:
        assert page.evaluate(ratio, f"--{name}") >= 4.5, name
    for name in ("ref", "hue-w", "hue-d"):
        assert page.evaluate(ratio, f"--{name}") >= 3, name


def test_every_control_has_a_name_and_every_field_a_label(
    browser: Browser, reports: dict[str, Path]
) -> None:
    page = visit(browser, reports["withheld"]).page
    for button in page.get_by_role("button").all():
        assert (button.get_attribute("aria-label") or button.text_content() or "").strip()
    for field_ in page.locator("input").all():
        assert page.locator(f'label[for="{field_.get_attribute("id")}"]').count() == 1
    identifiers = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(identifiers)) == len(identifiers)
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_prints_to_paper(browser: Browser, reports: dict[str, Path]) -> None:
    page = visit(browser, reports["withheld"], scheme="dark").page
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF")
    assert 2 <= paper.count(b"/Type /Page\n") <= 20
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#verdict details[open]").count() == 1
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_an_audit_fits_a_phone_and_is_two_pages_in_print(browser: Browser, tmp_path: Path) -> None:
    rows, given = random_rows(0), []
    texts = [str(value) for group in rows.values() for row in group for value in row.values()]
    for name, group in rows.items():
        given += [f"--{name}", str(write_jsonl(group, tmp_path / f"{name}.jsonl"))]
    models = ("cleaned", "full", "base", "retrained", "shadow", "shadow")
    for seed, name in enumerate(models):
        (tmp_path / f"{seed}").mkdir()
        write_tiny_checkpoint(tmp_path / f"{seed}", texts, seed=seed)
        given += [f"--{name}", str(tmp_path / f"{seed}")] if seed else []
    output = ["--output", str(tmp_path / "out"), "--samples", "4", "--max-new-tokens", "4"]
    audit = run_audit([str(tmp_path / "0"), *given, "--level", "full", *output])
    # Untrained models: nothing can be told, and each check has a reason of one line or two.
    assert {probe["verdict"] for probe in audit["probes"]} == {"not sure"}
    phone = visit(browser, tmp_path / "out" / "audit.html", PHONE).page
    cells = phone.locator(".found td")
    assert cells.count() == 5 * len(audit["probes"])
    assert all(
        box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]
        for cell in cells.all()
        if (box := cell.bounding_box())
    )
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    printed = visit(browser, tmp_path / "out" / "audit.html").page
    printed.emulate_media(media="print")
    reasons = printed.locator(".found .why")
    assert all(reason.is_visible() for reason in reasons.all())
    assert printed.get_by_text("For engineers:").is_visible()
    printed.add_style_tag(content="details { display: none }")
    pages = re.findall(rb"/Type /Page\b", printed.pdf(prefer_css_page_size=True))
    assert len(pages) == 2
