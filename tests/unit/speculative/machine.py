"""A simulated machine that decodes texts known in advance: every second on its clock is accounted for, none is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from penstock_core.batching import SequenceState
from penstock_core.speculative import SpeculationConfig, SpeculativeDecoder
from penstock_core.speculative.acceptance import GradedAcceptance
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.proposer import EMPTY, Draft

CHECKING_S = 50e-6
"""What a step with drafts costs beyond its tokens."""


class Machine:
    """Charges simulated seconds for steps, and `look_s` for every look at the clock: that stands for Python's time.

    Attributes:
        plain_s: what the same tokens would have taken without speculation, batch by batch.
    """

    def __init__(
        self,
        texts: Sequence[list[int]],
        step_s: Callable[[int], float],
        proposer: str,
        model: Oracle | None = None,
        look_s: float = 5e-6,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        self.plain_s = 0.0
        self.look_s = look_s
        self.step_s = step_s
        self.texts: list[list[int]] = []
        self.running: list[SequenceState] = []
        self.ended: list[SequenceState] = []
        self.decoder = SpeculativeDecoder(SpeculationConfig(proposer=proposer, **settings), model, self.clock)  # type: ignore[arg-type]
        if model is not None:
            model.machine = self
        for text in texts:
            self.add(text)

    def add(self, text: list[int]) -> None:
        number = len(self.texts)
        self.texts.append(text)
        state = SequenceState(f"r{number}", 0, np.array([900 + number], dtype=np.int32), len(text), 0.0, number, b"")
        state.row = number
        state.append(text[:1])
        state.num_computed = 1
        self.running.append(state)

    def clock(self) -> float:
        self.now += self.look_s
        return self.now

    def text_of(self, sequence: SequenceState) -> list[int]:
        return self.texts[int(sequence.request_id[1:])]

    def step(self) -> None:
        running = list(self.running)
        began = self.now
        if self.decoder.due():
            self.decoder.propose(running)
        tokens, samples, grown = 0, [], []
        for s in running:
            text, place = self.text_of(s), len(s.output_ids)
            right = 0
            while right < len(s.draft_ids) and s.draft_ids[right] == text[place + right]:
                right += 1
            samples.append(len(s.draft_ids) + 1)
            tokens += samples[-1]
            kept = s.append(text[place : place + right + 1])
            s.num_computed = s.num_tokens - 1
            s.draft_ids = []
            grown.append((s, 0, kept))
        self.now += self.step_s(tokens) + (CHECKING_S if tokens > len(running) else 0.0)
        self.plain_s += sum(kept for _, _, kept in grown) / len(running) * self.step_s(len(running))
        if self.decoder.asked:
            self.decoder.observe(SimpleNamespace(sequences=running, num_samples=samples, num_tokens=tokens), grown)  # type: ignore[arg-type]
        self.decoder.measure(tokens, self.now - began)
        for s in running:
            if s.finish_reason is not None:
                s.row = -1
                self.running.remove(s)
                self.ended.append(s)

    def run(self, tokens: int | None = None) -> float:
        """Speed against plain decoding, for about the next `tokens` of each sequence, or to the end of all."""
        began, plain_s = self.now, self.plain_s
        goals = {id(s): len(s.output_ids) + (tokens or 1 << 60) for s in self.running}
        while any(len(s.output_ids) < goals[id(s)] for s in self.running):
            self.step()
        return (self.plain_s - plain_s) / (self.now - began)

    def serve(self, texts: Sequence[list[int]], at_once: int) -> float:
        """Speed against plain decoding, for texts of which so many run at once, each followed by the next."""
        began, plain_s = self.now, self.plain_s
        waiting = list(reversed(texts))
        while waiting or self.running:
            while waiting and len(self.running) < at_once:
                self.add(waiting.pop())
            self.step()
        return (self.plain_s - plain_s) / (self.now - began)


class Oracle:
    """A draft model that guesses each token right with some chance, at some cost."""

    name = "draft"

    def __init__(self, chance: float, level_s: float, start_s: float | None = None) -> None:
        self.chance = chance
        self.level_s, self.start_s = level_s, level_s if start_s is None else start_s
        self.acceptance = GradedAcceptance(np.full(1, 0.6))
        self.start_cost, self.cost = StepCost(), StepCost()
        self.reading_s = 0.0
        self.machine: Machine
        self.rng = np.random.default_rng(0)
        self.finished = 0

    def propose(self, sequences: list[SequenceState], depths: list[int], floor: float = 0.0) -> list[Draft]:
        drafts = []
        chance = self.acceptance.rate(0)
        deepest = 1
        while chance ** (deepest + 1) >= floor and chance < 1.0 and deepest < 64:
            deepest += 1
        depths = [min(depth, deepest) for depth in depths]
        for s, depth in zip(sequences, depths, strict=True):
            following = self.machine.text_of(s)[len(s.output_ids) :][:depth]
            guesses = [token if self.rng.random() < self.chance else -1 for token in following]
            drafts.append(Draft(guesses, [0] * len(guesses)) if guesses else EMPTY)
        drafting = sum(1 for depth in depths if depth)
        self.machine.now += self.start_s + self.level_s * max(depths)
        self.start_cost.observe(drafting, self.start_s)
        self.cost.observe(drafting, self.level_s)
        return drafts

    def finish(self, sequence: SequenceState) -> None:
        self.finished += 1


def novel(length: int, seed: int = 0) -> list[int]:
    """A text in which nothing comes twice in a row."""
    text: list[int] = np.random.default_rng(seed).integers(0, 900, length).tolist()
    return text


def copying(length: int, seed: int = 0) -> list[int]:
    """A passage, over and over."""
    return (novel(60, seed) * (length // 60 + 1))[:length]


def memory_bound(tokens: int) -> float:
    """Time hardly depends on the number of tokens."""
    return 0.010 * (1 + 0.01 * tokens)


def arithmetic_bound(tokens: int) -> float:
    """Time is proportional to the tokens, nearly."""
    return 0.001 * (1 + tokens)


def small_model(tokens: int) -> float:
    """The bundled model's on two cores, about."""
    return 0.00022 + 0.00003 * tokens
