"""The folder of what can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelsoup import cache_folder


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSOUP_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder("loops") == Path("/own/loops")
    monkeypatch.delenv("MODELSOUP_CACHE")
    assert cache_folder("loops") == Path("/caches/modelsoup/loops")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("loops") == Path("/home/somebody/.cache/modelsoup/loops")


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no folder called ~ appears where one works."""
    for name in ("MODELSOUP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(NotADirectoryError):
        cache_folder("loops").mkdir(parents=True)
