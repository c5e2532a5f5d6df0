"""Errors that a user can act on: what was wrong, where, and what would be right. The command line prints them as one line."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user. The command line prints the message without a traceback and exits with code 2."""


class MemoryShortError(Exception):
    """Ray's memory monitor kills what is started, whatever it is; the message says in numbers why."""


def nearest(name: str, options: Iterable[str], *, most: int = 3) -> str:
    """A clause that names the closest options, e.g. ``did you mean 'cosine'?``; all of them where none is close."""
    options = sorted({str(option) for option in options})
    close = difflib.get_close_matches(str(name), options, n=most, cutoff=0.6)
    if not close:
        folded = {option.casefold(): option for option in options}
        matches = difflib.get_close_matches(str(name).casefold(), folded, n=most, cutoff=0.5)
        close = [folded[match] for match in matches]
    if close:
        return "did you mean " + " or ".join(repr(option) for option in close) + "?"
    if not options:
        return "there are none"
    shown = ", ".join(options[:20])
    return f"there are: {shown}" + (f", ... ({len(options)} in all)" if len(options) > 20 else "")
