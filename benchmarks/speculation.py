"""Speculative decoding on the bundled models: `python -m benchmarks.speculation [--json] [--quick]`.

Tokens per second with and without drafting, at batch 1, 8 and 32, on free text and on prompts whose answer copies
from them; beside it `transformers` with and without assisted generation, on the same weights, at batch 1. Every drafted
run is checked to give the plain run's tokens. Also the cost of a step that checks k drafts, and from it the acceptance
at which drafting breaks even: for free drafts, and for those of the draft model as the running engine measured them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.checkpoints import bundled_model
from benchmarks.report import alternate, console, parser, publish, table

PROPOSERS = (None, "draft", "ngram", "suffix", "auto")
BATCHES = (1, 8, 32)
KINDS = ("free", "copy")
AT_LEAST = 8  # requests in a run, and two batches of them; batches come one after another
_TALE = (
    "The harbour master wrote down every ship, every cargo and every captain in a large blue book. In the evening he "
    "read the list aloud: a barge with barley, a schooner with salt, a ferry with nine passengers and a brown goat. "
)


def prompts(kind: str, batch: int, turn: int) -> list[str]:
    """Free text to continue, or a text that is given twice and begun a third time.

    Other ones at every turn: the suffix proposer learns from what was generated, and must not meet the same again.
    """
    names = [f"{turn}-{number}" for number in range(max(2 * batch, AT_LEAST))]
    if kind == "free":
        return [f"Once upon a time, in house {name} by the river, there was a" for name in names]
    return [f"Letter {name}. {_TALE}{_TALE}Letter {name}. The harbour master" for name in names]


def main() -> None:
    """Measure every proposer on every workload."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=200, help="new tokens per request")
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--batches", type=int, nargs="*", default=BATCHES, help="requests at once")
    options.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="kinds of prompts")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.runs, arguments.batches = 64, 1, arguments.batches[:1]
    torch.set_num_threads(arguments.threads)
    engines = {proposer or "plain": _engine(proposer, arguments.threads) for proposer in PROPOSERS}
    figures: dict[str, dict[str, float]] = {name: {} for name in engines}
    acceptance: dict[str, dict[str, float]] = {name: {} for name in engines if name != "plain"}
    for kind in arguments.kinds:
        for batch in arguments.batches:
            workload = f"{kind}-{batch}"

            plain: dict[int, list[list[int]]] = {}  # its tokens by turn: it runs first, and as often as the others

            def contestant(name: str) -> Callable[[], Mapping[str, float]]:
                turns = itertools.count()

                def measure() -> Mapping[str, float]:
                    turn = next(turns)
                    results, tok_s = _run(engines[name], prompts(kind, batch, turn), batch, arguments)  # noqa: B023
                    tokens = [result.token_ids for result in results]
                    if plain.setdefault(turn, tokens) != tokens:  # noqa: B023
                        raise SystemExit(f"{name} changed an output")
                    drafted = sum(r.timings.drafted_tokens for r in results)
                    accepted = sum(r.timings.accepted_tokens for r in results)
                    return {"tok_s": tok_s, "acceptance": accepted / drafted if drafted else 0.0}

                return measure

            medians = alternate({name: contestant(name) for name in engines}, arguments.runs, workload)
            for name, values in medians.items():
                figures[name][workload] = values["tok_s"]
                if name in acceptance:
                    acceptance[name][workload] = values["acceptance"]
    workloads = list(figures["plain"])
    gains = {
        name: {workload: values[workload] / figures["plain"][workload] for workload in workloads}
        for name, values in figures.items()
        if name != "plain"
    }
    table(
        f"output tokens/s, bundled model, temperature {arguments.temperature}, {arguments.threads} threads",
        ["", *workloads],
        [
            *([name, *(values[workload] for workload in workloads)] for name, values in figures.items()),
            *([f"{name}, times plain", *(values[w] for w in workloads)] for name, values in gains.items()),
            *([f"{name}, acceptance", *(values[w] for w in workloads)] for name, values in acceptance.items()),
        ],
    )
    costs = step_costs(quick=arguments.quick, threads=arguments.threads)
    table(
        "time of a step that checks k drafts, times a plain step; acceptance at which free drafts break even",
        ["sequences", *(f"k={depth}" for depth in (2, 4, 7))],
        [[batch, *(f"{ratio:.2f} ({_break_even(ratio, int(depth)):.2f})" for depth, ratio in row.items())]
         for batch, row in costs.items()],
    )  # fmt: skip
    drafting = drafting_costs(engines["draft"])
    if drafting:
        table(
            "batch 1: a step with k guesses of the draft model, drafting included, times a plain step; break-even",
            ["", *drafting],
            [
                [
                    "ratio (acceptance)",
                    *(f"{ratio:.2f} ({_break_even(ratio, int(k)):.2f})" for k, ratio in drafting.items()),
                ]
            ],
        )
    undisturbed = undisturbed_steps(arguments)
    table(
        "batch 1, free text: a step of an undisturbed machine (lower decile of the steps' times), drafting included",
        ["", "microseconds", "tokens a step", "times plain tokens/s"],
        [[name, of["step_us"], of["tokens"], of["gain"]] for name, of in undisturbed.items()],
    )
    assisted = transformers_assisted(arguments)
    console.print(
        f"transformers, batch 1, free text: {assisted['plain_tok_s']:,.0f} tok/s plain, "
        f"{assisted['assisted_tok_s']:,.0f} assisted by the draft model ({assisted['gain']:.2f} times)"
    )
    publish(
        "speculation",
        {
            "temperature": arguments.temperature,
            "figures": figures,
            "gains": gains,
            "acceptance": acceptance,
            "step_costs": costs,
            "drafting_costs": drafting,
            "undisturbed": undisturbed,
            "transformers": assisted,
        },
        as_json=arguments.json,
    )


def _engine(proposer: str | None, threads: int, depth: int | None = None) -> Any:
    from penstock_core.cache import PageConfig
    from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
    from penstock_core.speculative import SpeculationConfig

    return InferencePipelineExecutor(
        PipelineConfig(
            model=bundled_model(),
            threads=threads,
            page=PageConfig(num_pages=4096),
            speculation=None if proposer is None else SpeculationConfig(proposer=proposer, fixed_depth=depth),
        )
    )


def _run(engine: Any, texts: list[str], batch: int, arguments: Any) -> tuple[list[Any], float]:
    from penstock_core.sampling import SamplingParams

    params = SamplingParams(
        temperature=arguments.temperature, seed=1, max_tokens=arguments.tokens, ignore_eos=True, min_tokens=0
    )
    results: list[Any] = []
    started = time.perf_counter()
    for first in range(0, len(texts), batch):
        results += engine.generate(texts[first : first + batch], params)
    elapsed = time.perf_counter() - started
    return results, sum(len(result.token_ids) for result in results) / elapsed


def _break_even(ratio: float, depth: int) -> float:
    """Least acceptance a per token at which 1 + a + ... + a^k tokens a step make up for its cost."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(depth + 1)) < ratio else (low, middle)
    return high


def undisturbed_steps(arguments: Any) -> dict[str, dict[str, float]]:
    """Plain steps, and steps with a fixed number of guesses of the draft model: their time where nothing disturbs them.

    A machine that others use too makes most steps longer; the lower decile is what they take by themselves.
    """
    figures: dict[str, dict[str, float]] = {}
    for depth in (None, 2, 4, 6):
        pipeline = _engine(None if depth is None else "draft", arguments.threads, depth).pipeline
        taken, texts = [], prompts("free", 1, 0)[: 2 if arguments.quick else AT_LEAST]
        for text in texts:
            pipeline.add_request(_request(pipeline, text, arguments))
            while pipeline.has_work:
                began = time.perf_counter()
                pipeline.step()
                taken.append(time.perf_counter() - began)
        step_us = sorted(taken)[len(taken) // 10] * 1e6
        tokens = len(texts) * arguments.tokens / len(taken)
        name = "plain" if depth is None else f"draft, {depth} guesses"
        figures[name] = {"step_us": step_us, "tokens": tokens, "gain": 1.0}
        plain = figures["plain"]
        figures[name]["gain"] = tokens / step_us / plain["tokens"] * plain["step_us"]
    return figures


def _request(pipeline: Any, text: str, arguments: Any) -> Any:
    from penstock_core.pipeline import EngineRequest
    from penstock_core.sampling import SamplingParams

    params = SamplingParams(temperature=arguments.temperature, seed=1, max_tokens=arguments.tokens, ignore_eos=True)
    return EngineRequest(text, pipeline.tokenizer.encode(text), params)


def drafting_costs(engine: Any) -> dict[str, float]:
    """By number of guesses: what the running engine measured of a step with them, over a plain step; batch 1."""
    speculator = engine.pipeline._speculator
    costs = speculator.costs
    if not all(cost.known for cost in (costs.plain, costs.checking, costs.start, costs.level)):
        return {}
    return {
        str(k): (costs.checking.at(1 + k) + costs.start.at(1) + k * costs.level.at(1)) / costs.plain.at(1)
        for k in range(1, speculator.config.max_depth + 1)
    }


def step_costs(*, quick: bool, threads: int) -> dict[str, dict[str, float]]:
    """Per batch: forward time with k + 1 rows a sequence over the time with one, context 256."""
    from penstock_core.attention import AttentionBatch
    from penstock_core.cache import PageConfig
    from penstock_core.distributed import DistributedInferenceEngine, EngineConfig

    engine = DistributedInferenceEngine.load(
        EngineConfig(model=bundled_model(), device="cpu", page=PageConfig(num_pages=2048), max_num_sequences=32)
    )
    model, pages = engine.model, engine.layers
    page_size, context = engine.page_size, 256

    def seconds(batch: int, rows: int) -> float:
        per_sequence = -(-(context + 8) // page_size)
        block_table = torch.arange(batch * per_sequence, dtype=torch.int32).reshape(batch, per_sequence)
        positions = torch.arange(context, context + rows).repeat(batch)
        owners = torch.arange(batch).repeat_interleave(rows)
        slots = block_table[owners, positions // page_size].long() * page_size + positions % page_size
        step = AttentionBatch(
            token_ids=torch.full((batch * rows,), 7),
            positions=positions,
            slot_mapping=slots,
            query_start=torch.arange(0, batch * rows + 1, rows, dtype=torch.int32),
            seq_lens=torch.full((batch,), context + rows, dtype=torch.int32),
            block_table=block_table,
            max_query_len=rows,
            max_seq_len=context + rows,
            page_size=page_size,
        )
        best = float("inf")
        for _ in range(10 if quick else 60):
            began = time.perf_counter()
            with torch.inference_mode():
                model.logits(model.forward(step, pages))
            best = min(best, time.perf_counter() - began)
        return best

    torch.set_num_threads(threads)
    return {
        str(batch): {str(depth): seconds(batch, depth + 1) / seconds(batch, 1) for depth in (2, 4, 7)}
        for batch in BATCHES
    }


def transformers_assisted(arguments: Any) -> dict[str, float]:
    """The peer: greedy generation, plain and assisted by the same draft model."""
    import transformers

    folder = bundled_model()
    target = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draft = transformers.AutoModelForCausalLM.from_pretrained(
        folder.with_name(folder.name + "-draft"), dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompts("free", 1, 0)[0], return_tensors="pt").input_ids
    common = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": arguments.tokens,
        "min_new_tokens": arguments.tokens,
        "pad_token_id": 0,
    }

    def contestant(assistant: Any) -> Callable[[], Mapping[str, float]]:
        def measure() -> Mapping[str, float]:
            began = time.perf_counter()
            with torch.inference_mode():
                out = target.generate(ids, assistant_model=assistant, **common)
            return {"tok_s": (out.shape[1] - ids.shape[1]) / (time.perf_counter() - began)}

        return measure

    medians = alternate({"plain": contestant(None), "assisted": contestant(draft)}, arguments.runs, "transformers")
    plain, assisted = medians["plain"]["tok_s"], medians["assisted"]["tok_s"]
    return {"plain_tok_s": plain, "assisted_tok_s": assisted, "gain": assisted / plain}


if __name__ == "__main__":
    main()
