"""The decoder on a simulated machine: it speculates where that pays, keeps out of the way elsewhere, and comes back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penstock_core.batching import SequenceState
from penstock_core.protocol.jobs import FinishReason
from penstock_core.speculative import SpeculationConfig, SpeculativeDecoder
from penstock_core.speculative.acceptance import GradedAcceptance
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.proposer import EMPTY, Draft

LOOKUP_S = 20e-6


class Machine:
    """Decodes texts known in advance, and charges simulated seconds for steps and for every look at the clock."""

    def __init__(
        self, texts: list[list[int]], step_s: Callable[[int], float], proposer: str, model: Any = None
    ) -> None:
        self.now = 0.0
        self.texts, self.step_s = texts, step_s
        self.decoder = SpeculativeDecoder(SpeculationConfig(proposer=proposer), model, self.clock)
        self.sequences = []
        for number, text in enumerate(texts):
            state = SequenceState(
                f"r{number}", 0, np.array([900 + number], dtype=np.int32), len(text), 0.0, number, b""
            )
            state.row, state.num_computed = number, 0
            state.append(text[:1])
            state.num_computed = 1
            self.sequences.append(state)

    def clock(self) -> float:
        self.now += LOOKUP_S
        return self.now

    def step(self) -> None:
        running = [s for s in self.sequences if s.finish_reason is None]
        self.now += 1e-9
        began = self.now
        self.decoder.propose(running)
        tokens, samples, grown = 0, [], []
        for s in running:
            text, place = self.texts[int(s.request_id[1:])], len(s.output_ids)
            right = 0
            while right < len(s.draft_ids) and s.draft_ids[right] == text[place + right]:
                right += 1
            samples.append(len(s.draft_ids) + 1)
            tokens += samples[-1]
            kept = s.append(text[place : place + right + 1])
            s.num_computed = s.num_tokens - 1
            s.draft_ids = []
            grown.append((s, 0, kept))
        self.now += self.step_s(tokens)
        self.decoder.observe(SimpleNamespace(sequences=running, num_samples=samples, num_tokens=tokens), grown)  # type: ignore[arg-type]
        self.decoder.measure(tokens, self.now - began)
        for s in running:
            if s.finish_reason is not None:
                s.row = -1

    def run(self, tokens: int | None = None) -> float:
        """Speed against plain decoding, for the next `tokens` of each text, or to the end."""
        began, start = self.now, [len(s.output_ids) for s in self.sequences]
        while any(
            s.finish_reason is None and len(s.output_ids) - n < (tokens or 10**9)
            for s, n in zip(self.sequences, start, strict=True)
        ):
            self.step()
        emitted = sum(len(s.output_ids) - n for s, n in zip(self.sequences, start, strict=True))
        return emitted / len(self.sequences) * self.step_s(len(self.sequences)) / (self.now - began)


class Oracle:
    """A draft model that guesses each token right with some chance, at some cost."""

    name = "draft"

    def __init__(self, chance: float, level_s: float) -> None:
        self.chance, self.level_s = chance, level_s
        self.acceptance = GradedAcceptance(np.full(1, 0.6))
        self.start_cost, self.cost = StepCost(), StepCost()
        self.machine: Machine
        self.rng = np.random.default_rng(0)
        self.finished = 0

    def propose(self, sequences: list[SequenceState], depths: list[int], floor: float = 0.0) -> list[Draft]:
        drafts = []
        for s, depth in zip(sequences, depths, strict=True):
            following = self.machine.texts[int(s.request_id[1:])][len(s.output_ids) :][:depth]
            guesses = [token if self.rng.random() < self.chance else -1 for token in following]
            drafts.append(Draft(guesses, np.zeros(len(guesses), dtype=np.int64)) if guesses else EMPTY)
        for level in range(max(depths)):
            active = sum(1 for depth in depths if depth > level)
            self.machine.now += self.level_s
            (self.cost if level else self.start_cost).observe(active, self.level_s)
        return drafts

    def finish(self, sequence: SequenceState) -> None:
        self.finished += 1


def novel(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


def copying(length: int, seed: int = 0) -> list[int]:
    return (novel(60, seed) * (length // 60 + 1))[:length]


def memory_bound(tokens: int) -> float:
    return 0.010 * (1 + 0.01 * tokens)


def arithmetic_bound(tokens: int) -> float:
    return 0.001 * (1 + tokens)


@pytest.mark.parametrize("proposer", ["ngram", "suffix", "auto"])
def test_a_copying_text_is_decoded_several_times_faster(proposer: str) -> None:
    assert Machine([copying(600)], memory_bound, proposer).run() > 3.0


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
@pytest.mark.parametrize("step_s", [memory_bound, arithmetic_bound])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_a_text_that_nobody_can_guess_is_decoded_as_fast_as_plainly(
    proposer: str, step_s: Callable[[int], float], count: int
) -> None:
    machine = Machine([novel(400, seed) for seed in range(count)], step_s, proposer)
    assert machine.run() > 0.97


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_where_time_follows_tokens_a_full_batch_decodes_plainly(proposer: str) -> None:
    machine = Machine([copying(400, seed) for seed in range(32)], arithmetic_bound, proposer)
    assert machine.run() > 0.95
    depths = machine.decoder.statistics().depths
    assert depths[0] > 0.9 * sum(depths)


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_speculation_comes_back_when_a_text_begins_to_copy(proposer: str) -> None:
    text = novel(1000)
    machine = Machine([text + text[200:900]], memory_bound, proposer)
    machine.run(1000)
    assert machine.run(600) > 2.5


@pytest.mark.parametrize(("chance", "least", "most"), [(0.9, 2.5, 9.0), (0.6, 1.3, 3.0), (0.02, 0.97, 1.05)])
def test_a_draft_model_is_used_as_far_as_it_is_good(chance: float, least: float, most: float) -> None:
    oracle = Oracle(chance, level_s=0.0005)
    machine = Machine([novel(1500)], memory_bound, "draft", oracle)
    oracle.machine = machine
    assert least < machine.run() < most


def test_a_dear_draft_model_is_left_alone() -> None:
    oracle = Oracle(0.9, level_s=0.012)
    machine = Machine([novel(1500)], memory_bound, "draft", oracle)
    oracle.machine = machine
    assert machine.run() > 0.97


def test_a_draft_model_that_becomes_good_is_noticed() -> None:
    oracle = Oracle(0.02, level_s=0.0005)
    machine = Machine([novel(9000)], memory_bound, "draft", oracle)
    oracle.machine = machine
    machine.run(2000)
    oracle.chance = 0.95
    machine.run(4000)
    assert machine.run(1000) > 2.0


def test_auto_takes_whichever_gains_more() -> None:
    oracle = Oracle(0.7, level_s=0.0005)
    machine = Machine([novel(500) + copying(800, seed=1)], memory_bound, "auto", oracle)
    oracle.machine = machine
    machine.run(500)
    before = machine.decoder.statistics()
    assert before.drafted_by["draft"] > 10 * before.drafted_by["suffix"]
    machine.run(100)
    middle = machine.decoder.statistics()
    machine.run()
    after = machine.decoder.statistics()
    assert (
        after.drafted_by["suffix"] - middle.drafted_by["suffix"]
        > after.drafted_by["draft"] - middle.drafted_by["draft"]
    )


def test_the_gain_that_is_reported_is_the_gain_there_was() -> None:
    machine = Machine([copying(1200)], memory_bound, "ngram")
    speed = machine.run()
    assert machine.decoder.statistics().gain == pytest.approx(speed, rel=0.1)


def test_ended_sequences_are_forgotten() -> None:
    oracle = Oracle(0.9, level_s=0.0005)
    machine = Machine([novel(20), novel(60)], memory_bound, "draft", oracle)
    oracle.machine = machine
    machine.run(40)
    assert machine.sequences[0].finish_reason is FinishReason.LENGTH
    assert oracle.finished == 1
    machine.decoder.close()
    assert oracle.finished == 2
