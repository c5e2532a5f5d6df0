"""The page of a sweep: one self-contained HTML file, rewritten as trials end; a section is an entry of `_view`."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from markupsafe import Markup

from perturbray.results import dots, page, plots, scatter, search, sections, table
from perturbray.results.claims.claim import Claim, Finding, frame, judged
from perturbray.results.claims.published import CLAIMS
from perturbray.results.reader import Reader
from perturbray.results.summary import Summary, summary_of
from perturbray.results.wording import answer, level_name

_STATES = {"running": "running", "done": "finished", "interrupted": "interrupted: the same command carries on"}
_TEMPLATE = page.template(page.TEMPLATE)

READING = """Intervals are 95 % intervals of a paired bootstrap over conditions, in which perturbations are drawn with all
their contexts, with training seeds nested in them: they cover which conditions were tested and, from two seeds on, that
training again gives another model. They do not cover other screens."""

BOARD = """Mean over conditions within a context, then over contexts; ± is the standard deviation over seeds; # is the
place, with = where models share it because they cannot be told apart from the first of their group. Models that share a
letter cannot be told apart: all pairs of a column are compared on the same conditions, and their intervals hold at once
(the maximum-t method), so among models that are equal a difference is seen in no more than 1 column of 20. Below: the
paired difference to the best baseline of that column with its own 95 % interval, which knows nothing of the other
comparisons. ▲ better, ▼ worse, ≈ cannot be told."""

CLAIMED = """Claims of PerturBench's paper and slides that this sweep has what it takes to test. A claim holds where the whole
interval lies where it says, does not hold where an interval lies wholly elsewhere, and is left open otherwise. Where a
sentence has several parts their intervals hold at once, and the claim holds if all of them do."""

SCATTERS = """A dot is a test condition{at}: what a model scores in it against the best baseline, equal on the dashed line.
Its name shows where the pointer rests; the keyboard comes to the conditions that differ most."""

SCATTERED = """ Dotted lines: mean response and replicate, against halves of the cells."""

CURVES = """Loss against epoch{at}: solid on the validation conditions, dashed in training; a line a seed; the mark is the
epoch whose weights were kept. Losses of unlike models are not comparable."""

SCALED = """Scaled: 0 as good as the mean response, 1 as good as a replicate (see Floor and ceiling)."""

SCALE = """A scaled score (u − b)/(r − b) puts a model u between the mean response b, which knows nothing of the single
perturbation, and a replicate r, where one half of a condition's observed cells predicts the other. All three are held
against the same halves, five times over. For metrics of cells the mean response is control cells plus its mean effect,
since a mean without noise is far from any cells. The score is given only where the replicate is better than the mean
response by more than 2 standard errors over conditions; elsewhere the metric is uncalibrated."""


def write_report(
    folder: str | Path, *, reader: Reader | None = None, summary: Summary | None = None, png: bool | None = None
) -> Path:
    """Write ``report.html``, ``figure.svg``, ``summary.csv`` and ``claims.csv`` of a results folder, each atomically; returns
    the page.

    Works from the first finished trial on, and before it. While a sweep runs, pass the same ``reader`` each time, so
    that only new files are read; or the ``summary``, where it is known. ``png``: also ``figure.png``; by default once the
    sweep does not run any more.
    """
    folder = Path(folder)
    summary = summary or summary_of(folder, reader=reader)
    figure = scaled = curves = None
    claims: Mapping[Claim, Mapping[str, Finding]] = {}
    if summary.headline:
        running = summary.plan.get("status", {}).get("state") == "running"
        png = not running if png is None else png
        alone = len(summary.levels) == 1
        figure = plots.save(dots.board(summary) if alone else plots.against_x(summary), folder, png=png)
        if plots.scalable(summary):
            drawn = dots.scaled(summary) if alone else plots.scaled(summary)
            scaled = plots.save(drawn, folder, name="scaled", png=png)
        drawn = plots.curves(summary)
        curves = None if drawn is None else plots.svg(drawn)
        summary.write(folder / "summary.csv")
        claims = judged(summary, CLAIMS)
        table.replace_file(folder / "claims.csv", lambda target: frame(claims).to_csv(target, index=False))
    text = render(
        summary,
        failures=table.failed(folder),
        figure=figure,
        scaled=scaled,
        curves=curves,
        claims=claims,
        searches=search.views(folder),
    )
    path = folder / "report.html"
    table.replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
    return path


def render(
    summary: Summary,
    *,
    failures: Mapping[str, dict],
    figure: str | None,
    scaled: str | None = None,
    curves: str | None = None,
    claims: Mapping[Claim, Mapping[str, Finding]] = MappingProxyType({}),
    searches: Sequence[dict] = (),
) -> str:
    """The page as text.

    ``failures``: those of ``table.failed``; ``figure``, ``scaled``, ``curves``: SVG elements; ``claims``: those of
    ``judged``; ``searches``: those of ``search.views``.
    """
    view = _view(
        summary,
        failures=failures,
        figure=figure,
        scaled=scaled,
        curves=curves,
        claims=claims,
        searches=searches,
    )
    return _TEMPLATE.render(view)


def figure_title(x: str) -> str:
    """Of the figure."""
    return f"Score against {x.replace('train_', 'training ').replace('_', ' ')}" if x else "Scores"


def _view(
    summary: Summary,
    *,
    failures: Mapping[str, dict],
    figure: str | None,
    scaled: str | None,
    curves: str | None,
    claims: Mapping[Claim, Mapping[str, Finding]],
    searches: Sequence[dict],
) -> dict:
    plan = summary.plan
    planned, status = plan.get("trials", []), plan.get("status", {})
    failures = {trial["key"]: failures[trial["key"]] for trial in planned if trial["key"] in failures}
    notes = list(plan.get("notes", ()))
    if summary.others:
        notes.append(f"Result files of other plans in this folder, left out: {summary.others}.")
    lead, findings = answer(summary)
    bounds, controls = sections.bounds(summary), sections.controls(summary.controls)
    if controls and not bounds:
        notes.append(controls)
    view = {
        "style": Markup(page.STYLE),
        "script": Markup(page.SCRIPT),
        "name": plan.get("name", "sweep"),
        "question": plan.get("question") or plan.get("name", "sweep"),
        "data_line": sections.data_line(plan.get("dataset", {})),
        "progress": {
            **{"planned": len(planned), "done": len(summary.trials), "failed": len(failures)},
            **{"running": status.get("running"), "state": _state(status)},
        },
        "written": datetime.now(UTC),
        "live": status.get("state") == "running",
        "complete": len(summary.trials) == len(planned),
        "lead": lead,
        "findings": findings,
        "waiting": f"No trial has finished yet{', and some failed: see the reasons below' if failures else ''}.",
        "reading": READING,
        "figure": Markup(themed(figure)) if figure else None,
        "scaled_figure": Markup(themed(apart(scaled))) if scaled else None,
        "scaled_caption": sections.scaled_caption(summary) if scaled else "",
        "scaled_text": " ".join(SCALE.split()),
        "reaching": sections.REACHING,
        "bounds": bounds,
        "controls": controls,
        "effects": sections.effects(summary),
        "figure_title": figure_title(plan.get("x", "")),
        "figure_caption": sections.figure_caption(summary),
        "board_caption": f"{BOARD} {SCALED}" if bounds else BOARD,
        "levels": sections.levels(summary),
        "claims": sections.claims(claims),
        "claims_text": CLAIMED,
        "variants": sections.variants(summary) if summary.headline else [],
        "scatters": scatter.views(summary) if summary.headline else [],
        "scatters_text": SCATTERS.format(at=_base(summary)) + SCATTERED * bool(bounds),
        "curves_figure": Markup(themed(apart(curves, "curves-"))) if curves else None,
        "curves_text": CURVES.format(at=_base(summary)),
        "changes": sections.changes(summary),
        "truth": sections.truth(summary),
        "strata": sections.strata(summary),
        "searches": [drawn(one, number) for number, one in enumerate(searches)],
        "statuses": sections.statuses(summary),
        "failures": list(failures.values()),
        "dataset": sections.terms(plan.get("dataset", {})),
        "notes": notes,
        "cost": sections.cost(summary),
        "command": plan.get("command", ""),
        "versions": sections.versions(summary),
        "shared": sections.shared(planned),
        "listing": sections.listing(summary, planned, failures),
    }
    return view | {"sections": _contents(view)}


def _contents(view: Mapping) -> list[tuple[str, str]]:
    """Anchor and title of the sections that the page has."""
    named = [
        ("answer", "Answer", True),
        ("figure", "Figure", view["figure"]),
        ("leaderboards", "Leaderboards", view["levels"]),
        ("claims", "Claims", view["claims"]),
        ("variants", "Variants", view["variants"]),
        ("conditions", "Conditions", view["scatters"]),
        ("anchors", "Floor and ceiling", view["bounds"]),
        ("effects", "By effect", view["effects"]),
        ("changes", "Losses", view["changes"]),
        ("truth", "Known truth", view["truth"]),
        ("strata", "Conditions apart", view["strata"]),
        ("searches", "Searches", view["searches"]),
        ("failures", "Flags and failures", view["statuses"] or view["failures"]),
        ("data", "Data and notes", True),
        ("curves", "Learning", view["curves_figure"]),
        ("cost", "Cost", view["cost"]),
        ("repeat", "Repeat it", True),
    ]
    return [(anchor, title) for anchor, title, present in named if present]


def _base(summary: Summary) -> str:
    """Where nothing is taken away, within a sentence."""
    name = "all trials" if summary.levels.empty else level_name(summary, summary.base)
    return "" if name == "all trials" else f", at {name}"


def _state(status: Mapping) -> str:
    state = status.get("state") or ""
    left = status.get("eta_seconds")
    return _STATES.get(state, state) + (f", about {duration(left)} to go" if left and state == "running" else "")


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def drawn(view: Mapping, number: int) -> dict:
    """A search's figures in the page's colours, with ids of their own."""
    figures = [Markup(themed(apart(one, f"search-{number}-{i}-"))) for i, one in enumerate(view["figures"])]
    return {**view, "figures": list(zip(figures, view["captions"], strict=False))}


def apart(figure: str, prefix: str = "scaled-") -> str:
    """A further figure with ids of its own: all were numbered from the same start."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", figure)


def themed(figure: str) -> str:
    """The figure in the page's colours, so that it reads on white and on black, and scaled to the page's width."""
    for colour, variable in ((plots.INK, "currentColor"), (plots.FAINT, "var(--line)"), (plots.PAPER, "var(--paper)")):
        figure = figure.replace(colour, variable)
    end = figure.index(">")
    opening = " ".join(part for part in figure[:end].split() if not part.startswith(("width=", "height=")))
    return f'{opening} role="img" aria-label="the figure; its numbers are in the tables below"{figure[end:]}'
