"""Train the bundled tokenizer, the main model and the draft model: `python -m training.train --minutes 40`.

The schedule is warm-up, stable, decay, driven by elapsed time or steps, whichever ends first, so a run may be cut
anywhere and still ends with a decayed learning rate. The draft model is distilled from the main model's
distributions. transformers is used here only; the worker has its own decoder.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from training import corpus
from training.batches import PackedStream
from training.checkpoint import CONTEXT_TOKENS, draft_config, main_config, save_checkpoint
from training.tokenizer import train_tokenizer

DEFAULT_OUT = Path("worker/penstock_worker/bundled")
MAIN_NAME, DRAFT_NAME = "penstock-story", "penstock-story-draft"
console = Console()

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (hidden [tokens, width], targets [tokens])


@dataclass(frozen=True, slots=True)
class Budget:
    """When training ends, and how fast it goes."""

    steps: int
    seconds: float
    tokens_per_step: int = 4096
    peak_lr: float = 4e-3
    warmup: float = 0.02
    decay: float = 0.35  # the share of the run, at its end, over which the rate falls to zero

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, 0 to 1."""
        return min(1.0, max(step / self.steps, elapsed_s / self.seconds))

    def rate(self, progress: float) -> float:
        """Warm-up, stable, then a `1 - sqrt` decay.

        Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024.
        """
        if progress < self.warmup:
            return self.peak_lr * max(progress / self.warmup, 0.02)
        if progress > 1 - self.decay:
            return float(self.peak_lr * (1 - ((progress - 1 + self.decay) / self.decay) ** 0.5))
        return self.peak_lr

    def row_length(self, progress: float) -> int:
        """Short rows first, the whole context window for the last third."""
        return 256 if progress < 0.35 else 512 if progress < 0.65 else CONTEXT_TOKENS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run can say about itself."""

    steps: int
    tokens: int
    seconds: float
    held_out_loss: float


def hidden_states(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states `[rows * length, hidden]` in bfloat16 arithmetic."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden: torch.Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)


def logits_of(model: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocab]` in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits: torch.Tensor = model.lm_head(hidden)
    return logits.float()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, rows: int = 32) -> float:
    """Mean cross-entropy in nats per token on packed rows of 512 that training never sees. float32 arithmetic."""
    model.eval()
    stream = PackedStream(tokenizer, seed, corpus.HELD_OUT)
    losses = []
    for _ in range(max(1, rows // 4)):
        batch = stream.next_batch(4, 512)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    model.train()
    return sum(losses) / len(losses)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (Jordan et al., 2024), AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def fit(
    model: LlamaForCausalLM,
    stream: PackedStream,
    budget: Budget,
    label: str,
    loss_of: LossFunction,
    teacher_input: Callable[[torch.Tensor], None] | None = None,
) -> tuple[int, int, float]:
    """Train until the budget ends or Ctrl-C. Returns steps, tokens and seconds."""
    optimizers = make_optimizers(model)
    started = time.monotonic()
    step, tokens, smooth = 0, 0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=1.0, note="")
        try:
            while (progress := budget.progress(step, time.monotonic() - started)) < 1.0:
                length = budget.row_length(progress)
                batch = stream.next_batch(max(1, budget.tokens_per_step // length), length)
                ids, targets = batch[:, :-1], batch[:, 1:].flatten()
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = budget.rate(progress)
                if teacher_input is not None:
                    teacher_input(ids)
                loss = loss_of(hidden_states(model, ids), targets)
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                step, tokens = step + 1, tokens + ids.numel()
                smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
                rate = tokens / (time.monotonic() - started)
                bar.update(task, completed=progress, note=f"step {step}  loss {smooth:.3f}  {rate:,.0f} tok/s")
                if not console.is_terminal and step % 100 == 0:
                    console.print(f"{label}: step {step}  loss {smooth:.4f}  {rate:,.0f} tok/s  {progress:.0%}")
        except KeyboardInterrupt:
            console.print(f"[yellow]{label}: stopped at step {step}")
    return step, tokens, time.monotonic() - started


def train_main(
    tokenizer: Tokenizer, budget: Budget, seed: int, model: LlamaForCausalLM | None = None
) -> tuple[LlamaForCausalLM, Outcome]:
    """Train the main model on next-token prediction: `model`, or a new one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(main_config()) if model is None else model

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(model, hidden), targets)

    steps, tokens, seconds = fit(model, PackedStream(tokenizer, seed), budget, "main", loss_of)
    return model, Outcome(steps, tokens, seconds, held_out_loss(model, tokenizer, seed))


def train_draft(
    main: LlamaForCausalLM, tokenizer: Tokenizer, budget: Budget, seed: int
) -> tuple[LlamaForCausalLM, Outcome]:
    """Distil the draft model: cross-entropy against the main model's next-token distribution."""
    torch.manual_seed(seed + 1)
    model = LlamaForCausalLM(draft_config())
    main.eval()
    teacher: list[torch.Tensor] = []

    @torch.no_grad()
    def ask_teacher(ids: torch.Tensor) -> None:
        teacher[:] = [logits_of(main, hidden_states(main, ids)).softmax(-1)]

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(model, hidden), teacher[0])

    stream = PackedStream(tokenizer, seed + 1000)
    steps, tokens, seconds = fit(model, stream, budget, "draft", loss_of, ask_teacher)
    return model, Outcome(steps, tokens, seconds, held_out_loss(model, tokenizer, seed))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder that receives the two checkpoints")
    parser.add_argument("--minutes", type=float, default=45.0, help="time for both models together")
    parser.add_argument("--steps", type=int, default=1_000_000, help="most steps per model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--part", choices=("both", "main", "draft"), default="both", help="draft: reuse the main model")
    parser.add_argument("--go-on", action="store_true", help="start from the main model and tokenizer in --out")
    parser.add_argument("--record", type=Path, help="JSON file that receives the outcomes, for training.evaluate")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything runs")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of this program."""

    out: Path
    minutes: float = 45.0
    steps: int = 1_000_000
    seed: int = 1
    lr: float = 4e-3
    part: str = "both"
    go_on: bool = False
    quick: bool = False

    def budget(self, share: float, rate: float) -> Budget:
        """The budget of one model: its share of the time, and its peak rate as a multiple of `lr`."""
        if self.quick:
            return Budget(steps=2, seconds=60, tokens_per_step=512)
        share = share if self.part == "both" else 1.0
        return Budget(steps=self.steps, seconds=self.minutes * 60 * share, peak_lr=self.lr * rate)


def run(plan: Plan) -> dict[str, Outcome]:
    """Train and save what the plan asks for; returns the outcome of each model that was trained."""
    outcomes: dict[str, Outcome] = {}
    main: LlamaForCausalLM | None = None
    if plan.part == "draft" or plan.go_on:
        tokenizer = Tokenizer.from_file(str(plan.out / MAIN_NAME / "tokenizer.json"))
        main = LlamaForCausalLM.from_pretrained(plan.out / MAIN_NAME, dtype=torch.float32)
    else:
        texts = 1500 if plan.quick else 30_000
        console.print(f"tokenizer: {texts} documents")
        tokenizer = train_tokenizer(corpus.document(plan.seed, index).text for index in range(texts))
    if main is None or plan.part != "draft":
        main, outcomes[MAIN_NAME] = train_main(tokenizer, plan.budget(0.8, 1.0), plan.seed, main)
        save_checkpoint(main, tokenizer, plan.out / MAIN_NAME)
    if plan.part != "main":
        draft, outcomes[DRAFT_NAME] = train_draft(main, tokenizer, plan.budget(0.2, 2.0), plan.seed)
        save_checkpoint(draft, tokenizer, plan.out / DRAFT_NAME)
    return outcomes


def command() -> None:
    """Entry point of `python -m training.train`."""
    arguments = vars(parse_arguments())
    torch.set_num_threads(arguments.pop("threads"))
    record: Path | None = arguments.pop("record")
    outcomes = {name: dataclasses.asdict(outcome) for name, outcome in run(Plan(**arguments)).items()}
    console.print_json(json.dumps(outcomes))
    if record is not None:
        known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        record.write_text(json.dumps(known | outcomes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command()
