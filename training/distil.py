"""Teach the draft model the main model's own answers: `python -m training.distil --minutes 20`.

A draft is checked along what the main model writes, which is narrower than the corpus: the main model continues
beginnings of documents (greedily, and sampled), and the draft in the folder is trained on towards its distributions
there. Sampled drafts are coupled to the target by common noise, so whatever brings the two distributions together makes
drafts agree; the likeliest token counts for more, because greedy answers ask for nothing else.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from penstock_core.cache import PageConfig
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.protocol.requests import SamplingParams
from training import corpus
from training.checkpoint import save_checkpoint
from training.train import (
    DEFAULT_OUT,
    DRAFT_NAME,
    MAIN_NAME,
    Budget,
    console,
    hidden_states,
    logits_of,
    make_optimizers,
)

_AT_ONCE = 256
_LIKELIEST = 24  # tokens of the main model's distribution that are kept
_ROWS = 24
_PROMPT_WEIGHT, _HARD_SHARE = 0.2, 0.4
_TEMPERATURES = (0.0, 0.0, 0.7, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of a beginning and what the main model made of it."""

    ids: list[int]
    prompt_tokens: int


def answers(folder: Path, tokenizer: Tokenizer, seconds: float, seed: int) -> list[Answer]:
    """What the main model writes in that time."""
    engine = InferencePipelineExecutor(
        PipelineConfig(folder, threads=torch.get_num_threads(), page=PageConfig(num_pages=8192))
    )
    draw, documents = random.Random(seed), corpus.documents(seed)
    made: list[Answer] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or not made:
        beginnings, params = [], []
        for number in range(_AT_ONCE):
            ids = tokenizer.encode(next(documents).text, add_special_tokens=False).ids
            longest = 24 if draw.random() < 0.5 else 120 if draw.random() < 0.8 else 500
            beginnings.append(ids[: draw.randint(2, max(2, min(longest, len(ids) - 1)))])
            params.append(
                SamplingParams(
                    temperature=draw.choice(_TEMPERATURES),
                    seed=len(made) + number,
                    max_tokens=draw.choice((128, 256, 256, 400)),
                    ignore_eos=draw.random() < 0.5,
                )
            )
        results = engine.generate(beginnings, params)
        made += [Answer([*ids, *result.token_ids], len(ids)) for ids, result in zip(beginnings, results, strict=True)]
    return made


@torch.no_grad()
def _teach(main: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The main model's likeliest tokens and their chances, [rows * length, likeliest]."""
    chances, tokens = logits_of(main, hidden_states(main, ids)).softmax(-1).topk(_LIKELIEST, -1)
    return tokens, chances / chances.sum(-1, keepdim=True)


def _batch(some: list[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids, and the weight of what each position predicts: nothing behind the end, little within a prompt."""
    longest = max(len(answer.ids) for answer in some)
    ids, weights = torch.zeros(len(some), longest, dtype=torch.long), torch.zeros(len(some), longest)
    for row, answer in enumerate(some):
        ids[row, : len(answer.ids)] = torch.tensor(answer.ids)
        weights[row, : len(answer.ids) - 1] = 1.0
        weights[row, : answer.prompt_tokens - 1] = _PROMPT_WEIGHT
    return ids, weights.flatten()


def distil(main: LlamaForCausalLM, draft: LlamaForCausalLM, made: list[Answer], budget: Budget, seed: int) -> int:
    """Train the draft in place; the number of steps."""
    draw, optimizers = random.Random(seed), make_optimizers(draft)
    main.eval()
    draft.train()
    started, step = time.monotonic(), 0
    while (progress := budget.progress(step, time.monotonic() - started)) < 1.0:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = budget.rate(progress)
        pool = sorted(draw.sample(made, min(len(made), 8 * _ROWS)), key=lambda answer: len(answer.ids))
        first = draw.randrange(max(1, len(pool) - _ROWS))
        ids, weights = _batch(pool[first : first + _ROWS])  # of about one length
        tokens, chances = _teach(main, ids)
        logits = logits_of(draft, hidden_states(draft, ids))
        likely = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        soft, hard = -(chances * likely).sum(-1), F.cross_entropy(logits, tokens[:, 0], reduction="none")
        loss = (((1 - _HARD_SHARE) * soft + _HARD_SHARE * hard) * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            console.print(f"distil: step {step}  loss {loss.item():.4f}  {progress:.0%}")
    return step


def run(out: Path, budget: Budget, answer_s: float, seed: int) -> int:
    """Go on with the draft model in a folder; the number of steps."""
    tokenizer = Tokenizer.from_file(str(out / MAIN_NAME / "tokenizer.json"))
    main, draft = (
        LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32) for name in (MAIN_NAME, DRAFT_NAME)
    )
    made = answers(out / MAIN_NAME, tokenizer, answer_s, seed)
    console.print(f"{len(made)} answers, {sum(len(answer.ids) for answer in made):,} tokens")
    torch.manual_seed(seed)
    steps = distil(main, draft, made, budget, seed)
    save_checkpoint(draft, tokenizer, out / DRAFT_NAME)
    return steps


def command() -> None:
    """Entry point of `python -m training.distil`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder that holds the two checkpoints")
    parser.add_argument("--minutes", type=float, default=20.0, help="time, a quarter of it for making the answers")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = arguments.minutes * 60
    budget = Budget(steps=2 if arguments.quick else 1_000_000, seconds=0.75 * seconds, peak_lr=arguments.lr, decay=0.6)
    steps = run(arguments.out, budget, 0.0 if arguments.quick else 0.25 * seconds, arguments.seed)
    console.print(f"{steps} steps")


if __name__ == "__main__":
    command()
