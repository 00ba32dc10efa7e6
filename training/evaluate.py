"""Measure the bundled checkpoints and write their model cards: `python -m training.evaluate`.

Everything is read back from the saved 16-bit files, so the card speaks of what is shipped. Requests come from the
held-out split of the corpus. Arithmetic is float32.
"""

# ruff: noqa: E501 -- a row of a table in the card is one line

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from training import corpus, records
from training.markers import EOS
from training.train import DEFAULT_OUT, DRAFT_NAME, MAIN_NAME, held_out_loss

SAMPLE_REQUESTS = (
    "Tell me a story about a fox who wants to fly.",
    "Write a short story about a voyage from Marisk to Old Harbour.",
    "Tell me a story about an elephant who wants to dance.",
    "Write a letter from Ida to Bruno about a quarrel.",
    "Describe Anna the miller as JSON with the keys name, age, place and items.",
    "Write a weather report for Thornby on Friday in winter.",
    "What is the capital of France?",
)
STORY_REQUESTS = (
    "Tell me a story about a hedgehog who wants to learn to read.",
    "Tell me a story about an owl who wants to build a boat.",
    "Write a short story about a clockmaker named Tilda.",
    "Tell me a story about a beaver who wants to see the sea.",
    "Write a short story about a broken harbour lamp.",
    "Write a short mystery.",
    "Tell me a story about an inventor who builds a letter kite.",
    "Write a short story about a message in a bottle.",
    "Tell me a story about a penguin who wants to play chess.",
    "Write a short story about a flood.",
)
console = Console()


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer; `tokens` counts the end token when `ended`."""

    request: str
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Generator:
    """The main model with its tokenizer, answering chat requests in padded batches."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def answer(self, requests: Sequence[str], temperature: float, seed: int = 0, limit: int = 400) -> list[Answer]:
        """Answers in the order of `requests`; `temperature` 0 is greedy, otherwise top-p 0.95."""
        torch.manual_seed(seed)
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
            )
            for request in requests
        ]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        settings = (
            {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
            if temperature
            else {"do_sample": False, "temperature": None, "top_p": None}
        )
        output = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=limit, **settings
        )
        ends = set(self.model.generation_config.eos_token_id)
        answers = []
        for request, row in zip(requests, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            stop = next((i for i, token in enumerate(row) if token in ends), None)
            kept = row if stop is None else row[:stop]
            count = len(row) if stop is None else stop + 1
            answers.append(Answer(request, self.tokenizer.decode(kept), count, stop is not None))
        return answers


def load(folder: Path) -> LlamaForCausalLM:
    """A saved model, in float32 for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def json_requests(count: int, seed: int) -> Iterator[records.Exchange]:
    """Held-out requests for records."""
    for index in range(count):
        yield records.describe(corpus.stream(seed, index, "held-out-json"))


def json_scores(generator: Generator, temperature: float, count: int, seed: int) -> dict[str, float]:
    """The share of answers that parse, and the share that also have exactly the keys that were asked for."""
    parsed = exact = 0
    exchanges = list(json_requests(count, seed))
    for start in range(0, count, 50):
        part = exchanges[start : start + 50]
        for exchange, answer in zip(part, generator.answer([e.request for e in part], temperature, seed), strict=True):
            try:
                found = json.loads(answer.text)
            except json.JSONDecodeError:
                continue
            parsed += 1
            if re.search("keys|with [a-z_]+(,| and|\\.)", exchange.request):
                exact += list(found) == list(json.loads(exchange.answer))
            else:
                exact += 1
    return {"parses": parsed / count, "keys_as_asked": exact / count}


@torch.no_grad()
def agreement(
    main: LlamaForCausalLM, draft: LlamaForCausalLM, generator: Generator, requests: Sequence[str], depth: int
) -> dict[str, float]:
    """How often the draft's first choice is the main model's, along text that the main model writes greedily.

    `accepted` is the mean number of draft tokens accepted per check at `depth`: along greedy text a draft of length
    k is accepted up to its first disagreement, so teacher forcing gives the exact figure.
    """
    hits: list[bool] = []
    runs: list[int] = []
    for answer in generator.answer(requests, 0.0):
        prompt = generator.tokenizer.apply_chat_template(
            [{"role": "user", "content": answer.request}], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = generator.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = generator.tokenizer(prompt + answer.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        same = (main(ids).logits.argmax(-1) == draft(ids).logits.argmax(-1))[0, len(prompt_ids) - 1 :].tolist()
        hits += same
        position = 0
        while position < len(same):
            window = same[position : position + depth]
            accepted = next((i for i, hit in enumerate(window) if not hit), len(window))
            runs.append(accepted)
            position += accepted + 1
    return {"agreement": sum(hits) / len(hits), "accepted": statistics.mean(runs)}


@torch.no_grad()
def held_out_agreement(main: LlamaForCausalLM, draft: LlamaForCausalLM, generator: Generator, count: int) -> float:
    """Share of positions of held-out documents where both models have the same first choice."""
    same = total = 0
    for index in range(count):
        text = corpus.document(1, index, corpus.HELD_OUT).text
        ids = generator.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :1024]
        equal = main(ids).logits.argmax(-1) == draft(ids).logits.argmax(-1)
        same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


def bytes_per_token(generator: Generator, count: int) -> float:
    """Mean UTF-8 bytes per token of held-out documents."""
    texts = [corpus.document(1, index, corpus.HELD_OUT).text for index in range(count)]
    tokens = sum(len(ids) for ids in generator.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return sum(len(text.encode()) for text in texts) / tokens


def measure(folder: Path, seed: int, count: int) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """All figures, and the samples as (request, sampler, answer)."""
    main, draft = load(folder / MAIN_NAME), load(folder / DRAFT_NAME)
    generator = Generator(main, AutoTokenizer.from_pretrained(folder / MAIN_NAME))
    backend = generator.tokenizer.backend_tokenizer
    figures: dict[str, float] = {}
    for name, model in (("main", main), ("draft", draft)):
        figures[f"{name}_loss"] = held_out_loss(model.eval(), backend, seed, rows=128)
        figures[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
        model.eval()
    figures["bytes_per_token"] = bytes_per_token(generator, 200)
    for label, temperature in (("greedy", 0.0), ("0.7", 0.7)):
        for key, value in json_scores(generator, temperature, count, seed).items():
            figures[f"json_{label}_{key}"] = value
    figures |= agreement(main, draft, generator, [*STORY_REQUESTS, *SAMPLE_REQUESTS], depth=4)
    figures["held_out_agreement"] = held_out_agreement(main, draft, generator, 100)
    stories = [a for s in range(5) for a in generator.answer(STORY_REQUESTS, 0.8, seed + s)]
    figures["stories_ended"] = sum(a.ended for a in stories) / len(stories)
    lengths = sorted(a.tokens for a in stories)
    figures["story_tokens_low"], figures["story_tokens_median"] = (
        lengths[len(lengths) // 20],
        statistics.median(lengths),
    )
    figures["story_tokens_high"] = lengths[-1 - len(lengths) // 20]
    samples = []
    for sampler, temperature in (("greedy", 0.0), ("temperature 0.8, top-p 0.95", 0.8)):
        answers = generator.answer(SAMPLE_REQUESTS, temperature, seed)
        samples += [(a.request, sampler, a.text + ("" if a.ended else " [cut]")) for a in answers]
    return figures, samples


HEADER = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

"""
MAIN_CARD = """A very small Llama-shaped language model that writes short tales about rivers, ships, workshops and animals, and answers
with letters, recipes, weather reports, riddles and JSON. It comes with the Penstock worker, so that the demo, the
documentation and the tests run with a real checkpoint, offline and on any CPU.

| | |
|---|---|
| parameters | {main_parameters:,.0f} (embedding tied) |
| shape | hidden 192, 4 layers, 6 query heads, 2 key/value heads, head size 32, intermediate 512 |
| context | 1,024 tokens, RoPE with base 10,000 |
| vocabulary | 2,048: byte-level BPE, every byte present, so any text round-trips; digits are single tokens |
| weights | float16 safetensors, {size_mb:.1f} MB |
| training | {steps:,} steps, {tokens:,} tokens, {minutes:.0f} minutes on one CPU thread; Muon and AdamW, warm-up, stable, decay |
| held-out loss | {main_loss:.3f} nats per token ({bits_per_byte:.3f} bits per byte at {bytes_per_token:.2f} bytes per token) |
| JSON answers that parse | {json_greedy_parses:.1%} greedy, {json_07_parses:.1%} at temperature 0.7 ({count} held-out requests each) |
| ... with exactly the keys asked for (or none were asked for) | {json_greedy_keys:.1%} greedy, {json_07_keys:.1%} at temperature 0.7 |
| stories at temperature 0.8 | {stories_ended:.0%} end by themselves; {story_tokens_low:.0f} to {story_tokens_high:.0f} tokens, median {story_tokens_median:.0f} |
| agreement with `penstock-story-draft` | {agreement:.1%} of greedy tokens; {accepted:.2f} of 4 draft tokens accepted per check |

## Use

Plain text continues after `<|bos|>`, which the tokenizer adds; a title and an empty line make a good beginning. Chats use
the template in `tokenizer_config.json` with the roles system, user and assistant. Generation ends at `<|eos|>` or `<|end|>`.
Forms of request it was trained on (it answers in the right form, but see the limits):

- `Tell me a story about a heron who wants to see the sea.` (any animal, most wishes)
- `Write a short story about a clockmaker named Tilda.` / `Write a short mystery.` / `Tell me a story.`
- questions about the story just told or given, summaries, quotations, `Repeat this text`
- `Describe Anna the miller as JSON with the keys name, age and place.` (person, animal, village, ship, weather)
- letters, recipes, weather reports, ship's logs, instructions, notices, riddles, verses, dialogues, lists

## Data

All text is written by the story grammar in `training/` of the Penstock repository, which is its authors' own work: every
document is a pure function of a seed and an index, and no outside data is used. Held-out text comes from another random
stream of the same grammar. Names, places and people are invented.

## Limits

The model knows its small world and nothing else: no facts, no arithmetic, no code, no language but English. Each sentence
is grammatical, but **it does not reliably carry names, animals, wishes or JSON keys from the request or from one sentence to
the next**: a story asked for about a fox may be about a bear, and its hero may change name. Copying requests (`Repeat this
text`) fail for the same reason, so they say nothing about n-gram drafting. Held-out figures describe text of the same grammar and say nothing about other text. It is
meant for demonstrations, tests and benchmarks, not for advice.

## Making it again

`python -m training.train` trains the tokenizer, this model and the draft model, `python -m training.distil` goes on with
the draft; `python -m training.evaluate` measures them and writes this card.

"""
DRAFT_CARD = """The draft model for speculative decoding with [`penstock-story`](../penstock-story/README.md). It has the same tokenizer and
the same chat template, and was distilled from that model's next-token distributions: first over the same grammar's text,
then along what that model itself writes, greedily and sampled.

| | |
|---|---|
| parameters | {draft_parameters:,.0f} (embedding tied) |
| shape | hidden 64, 2 layers, 2 heads, head size 32, intermediate 192; context 1,024 tokens |
| weights | float16 safetensors, {draft_size_mb:.2f} MB |
| training | {draft_steps:,} steps, {draft_tokens:,} tokens, {draft_minutes:.0f} minutes on one CPU thread |
| further training | about 20 minutes on one CPU thread, along answers of the main model |
| held-out loss | {draft_loss:.3f} nats per token (the main model: {main_loss:.3f}) |
| agreement with the main model | {agreement:.1%} of tokens along its greedy answers; {held_out_agreement:.1%} of positions of held-out text |
| accepted per check | {accepted:.2f} of 4 drafted tokens along greedy answers |

Two layers are the fewest that can copy a name seen earlier. By itself it writes grammatical but incoherent text; use it only
to draft. `python -m training.train --part draft`, then `python -m training.distil`, make it again from the main model.
License: Apache-2.0.
"""


def write_cards(
    folder: Path, figures: dict[str, float], samples: list[tuple[str, str, str]], runs: dict[str, float], count: int
) -> None:
    """Fill in both README.md files."""
    values: dict[str, float] = figures | runs
    values |= {
        "count": count,
        "bits_per_byte": figures["main_loss"] / 0.6931 / figures["bytes_per_token"],
        "size_mb": (folder / MAIN_NAME / "model.safetensors").stat().st_size / 1e6,
        "draft_size_mb": (folder / DRAFT_NAME / "model.safetensors").stat().st_size / 1e6,
        "json_07_parses": figures["json_0.7_parses"],
        "json_07_keys": figures["json_0.7_keys_as_asked"],
        "json_greedy_keys": figures["json_greedy_keys_as_asked"],
    }
    quoted = ["## Samples\n\nNot selected: the first answer to each request.\n"]
    for request, sampler, text in samples:
        body = "\n".join(f"> {line}".rstrip() for line in text.replace(EOS, "").split("\n"))
        quoted.append(f"**{request}** ({sampler})\n\n{body}\n")
    main_card = HEADER.format(name=MAIN_NAME) + MAIN_CARD.format(**values) + "\n".join(quoted)
    (folder / MAIN_NAME / "README.md").write_text(main_card, encoding="utf-8")
    draft_card = HEADER.format(name=DRAFT_NAME) + DRAFT_CARD.format(**values)
    (folder / DRAFT_NAME / "README.md").write_text(draft_card, encoding="utf-8")


def command() -> None:
    """Entry point of `python -m training.evaluate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder that holds the two checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="JSON requests per temperature")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=Path, help="JSON file that training.train wrote; without it no card is written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures, samples = measure(arguments.out, arguments.seed, arguments.count)
    console.print_json(json.dumps(figures))
    for request, sampler, text in samples:
        console.print(f"\n[bold]{request}[/bold] ({sampler})")
        console.print(text, markup=False, highlight=False)
    if arguments.runs is not None:
        outcomes = json.loads(arguments.runs.read_text(encoding="utf-8"))
        main, draft = outcomes[MAIN_NAME], outcomes[DRAFT_NAME]
        runs = {"steps": main["steps"], "tokens": main["tokens"], "minutes": main["seconds"] / 60}
        runs |= {"draft_steps": draft["steps"], "draft_tokens": draft["tokens"], "draft_minutes": draft["seconds"] / 60}
        write_cards(arguments.out, figures, samples, runs, arguments.count)


if __name__ == "__main__":
    command()
