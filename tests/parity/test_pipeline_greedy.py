"""The whole pipeline says what transformers.generate says: whole, chunked, cached, preempted, resumed, all together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock_core.cache import PageConfig
from penstock_core.models.tokenizer import Tokenizer
from penstock_core.pipeline import (
    EngineRequest,
    InferencePipelineExecutor,
    PipelineConfig,
    ResumedChoice,
    UnifiedInferencePipeline,
)
from penstock_core.protocol.jobs import Choice
from penstock_core.protocol.requests import SamplingParams
from tests.parity.checkpoints import write_checkpoint

pytestmark = pytest.mark.parity

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"
NEW_TOKENS = 32
LENGTHS = (3, 16, 31, 32, 33, 70)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@dataclass
class Reference:
    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["random", "bundled"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Prompts and transformers' greedy continuations, of a random Llama and of the model that comes with the worker."""
    tokenizer = Tokenizer.from_checkpoint(BUNDLED)
    if request.param == "random":
        folder = tmp_path_factory.mktemp("llama")
        config = transformers.LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=1,
        )
        model = write_checkpoint(folder, config)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUNDLED / name, folder)
        prompts = [[(7 * i + 13 * n) % 2000 + 7 for i in range(n)] for n in LENGTHS]
    else:
        folder = BUNDLED
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        story = tokenizer.encode("Once upon a time, beside the river, there lived a fox who could not sleep. ") * 6
        prompts = [story[:n] for n in LENGTHS]
    return Reference(folder, prompts, [_greedy(model, prompt) for prompt in prompts])


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def pipeline(reference: Reference, **options: Any) -> UnifiedInferencePipeline:
    page = PageConfig(
        page_size=8,
        num_pages=options.pop("num_pages", 200),
        host_pages=options.pop("host_pages", 0),
        kv_dtype=options.pop("kv_dtype", "auto"),
    )
    return UnifiedInferencePipeline(PipelineConfig(reference.folder, device="cpu", page=page, **options))


def run(pipe: UnifiedInferencePipeline, requests: list[EngineRequest]) -> dict[str, Choice]:
    for request in requests:
        pipe.add_request(request)
    choices = {}
    while pipe.has_work:
        for output in pipe.step():
            if output.result is not None:
                assert output.result.error is None
                choices[output.request_id] = output.result.choices[0]
    pipe.cache.check(idle=True)
    return choices


def requests(reference: Reference, name: str = "") -> list[EngineRequest]:
    return [EngineRequest(f"{name}{n}", prompt, GREEDY) for n, prompt in enumerate(reference.prompts)]


def tokens(choices: dict[str, Choice], name: str = "") -> list[list[int]]:
    return [list(choices[f"{name}{n}"].token_ids) for n in range(len(LENGTHS))]


def test_one_at_a_time(reference: Reference) -> None:
    pipe = pipeline(reference, prefix_cache=False)
    for request, output in zip(requests(reference), reference.outputs, strict=True):
        assert list(run(pipe, [request])[request.request_id].token_ids) == output


@pytest.mark.parametrize("budget", [2048, 16, 7], ids=["whole", "chunks of 16", "chunks of 7"])
def test_all_together(reference: Reference, budget: int) -> None:
    pipe = pipeline(reference, max_batch_tokens=budget, max_num_sequences=6)
    assert tokens(run(pipe, requests(reference))) == reference.outputs


def test_after_a_prefix_hit(reference: Reference) -> None:
    pipe = pipeline(reference)
    run(pipe, requests(reference, "cold "))
    before = pipe.statistics().cache.hit_tokens
    assert tokens(run(pipe, requests(reference, "warm ")), "warm ") == reference.outputs
    assert pipe.statistics().cache.hit_tokens - before >= sum((n - 1) // 8 * 8 for n in LENGTHS)


def test_after_preemption(reference: Reference) -> None:
    pipe = pipeline(reference, num_pages=29, max_model_len=128, prefix_cache=False)
    assert tokens(run(pipe, requests(reference))) == reference.outputs
    assert pipe.statistics().preemptions > 0


def test_after_a_trip_to_host_memory(reference: Reference) -> None:
    pipe = pipeline(reference, num_pages=20, max_model_len=128, host_pages=100)
    run(pipe, requests(reference, "cold "))
    before = pipe.statistics().cache.restored_pages
    assert tokens(run(pipe, requests(reference, "warm ")), "warm ") == reference.outputs
    assert pipe.statistics().cache.restored_pages > before


def test_int8_pages_survive_the_trip_to_host_memory(reference: Reference) -> None:
    options: dict[str, Any] = {"kv_dtype": "int8", "max_model_len": 128}
    stayed = tokens(run(pipeline(reference, **options), requests(reference)))
    pipe = pipeline(reference, num_pages=20, host_pages=100, **options)
    run(pipe, requests(reference, "cold "))
    assert tokens(run(pipe, requests(reference, "warm ")), "warm ") == stayed


@pytest.mark.parametrize("cut", [0, 1, 13, 31, 32])
def test_after_a_crash(reference: Reference, cut: int) -> None:
    resumed = [
        EngineRequest(f"{n}", prompt, GREEDY, resume=[ResumedChoice(0, output[:cut])])
        for n, (prompt, output) in enumerate(zip(reference.prompts, reference.outputs, strict=True))
    ]
    assert tokens(run(pipeline(reference), resumed)) == reference.outputs


def test_with_drafts_right_and_wrong(reference: Reference) -> None:
    pipe = pipeline(reference)
    for request in requests(reference):
        pipe.add_request(request)
    outputs: dict[str, list[int]] = {}
    while pipe.has_work:
        for sequence in pipe.batcher.running:
            done = len(sequence.output_ids)
            right = reference.outputs[int(sequence.request_id)][done : done + 3]
            sequence.propose([token if (done + i) % 5 else 9 for i, token in enumerate(right)])
        for output in pipe.step():
            if output.result is not None:
                outputs[output.request_id] = list(output.result.choices[0].token_ids)
    assert [outputs[f"{n}"] for n in range(len(LENGTHS))] == reference.outputs


def test_executor_generates_the_same(reference: Reference) -> None:
    results = InferencePipelineExecutor(pipeline(reference)).generate(reference.prompts, GREEDY)
    assert [list(result.token_ids) for result in results] == reference.outputs


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_seeded_sampling_is_the_same_in_a_crowd_chunked_and_cached(reference: Reference, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=24, ignore_eos=True)
    alone = run(pipeline(reference), [EngineRequest("x", reference.prompts[5], params)])["x"].token_ids
    crowd = [EngineRequest(f"{i}", reference.prompts[i % 6], params.model_copy(update={"seed": i})) for i in range(63)]
    wanted = EngineRequest("x", reference.prompts[5], params)
    pipe = pipeline(reference, num_pages=1200, max_batch_tokens=100)
    assert run(pipe, [*crowd[:30], wanted, *crowd[30:]])["x"].token_ids == alone
    assert run(pipe, [EngineRequest("again", reference.prompts[5], params)])["again"].token_ids == alone
