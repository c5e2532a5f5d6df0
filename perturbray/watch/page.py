"""The markup of the live page: a shell that a script keeps up to date, and the fragments that it puts in it."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from markupsafe import Markup, escape

from perturbray.results import page, sections
from perturbray.results.live import Point
from perturbray.watch.drawing import Drawing
from perturbray.watch.state import (
    BROKEN,
    DONE,
    INTERRUPTED,
    RUNNING,
    SILENT,
    WAITING,
    Active,
    State,
)

SHOWN = 40  # running trials in rows; the others are counted
FAILURES = 10  # failed trials with their reason; the others are counted
NONE = "–"
WIDTH, HEIGHT = 168, 34  # of a small learning curve

STYLE = """
main { padding-top: 1.4rem; }
h1 { margin-bottom: .5rem; }
.top { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; margin: 0 0 .7rem; }
.badge { font-weight: 600; } .badge::before { content: "●"; margin-right: .4rem; }
.badge.running { color: var(--good); } .badge.silent, .badge.broken { color: var(--bad); }
.badge.waiting, .badge.interrupted { color: var(--even); } .badge.done { color: var(--accent); }
.badge.done::before { content: "✓"; } .badge.silent::before, .badge.broken::before { content: "!"; }
.badge.interrupted::before { content: "‖"; } .badge.waiting::before { content: "○"; }
.bar { display: flex; height: .8rem; background: var(--wash); border: 1px solid var(--line); border-radius: 3px;
  overflow: hidden; margin: 0 0 .9rem; }
.bar i { flex: 0 0 auto; min-width: 3px; } .bar .done { background: var(--accent); } .bar .failed { background: var(--bad); }
.bar .running { background: repeating-linear-gradient(135deg, var(--good) 0 4px, transparent 4px 8px); }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem 1.2rem; margin: 0;
  max-width: none; font-size: 1rem; }
.facts div { border-left: 3px solid var(--line); padding-left: .65rem; }
.facts .done { border-color: var(--accent); } .facts .failed { border-color: var(--bad); color: inherit; }
.facts .running { border-color: var(--good); }
.facts dt { font-size: .8125rem; }
.facts dd { font-size: 1.32rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.facts dd small { font-size: .8125rem; color: var(--soft); white-space: nowrap; }
.runs { width: 100%; } .runs th:first-child { overflow-wrap: anywhere; min-width: 11rem; }
.runs td, .runs th { vertical-align: middle; }
.runs td.n small { color: var(--soft); }
.spark { display: block; overflow: visible; }
.spark path { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.spark path.train { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 2; }
.spark circle { fill: var(--accent); }
.gone { background: var(--wash); border-left: 4px solid var(--bad); padding: .5rem .8rem; margin: 0 0 1rem; }
#curves .wide > svg { max-width: 44rem; }
@media (max-width: 40rem) { .facts { grid-template-columns: repeat(2, 1fr); } .runs { min-width: 44rem; }
  .board { min-width: 60rem; } }
[hidden] { display: none; }
"""

SCRIPT = """
"use strict";
const gone = document.getElementById("gone");
function put(element, text) {
  const open = new Map([...element.querySelectorAll("details[id]")].map(one => [one.id, one.open]));
  const left = [...element.querySelectorAll(".wide")].map(one => one.scrollLeft);
  const focused = element.contains(document.activeElement) ? document.activeElement.id : "";
  element.innerHTML = text;
  for (const one of element.querySelectorAll("details[id]")) if (open.has(one.id)) one.open = open.get(one.id);
  element.querySelectorAll(".wide").forEach((one, at) => { one.scrollLeft = left[at] || 0; });
  if (focused) document.getElementById(focused)?.focus();
}
let shown = {};
async function poll() {
  try {
    const answer = await fetch("state", {cache: "no-cache"});
    if (!answer.ok) throw new Error(answer.status);
    const found = await answer.json();
    document.title = found.title;
    for (const [id, text] of Object.entries(found.parts)) {
      if (shown[id] !== text) put(document.getElementById(id), text);
      document.getElementById(id).hidden = !text;
    }
    shown = found.parts;
    gone.hidden = true;
  } catch (error) { gone.hidden = false; }
  setTimeout(poll, document.hidden ? 5000 : 1000);
}
setTimeout(poll, 1000);
"""

_PARTS = {
    "head": """\
<p class="kind">perturbray sweep <b>{{ name }}</b>{% if data %} on {{ data }}{% endif %}</p>
<h1>{{ question }}</h1>
<p class="top"><span class="badge {{ kind }}">{{ badge }}</span> <span class="soft">{{ beside }}</span></p>
""",
    "counts": """\
{% if asked %}
<div class="bar" role="img" aria-label="{{ done }} of {{ asked }} trials done, {{ running }} running, {{ failed }} failed">
{% for part in bar %}<i class="{{ part[0] }}" style="width: {{ part[1] }}%"></i>{% endfor %}
</div>
<dl class="facts">
{% for fact in facts %}
<div class="{{ fact.kind }}"><dt>{{ fact.name }}</dt>
<dd id="fact-{{ fact.id }}">{{ fact.value }}{% if fact.beside %} <small>{{ fact.beside }}</small>{% endif %}</dd></div>
{% endfor %}
</dl>
{% endif %}
""",
    "running": """\
{% if rows %}
<h2>Running</h2>
<div class="wide" tabindex="0" role="region" aria-label="trials that run">
<table class="runs"><caption>Loss by epoch: solid on the validation conditions, dashed in training; each on its own scale.\
{% if more %} The first {{ rows | length }} of {{ rows | length + more }}.{% endif %}</caption>
<thead><tr><th scope="col">trial</th><th scope="col" class="n">epoch</th><th scope="col">learning</th>
<th scope="col" class="n">validation loss</th><th scope="col" class="n">running for</th><th scope="col" class="n">cells/s</th>
<th scope="col" class="n">memory</th><th scope="col">host</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row.name }}</th><td class="n">{{ row.epoch }}</td><td>{{ row.curve }}</td>
<td class="n">{{ row.loss }}</td>
<td class="n">{{ row.seconds }}</td><td class="n">{{ row.cells }}</td><td class="n">{{ row.memory }}</td><td>{{ row.host }}</td>
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
""",
    "failures": """\
{% if rows %}
<h2 class="failed">Failed</h2>
{% for row in rows %}
<details id="failed-{{ loop.index }}-{{ row.key }}"><summary><b>{{ row.name }}</b>: <span class="failed">{{ row.error }}</span>
</summary>
{% if row.curve %}<p class="soft">Its loss by epoch: {{ row.curve }}</p>{% endif %}
<pre tabindex="0">{{ row.traceback or "no traceback was recorded" }}</pre></details>
{% endfor %}
{% if more %}<p class="soft">And {{ more }} more, each in its .failed.json.</p>{% endif %}
{% endif %}
""",
    "board": """\
{% if problem %}<h2>Leaderboard</h2><p class="failed">{{ problem }}</p>{% endif %}
{% if drawing.levels %}
<h2>Leaderboard{{ so_far }}</h2>
{% for level in drawing.levels %}
<h3>{{ level.title }}</h3>{{ boards(level) }}
{% endfor %}
{% elif waiting %}
<h2>Leaderboard</h2><p class="soft">{{ waiting }}</p>
{% endif %}
""",
    "figure": """\
{% if drawing.figure %}
<h2>{{ drawing.figure_title }}{{ so_far }}</h2>
<figure><div class="wide" tabindex="0" role="region" aria-label="figure of scores">{{ drawing.figure }}</div></figure>
{% endif %}
""",
    "curves": """\
{% if drawing.curves %}
<h2>Learning curves of finished trials</h2>
<figure><div class="wide" tabindex="0" role="region" aria-label="figure of losses">{{ drawing.curves }}</div>
<figcaption>Loss against epoch where nothing is taken away: solid on the validation conditions, dashed in training; a line a
seed; the mark is the epoch whose weights were kept.</figcaption></figure>
{% endif %}
""",
    "searches": """\
{% for one in drawing.searches %}
<h2>Search: {{ one.title }}</h2>
{% for text in one.sentences %}<p>{{ text }}</p>{% endfor %}
{% for figure, caption in one.figures %}
<figure><div class="wide" tabindex="0" role="region" aria-label="figure of the search">{{ figure }}</div>
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% endfor %}
""",
    "foot": """\
<h2>Where it runs</h2>
{{ terms(facts) }}
{% if said %}<details id="lines"><summary>The last lines it said</summary>
<pre tabindex="0">{{ said }}</pre></details>{% endif %}
""",
}
_TEMPLATES = {name: page.template(page.MACROS + text) for name, text in _PARTS.items()}

_SHELL = page.template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<main>
<p id="gone" class="gone" role="status" hidden>Nobody keeps this page up to date any more; below is what it showed last. Look
again with <code>perturbray watch {{ folder }}</code></p>
{% for id, text in parts.items() %}
<{{ "header" if id == "head" else "section" }} id="{{ id }}"{{ "" if text else " hidden" }}>{{ text }}\
</{{ "header" if id == "head" else "section" }}>
{% endfor %}
</main>
<script>{{ script }}</script>
</body>
</html>
""")


def shell(state: State, drawing: Drawing, folder: str) -> str:
    """The whole page, complete as of now also where no script runs."""
    found = fragments(state, drawing, folder)
    return _SHELL.render(
        title=title(state),
        style=Markup(page.STYLE + STYLE),
        script=Markup(SCRIPT),
        folder=folder,
        parts={name: Markup(text) for name, text in found.items()},
    )


def title(state: State) -> str:
    """Of the browser's tab."""
    name = state.plan.get("name") or "perturbray"
    return f"{state.done}/{state.asked} {name}" if state.asked else str(name)


def fragments(state: State, drawing: Drawing, folder: str) -> dict[str, str]:
    """The parts of the page as markup, in their order; "" for one that has nothing to show."""
    views = {
        "head": _head(state, folder),
        "counts": _counts(state),
        "running": {"rows": [_row(one) for one in state.active[:SHOWN]], "more": max(state.running - SHOWN, 0)},
        "failures": _failures(state),
        "board": _board(state, drawing),
        "figure": {"drawing": drawing, "so_far": _so_far(state, drawing)},
        "curves": {"drawing": drawing},
        "searches": {"drawing": drawing},
        "foot": {"facts": _where(state, folder), "said": "\n".join(state.said.said) if state.said else ""},
    }
    return {name: _TEMPLATES[name].render(view).strip() for name, view in views.items()}


def _head(state: State, folder: str) -> dict:
    plan = state.plan
    name = plan.get("name") or folder.rstrip("/").rsplit("/", 1)[-1]
    dataset = plan.get("dataset")
    return {
        "name": name,
        "data": sections.data_line(dataset) if isinstance(dataset, Mapping) else "",
        "question": plan.get("question") or name,
        "kind": state.kind,
        "badge": _badge(state),
        "beside": _beside(state),
    }


def _badge(state: State) -> str:
    if state.kind == DONE:
        return "Finished" if not state.failed else f"Finished, {state.failed} failed"
    return {
        WAITING: "Nothing has begun here yet",
        RUNNING: "Running",
        SILENT: f"No sign of life since {clock(state.silence)}" if state.said else "No sign of life",
        INTERRUPTED: "Interrupted",
        BROKEN: "Broken off",
    }[state.kind]


def _beside(state: State) -> str:
    live, again = state.said, "the same command goes on from here"
    if state.kind == WAITING:
        return "This page fills as soon as a sweep writes into this folder."
    if state.kind == RUNNING and live:
        since = clock(live.time - live.began)
        return f"for {since} on {live.host}" + ("" if live.runs else ": no trial has begun yet")
    if state.kind == SILENT:
        lost = f"; {trials(state.lost)} under way then" if state.lost else ""
        return f"Whoever ran it was probably killed{lost}; finished trials are kept, and {again}."
    if state.kind == BROKEN and live:
        return f"{live.reason}; {again}."
    return f"{again[0].upper()}{again[1:]}." if state.kind == INTERRUPTED else ""


def _counts(state: State) -> dict:
    asked = max(state.asked, 1)
    parts = [("done", state.done), ("failed", state.failed), ("running", state.running)]
    facts = [
        ("done", "done", f"{state.done:,}", f"of {state.asked:,}", "done"),
        ("running", "running", f"{state.running:,}", _scoring(state), "running" if state.running else ""),
        ("queued", "queued", f"{state.queued:,}", "", ""),
        ("failed", "failed", f"{state.failed:,}", "", "failed" if state.failed else ""),
        *_rates(state),
    ]
    names = ("id", "name", "value", "beside", "kind")
    return {
        "asked": state.asked,
        "done": state.done,
        "running": state.running,
        "failed": state.failed,
        "bar": [(name, f"{100 * count / asked:.3f}") for name, count in parts if count],
        "facts": [dict(zip(names, fact, strict=True)) for fact in facts],
    }


def _scoring(state: State) -> str:
    scoring = sum(one.run.stopped for one in state.active)
    return f"{scoring:,} being scored" if scoring else ""


def _rates(state: State) -> list[tuple[str, str, str, str, str]]:
    """Time left, throughput, memory: of what runs now."""
    if state.kind != RUNNING or state.said is None:
        return []
    runs = [one.run for one in state.active if not one.run.stopped]
    cells = sum(run.cells / run.epoch_seconds for run in runs if run.cells and run.epoch_seconds)
    hours = max(state.said.time - state.said.began, 1.0) / 3600
    ended = state.done + state.failed - state.said.before
    memory = [run.memory_mb for run in runs if run.memory_mb is not None]
    card = [run.gpu_memory_mb for run in runs if run.gpu_memory_mb is not None]
    busy = [run.gpu_percent for run in runs if run.gpu_percent is not None]
    rates = [
        ("left", "time left", NONE if state.left is None else f"about {clock(state.left)}", "", ""),
        ("cells", "training", amount(cells) if cells else NONE, "cells/s" if cells else "", ""),
        ("trials", "trials", f"{ended / hours:,.0f}" if ended > 0 else NONE, "an hour" if ended > 0 else "", ""),
        ("memory", "memory of trials", megabytes(sum(memory)) if memory else NONE, "", ""),
    ]
    if card:
        beside = f"{sum(busy) / len(busy):.0f} % busy" if busy else ""
        rates.append(("gpu", "GPU memory", megabytes(sum(card)), beside, ""))
    return rates


def _row(one: Active) -> dict:
    run = one.run
    losses = [watched for _, _, watched in run.points if watched is not None]
    cells = run.cells / run.epoch_seconds if run.cells and run.epoch_seconds else None
    count = f"{one.epoch:,}" if one.epoch else NONE
    return {
        "name": one.name,
        "epoch": Markup("{} <small>/ {}</small>").format(count, f"{one.epochs:,}")
        if one.epochs and one.epoch
        else count,
        "curve": "being scored" if run.stopped else spark(run.points),
        "loss": f"{losses[-1]:#.4g}" if losses else NONE,
        "seconds": clock(one.seconds),
        "cells": NONE if cells is None else amount(cells),
        "memory": NONE if run.memory_mb is None else megabytes(run.memory_mb),
        "host": run.host or NONE,
    }


def _failures(state: State) -> dict:
    rows = [{**vars(one), "curve": spark(one.points)} for one in state.failures[:FAILURES]]
    return {"rows": rows, "more": max(state.failed - FAILURES, 0)}


def _board(state: State, drawing: Drawing) -> dict:
    waiting = ""
    if not drawing.levels and not drawing.problem and state.plan:
        count = len(state.finished)
        waiting = f"Being drawn, of {trials(count)}." if count else "No trial has finished yet."
    problem = "; ".join(filter(None, [state.problem, drawing.problem]))
    return {"drawing": drawing, "problem": problem, "waiting": waiting, "so_far": _so_far(state, drawing)}


def _so_far(state: State, drawing: Drawing) -> str:
    planned = len(state.plan.get("trials", ()))
    if drawing.trials == planned:
        return ""
    return f"{' so far' if state.queued or state.running else ''}, {drawing.trials:,} of {planned:,} trials"


def _where(state: State, folder: str) -> list[tuple[str, str]]:
    facts = [("results", folder)]
    if live := state.said:
        facts.append(("run by", f"process {live.pid} on {live.host}"))
        facts += [("cluster", live.cluster)] if live.cluster else []
        at = datetime.fromtimestamp(live.time, UTC)
        facts.append(("last sign of life", f"{at:%Y-%m-%d %H:%M:%S} UTC"))
    command = state.plan.get("command")
    return [*facts, *([("command", str(command))] if command else [])]


def spark(points: Sequence[Point]) -> Markup | str:
    """A learning curve as a small figure; "" with fewer than two epochs."""
    if len(points) < 2:
        return ""
    values = [value for point in points for value in point[1:] if value is not None]
    if not values:
        return ""
    settled = [
        value for at, point in enumerate(points) for value in point[1 + (at == 0) :] if value is not None
    ] or values
    low, high = min(settled), max(settled)  # the first training loss would take all the room
    first, last = points[0][0], points[-1][0]

    def place(epoch: int, value: float) -> tuple[float, float]:
        x = (epoch - first) / max(last - first, 1) * WIDTH
        return round(x, 1), round(HEIGHT - (min(value, high) - low) / max(high - low, 1e-12) * HEIGHT, 1)

    lines = []
    for column, kind in ((1, "train"), (2, "watched")):
        found = [place(point[0], point[column]) for point in points if point[column] is not None]
        if found:
            path = "M" + " L".join(f"{x} {y}" for x, y in found)
            lines.append(f'<path class="{kind}" d="{path}"/>')
    watched = [(epoch, value) for epoch, _, value in points if value is not None]
    text = f"loss over {last} epochs"
    if watched:
        x, y = place(*watched[-1])
        lines.append(f'<circle cx="{x}" cy="{y}" r="2.5"/>')
        text = f"validation loss from {watched[0][1]:.4g} to {watched[-1][1]:.4g} in epochs {first} to {last}"
    return Markup(
        f'<svg class="spark" role="img" aria-label="{escape(text)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="-3 -3 {WIDTH + 6} {HEIGHT + 6}">{"".join(lines)}</svg>'
    )


def trials(count: int) -> str:
    return f"{count:,} trial{'s' * (count != 1)}"


def clock(seconds: float) -> str:
    """Seconds as a person says them, in three characters of precision."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def amount(value: float) -> str:
    """A rate to three digits."""
    if value >= 1e6:
        return f"{value / 1e6:,.2f} M"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.0f}" if value >= 10 else f"{value:.3g}"


def megabytes(value: float) -> str:
    return f"{value:,.0f} MB" if value < 1024 else f"{value / 1024:,.1f} GB"
