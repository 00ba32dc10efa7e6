"""One model over several ranks: `python -m benchmarks.distributed [--size small] [--json] [--quick]`.

The same prompts on one process, on 2 ranks (through shared memory and through sockets), on 2 stages and on 2 stages of
2 ranks, at equal threads in all as far as there are that many: each rank has at least one. Greedy, end of sequence
ignored, fp32. Decoding is 8 requests of 64 new tokens; prefill is one prompt of 512 tokens. Beside the rates: what goes
through collectives, between stages and in messages, per step, and what each rank holds.

Each set-up runs in a process of its own, because a process is in one group at most; they are measured in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SIZES, random_checkpoint
from benchmarks.report import alternate, parser, publish, table

CUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "2 ranks": {"tensor_parallel": 2},
    "2 ranks, sockets": {"tensor_parallel": 2, "shared_memory": False},
    "2 stages": {"pipeline_parallel": 2},
    "2 stages of 2 ranks": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
SEQUENCES, NEW_TOKENS, PROMPT, LONG_PROMPT = 8, 64, 32, 512


def main() -> None:
    """Run the comparison and print it; with `--serve`, be one of those compared."""
    options = parser(__doc__)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--serve", choices=CUTS, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.size, arguments.runs = "tiny", 1
    folder = random_checkpoint(arguments.size)
    if arguments.serve is not None:
        serve(folder, arguments.serve, arguments.threads, quick=arguments.quick)
        return
    contestants = {name: Contestant(name, arguments) for name in CUTS}
    try:
        figures = alternate(
            {name: contestant.measure for name, contestant in contestants.items()}, arguments.runs, arguments.size
        )
    finally:
        for contestant in contestants.values():
            contestant.end()
    about = {name: contestant.about for name, contestant in contestants.items()}
    alone = figures["1 rank"]
    ratios = {
        name: {key: values[key] / alone[key] for key in ("decode_tok_s", "prefill_tok_s")}
        for name, values in figures.items()
    }
    table(
        f"speed, {arguments.size}, fp32, {arguments.threads} threads",
        ["", "decode tok/s", "against one rank", "prefill tok/s", "against one rank", "ms a decoding step"],
        [
            [
                name,
                values["decode_tok_s"],
                ratios[name]["decode_tok_s"],
                values["prefill_tok_s"],
                ratios[name]["prefill_tok_s"],
                values["step_ms"],
            ]
            for name, values in figures.items()
        ],
    )
    table(
        "exchanged by rank 0 in a decoding step, waiting included",
        ["", "collectives", "KiB", "ms", "between stages KiB", "ms", "message bytes", "us"],
        [[name, *(values[key] for key in list(values)[3:])] for name, values in figures.items() if name != "1 rank"],
    )
    table(
        "start and memory",
        ["", "threads", "ready s", "weights MiB by rank", "resident MiB by rank"],
        [
            [
                name,
                said["threads"],
                said["ready_s"],
                *(" ".join(f"{mib:.0f}" for mib in said[key]) for key in ("weights_mib", "resident_mib")),
            ]
            for name, said in about.items()
        ],
    )
    publish(
        "distributed",
        {"size": arguments.size, "figures": figures, "ratios": ratios, "about": about},
        as_json=arguments.json,
    )


class Contestant:
    """One set-up in its own process, which measures when told to."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "benchmarks.distributed", "--serve", name, "--size", arguments.size]
        command += ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._hear()
        self.about["ready_s"] = time.perf_counter() - started

    def measure(self) -> Mapping[str, float]:
        """One run."""
        assert self._process.stdin is not None
        self._process.stdin.write("measure\n")
        self._process.stdin.flush()
        return self._hear()

    def end(self) -> None:
        """End it, with its ranks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with exit code {self._process.wait()}; its messages are above")
        said: dict[str, Any] = json.loads(line)
        return said


def serve(folder: Path, name: str, threads: int, *, quick: bool) -> None:
    """Load one set-up, say so, and measure once for every line on standard input."""
    import psutil
    import torch

    from penstock_core.distributed import DistributedConfig
    from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig

    distributed = DistributedConfig(**CUTS[name])
    each = max(1, threads // distributed.num_ranks)
    executor = InferencePipelineExecutor(
        PipelineConfig(
            model=folder,
            device="cpu",
            dtype="float32",
            threads=each,
            max_model_len=1024,
            max_num_sequences=SEQUENCES,
            prefix_cache=False,
            distributed=distributed,
        )
    )
    processes = [psutil.Process(), *psutil.Process().children()]
    say(
        {
            "threads": each * distributed.num_ranks,
            "shared_memory": executor.pipeline.engine.group is not None and executor.pipeline.engine.group.shared,
            "weights_mib": [report.weights / 2**20 for report in executor.pipeline.engine.memory],
            "resident_mib": [process.memory_info().rss / 2**20 for process in processes],
            "memory": [asdict(report) for report in executor.pipeline.engine.memory],
        }
    )
    assert torch.get_num_threads() == each
    for _ in sys.stdin:
        say(measure(executor, quick=quick))
    executor.shutdown(timeout_s=30)


def measure(executor: Any, *, quick: bool) -> dict[str, float]:
    """Decode a batch, counting from the step after its prompts; then read a long prompt."""
    from penstock_core.pipeline import EngineRequest
    from penstock_core.sampling import SamplingParams

    shape, pipeline = random.Random(0), executor.pipeline
    group, new_tokens = pipeline.engine.group, NEW_TOKENS // (4 if quick else 1)

    def add(count: int, length: int, new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for number in range(count):
            prompt = [shape.randrange(2, 2000) for _ in range(length)]
            pipeline.add_request(EngineRequest(f"{length}-{number}", prompt, sampling))

    def finish() -> tuple[int, float]:
        started, steps = time.perf_counter(), 0
        while pipeline.has_work:
            pipeline.step()
            steps += 1
        return steps, time.perf_counter() - started

    def exchanged() -> list[float]:
        kinds = () if group is None else (group.traffic, group.handed_on, group.told)
        return [value for kind in kinds for value in (kind.calls, kind.num_bytes, kind.seconds)] or [0.0] * 9

    add(SEQUENCES, PROMPT, new_tokens)
    pipeline.step()
    before = exchanged()
    steps, decode_s = finish()
    calls, sent, waited, _, handed, handing, _, told, telling = (
        (after - earlier) / steps for after, earlier in zip(exchanged(), before, strict=True)
    )
    add(1, LONG_PROMPT, 1)
    _, prefill_s = finish()
    return {
        "decode_tok_s": SEQUENCES * (new_tokens - 1) / decode_s,
        "prefill_tok_s": LONG_PROMPT / prefill_s,
        "step_ms": decode_s / steps * 1e3,
        "collectives": calls,
        "collective_kib": sent / 1024,
        "collective_ms": waited * 1e3,
        "handed_on_kib": handed / 1024,
        "handed_on_ms": handing * 1e3,
        "message_bytes": told,
        "message_us": telling * 1e6,
    }


def say(what: Mapping[str, Any]) -> None:
    """One line of JSON to the parent."""
    os.write(1, (json.dumps(what) + "\n").encode())


if __name__ == "__main__":
    main()
