"""The live page in a real browser, beside a sweep that runs with a failing trial in it, and after it."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_recorder import PLUGIN

from perturbray.watch.state import Folder

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROKEN = PLUGIN.replace('"slow"', '"breaks"').replace("breaks: bool = False", "breaks: bool = True")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed"),
]


def look(address, profile, *, seconds=3):
    """The page's document after its script ran for some seconds."""
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--window-size=1280,900", *QUIET]
    wait = [f"--virtual-time-budget={1000 * seconds}", f"--user-data-dir={profile}", "--dump-dom"]
    command = [BROWSER, *plain, *wait, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def fact(dom, name):
    return int(re.search(rf'<dd id="fact-{name}">([\d,]+)', dom)[1].replace(",", ""))


def text(dom, part):
    found = re.search(rf'<(section|header) id="{part}"[^>]*>(.*?)</\1>', dom, re.DOTALL)[2]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", found)).split())


def address_in(said):
    return re.search(r"live page of \S+: (http://127\.0\.0\.1:\d+/)", said)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The documents that a browser saw during a sweep and after it, and the sweep's folder."""
    place = tmp_path_factory.mktemp("watched")
    (place / "slow.py").write_text(PLUGIN)
    (place / "breaks.py").write_text(BROKEN)
    words = [
        *("--model", "mean_shift", "--model", "slow", "--model", "breaks"),
        "--set",
        "training.epochs=4",
        "--grid",
        "ablation.level=0.0,0.2",
    ]
    words += ["--plugin", "slow.py", "--plugin", "breaks.py", "--watch", "--replicates", "3", "--results", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
    folder = place / "out" / "imbalance"
    with open(place / "said", "w+") as said:
        command = [sys.executable, str(ROOT / "sweeps/imbalance.py"), *words]
        driver = subprocess.Popen(command, cwd=place, env=environment, stdout=said, stderr=said)
        try:
            during = _during(driver, place, folder)
            code = driver.wait(240)
        finally:
            driver.kill()
            driver.wait()
        assert code == 1, (place / "said").read_text()[-2000:]
    after = [sys.executable, "-m", "perturbray", "watch", str(folder)]
    with subprocess.Popen(after, env=environment, stdout=subprocess.PIPE, text=True) as page:
        address = address_in(page.stdout.readline())[1]
        while b"<table" not in json_part(address, "board"):
            time.sleep(0.3)
        end = look(address, place / "profile")
        page.terminate()
    return during, end, folder, (place / "said").read_text()


def json_part(address, name):
    with urllib.request.urlopen(f"{address}state", timeout=20) as answer:
        return json.loads(answer.read())["parts"][name].encode()


def _during(driver, place, folder):
    """Two looks of the browser while the sweep runs: the first once a trial has failed, with what the folder said then."""
    looked, deadline = Folder(folder), time.monotonic() + 240
    while time.monotonic() < deadline:
        assert driver.poll() is None, (place / "said").read_text()[-2000:]
        state = looked.look()
        if state.failed and state.done and state.running:
            break
        time.sleep(0.2)
    address = address_in((place / "said").read_text())[1]
    return state, look(address, place / "profile", seconds=1), looked.look()


def test_during_a_sweep_the_browser_shows_what_runs_is_done_and_failed(followed):
    (before, dom, after), _, _, _ = followed
    assert "Running" in text(dom, "head")
    counts = {name: fact(dom, name) for name in ("done", "running", "queued", "failed")}
    assert sum(counts.values()) == before.asked > 20
    for name in ("done", "failed"):
        assert getattr(before, name) <= counts[name] <= getattr(after, name)
    assert counts["done"] >= 1
    assert counts["failed"] >= 1
    assert counts["queued"] >= 1
    assert "RuntimeError: no luck in the 2nd epoch" in text(dom, "failures")
    assert 'id="gone" class="gone" role="status" hidden' in dom


def test_after_it_the_browser_shows_the_final_leaderboard(followed):
    _, dom, folder, _ = followed
    state = Folder(folder).look()
    assert f"Finished, {state.failed} failed" in text(dom, "head")
    assert fact(dom, "done") + fact(dom, "failed") == state.asked
    assert (fact(dom, "running"), fact(dom, "queued")) == (0, 0)
    report = (folder / "report.html").read_text()
    means = re.findall(r'<span class="mean">([^<]+)</span>', report)
    shown = re.findall(r'<span class="mean">([^<]+)</span>', dom)
    assert shown == means[: len(shown)]
    assert len(shown) >= 12
    assert "so far" not in text(dom, "board")


def test_the_sweep_says_where_its_page_is_and_how_to_look_again(followed):
    *_, said = followed
    assert address_in(said)
    assert said.rstrip().endswith("look again: perturbray watch out/imbalance")
