"""Registry: from a name to a thing. Refuses a name twice, and lists the alternatives when a name is missing."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from perturbray.errors import InputError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Things of one kind by name, in order of registration.

    >>> COLOURS = Registry("colour")
    >>> @COLOURS.register("red")
    ... class Red: ...
    >>> COLOURS.name_of(Red)
    'red'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that puts a thing under ``name``; the same definition read again replaces itself."""

        def keep(thing: T) -> T:
            present = self._things.get(name)
            if present is not None and _definition(present) != _definition(thing):
                raise InputError(f"there is a {self.kind} named {name!r} already: {_definition(present)}")
            self._things[name] = thing
            return thing

        return keep

    def name_of(self, thing: T) -> str:
        """The name under which a thing, or the class of an instance, stands here."""
        for name, candidate in self._things.items():
            if candidate is thing or candidate is type(thing):
                return name
        raise KeyError(f"{thing!r} is not a registered {self.kind}")

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise InputError(f"no {self.kind} is named {name!r}: {nearest(name, self._things)}")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


def _definition(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
