"""The page in a real browser: it draws, loads nothing, fits, and can be read with the keyboard, in light and in dark."""

import html
import json
import re
import shutil
import subprocess

import pytest
from fake_sweep import anchored_sweep

from perturbray.results import page as markup
from perturbray.results.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target)), true);
addEventListener("load", () => {
  const visible = element => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const dots = [...document.querySelectorAll(".dot[tabindex]")].filter(visible);
  const shown = dot => getComputedStyle(dot.querySelector("text")).visibility;
  const before = dots.map(shown);
  dots[0].focus();
  const reached = document.activeElement === dots[0] && shown(dots[0]);
  const folded = [...document.querySelectorAll("details")];
  const closed = folded.filter(one => !one.open).length;
  for (const one of folded) one.open = true;
  const figures = [...document.querySelectorAll("svg")];
  const regions = [...document.querySelectorAll(".wide")];
  const found = {
    errors, reached, before: [...new Set(before)], closed,
    after: shown(dots[1]),
    resources: performance.getEntriesByType("resource").map(entry => entry.name),
    page: [document.documentElement.scrollWidth, innerWidth],
    figures: figures.length, drawn: figures.filter(visible).length,
    stuck: regions.filter(one => one.scrollWidth > one.clientWidth + 1 && one.tabIndex < 0).length,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    outcomes: [...document.querySelectorAll(".outcome")].map(one => one.innerText.trim()),
    labels: [...document.querySelectorAll(".dot text")].slice(0, 50).map(one => {
      const box = one.getBoundingClientRect(), frame = one.ownerSVGElement.getBoundingClientRect();
      return box.left >= frame.left - 1 && box.right <= frame.right + 1; }),
  };
  const text = document.createElement("pre");
  text.id = "probe";
  text.textContent = JSON.stringify(found);
  document.body.append(text);
});
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "imbalance"
    anchored_sweep(folder, levels=(0.0, 0.3), seeds=2)
    return write_report(folder, png=False)


def look(report, *, width=1180, flags=()):
    """What a browser without a network makes of the page."""
    path = report.with_name("probed.html")
    path.write_text(report.read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    offline = ["--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"]
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900"]
    profile = f"--user-data-dir={report.parent / 'profile'}"
    command = [BROWSER, *plain, *offline, *flags, profile, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def seen(report):
    return look(report)


def test_the_page_draws_every_figure_without_an_error_and_without_loading_anything(seen):
    assert seen["errors"] == []
    assert seen["resources"] == []
    assert seen["drawn"] == seen["figures"] > 10


def test_a_condition_shows_its_name_when_the_keyboard_comes_to_it(seen):
    assert seen["before"] == ["hidden"]
    assert seen["reached"] == "visible"
    assert seen["after"] == "hidden"
    assert all(seen["labels"]), "a name stands outside of its plot"


@pytest.mark.parametrize("width", [1180, 600])
def test_nothing_runs_over_the_edge_and_what_scrolls_can_be_reached(report, width):
    found = look(report, width=width)
    assert found["page"][0] <= found["page"][1]
    assert found["stuck"] == 0


def test_outcomes_are_told_by_mark_and_word_and_not_by_colour_alone(seen):
    assert seen["outcomes"]
    assert set(seen["outcomes"]) <= {"✓ holds", "✗ does not hold", "? the data cannot tell"}


def test_the_page_is_dark_where_the_reader_asks_for_it(report, seen):
    dark = look(report, flags=["--force-dark-mode"])
    assert seen["paper"] == "rgb(255, 255, 255)"
    assert (dark["paper"], dark["ink"]) == ("rgb(20, 24, 27)", "rgb(230, 234, 236)")
    assert dark["errors"] == []


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_the_paper(theme):
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", markup.STYLE.split("@media screen")[theme].split("* {")[0]))
    for name in ("ink", "soft", "accent", "good", "bad", "even"):
        light, dark = sorted([luminance(colours[name]), luminance(colours["paper"])], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name  # WCAG 2, level AA
