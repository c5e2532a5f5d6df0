"""Laws of plugins: a user's file registers what it defines, here and in any other process, and errors name its line."""

import pickle
import sys

import pytest

from perturbray import plugin
from perturbray.errors import InputError
from perturbray.models.base import MODELS
from perturbray.plugin import Plugin
from perturbray.registry import Registry

SOURCE = '''
from dataclasses import dataclass

from perturbray.models.base import MODELS, Model, ModelSpec

RUNS = globals().get("RUNS", 0) + 1


class TwiceNet(Model):
    def predict(self, batch):
        return 2 * batch.control


@MODELS.register("twice")
@dataclass(frozen=True, kw_only=True)
class Twice(ModelSpec):
    """Twice the control."""

    factor: int = 2

    def build(self, vocabulary):
        return TwiceNet(vocabulary)
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Models and modules as they were, after every test."""
    monkeypatch.setattr(MODELS, "_things", dict(MODELS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "my-models.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_a_file_registers_a_model(path):
    assert "twice" not in MODELS
    Plugin.read(str(path)).install()
    assert MODELS["twice"](factor=3).factor == 3
    assert MODELS["twice"].__module__ == "perturbray_plugin_my_models"


def test_installing_again_changes_nothing(path):
    mine = Plugin.read(str(path))
    mine.install()
    first = MODELS["twice"]
    plugin.install((mine, Plugin.read(str(path))))
    assert MODELS["twice"] is first
    assert sys.modules[mine.name].RUNS == 1


def test_a_file_that_was_edited_replaces_what_it_defined(path):
    Plugin.read(str(path)).install()
    path.write_text(SOURCE.replace("factor: int = 2", "factor: int = 5"), encoding="utf-8")
    Plugin.read(str(path)).install()
    assert MODELS["twice"]().factor == 5


def test_a_plugin_travels_as_text_and_its_specs_with_it(path):
    mine = pickle.loads(pickle.dumps(Plugin.read(str(path))))
    path.unlink()
    mine.install()
    assert pickle.loads(pickle.dumps(MODELS["twice"](factor=4))) == MODELS["twice"](factor=4)


@pytest.mark.parametrize(
    ("wrong", "line", "reason"),
    [
        ("x = 1\ny = x +\n", 2, "SyntaxError"),
        ("x = 1\n\nprint(unknown)\n", 3, "unknown"),
        ("def f():\n    raise ValueError('no')\n\nf()\n", 2, "no"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("import a_module_that_nobody_has\n", 1, "a_module_that_nobody_has"),
        (SOURCE.replace('"twice"', '"no_change"'), 14, "no_change"),
    ],
    ids=["syntax", "name", "in a function", "in a library", "import", "taken name"],
)
def test_an_error_names_the_file_and_its_line(tmp_path, wrong, line, reason):
    path = tmp_path / "broken.py"
    path.write_text(wrong, encoding="utf-8")
    mine = Plugin.read(str(path))
    with pytest.raises(InputError, match=rf"--plugin broken, line {line}: .*{reason}"):
        mine.install()
    assert mine.name not in sys.modules, "so that a corrected file is run"


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(InputError, match=r"--plugin .*nowhere\.py: cannot be read \(No such file"):
        Plugin.read(str(tmp_path / "nowhere.py"))


def test_a_file_that_is_not_text_is_refused_by_its_path(tmp_path):
    path = tmp_path / "binary.py"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"--plugin .*binary\.py: cannot be read \(it is not UTF-8 text\)"):
        Plugin.read(str(path))


def test_installed_packages_register_by_their_entry_point(monkeypatch):
    loaded = []

    class Point:
        def load(self):
            loaded.append(self)

    monkeypatch.setattr(plugin, "entry_points", lambda *, group: [Point()] if group == "perturbray" else [])
    plugin.install()
    assert len(loaded) == 1
    assert isinstance(MODELS, Registry)
