"""Who is measured by the engine benchmarks: our engine, `transformers`, and engines in environments of their own.

All continue prompts of token ids greedily by a number of tokens, on the same checkpoint, precision and threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.report import console

ENGINES = ("openvino", "llamacpp")
_HERE = Path(__file__).parent / "peers"


class Contestant(Protocol):
    """An engine with a checkpoint loaded."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> object:
        """Continue each prompt by exactly `new_tokens` tokens."""


class Penstock:
    """This repository's engine, used alone, without Redis."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        from penstock_core.cache import PageConfig
        from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig

        self.executor = InferencePipelineExecutor(
            PipelineConfig(
                model=folder,
                device=arguments.device,
                dtype=arguments.dtype,
                quantization=arguments.quantization,
                threads=arguments.threads,
                max_num_sequences=64,
                page=PageConfig(kv_dtype=arguments.kv_dtype),
            )
        )
        self.weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // (
            4 if arguments.quantization else {"float32": 1}.get(arguments.dtype, 2)
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Continue each prompt by exactly `new_tokens` tokens."""
        from penstock_core.sampling import SamplingParams

        results = self.executor.generate(
            prompts, SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        )
        assert all(len(result.token_ids) == new_tokens for result in results)


class Transformers:
    """`transformers` generate with its own defaults: a contiguous cache, the batch padded to one length."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=arguments.dtype).to(
            arguments.device
        )
        self.model.eval()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Continue each prompt by exactly `new_tokens` tokens. All prompts of a call have one length."""
        ids = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + new_tokens


class Engine:
    """A peer in its own environment, reached through pipes; see `benchmarks/peers/serve.py`."""

    def __init__(self, name: str, python: Path, folder: Path, threads: int, precision: str) -> None:
        converted = Path(tempfile.gettempdir()) / "penstock-benchmarks"
        command = [str(python.absolute()), f"{name}_engine.py", str(folder), str(converted), str(threads), precision]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command, cwd=_HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.version = str(self._answer()["version"])

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Continue each prompt by exactly `new_tokens` tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert [len(tokens) for tokens in answer] == [new_tokens] * len(prompts)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise EngineUnusable(self._log.read().decode(errors="replace").strip().rpartition("\n")[2] or "no message")
        return json.loads(line)


class EngineUnusable(Exception):
    """A peer's process ended; carries its last words."""


def installed_engines(environments: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Engine]:
    """The peers that are installed and load this checkpoint, by name and version; the others are said to be missing."""
    found = {}
    for name in ENGINES:
        python = environments / name / "bin" / "python"
        if not python.exists():
            console.print(f"{name} is not installed under {environments}: left out (make bench-peers)")
            continue
        try:
            engine = Engine(name, python, folder, arguments.threads, arguments.quantization or arguments.dtype)
        except EngineUnusable as error:
            console.print(f"{name} does not work here and is left out: {error}")
            continue
        found[f"{name} {engine.version.partition('-')[0]}"] = engine
    return found
