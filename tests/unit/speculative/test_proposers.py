"""Lookups find what followed; the automaton knows every run it read; memory stays within its bound."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_core.batching import SequenceState
from penstock_core.protocol.jobs import FinishReason
from penstock_core.speculative.automaton import ROOT, Reader, SuffixAutomaton
from penstock_core.speculative.ngram import NgramIndex, NgramProposer
from penstock_core.speculative.suffix import SuffixProposer

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def sequence(prompt: list[int], output: list[int] | None = None) -> SequenceState:
    state = SequenceState("r", 0, np.array(prompt, dtype=np.int32), 1000, 0.0, 0, b"")
    state.output_ids = output or []
    return state


def occurs(needle: list[int], texts: list[list[int]]) -> bool:
    return any(text[i : i + len(needle)] == needle for text in texts for i in range(len(text) - len(needle) + 1))


@given(tokens=TOKENS, chunks=st.lists(st.integers(1, 7), max_size=10))
@settings(max_examples=200, deadline=None)
def test_a_lookup_finds_the_longest_of_the_latest_earlier_matches(tokens: list[int], chunks: list[int]) -> None:
    index = NgramIndex([], 2)
    for size in [*chunks, 40]:
        index.extend(tokens[len(index.tokens) : len(index.tokens) + size])
    place, length = index.find(max_match=5)
    end = len(tokens)
    matches = {}
    for at in range(2, end):
        common = 0
        while common < min(5, at) and tokens[at - 1 - common] == tokens[end - 1 - common]:
            common += 1
        if common >= 2:
            matches[at] = common
    latest = dict(sorted(matches.items())[-8:])
    assert length == max(latest.values(), default=0)
    assert not latest or place == max(at for at, common in latest.items() if common == length)


def test_a_repeating_text_is_drafted_round_and_round() -> None:
    proposer = NgramProposer(2, 8)
    draft = proposer.propose([sequence([9, 1, 2, 3, 1, 2, 3, 1, 2])], [7])[0]
    assert draft.token_ids == [3, 1, 2, 3, 1, 2, 3]
    assert draft.grades == [5] * 7


def test_a_lookup_follows_the_output_as_it_grows() -> None:
    proposer, state = NgramProposer(2, 8), sequence([5, 6, 7, 8])
    assert proposer.propose([state], [3])[0].token_ids == []
    state.output_ids += [1, 5, 6]
    assert proposer.propose([state], [3])[0].token_ids == [7, 8, 1]
    proposer.finish(state)
    assert proposer.propose([state], [2])[0].token_ids == [7, 8]


@given(texts=st.lists(TOKENS, max_size=4), own=TOKENS)
@settings(max_examples=200, deadline=None)
def test_a_reader_knows_the_longest_suffix_that_was_read_before(texts: list[list[int]], own: list[int]) -> None:
    automaton, reader = SuffixAutomaton(), Reader()
    for text in texts:
        automaton.begin()
        for token in text:
            automaton.read(token)
    for end, token in enumerate(own, 1):
        automaton.advance(reader, token)
        longest = max(length for length in range(end + 1) if occurs(own[end - length : end], texts) or not length)
        assert reader.matched == longest
        assert (reader.state == ROOT) == (longest == 0)


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=30), prefix=st.lists(st.integers(0, 3), max_size=3))
@settings(max_examples=200, deadline=None)
def test_the_likeliest_token_is_one_that_followed_most_often(text: list[int], prefix: list[int]) -> None:
    automaton, reader = SuffixAutomaton(), Reader()
    automaton.begin()
    for token in text:
        automaton.read(token)
    for token in prefix:
        automaton.advance(reader, token)
    matched = prefix[len(prefix) - reader.matched :]
    followers = Counter(
        text[i + len(matched)] for i in range(len(text) - len(matched)) if text[i : i + len(matched)] == matched
    )
    token, _, share = automaton.likeliest(reader.state)
    assert (share > 0) == bool(followers)
    if followers and len(matched) < 30:
        assert followers[token] == max(followers.values())


def test_states_are_at_most_two_per_token() -> None:
    automaton, rng = SuffixAutomaton(), np.random.default_rng(0)
    for _ in range(20):
        automaton.begin()
        for token in rng.integers(0, 5, 100).tolist():
            automaton.read(token)
    assert automaton.size == 2000
    assert automaton.num_states <= 2 * automaton.size + 1


def finished(output: list[int]) -> SequenceState:
    state = sequence([0], output)
    state.finish_reason = FinishReason.STOP
    return state


def test_what_one_sequence_said_is_drafted_for_another() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=1000)
    proposer.finish(finished([10, 11, 12, 13, 14, 15]))
    draft = proposer.propose([sequence([99], [11, 12])], [4])[0]
    assert draft.token_ids == [13, 14, 15]


def test_the_more_frequent_continuation_is_drafted() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=1000)
    for output in ([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 6]):
        proposer.finish(finished(output))
    assert proposer.propose([sequence([99], [1, 2])], [2])[0].token_ids == [5, 6]


def test_an_own_longer_match_beats_a_remembered_shorter_one() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=1000)
    proposer.finish(finished([2, 3, 50, 51]))
    assert proposer.propose([sequence([1, 2, 3, 4, 1, 2, 3])], [1])[0].token_ids == [4]
    assert proposer.propose([sequence([9, 7], [2, 3])], [1])[0].token_ids == [50]


def test_a_preempted_sequence_is_not_learned_from() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=1000)
    proposer.finish(sequence([0], [10, 11, 12, 13]))
    assert proposer.propose([sequence([99], [10, 11])], [2])[0].token_ids == []


def test_memory_is_bounded_and_the_oldest_is_forgotten_first() -> None:
    proposer, rng = SuffixProposer(2, 8, learned_tokens=400), np.random.default_rng(1)
    for number in range(60):
        proposer.finish(finished([1000 + number, *rng.integers(0, 900, 50).tolist(), 2000 + number]))
        for _ in range(3):
            proposer.propose([], [])
        assert proposer.num_learned <= 400 + 64
    recent = finished([7, 8, 9, 10])
    proposer.finish(recent)
    assert proposer.propose([sequence([99], [7, 8])], [2])[0].token_ids == [9, 10]


def test_learning_takes_a_few_tokens_a_call() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=10_000)
    proposer.finish(finished(list(range(1000))))
    sizes = []
    for _ in range(4):
        proposer.propose([], [])
        sizes.append(proposer.num_learned)
    assert sizes == [64, 128, 192, 256]


def test_readers_survive_a_change_of_generation() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=100)
    state = sequence([99], [4])
    proposer.finish(finished([5, 6, 7, *range(100, 140)]))
    proposer.propose([state], [2])
    state.output_ids += [5, 6]
    assert proposer.propose([state], [1])[0].token_ids == [7]
    proposer.finish(finished([8, 8, *range(200, 230)]))
    proposer.propose([], [])
    state.output_ids.append(7)
    assert proposer.propose([state], [1])[0].token_ids == [100]


def test_without_memory_it_is_a_lookup() -> None:
    proposer = SuffixProposer(2, 8, learned_tokens=0)
    proposer.finish(finished([10, 11, 12, 13]))
    assert proposer.propose([sequence([99], [10, 11])], [2])[0].token_ids == []
    assert proposer.propose([sequence([1, 2, 3, 1, 2])], [1])[0].token_ids == [3]
