"""Plugins: a user's own file registers models, splits, ablations; its source travels to the workers with the trials."""

import linecache
import re
import sys
import types
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from perturbray.errors import InputError

GROUP = "perturbray"  # an installed package registers its things with an entry point of this group


@dataclass(frozen=True)
class Plugin:
    """A module as text. Running it registers what it defines; running the same text again changes nothing."""

    name: str
    source: str

    @classmethod
    def read(cls, path: str) -> "Plugin":
        """The plugin in a file. Raises InputError if there is none."""
        place = Path(path)
        try:
            source = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"--plugin {path}: cannot be read ({reason})") from None
        return cls(name=f"perturbray_plugin_{re.sub(r'[^0-9A-Za-z_]', '_', place.stem)}", source=source)

    def install(self) -> None:
        """Run the module in this process, once. Raises InputError that names the line at fault."""
        present = sys.modules.get(self.name)
        if present is not None and present.__dict__.get("__source__") == self.source:
            return
        module = types.ModuleType(self.name)
        filename = f"<{self.name}>"
        module.__dict__.update(__source__=self.source, __file__=filename)
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(keepends=True), filename)
        sys.modules[self.name] = module
        try:
            exec(compile(self.source, filename, "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[self.name]
            line = error.lineno if isinstance(error, SyntaxError) else _line(error, filename)
            raise InputError(
                f"--plugin {self.name.removeprefix('perturbray_plugin_')}, line {line}: {error!r}"
            ) from error


def install(plugins: tuple[Plugin, ...] = ()) -> None:
    """Register what installed packages and given files add."""
    for point in entry_points(group=GROUP):
        point.load()
    for plugin in plugins:
        plugin.install()


def _line(error: Exception, filename: str) -> int | str:
    traceback, line = error.__traceback__, "?"
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
