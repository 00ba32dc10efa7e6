"""A model by its hub id, through the real download library, against a local stand-in for the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import Client
from penstock_worker.exit_codes import ExitCode
from penstock_worker.models import BUNDLED
from tests.integration.worker.hub import Hub, serving
from tests.redis_server import RedisServer

pytestmark = pytest.mark.integration

MODEL = "somebody/a-story"
TOO_NEW = "somebody/too-new"
GATED = "somebody/gated"
READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A repository with the weights, a second copy of them, and code; and one of an unknown architecture."""
    story, new = tmp_path / "story", tmp_path / "new"
    shutil.copytree(BUNDLED / "penstock-story-draft", story)
    (story / "modeling_story.py").write_text("raise SystemExit('code from the hub was run')")
    (story / "pytorch_model.bin").write_bytes(b"pickled")
    (story / "original").mkdir()
    shutil.copy(story / "model.safetensors", story / "original" / "consolidated.safetensors")
    shutil.copytree(BUNDLED / "penstock-story-draft", new)
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps({**config, "architectures": ["TooNewForCausalLM"], "model_type": "x"}))
    with serving(Hub({MODEL: story, TOO_NEW: new}, frozenset({GATED}))) as started:
        yield started


def start(server: RedisServer, hub: Hub, tmp_path: Path, model: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "penstock_worker", "--redis-url", server.url, "--model", model, "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PENSTOCK_HEALTH_DIR": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)


def test_a_hub_model_is_fetched_without_what_is_not_read_and_found_again_offline(
    server: RedisServer, hub: Hub, tmp_path: Path
) -> None:
    for attempt in range(2):
        worker = start(server, hub, tmp_path, MODEL)
        try:
            with Client(server.url, model=MODEL) as client:
                result = client.submit("The miller", max_tokens=4, seed=1).result(timeout=90)
            assert result.model == MODEL
            assert result.usage.completion_tokens == 4
        finally:
            worker.terminate()
            worker.communicate()
        if attempt == 0:
            fetched = {name.removeprefix(f"{MODEL}/") for name in hub.fetched}
            assert fetched <= {*READ, "model.safetensors"}
            assert {"config.json", "tokenizer.json", "model.safetensors"} <= fetched
            hub.repositories = {}
            hub.url = "http://127.0.0.1:9"  # nobody listens there: from now on the cache alone


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("somebody/else", "the hub has no such model, or not for you; check its spelling, or set HF_TOKEN"),
        (GATED, "accept its terms and set HF_TOKEN"),
        (TOO_NEW, "TooNewForCausalLM"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_weights_are_fetched(
    server: RedisServer, hub: Hub, tmp_path: Path, model: str, said: str
) -> None:
    worker = start(server, hub, tmp_path, model)
    _, errors = worker.communicate(timeout=90)
    assert worker.returncode == ExitCode.MODEL, errors
    assert said in errors
    assert "Traceback" not in errors
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_a_hub_out_of_reach_is_told_from_a_model_that_is_not_there(
    server: RedisServer, hub: Hub, tmp_path: Path
) -> None:
    hub.url = "http://127.0.0.1:9"
    worker = start(server, hub, tmp_path, MODEL)
    _, errors = worker.communicate(timeout=90)
    assert worker.returncode == ExitCode.MODEL, errors
    assert "not in the local cache, and the hub did not give it ([Errno 111] Connection refused)" in errors
