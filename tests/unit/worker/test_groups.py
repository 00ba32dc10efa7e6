"""Groups of ranks: each has its own GPUs and its share of the cores, or is refused with the remedy."""

from __future__ import annotations

import pytest

from penstock_core.protocol.errors import InvalidConfiguration
from penstock_worker.groups import deal, physical_device, visible_gpus
from penstock_worker.settings import WorkerSettings


def dealt(machine: str, options: dict[str, object]) -> list[tuple[str, str | None, int]]:
    groups = deal(WorkerSettings.model_validate(options), machine.split(), cores=8)
    assert [group.slot for group in groups] == list(range(len(groups)))
    return [(group.device, group.visible, group.threads) for group in groups]


@pytest.mark.parametrize(
    ("options", "machine", "groups"),
    [
        ({"gpus": "0,1,2,3", "tensor_parallel": 2}, "0 1 2 3", [("cuda", "0,1", 2), ("cuda", "2,3", 2)]),
        ({"gpus": "3,1", "tensor_parallel": 2}, "a b c d", [("cuda", "d,b", 4)]),
        ({"gpus": "0"}, "0 1", [("cuda", "0", 8)]),
        ({"gpus": "0,1", "ranks": 2}, "0 1", [("cuda", "0", 4), ("cuda", "1", 4)]),
        ({"ranks": 4, "tensor_parallel": 2}, "", [("auto", None, 2)] * 2),
        ({"ranks": 4, "tensor_parallel": 2, "device": "cpu"}, "0 1", [("cpu", None, 2)] * 2),
        ({"ranks": 2, "tensor_parallel": 2}, "0 1 2", [("cuda", "0,1", 4)]),
        ({"processes": 4}, "", [("auto", None, 2)] * 4),
        ({"processes": 2, "tensor_parallel": 2}, "", [("auto", None, 2)] * 2),
        ({"processes": 3}, "0 1", [("cuda", "0", 2), ("cuda", "1", 2), ("cuda", "0", 2)]),
        ({"processes": 2, "device": "cuda:1"}, "0 1", [("cuda:1", None, 4)] * 2),
        ({"processes": 2, "threads": 3}, "", [("auto", None, 3)] * 2),
        ({"processes": 16}, "", [("auto", None, 1)] * 16),
        ({"processes": 2, "ranks": 4, "tensor_parallel": 2}, "", [("auto", None, 2)] * 2),
    ],
)
def test_ranks_gpus_and_cores_are_dealt_out(
    options: dict[str, object], machine: str, groups: list[tuple[str, str | None, int]]
) -> None:
    assert dealt(machine, options) == groups


@pytest.mark.parametrize(
    ("options", "machine", "refusal"),
    [
        ({"gpus": "0,1,2", "tensor_parallel": 2}, "0 1 2", "--gpus: 3 ranks do not divide .* multiple of 2"),
        ({"ranks": 3, "tensor_parallel": 2}, "", "--ranks: 3 ranks do not divide .* multiple of 2"),
        ({"gpus": "0,1", "ranks": 4}, "0 1 2 3", "--ranks: is 4, and --gpus names 2: .* leave --ranks out"),
        ({"gpus": "0,4"}, "0 1", r"--gpus: GPU 4 is not there \(0 to 1 are\); name others"),
        ({"gpus": "0"}, "", r"--gpus: GPU 0 is not there \(none is\); .* on the CPU with --ranks"),
        ({"gpus": "1,0,1"}, "0 1", "--gpus: names GPU 1 twice; name each once"),
        ({"gpus": "0", "device": "cpu"}, "0", "--gpus: names GPUs, and --device is cpu; give one"),
        ({"gpus": "0", "device": "cuda:0"}, "0", "--gpus: names GPUs, and --device is cuda:0; give one"),
        ({"ranks": 4, "tensor_parallel": 2}, "0 1", "--ranks: 4 ranks need a GPU each, and 2 are there; .*cpu"),
        ({"processes": 2, "tensor_parallel": 2}, "0", "--processes: 4 ranks need a GPU each, and 1 is there"),
        ({"processes": 3, "ranks": 4, "tensor_parallel": 2}, "", "--processes: is 3, but 4 ranks make 2 groups"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_with_the_remedy(
    options: dict[str, object], machine: str, refusal: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=refusal):
        dealt(machine, options)


@pytest.mark.parametrize(
    ("chosen", "gpus"), [("0,1", ["0", "1"]), ("", []), ("-1", []), ("GPU-abc, 2", ["GPU-abc", "2"])]
)
def test_only_visible_gpus_are_dealt_out(chosen: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == gpus


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "shown"),
    [
        ("cpu", 2, ["0"], "cpu"),
        ("cuda:0", 1, [], "cuda:0"),
        ("cuda:0", 2, ["2", "3"], "cuda:2,3"),
        ("cuda:1", 1, ["2", "3"], "cuda:3"),
    ],
)
def test_a_device_is_shown_by_the_machines_own_name(device: str, ranks: int, gpus: list[str], shown: str) -> None:
    assert physical_device(device, ranks, gpus) == shown
