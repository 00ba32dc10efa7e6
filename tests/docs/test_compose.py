"""compose.yaml and the images, as far as they can be held without a container engine.

The file is checked against the compose specification's own schema; the commands that the images and health checks name
are run, for their help, as they stand there.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_compose_file_follows_the_specification() -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            str(ROOT / "compose.yaml"),
        ],
        check=True,
        capture_output=True,
    )


def test_redis_keeps_what_it_accepts(compose: dict[str, Any]) -> None:
    command = compose["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert any(mount.endswith(":/data") for mount in compose["services"]["redis"]["volumes"])


def test_every_service_has_a_health_check_and_a_memory_limit(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["deploy"]["resources"]["limits"]["memory"]


def test_workers_scale(compose: dict[str, Any]) -> None:
    """`--scale` is refused for a service with a fixed name or a published host port."""
    for name in ("worker", "worker-gpu"):
        service = compose["services"][name]
        assert "container_name" not in service
        assert "ports" not in service
    assert compose["services"]["worker"]["profiles"] == ["cpu"]
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()


def test_workers_get_only_variables_the_worker_reads(compose: dict[str, Any]) -> None:
    known = {f"PENSTOCK_{field.upper()}" for field in WorkerSettings.model_fields} | {"HF_HOME"}
    for name in ("worker", "worker-gpu"):
        assert set(compose["services"][name]["environment"]) <= known


def test_a_stopped_worker_has_time_to_drain(compose: dict[str, Any]) -> None:
    grace_s = WorkerSettings().grace_s
    for name in ("worker", "worker-gpu"):
        assert float(compose["services"][name]["stop_grace_period"].removesuffix("s")) > grace_s


def test_health_check_command_reports_a_missing_worker(compose: dict[str, Any], tmp_path: Path) -> None:
    command = compose["services"]["worker"]["healthcheck"]["test"][1:]
    assert command[0] == "python"
    environment = {**os.environ, "PENSTOCK_HEALTH_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 1
    assert str(tmp_path) in ran.stdout, ran.stderr


def test_gateway_is_published_on_this_machine_only(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in gateway["ports"])
    assert set(gateway["environment"]) <= {"PENSTOCK_REDIS_URL", "PENSTOCK_QUEUE", "PENSTOCK_API_KEYS"}


def test_gateway_serves_the_queue_that_the_worker_does(compose: dict[str, Any]) -> None:
    """The story: with PENSTOCK_MODEL set the worker served that model's queue, and the gateway the bundled one's."""
    model = compose["services"]["worker"]["environment"]["PENSTOCK_MODEL"]
    assert compose["services"]["gateway"]["environment"]["PENSTOCK_QUEUE"] == f"${{PENSTOCK_QUEUE:-{model}}}"


@pytest.mark.parametrize(("image", "targets"), [("worker", 2), ("gateway", 1)])
def test_image_commands_exist(image: str, targets: int) -> None:
    dockerfile = (ROOT / "docker" / f"{image}.Dockerfile").read_text()
    entrypoints = re.findall(r"^ENTRYPOINT \[(.*)\]$", dockerfile, re.MULTILINE)
    commands = re.findall(r"^CMD \[(.*)\]$", dockerfile, re.MULTILINE)
    assert len(entrypoints) == len(commands) == targets
    for entrypoint, command in zip(entrypoints, commands, strict=True):
        program, *arguments = shlex.split(f"{entrypoint} {command}".replace(",", ""))
        assert program == "penstock"
        ran = subprocess.run(
            [sys.executable, "-m", "penstock", *arguments, "--help"], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("image", ["worker", "gateway"])
def test_images_copy_what_the_package_needs(image: str) -> None:
    dockerfile = (ROOT / "docker" / f"{image}.Dockerfile").read_text()
    ignored, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for path in copied.split():
            assert (ROOT / path).exists(), path
            assert f"!{path.split('/')[0]}" in rules, f"{path} is not sent to the builder"
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    for stage in re.findall(r"--from=(\S+)", dockerfile):
        assert stage in stages


def test_kernels_are_built_with_what_their_stage_has(tmp_path: Path) -> None:
    """Those stages hold the interpreter, a compiler and the two copied paths, and no installed package."""
    dockerfile = (ROOT / "docker" / "worker.Dockerfile").read_text()
    copied = re.findall(r"^COPY (core/penstock_core/\S+) /src/(\S+)$", dockerfile, re.MULTILINE)
    assert copied[: len(copied) // 2] == copied[len(copied) // 2 :], "both stages copy the same"
    for source, target in dict(copied).items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).symlink_to(ROOT / source)
    assert "python -m penstock_core.kernels.build /kernels" in dockerfile
    code = "import sys; sys.path.insert(0, sys.argv[1]); from penstock_core.kernels import build; print(build.SOURCES)"
    ran = subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))
