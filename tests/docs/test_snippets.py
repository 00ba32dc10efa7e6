"""Every command and snippet of the README and the docs does what it says, run against a real broker and worker.

Python blocks run as they stand, each as a script of its own. Of the console blocks, `penstock` commands run; `make`
targets, compose services, packages and extras are looked up, for what cannot be run inside a test (the tests
themselves, containers, installations).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from penstock import Client, EmbeddedBroker
from penstock_core.kernels.build import cache_folder
from penstock_worker.models import bundled_models
from tests.worker_process import PATIENCE_S, until

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT_S = 180

pytestmark = pytest.mark.integration


def _blocks(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for number, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S), 1):
            found.append(pytest.param(match.group(1), id=f"{page.name}-{number}"))
    return found


def _commands() -> list[object]:
    found = []
    for page in PAGES:
        for match in re.finditer(r"^```console\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in match.group(1).splitlines():
                if line.startswith("$ "):
                    found.append(pytest.param(line[2:], id=f"{page.name}: {line[2:][:60]}"))
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A broker and a worker, found through the environment as a user would set it."""
    with EmbeddedBroker() as broker:
        variables = {
            **os.environ,
            "PENSTOCK_REDIS_URL": broker.url,
            "PENSTOCK_THREADS": "1",
            "PENSTOCK_HEALTH_DIR": str(tmp_path_factory.mktemp("health")),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(tmp_path_factory.mktemp("home")),
            "XDG_CACHE_HOME": str(cache_folder().parents[1]),  # with the kernels that are built
        }
        log = tmp_path_factory.mktemp("worker") / "log"
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [sys.executable, "-m", "penstock_worker"], env=variables, stderr=output, stdout=output
            )

        def serves() -> bool:
            assert worker.poll() is None, log.read_text()
            return bool(client.queue_snapshot().workers)

        try:
            with Client(broker.url, queue="penstock-story") as client:
                until(serves, "the worker")
            yield variables
            worker.terminate()
            assert worker.wait(PATIENCE_S) == 0, log.read_text()
        finally:
            worker.kill()


@pytest.mark.parametrize("source", _blocks("python"))
def test_python_block_runs(source: str, environment: dict[str, str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize("command", _commands())
def test_console_command_works(command: str, environment: dict[str, str], tmp_path: Path) -> None:
    words = shlex.split(command.replace("/tmp/", f"{tmp_path}/"))  # which another run may have filled
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        assert name == "COMPOSE_PROFILES"
        assert value in ("cpu", "gpu")
    match words:
        case ["make", target]:
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
        case ["docker", "compose", "up", "--scale", scaled]:
            service, _, count = scaled.partition("=")
            assert service in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
            assert int(count) > 0
        case ["pip", "install", package]:
            name, _, extra = package.removesuffix("]").partition("[")
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert name == project["name"]
            assert not extra or extra in project["optional-dependencies"]
        case ["penstock", "serve" | "worker" | "gateway" | "top" | "demo", *options]:
            # These run until they are stopped, or long; their own tests run them. Here: the options exist.
            shown = subprocess.run(
                ["penstock", words[1], "--help"], env=environment, capture_output=True, text=True, check=True
            ).stdout
            for option in options:
                assert not option.startswith("--") or option in shown, f"{option} is not in penstock {words[1]} --help"
        case ["penstock", *_] | ["python", *_]:
            ran = subprocess.run(
                words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
        case _:
            pytest.fail(f"no test knows how to hold this command: {command}")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_bundled_model_is_the_one_the_readme_names() -> None:
    assert "penstock-story" in bundled_models()


def test_every_guarantee_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[^`:]+)(?:::(\w+))?`", (ROOT / "docs" / "guarantees.md").read_text())
    assert named
    for path, name in named:
        assert (ROOT / path).exists(), path
        assert not name or re.search(rf"\b(def|class) {name}\b", (ROOT / path).read_text()), f"{path}::{name}"
