"""Set-ups that cannot work are refused before anything is loaded, with what to change, on every rank alike."""

from __future__ import annotations

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock_core.distributed import DistributedConfig, EngineConfig, launch
from penstock_core.distributed.rendezvous import Place, Rendezvous
from penstock_core.protocol.errors import EngineFailed, InvalidConfiguration
from penstock_worker import follow
from penstock_worker.load import pipeline_config
from penstock_worker.models import Checkpoint
from penstock_worker.settings import WorkerSettings

BUNDLED = Path(__file__).parents[3] / "worker/penstock_worker/bundled/penstock-story"
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
CONFIG = EngineConfig(BUNDLED, device="cpu", distributed=DistributedConfig(tensor_parallel=2))


def agree(folder: Path, *configs: EngineConfig) -> list[str]:
    """What each rank is told, empty where it may go on."""

    def rank(number: int) -> str:
        place = Place(number, len(configs), number, len(configs))
        try:
            Rendezvous.in_file(folder / "rendezvous", place, 30.0).agree(launch.claims(configs[number]))
        except InvalidConfiguration as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(rank, range(len(configs))))


def test_ranks_that_run_the_same_may_go_on(tmp_path: Path) -> None:
    elsewhere = tmp_path / "copy"
    shutil.copytree(BUNDLED, elsewhere)
    assert agree(tmp_path, CONFIG, replace(CONFIG, threads=1), replace(CONFIG, model=elsewhere)) == [""] * 3


def test_ranks_that_differ_are_refused_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(BUNDLED, other)
    settings = (other / "config.json").read_text()
    (other / "config.json").write_text(settings.replace("{", '{"attention_bias": false,', 1))
    for number, (different, named) in enumerate(
        [
            (replace(CONFIG, model=other), "model"),
            (replace(CONFIG, quantization="int8"), "quantization"),
            (replace(CONFIG, distributed=DistributedConfig(pipeline_parallel=2)), "distributed.tensor_parallel"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        told = agree(folder, CONFIG, CONFIG, different)
        assert told[0].startswith(f"{named}: is ")
        assert "on rank 2" in told[0]
        assert told == [told[0]] * 3


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = launch.claims(CONFIG)
    monkeypatch.setattr(launch, "__version__", "0.0.1")
    assert {name for name, value in launch.claims(CONFIG).items() if ours[name] != value} == {"penstock version"}


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    alone = Rendezvous.in_file(tmp_path / "rendezvous", Place(0, 2, 0, 2), timeout_s=0.05)
    with pytest.raises(EngineFailed, match=r"waited .* claims/1; are all 2 ranks started"):
        alone.agree({})
    fallen = Rendezvous.in_file(tmp_path / "other", Place(0, 2, 0, 2), 30.0, lambda: "rank 1 ended")
    with pytest.raises(EngineFailed, match="rank 1 ended while the group was put together"):
        fallen.agree({})


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfiguration, match=rf"MASTER_PORT: {port} is in use; choose another"):
            Rendezvous.over_tcp(Place(0, 2, 0, 2, "127.0.0.1", port, owns_store=True), 5.0)


def test_a_port_where_nobody_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(EngineFailed, match=rf"nobody answers at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}"):
        Rendezvous.over_tcp(Place(1, 2, 1, 2, "127.0.0.1", port), 0.5)


def test_the_environment_tells_the_place() -> None:
    assert Place.from_environment({}) is None
    place = Place.from_environment(TORCHRUN)
    assert place == Place(1, 2, 1, 2, "127.0.0.1", 29500, prefix="penstock/0")
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3", "LOCAL_RANK": "0"}
    launched = Place.from_environment({**TORCHRUN, "RANK": "0", **agent, "LOCAL_WORLD_SIZE": "1"})
    assert launched == Place(0, 2, 0, 1, "127.0.0.1", 29500, owns_store=False, prefix="penstock/3")
    with pytest.raises(InvalidConfiguration, match="RANK: 2 is not below WORLD_SIZE 2"):
        Place.from_environment({**TORCHRUN, "RANK": "2"})
    with pytest.raises(InvalidConfiguration, match="MASTER_PORT: 'http' is not a number"):
        Place.from_environment({**TORCHRUN, "MASTER_PORT": "http"})


def test_too_many_ranks_for_a_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert launch.device_of("cpu", Place(0, 8, 0, 8)).type == "cpu"
    with pytest.raises(InvalidConfiguration, match=r"9 ranks on a machine of 2 cores.*at most 8"):
        launch.device_of("cpu", Place(0, 9, 0, 9))
    assert launch.device_of("cpu", Place(8, 9, 0, 1)).type == "cpu"  # on nine machines they are not too many
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device_of("cuda", Place(3, 4, 1, 2)) == torch.device("cuda:1")
    with pytest.raises(InvalidConfiguration, match="3 ranks need a CUDA device each, and 2 are there"):
        launch.device_of("cuda", Place(0, 3, 0, 3))
    with pytest.raises(InvalidConfiguration, match="CUDA_VISIBLE_DEVICES"):
        launch.device_of("cuda:1", Place(0, 2, 0, 2))


@pytest.mark.parametrize(
    ("settings", "environment", "problem"),
    [
        ({}, {}, None),
        ({"tensor_parallel": 2}, {}, None),
        ({"tensor_parallel": 2}, TORCHRUN, None),
        ({"pipeline_parallel": 2}, TORCHRUN, None),
        ({}, TORCHRUN, "torchrun started 2 processes, and --tensor-parallel 1 times --pipeline-parallel 1 makes 1"),
        ({"tensor_parallel": 2, "ranks": 4}, TORCHRUN, "under torchrun leave them out"),
    ],
)
def test_flags_and_launcher_must_fit(
    settings: dict[str, Any], environment: dict[str, str], problem: str | None
) -> None:
    told = follow.mismatch(WorkerSettings(**settings), environment)
    assert (told is None) if problem is None else problem in (told or "")


def test_only_ranks_above_0_follow() -> None:
    assert follow.is_follower(TORCHRUN)
    assert not follow.is_follower({**TORCHRUN, "RANK": "0"})
    assert not follow.is_follower({"RANK": "1"})


def test_the_workers_flags_reach_the_engine() -> None:
    settings = WorkerSettings(tensor_parallel=2, pipeline_parallel=3, memory_fraction=0.3, kv_cache_tokens=100)
    engine = pipeline_config(settings, Checkpoint(BUNDLED, "story")).engine()
    assert engine.distributed == DistributedConfig(tensor_parallel=2, pipeline_parallel=3)
    assert engine.distributed.num_ranks == settings.group_size == 6
    assert (engine.page.memory_fraction, engine.page.sized(16).num_pages) == (0.3, 7)
