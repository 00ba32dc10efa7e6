"""Speculative decoding on the bundled models: `python -m benchmarks.speculation [--json] [--quick]`.

Every proposer beside plain decoding of the same requests, in alternating short runs, at batch 1, 8 and 32: on free
text, and where the answer repeats the prompt. A second plain engine, measured like a proposer, is the noise floor.
Every run is checked to give the plain run's tokens. Then what steps with drafts cost, and from it the acceptance at
which drafting breaks even; and `transformers` with and without assisted generation, on the same weights, at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import torch

from benchmarks import speculation_costs
from benchmarks.checkpoints import bundled_model
from benchmarks.paired import Comparison, Interval, compare
from benchmarks.report import chart, console, parser, publish, table

PROPOSERS = ("draft", "ngram", "suffix", "auto")
AGAIN = "plain again"
BATCHES = (1, 8, 32)
KINDS = ("free", "copy")
DEPTHS = (1, 2, 3, 4, 6, 8)
AT_LEAST = 8  # requests in a run, and two batches of them where they are small
ASSISTED_ROUNDS = 3
_OPENING_WORDS = 12


@cache
def openings() -> Sequence[str]:
    """First words of tales that no training saw, each another."""
    from training import corpus
    from training.markers import BOS

    found: dict[str, None] = {}
    number = 0
    while len(found) < 512:
        document = corpus.document(7, number, corpus.HELD_OUT)
        number += 1
        if document.kind == "tale":
            found[" ".join(document.text.removeprefix(BOS).split(" ")[:_OPENING_WORDS])] = None
    return list(found)


@cache
def questions() -> Sequence[str]:
    """Requests for tales, each another, neighbours unlike each other."""
    from training.lexicon import ANIMALS
    from training.tales.animals import WISHES

    return [
        f"Tell me a story about a {animal} who wants to {WISHES[(turn + place) % len(WISHES)].goal}."
        for turn in range(len(WISHES))
        for place, animal in enumerate(ANIMALS)
    ]


class Workload:
    """Requests by round, none twice in a run of the benchmark; of various lengths, so that they end one by one.

    `free`: the opening of a tale, to be continued. `copy`: a conversation in which a tale is asked for, told (by the
    model itself, before the clock starts) and asked for again in the same words; mostly it is then told again.
    """

    def __init__(self, kind: str, batch: int, texts: Iterator[str], engine: Any) -> None:
        self.name = f"{kind}-{batch}"
        self.batch = batch
        self._kind = kind
        self._texts = texts
        self._engine = engine
        self._size = max(AT_LEAST, 2 * batch)
        self._made: list[list[list[int]]] = []

    def requests(self, number: int, tokens: int, temperature: float = 0.0) -> list[Any]:
        """The requests of a round, of `tokens` new tokens in the mean."""
        from penstock_core.pipeline import EngineRequest
        from penstock_core.sampling import SamplingParams

        while len(self._made) <= number:
            texts = list(islice(self._texts, self._size))
            if self._kind == "free":
                self._made.append([self._engine.pipeline.tokenizer.encode(text) for text in texts])
            else:
                self._made.append(_told_once(texts, self._engine))
        return [
            EngineRequest(
                f"{number:03}-{place:03}",
                prompt,
                SamplingParams(temperature=temperature, seed=place, max_tokens=length, ignore_eos=True),
            )
            for place, prompt in enumerate(self._made[number])
            for length in (tokens * (4 + place * 5 % 8) * 2 // 15,)
        ]


def _told_once(asked: list[str], engine: Any) -> list[list[int]]:
    """Prompts in which these tales were told, and are asked for again."""
    from penstock_core.protocol.requests import GenerationRequest
    from penstock_core.sampling import SamplingParams

    first = [[{"role": "user", "content": question}] for question in asked]
    tales = engine.generate(first, SamplingParams(temperature=0.0, max_tokens=256))
    return [
        engine.encode(GenerationRequest.parse({"messages": [*ask, _said(tale.choices[0].text), *ask]}))
        for ask, tale in zip(first, tales, strict=True)
    ]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Contestant:
    """A pipeline that serves the rounds of a workload, so many requests at once, each followed by the next.

    Attributes:
        drafted, accepted: tokens, over all rounds that count.
    """

    def __init__(
        self, pipeline: Any, workload: Workload, tokens: int, temperature: float, expected: dict[int, Any]
    ) -> None:
        """`expected`: the tokens of each round, set by whoever serves it first."""
        self._pipeline, self._workload, self._expected = pipeline, workload, expected
        self._requests = tokens, temperature
        self.drafted = self.accepted = 0

    def __call__(self, number: int) -> int:
        """Serve a round; tokens generated."""
        results = serve(self._pipeline, self._workload.requests(number, *self._requests), self._workload.batch)
        tokens = [results[name].choices[0].token_ids for name in sorted(results)]
        if self._expected.setdefault(number, tokens) != tokens:
            raise SystemExit(f"an output of {self._workload.name} changed")
        if number:
            self.drafted += sum(result.timings.drafted_tokens for result in results.values())
            self.accepted += sum(result.timings.accepted_tokens for result in results.values())
        return sum(map(len, tokens))


def serve(pipeline: Any, requests: Sequence[Any], at_once: int) -> dict[str, Any]:
    """Results by request id."""
    results: dict[str, Any] = {}
    coming = iter(requests)
    for request in islice(coming, at_once):
        pipeline.add_request(request)
    while pipeline.has_work:
        for output in pipeline.step():
            if output.result is not None:
                results[output.request_id] = output.result
                for request in islice(coming, 1):
                    pipeline.add_request(request)
    return results


def main() -> None:
    """Measure every proposer on every workload."""
    options = parser(__doc__)
    options.set_defaults(runs=9)
    options.add_argument("--tokens", type=int, default=150, help="new tokens per request, in the mean")
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="requests at once")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of prompts")
    options.add_argument("--proposers", nargs="+", choices=PROPOSERS, default=PROPOSERS)
    arguments = options.parse_args()
    depths: Sequence[int] = DEPTHS
    if arguments.quick:
        arguments.tokens, arguments.runs, arguments.batches, depths = 60, 1, arguments.batches[:1], (2, 4)
    torch.set_num_threads(arguments.threads)
    engine_of = _engines(arguments.threads)
    plain = engine_of(None, None)
    engines = {AGAIN: engine_of(None, None)} | {name: engine_of(name, None) for name in arguments.proposers}
    texts = {"free": iter(openings()), "copy": iter(questions())}
    rates: dict[str, float] = {}
    found: dict[str, dict[str, Comparison]] = {}
    acceptance: dict[str, dict[str, float]] = {}
    for kind in arguments.kinds:
        for batch in arguments.batches:
            workload = Workload(kind, batch, texts[kind], plain)
            name = workload.name
            rates[name], found[name], acceptance[name] = _serve_by_all(plain, engines, workload, arguments)
    _show(rates, found, acceptance, arguments)
    costs = speculation_costs.measure(
        engine_of, openings()[-max(arguments.batches) :], arguments.batches, depths, arguments.tokens
    )
    speculation_costs.show(costs)
    assisted = transformers_assisted(arguments)
    console.print(
        f"transformers, one request at a time, free text: {assisted['plain_tok_s']:,.0f} tok/s plain; assisted by the "
        f"draft model {assisted['times_plain']['median']:.2f} times that"
    )
    publish(
        "speculation",
        {
            "temperature": arguments.temperature,
            "rounds": arguments.runs,
            "plain_tok_s": rates,
            "times_plain": _medians(found, lambda one: one.speed),
            "processor_times_plain": _medians(found, lambda one: one.processor),
            "acceptance": acceptance,
            "step_ms": costs,
            "transformers": assisted,
        },
        as_json=arguments.json,
    )


def _serve_by_all(
    plain: Any, engines: dict[str, Any], workload: Workload, arguments: Any
) -> tuple[float, dict[str, Comparison], dict[str, float]]:
    """Of one workload: plain tokens/s, how every engine fared beside it, and the drafts' acceptance."""
    expected: dict[int, Any] = {}
    workload.requests(arguments.runs, arguments.tokens)  # all of them, before the clock starts
    contestants = {
        name: Contestant(engine.pipeline, workload, arguments.tokens, arguments.temperature, expected)
        for name, engine in engines.items()
    }
    reference = Contestant(plain.pipeline, workload, arguments.tokens, arguments.temperature, expected)
    tok_s, found = compare(reference, contestants, arguments.runs, workload.name)
    return tok_s, found, {name: one.accepted / one.drafted for name, one in contestants.items() if one.drafted}


def _medians(
    found: dict[str, dict[str, Comparison]], figures: Callable[[Comparison], list[float]]
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {workload: Interval.of(figures(of[name])).as_dict() for workload, of in found.items()}
        for name in next(iter(found.values()))
    }


def _show(
    rates: dict[str, float],
    found: dict[str, dict[str, Comparison]],
    acceptance: dict[str, dict[str, float]],
    arguments: Any,
) -> None:
    workloads, names = list(found), list(next(iter(found.values())))
    table(
        f"tokens/s, times plain; bundled model, temperature {arguments.temperature}, {arguments.threads} threads, "
        f"median of {arguments.runs} rounds (interval)",
        ["", *workloads],
        [
            ["plain, tokens/s", *rates.values()],
            *([name, *(Interval.of(found[each][name].speed) for each in workloads)] for name in names),
        ],
    )
    table(
        "processor time of a token, times plain",
        ["", *workloads],
        [[name, *(Interval.of(found[each][name].processor) for each in workloads)] for name in names],
    )
    table(
        "the first round, in which nothing is known yet: tokens/s, times plain (drafts accepted in all others)",
        ["", *workloads],
        [
            [name, *(f"{found[each][name].first:.2f} ({acceptance[each].get(name, 0.0):.0%})" for each in workloads)]
            for name in names
            if name != AGAIN
        ],
    )
    for each in workloads:
        chart(f"{each}, times plain", {name: Interval.of(found[each][name].speed).median for name in names})


def _engines(threads: int) -> Callable[[str | None, int | None], Any]:
    """What makes an executor of a proposer (None: plain) and a fixed depth (None: as deep as pays).

    All of them compute with the same weights and pages, one after another: where in memory these lie makes a
    difference of a few percent between engines that do the same.
    """
    from penstock_core.cache import PageConfig
    from penstock_core.distributed import DistributedInferenceEngine
    from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig, UnifiedInferencePipeline
    from penstock_core.speculative import SpeculationConfig

    plain = PipelineConfig(
        model=bundled_model(),
        threads=threads,
        page=PageConfig(num_pages=4096),
        prefix_cache=False,  # or whoever serves a round second would have its prompts computed
    )
    engine = DistributedInferenceEngine.load(plain.engine())

    def engine_of(proposer: str | None, depth: int | None) -> Any:
        speculation = None if proposer is None else SpeculationConfig(proposer=proposer, fixed_depth=depth)
        return InferencePipelineExecutor(
            UnifiedInferencePipeline(replace(plain, speculation=speculation), engine=engine)
        )

    return engine_of


def transformers_assisted(arguments: Any) -> dict[str, Any]:
    """The peer: greedy generation one request at a time, plain and assisted by the same draft model."""
    import transformers

    folder = bundled_model()
    target = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draft = transformers.AutoModelForCausalLM.from_pretrained(
        folder.with_name(folder.name + "-draft"), dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def contestant(assistant: Any) -> Callable[[int], int]:
        def serve_round(number: int) -> int:
            for text in openings()[2 * number : 2 * number + 2]:
                ids = tokenizer(text, return_tensors="pt").input_ids
                with torch.inference_mode():
                    target.generate(
                        ids,
                        assistant_model=assistant,
                        attention_mask=torch.ones_like(ids),
                        do_sample=False,
                        max_new_tokens=arguments.tokens,
                        min_new_tokens=arguments.tokens,
                        pad_token_id=0,
                    )
            return 2 * int(arguments.tokens)

        return serve_round

    rounds = min(arguments.runs, ASSISTED_ROUNDS)
    tok_s, found = compare(contestant(None), {"assisted": contestant(draft)}, rounds, "transformers")
    return {"plain_tok_s": tok_s, "times_plain": Interval.of(found["assisted"].speed).as_dict()}


if __name__ == "__main__":
    main()
