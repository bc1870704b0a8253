"""The pages in a real browser: every plot is drawn, nothing is logged, nothing is fetched, the selectors work.

Needs Chromium and its driver on the search path (Debian: chromium, chromium-driver) and selenium. Without them the
tests skip and say so, or fail where the environment sets AIRTUNE_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from airtune.report import (
    compare_summary,
    load_run,
    load_runs,
    write_compare_report,
    write_plan_page,
    write_run_report,
)
from report.synthetic_plans import make_plan
from report.synthetic_runs import write_compare, write_run

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1600",
)
WAIT = 30

# What stands in each visible plot: its name, whether it was drawn, and the drawn marks of its traces.
MARKS = """
const drawnPaths = (slot) => [...slot.querySelectorAll('.scatterlayer path')]
  .filter((path) => (path.getAttribute('d') || '').length > 4);
const drawnBars = (slot) => [...slot.querySelectorAll('.barlayer .point path')]
  .filter((path) => path.getBBox().width > 0 && path.getBBox().height > 0);
const height = (slot) => { const svg = slot.querySelector('svg.main-svg'); return svg ? svg.clientHeight : 0; };
return [...document.querySelectorAll('.plot')].filter((slot) => slot.offsetParent !== null).map((slot) => ({
  name: slot.dataset.figure,
  drawn: slot.dataset.drawn === 'yes',
  lines: drawnPaths(slot).length,
  bars: drawnBars(slot).length,
  traces: slot.data ? slot.data.length : 0,
  width: slot.clientWidth,
  height: height(slot),
}));
"""
RUN_PLOTS = {
    "accuracy_time",
    "accuracy_bits",
    "loss_time",
    "loss_bits",
    "round",
    "duration",
    "participation",
    "notes",
    "energy_rounds",
    "energy_devices",
    "cell",
    "rates",
    "diagnostics",
}


def absent(reason: str) -> None:
    if os.environ.get("AIRTUNE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"AIRTUNE_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        absent("no Chromium with its driver is installed (Debian: apt-get install chromium chromium-driver)")
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        absent("selenium is not installed (pip install 'airtune[test]')")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    run = write_run(root / "run", diagnostics=True)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["notes"]["queue_s"] = 0.1 * line["round"]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = write_compare(root / "compare", ("legend", "fedit"), seeds=2)
    runs = load_runs([folder])
    sweep = [make_plan(m, speed=s, sweep=v) for v, s in (("5MHz", 1), ("10MHz", 2)) for m in ("legend", "fedit")]
    return {
        "run": write_run_report(run),
        "compare": write_compare_report(folder, runs, compare_summary(runs, out_dir=folder)),
        "plan": write_plan_page(root / "plan", [make_plan("tsfa", curve=True)]),
        "sweep": write_plan_page(root / "sweep", sweep),
    }


def visit(browser, page: Path) -> dict[str, dict]:
    """Open a page, wait until every visible plot is drawn, and return its marks by name."""
    from selenium.webdriver.support.ui import WebDriverWait

    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages left
    browser.get(page.as_uri())
    WebDriverWait(browser, WAIT).until(lambda b: (m := b.execute_script(MARKS)) and all(item["drawn"] for item in m))
    return {item["name"]: item for item in browser.execute_script(MARKS)}


def assert_drawn(marks: dict[str, dict]) -> None:
    for name, item in marks.items():
        assert item["lines"] + item["bars"] >= item["traces"] > 0, f"{name}: {item}"
        assert item["width"] > 250, name
        assert item["height"] > 100, name


def assert_silent(browser, page: Path) -> None:
    """No message on the console, no request but for the page itself."""
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    outside = [url for url in asked if not url.startswith(("data:", "blob:"))]
    assert outside == [page.as_uri()]


def test_the_run_page_draws_every_plot(browser, pages: dict[str, Path]) -> None:
    marks = visit(browser, pages["run"])
    assert set(marks) == RUN_PLOTS
    assert_drawn(marks)
    assert_silent(browser, pages["run"])
    run = load_run(pages["run"].parent)
    plotted = browser.execute_script("return document.querySelector('[data-figure=accuracy_time]').data[0].y")
    assert plotted[-1] == pytest.approx(100 * run.final["accuracy"], rel=1e-4)
    assert f"{100 * run.final['accuracy']:.1f}" in browser.title + browser.find_element("tag name", "h1").text


def test_the_round_can_be_chosen(browser, pages: dict[str, Path]) -> None:
    visit(browser, pages["run"])
    run = load_run(pages["run"].parent)
    bars = "return document.querySelectorAll('#round-view .barlayer .trace').length"
    before = browser.find_element("css selector", "#round-view .facts").text
    assert browser.execute_script(bars) == 8  # four stages, four columns
    browser.execute_script(
        "const i = document.querySelector('#round-view input'); i.value = 3;"
        "i.dispatchEvent(new Event('input', {bubbles: true}));"
    )
    facts = browser.find_element("css selector", "#round-view .facts").text
    assert facts.startswith("Round 4 took") and facts != before
    line = run.rounds[4]
    data = browser.execute_script("return document.querySelector('#round-view .plot').data")
    assert [trace["name"] for trace in data[:4]] == ["Download", "Compute", "Upload", "Wait"]
    shown = {int(label.split()[0]): value for label, value in zip(data[1]["y"], data[1]["x"], strict=True)}
    assert shown == pytest.approx({row.client: row.compute_s for row in line.clients}, rel=1e-4)
    upload = zip(data[2]["y"], data[2]["base"], data[2]["x"], strict=True)
    ends = {int(label.split()[0]): base + value for label, base, value in upload}
    seconds = {row.client: row.download_s + row.compute_s + row.upload_s for row in line.clients}
    assert ends == pytest.approx(seconds, rel=1e-4)
    browser.find_element("css selector", "#round-view button[data-step='1']").click()
    assert browser.find_element("css selector", "#round-view output").text == "round 5 of 24"
    assert_silent(browser, pages["run"])


def test_the_compare_page_draws_and_switches_runs(browser, pages: dict[str, Path]) -> None:
    marks = visit(browser, pages["compare"])
    assert {"costs", "ratios", "accuracy_time", "round", "cell"} <= set(marks)
    assert_drawn(marks)
    energy = "return document.querySelector('[data-figure=energy_rounds]').data[0].y"
    first = browser.execute_script(energy)
    shown = (
        "return [...document.querySelectorAll('table caption')]"
        ".filter((c) => c.offsetParent && c.textContent.startsWith('Dropped')).length"
    )
    assert browser.execute_script(shown) == 1
    browser.execute_script(
        "const s = document.getElementById('chooser'); s.value = '3';"
        "s.dispatchEvent(new Event('change', {bubbles: true}));"
    )
    assert browser.execute_script(energy) != first
    assert browser.execute_script(shown) == 1
    assert_drawn({item["name"]: item for item in browser.execute_script(MARKS)})
    assert_silent(browser, pages["compare"])


@pytest.mark.parametrize(
    ("name", "plots"),
    [
        ("plan", {"round", "profile", "band", "cell", "rates", "curve_0"}),
        ("sweep", {"sweep", "round", "profile", "band", "cell", "rates"}),
    ],
)
def test_plan_pages_draw_every_plot(browser, pages: dict[str, Path], name: str, plots: set[str]) -> None:
    marks = visit(browser, pages[name])
    assert set(marks) == plots
    assert_drawn(marks)
    assert_silent(browser, pages[name])


def test_the_plots_follow_the_readers_theme(browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    colour = "return document.querySelector('[data-figure=accuracy_time]').data[0].line.color"
    try:
        found = []
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            visit(browser, pages["run"])
            found.append(browser.execute_script(colour))
        assert found == ["#0072b2", "#4fabe0"]
        media = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)  # the reader changes while the page is open
        WebDriverWait(browser, WAIT).until(lambda b: b.execute_script(colour) == "#0072b2")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_narrow_screen_does_not_scroll_sideways(browser, pages: dict[str, Path]) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(browser, pages["compare"])
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
