"""The leaderboard in a terminal: as many headline metrics as its width holds, at the lowest and the highest level."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from perturbray.results.summary import Summary
from perturbray.results.wording import NONE, Cell, cells, level_name

_STYLES = {"better": "bold green", "worse": "red", "tie": "yellow", "": ""}
_COLUMN = 25  # characters of a metric's column: "+0.052 [+0.031, +0.071] ▲" and a space


class Leaderboard:
    """Fits the width that it is printed in."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        summary = self.summary
        if not summary.headline:
            yield Text("No trial has finished yet.")
            return
        levels = list(summary.levels["level"])
        series = summary.series
        name_width = min(max(map(len, series)) + 1, max(12, options.max_width // 3))
        fit = max(1, (options.max_width - name_width - 1) // (_COLUMN + 2))
        # Scores first: a rank is read beside its score, and where there is no room for all, the scores stay.
        ordered = sorted(summary.headline, key=lambda name: name.endswith("/rank"))
        shown = ordered[:fit]
        for level in dict.fromkeys([levels[0], levels[-1]]):
            yield _board(summary, level, metrics=shown, name_width=name_width)
            yield Text()
        yield _legend(summary, left_out=ordered[fit:])


def _board(summary: Summary, level: object, *, metrics: list[str], name_width: int) -> Table:
    board = Table(
        title=level_name(summary, level),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="",
    )
    board.add_column(Text("model", style="dim"), min_width=name_width, max_width=name_width, overflow="ellipsis")
    for metric in metrics:
        scale = summary.scales[metric]
        head = Text.assemble((f"{scale.title} {scale.arrow}", "bold"), (f"\n{scale.name}", "dim"))
        board.add_column(head, min_width=_COLUMN, no_wrap=True)
    found = cells(summary, level, metrics)
    baselines = summary.baselines
    order = [name for name in summary.order(level) if name in found]
    models = [name for name in order if name not in baselines]
    for name in order:
        faint = name in baselines
        label = Text(name, style="dim italic" if faint else "bold", no_wrap=True, overflow="ellipsis")
        board.add_row(
            label,
            *[_text(found[name].get(metric), faint=faint) for metric in metrics],
            end_section=bool(models) and name == models[-1],
        )
        if models and name == models[-1] and len(order) > len(models):
            board.add_row(Text("baselines", style="dim"), *[""] * len(metrics))
    return board


def _text(cell: Cell | None, *, faint: bool) -> Text:
    if cell is None:
        return Text(NONE, style="dim")
    first = Text().append(cell.mean, style="dim" if faint else "bold")
    first.append(f" ±{cell.sd}" if cell.sd else "", style="dim")
    first.append(f"  #{cell.place}" if cell.place else "", style="dim")
    if cell.note:
        return first.append(f"\n{cell.note}", style="red" if "failed" in cell.note else "dim")
    if not cell.reference:
        return first.append("\nreference" if faint else "\n", style="dim")
    second = f"\n{cell.difference} {cell.interval} "
    return first.append(second, style="dim").append(cell.mark, style="dim" if faint else _STYLES[cell.verdict])


def _legend(summary: Summary, *, left_out: list[str]) -> Text:
    text = Text(style="dim")
    text.append(
        "mean ±sd over seeds  #place, = not told apart, of all pairs at once. Below: difference to the best baseline "
    )
    text.append(
        "('reference') with its 95 % interval over conditions and seeds; ▲ better  ▼ worse  ≈ cannot be told apart."
    )
    if left_out:
        text.append(f" For {', '.join(left_out)} widen the terminal, or see summary.csv and report.html.")
    return text


def terminal(summary: Summary) -> Leaderboard:
    """The leaderboard as something that rich prints: ``console.print(terminal(summary))``."""
    return Leaderboard(summary)
