"""Building the kernels: wherever there is a compiler, and with a remedy where there is no home to keep them in."""

from __future__ import annotations

import shutil

import pytest

from penstock_core.kernels import build, native


def test_where_a_compiler_is_there_are_kernels() -> None:
    """Or all tests of them are skipped, and nobody sees it."""
    assert native.kernels() is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a container was only given the number of; what was built ahead of time is found all the same."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(build.BuildFailed, match="set HOME or XDG_CACHE_HOME"):
        build.cache_folder()
    found = build.find_library()
    assert found is None or found.parent == build.SOURCES.parent
