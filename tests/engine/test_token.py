"""The token of Ray's dashboard and job interface: only this user can read it, whoever wrote the file."""

import os
import stat

import pytest

from perturbray.cluster import _token


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name) if name in os.environ else None
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_readable_by_its_user_alone(home):
    before = os.umask(0o022)
    try:
        where = _token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    assert where == str(path)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert len(path.read_text()) == 64
    text = path.read_text()
    _token()
    assert path.read_text() == text, "the token stays what it was"


def test_a_token_that_all_can_read_is_closed(home):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("abc")
    path.chmod(0o644)
    assert _token() == str(path)
    assert (mode(path), path.read_text()) == (0o600, "abc")


def test_the_path_of_the_token_may_be_given(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "elsewhere" / "token"))
    assert _token() == str(home / "elsewhere" / "token")
    assert mode(home / "elsewhere" / "token") == 0o600
    assert not (home / ".ray").exists()


def test_a_token_of_the_environment_is_used_and_nothing_is_written(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert _token() == "$RAY_AUTH_TOKEN"
    assert list(home.iterdir()) == []


def test_a_home_that_cannot_be_written_gives_a_token_for_this_run(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is taken back afterwards
    monkeypatch.setenv("HOME", "/proc/no-such-home")
    assert "of this process" in _token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
