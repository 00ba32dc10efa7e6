"""Commands run in this process, on the test's own queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from penstock import Client
from penstock.cli.app import app


@pytest.fixture
def cli(redis_url: str, queue: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command on the test's queue."""
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    monkeypatch.setenv("PENSTOCK_QUEUE", queue)

    def call(*args: str, **options: Any) -> Result:
        return CliRunner().invoke(app, list(args), **options)

    return call


@pytest.fixture
def sdk(redis_url: str, queue: str) -> Iterator[Client]:
    with Client(redis_url, queue=queue) as client:
        yield client
