"""What a person should know of a split before it is run, from its record alone."""

from perturbray.data.splits.base import COMMON, SUBSETS

MOST_CONTEXTS = 12
MOST_VALUES = 60  # letters of a field's value


def summary(record: dict, *, taken: str = "") -> str:
    """A table: by context the conditions and cells of each set, and what else came out, as lines of text.

    ``taken``: what an ablation took away, in words.
    """
    counts = record["counts"]
    unused = any(of["unused"][0] or of["unused"][1] for of in counts.values())
    names = (*SUBSETS[1:], *(["unused"] if unused else []))
    rows = [["context", *names, "control cells"]]
    shown = list(counts.items())[: len(counts) if len(counts) <= MOST_CONTEXTS + 1 else MOST_CONTEXTS]
    for context, of in shown:
        rows.append(_row(context, of, names))
    if len(shown) < len(counts):
        rows.append([f"... {len(counts) - len(shown)} more"])
    if len(counts) > 1:
        total = {n: [sum(of[n][i] for of in counts.values()) for i in range(3)] for n in SUBSETS}
        rows.append(_row("all", total, names))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = [f"{title(record, taken=taken)}; conditions (their cells)"]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1 : len(others) + 1], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*lines, *(f"  {note}" for note in _notes(record))])


def title(record: dict, *, taken: str = "") -> str:
    """The task and its fields in a line."""
    fields = {
        name: "+".join(map(str, value)) if name == "controls" else _short(value)
        for name, value in record["parameters"].items()
        if value not in (None, "", ())
    }
    said = ", ".join(f"{name} {value}" for name, value in sorted(fields.items(), key=lambda item: item[0] == "seed"))
    return f"split {record['algorithm']}" + (f" ({said})" if said else "") + (f", {taken}" if taken else "")


def totals(record: dict) -> str:
    """The conditions of each set in a few words."""
    number = {name: sum(of[name][0] for of in record["counts"].values()) for name in SUBSETS}
    parts = [f"{number[name]:,} {name}" for name in SUBSETS[1:]]
    return ", ".join([*parts, *([f"{number['unused']:,} unused"] if number["unused"] else [])]) + " conditions"


def _row(context: str, of: dict[str, list[int]], names: tuple[str, ...]) -> list[str]:
    cells = [f"{of[name][0]:,} ({of[name][1]:,})" for name in names]
    return [context, *cells, " + ".join(f"{of[name][2]:,}" for name in names)]


def _notes(record: dict) -> list[str]:
    strata = {name: of for name, of in record.get("strata", {}).items() if name != COMMON}
    apart = [
        f"{of[SUBSETS.index('test')]} test conditions are reported apart, as {name}" for name, of in strata.items()
    ]
    return [*record.get("notes", ()), *apart]


def _short(value: object) -> str:
    text = "; ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= MOST_VALUES else text[: MOST_VALUES - 3] + "..."
