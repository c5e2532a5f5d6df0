"""A cluster file as the rules see it: its parts by name, whatever shape they have, and what was found wrong with them.

Every accessor gives an empty thing where the file holds one of the wrong shape: Ray's schema, which is checked too, says
so, and no rule has to.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perturbray.errors import InputError

PLACEHOLDER = re.compile(r"FILL_IN\w*")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (an error), or that is likely not meant (a warning), and what would be right."""

    where: str  # dotted path in the file
    what: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{'warning' if self.warning else 'error'}: {self.where or 'the file'}: {self.what}"


def join(path: str, part: str | int) -> str:
    """The path of what a mapping or list at ``path`` holds: ``a.b``, ``a[0]``, ``a['~/b.c']``."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    if not re.fullmatch(r"[\w-]+", part):
        return f"{path}[{part!r}]"
    return f"{path}.{part}" if path else part


@dataclass(frozen=True)
class ClusterFile:
    """What a cluster file says."""

    path: Path
    config: dict[str, Any]
    folder: Path  # sources of file_mounts are relative to where `ray up` is called

    @classmethod
    def read(cls, path: str | Path, *, folder: Path | None = None) -> "ClusterFile":
        """Raises InputError where the file cannot be read, is no YAML, or says a thing twice."""
        path = Path(path)
        try:
            config = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceEach)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise InputError(f"{path}{line}: no valid YAML ({getattr(error, 'problem', error)})") from None
        if not isinstance(config, dict):
            raise InputError(f"{path}: holds no mapping; a cluster file begins with `cluster_name: ...`")
        return cls(path=path, config=config, folder=folder or Path.cwd())

    @property
    def provider(self) -> dict[str, Any]:
        return mapping(self.config.get("provider"))

    @property
    def kind(self) -> str:
        return str(self.provider.get("type", ""))

    @property
    def docker(self) -> dict[str, Any]:
        return mapping(self.config.get("docker"))

    @property
    def image(self) -> str:
        """The container's image; "" where Ray runs on the machines themselves."""
        return str(
            next((self.docker[key] for key in ("image", "head_image", "worker_image") if self.docker.get(key)), "")
        )

    @property
    def file_mounts(self) -> dict[str, str]:
        return {str(there): str(here) for there, here in mapping(self.config.get("file_mounts")).items()}

    @property
    def node_types(self) -> dict[str, dict[str, Any]]:
        return {str(name): mapping(kind) for name, kind in mapping(self.config.get("available_node_types")).items()}

    @property
    def head(self) -> str:
        """The name of the head's type."""
        return str(self.config.get("head_node_type", ""))

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        return {name: kind for name, kind in self.node_types.items() if name != self.head}

    def source(self, path: str) -> Path:
        """Where a file named in the cluster file lies on this machine."""
        return self.folder / Path(path).expanduser()

    def commands(self, *sections: str) -> list[tuple[str, str]]:
        """Path and text of every command of the sections."""
        found = []
        for section in sections:
            given = self.config.get(section)
            for number, text in enumerate(given if isinstance(given, list) else []):
                found.append((join(section, number), str(text)))
        return found

    def starts(self, role: str) -> list[tuple[str, str]]:
        """Path and text of the commands that start Ray on the head, or on a worker."""
        return [(path, text) for path, text in self.commands(f"{role}_start_ray_commands") if "ray start" in text]

    def run_options(self, role: str) -> list[str]:
        """Words of the options with which the container of a head or a worker starts."""
        given = [self.docker.get(key) for key in ("run_options", f"{role}_run_options")]
        return [word for some in given if isinstance(some, list) for one in some for word in shlex.split(str(one))]

    def strings(self) -> Iterator[tuple[str, str]]:
        """Path and text of every value that is a text."""
        yield from _strings("", self.config)


class _OnceEach(yaml.SafeLoader):
    """YAML in which no mapping holds a key twice: the second would silently take the place of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands here twice, and the second would win", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _strings(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _strings(join(path, key if isinstance(key, int) else str(key)), part)
