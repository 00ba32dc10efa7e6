"""SpeculativeDecoder: before each step, guesses at what follows; after it, what they were worth.

The sampler is stateless, so the target's token at each position is determined before anyone guesses: a draft is right
exactly when it equals that token, and no draft, depth or proposer can change an output. All this class decides is
speed: how deep to draft from predictions (`depth.py`), whether to draft at all from what was gained (`budget.py`). The
pipeline asks whether drafts are `due` before each step and calls `measure` after it; where they are, `propose` before
the batcher schedules and `observe` after it updates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock_core.batching import SequenceState, TokenBatch
from penstock_core.protocol.jobs import Speculation
from penstock_core.speculative.acceptance import SequenceBias
from penstock_core.speculative.budget import LossBudget, Standing, Standings
from penstock_core.speculative.config import SpeculationConfig
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.depth import Costs, choose_depths, draft_depth, worth_checking
from penstock_core.speculative.draft_model import DraftModelProposer
from penstock_core.speculative.ngram import NgramProposer
from penstock_core.speculative.proposer import EMPTY, Draft, Proposer
from penstock_core.speculative.statistics import DraftTally, SpeculationMeter, SpeculationStatistics, summary
from penstock_core.speculative.suffix import SuffixProposer

_FRUITLESS_SHARE = 0.005  # of a step's time that proposing in vain may take, on average
_LONGEST_PAUSE_STEPS = 32
_IDLE_STEPS = 16  # between two looks at whether drafting is due
_OTHER_PROBE_STEPS = 64  # that a sequence for which the draft model is poor goes without it
_PLAIN_EVERY_STEPS, _PLAIN_STEPS = 96, 4  # drafting pauses now and then, or plain steps would be those of other times
_SAMPLED_STEPS = 8  # one in so many plain steps is enough to know their time
_READING_STEPS = 32  # over which the draft model's reading of a prompt is spread: they have the use of it
_LONGEST_STEP = 8.0  # plain steps; what takes longer was disturbed
_STALLED_STEP = 32.0  # plain steps; more than that is not held against drafting
_SLOWNESS_MEMORY = 1.0 / 64
_NO_CHANCES: list[float] = []


@dataclass(slots=True)
class _Track:
    """What speculation remembers of one sequence.

    Attributes:
        found, guessed: this step's lookup and the draft model's guess, in full; less of one of them may be checked.
        offered: whose draft goes into the step, if any. known: output tokens before the step.
        lookup_bias, model_bias: how this sequence's drafts fare against expectation.
        resting: number of the step from which a lookup is tried again. guessed_at: step of the latest guess.
    """

    found: Draft = EMPTY
    guessed: Draft = EMPTY
    offered: Proposer | None = None
    known: int = 0
    lookup_bias: SequenceBias = field(default_factory=SequenceBias)
    model_bias: SequenceBias = field(default_factory=SequenceBias)
    resting: int = 0
    guessed_at: int = 0


class SpeculativeDecoder:
    """Drafts for the running sequences of one pipeline.

    Args:
        config: settings.
        model: the proposer with a draft model, if there is one.
        clock: seconds, for the cost of drafting.

    Attributes:
        asked: whether anyone was asked to propose for this step, so that `observe` has something to learn.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        model: DraftModelProposer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self._clock = clock
        self._model = model if config.may_use_draft_model else None
        self._lookup: NgramProposer | SuffixProposer | None = None
        if config.proposer == "ngram":
            self._lookup = NgramProposer(config.min_match, config.max_match)
        elif config.proposer in ("suffix", "auto"):
            self._lookup = SuffixProposer(config.min_match, config.max_match, config.learned_tokens)
        names = [proposer.name for proposer in (self._lookup, self._model) if proposer is not None]
        self.costs = Costs(StepCost(), StepCost(), *(() if model is None else (model.start_cost, model.cost)))
        self._budget = LossBudget()
        self._lookup_standings, self._model_standings = Standings(), Standings()
        self._meter = SpeculationMeter(config.max_depth, names)
        self._tallies: dict[SequenceState, DraftTally] = {}
        self._tracks: dict[SequenceState, _Track] = {}
        self._steps = 0
        self._idle = 0  # steps until anyone is asked again
        self._since_plain = 0  # steps with drafts
        self._slowness = 1.0  # mean time of plain steps over their usual time
        self.asked = False
        # Of the coming step:
        self._decoding = 0  # sequences that get a token
        self._standing: Standing | None = None  # of the drafts in it
        self._by_model = False  # whether the draft model is asked
        self._spent_s = 0.0  # on proposing for it
        self._checked = 0  # drafts in it
        self._grown: list[tuple[DraftTally, int]] = []  # sequences asked about, and their new tokens
        # Not accounted for yet:
        self._unbilled_s = 0.0  # of plain steps
        self._reading_s = 0.0  # in which the draft model read prompts, for the good of many steps

    def due(self) -> bool:
        """Count a step; whether it is time to propose. A step for which it is not costs next to nothing."""
        self._steps += 1
        self.asked = False
        if self._idle:
            self._idle -= 1
            return False
        return True

    def propose(self, running: Sequence[SequenceState], waiting_tokens: int = 0) -> None:
        """Give drafts to the running sequences for which they are likely to pay.

        Args:
            running: sequences that hold a row of the table.
            waiting_tokens: prompt tokens of waiting sequences that the next step is likely to take in.
        """
        began = self._clock()
        self._standing, self._by_model, self._spent_s, self._checked = None, False, 0.0, 0
        self._forget_all_but(running)
        unread = [sequence.num_tokens - sequence.num_computed for sequence in running]
        decoding = [sequence for sequence, tokens in zip(running, unread, strict=True) if tokens == 1]
        self._decoding = len(decoding)
        if self.config.fixed_depth is not None:
            self._propose_fixed(decoding, self.config.fixed_depth)
        elif decoding and self.costs.plain.known:
            if self._since_plain >= _PLAIN_EVERY_STEPS:
                self._since_plain, self._idle = 0, _PLAIN_STEPS - 1
                return
            self._propose_paying(decoding, sum(unread) + waiting_tokens)
            self._since_plain += self._standing is not None
        self._spent_s = self._clock() - began
        if self.asked and self._standing is None and self.config.fixed_depth is None:
            # What was spent in vain is made up for by not asking again for a while.
            self._idle = self._pause_after(self._spent_s)

    def observe(self, batch: TokenBatch, grown: Sequence[tuple[SequenceState, int, int]]) -> None:
        """Learn what the drafts of a step were worth.

        Args:
            batch: what was computed.
            grown: what `TokenBatcher.update` returned: sequence, its first place, number of new tokens.
        """
        meter = self._meter
        samples = {id(sequence): number for sequence, number in zip(batch.sequences, batch.num_samples, strict=True)}
        self._grown.clear()
        for sequence, _, count in grown:
            track = self._tracks.get(sequence)
            if track is None or track.known != len(sequence.output_ids) - count:
                continue  # it computed its prompt in this step
            checked = samples[id(sequence)] - 1
            self._checked += checked
            tally = self._tallies.get(sequence)
            if tally is None:
                tally = self._tallies[sequence] = DraftTally(self.config.max_depth)
            self._grown.append((tally, count))
            right = self._learn(track, sequence.output_ids[track.known :], checked)
            meter.depths[checked] += 1
            tally.depths[checked] += 1
            if checked:
                assert track.offered is not None
                meter.count_by(track.offered.name, checked, right)
                tally.count(checked, right)

    def measure(self, step_tokens: int, step_s: float) -> None:
        """Learn what the step cost: its tokens, and all its seconds, those of `propose` included."""
        meter, plain = self._meter, self.costs.plain
        if not self.asked:
            self._unbilled_s += step_s
            if not self._steps % _SAMPLED_STEPS or self._idle < 2:  # the first ones after drafting are slower
                self._measure_plain(step_tokens, step_s)
            return
        drafts, took_s = self._checked, step_s - self._spent_s
        (self.costs.checking if drafts else plain).observe(step_tokens, took_s)
        meter.step_s += took_s
        meter.propose_s += self._spent_s
        if plain.known:
            self._settle(step_tokens, drafts, took_s)
        else:
            meter.plain_s += took_s

    def _settle(self, step_tokens: int, drafts: int, took_s: float) -> None:
        """What a step for which drafts were asked for saved against plain ones, and what follows from that."""
        plain = self.costs.plain
        one_s = plain.at(max(1, self._decoding)) * self._slowness
        base_s, drafting_s = took_s, self._spent_s
        if self._by_model:
            assert self._model is not None
            self._reading_s += self._model.reading_s
            paid_s = self._reading_s / _READING_STEPS
            self._reading_s -= paid_s
            drafting_s += paid_s - self._model.reading_s
        emitted = 1.0
        if drafts:
            # Prompts that the step computed too would have been in one plain step; further tokens need further steps.
            base_s = plain.at(step_tokens - drafts) * self._slowness
            emitted = sum(count for _, count in self._grown) / max(1, len(self._grown))
        plain_s, spent_s = base_s + one_s * (emitted - 1.0), took_s + drafting_s
        self._meter.plain_s += plain_s
        plainly_s = plain.at(step_tokens)
        self._budget.earn(spent_s, plain_s - min(spent_s, plainly_s * _STALLED_STEP), one_s)
        if self._standing is not None:
            undisturbed_s = min(spent_s, plainly_s * _LONGEST_STEP)
            self._standing.record(plain_s, undisturbed_s, self._steps, self._budget)
        for tally, count in self._grown:
            tally.saved_s += base_s + one_s * (count - 1.0) - spent_s

    def statistics(self) -> SpeculationStatistics:
        """Counters since the start."""
        return self._meter.read(self._unbilled_s)

    def report(self, ended: Sequence[SequenceState]) -> Speculation | None:
        """What speculation did for the sequences of a request that has ended; None if it was never tried for them."""
        tallies = [tally for tally in (self._tallies.pop(sequence, None) for sequence in ended) if tally is not None]
        return summary(tallies) if tallies else None

    def close(self) -> None:
        """Give up everything kept for sequences."""
        self._forget_all_but(())
        self._tallies.clear()

    # --- proposing ------------------------------------------------------------------------------------------------

    def _propose_fixed(self, decoding: list[SequenceState], depth: int) -> None:
        tracks = self._begin(decoding)
        depths = [min(depth, _room(sequence)) for sequence in decoding]
        self._look_up(decoding, tracks, depths)
        wanted = [0 if track.found.token_ids else depth for track, depth in zip(tracks, depths, strict=True)]
        self._guess(decoding, tracks, wanted, 0.0)
        for sequence, track in zip(decoding, tracks, strict=True):
            draft = track.found if track.found.token_ids else track.guessed
            self._offer(sequence, track, draft, len(draft.token_ids))

    def _propose_paying(self, decoding: list[SequenceState], step_tokens: int) -> None:
        emitting = len(decoding)
        plain_s = self.costs.plain.at(emitting)
        by_lookup, by_model = (
            proposer is not None and standings.of(emitting).allows(self._steps, self._budget, plain_s)
            for proposer, standings in (
                (self._lookup, self._lookup_standings),
                (self._model, self._model_standings),
            )
        )
        if not by_lookup and not by_model:
            self._idle = _IDLE_STEPS
            return
        tracks = self._begin(decoding)
        room = [min(self.config.max_depth, _room(sequence)) for sequence in decoding]
        if by_lookup:
            rested = [depth if track.resting <= self._steps else 0 for track, depth in zip(tracks, room, strict=True)]
            self._look_up(decoding, tracks, rested)
        if by_model and self._propose_by_model(decoding, tracks, room, step_tokens):
            return
        if not any(track.found.token_ids for track in tracks):
            return
        chances = [self._chances(track.found, self._lookup, track.lookup_bias) for track in tracks]
        standing = self._lookup_standings.of(emitting)
        chosen = choose_depths(chances, step_tokens, emitting, self.costs, some=standing.is_trying)
        for sequence, track, depth in zip(decoding, tracks, chosen, strict=True):
            if depth:
                self._offer(sequence, track, track.found, depth)
                self._standing = standing

    def _propose_by_model(
        self, decoding: list[SequenceState], tracks: list[_Track], room: list[int], step_tokens: int
    ) -> bool:
        """Let the draft model guess for those sequences for which it is better than the lookup; whether for any."""
        assert self._model is not None
        emitting, mean = len(decoding), [self._model.acceptance.mean]
        expected = [track.model_bias.adjust(mean)[0] for track in tracks]
        depth, floor = draft_depth(sum(expected) / emitting, step_tokens, emitting, self.costs, self.config.max_depth)
        found = [self._chances(track.found, self._lookup, track.lookup_bias) for track in tracks]
        standing = self._model_standings.of(emitting)
        depths = []
        for track, chance, looked_up, most in zip(tracks, expected, found, room, strict=True):
            wanted = 0
            if standing.is_trying or chance >= floor:
                # A guess that turns out surer than the mean is worth going on from, up to the limit.
                wanted = 0 if _yield(looked_up, floor) > _yield([chance] * depth, floor) else most
            elif self._steps - track.guessed_at >= _OTHER_PROBE_STEPS:
                wanted = min(1, most)
            if wanted:
                track.guessed_at = self._steps
            depths.append(wanted)
        if not any(depths):
            return False
        self._standing, self._by_model = standing, True
        limit = max(1, (self.costs.most_tokens(step_tokens) - step_tokens) // emitting)
        self._guess(decoding, tracks, [min(limit, wanted) for wanted in depths], floor)
        for sequence, track, wanted, looked_up in zip(decoding, tracks, depths, found, strict=True):
            if wanted:
                chances = self._chances(track.guessed, self._model, track.model_bias)
                self._offer(sequence, track, track.guessed, max(standing.is_trying, worth_checking(chances, floor)))
            else:
                self._offer(sequence, track, track.found, worth_checking(looked_up, floor))
        return True

    def _look_up(self, decoding: list[SequenceState], tracks: list[_Track], depths: list[int]) -> None:
        if self._lookup is None or not any(depths):
            return
        began = self._clock()
        found = self._lookup.propose(decoding, depths)
        rest = 0 if self.config.fixed_depth is not None else 1 + self._pause_after(self._clock() - began)
        for track, draft, depth in zip(tracks, found, depths, strict=True):
            track.found = draft
            if depth and not draft.token_ids:
                track.resting = self._steps + rest

    def _guess(self, decoding: list[SequenceState], tracks: list[_Track], depths: list[int], floor: float) -> None:
        if self._model is not None and any(depths):
            for track, draft in zip(tracks, self._model.propose(decoding, depths, floor), strict=True):
                track.guessed = draft

    def _offer(self, sequence: SequenceState, track: _Track, draft: Draft, depth: int) -> None:
        tokens = draft.token_ids[:depth]
        if tokens:
            track.offered = self._model if draft is track.guessed else self._lookup
            sequence.propose(tokens)

    def _chances(self, draft: Draft, proposer: Proposer | None, bias: SequenceBias) -> list[float]:
        if proposer is None or not draft.token_ids:
            return _NO_CHANCES
        return bias.adjust([proposer.acceptance.rate(grade) for grade in draft.grades])

    def _pause_after(self, spent_s: float) -> int:
        """Steps after which time spent in vain is as small a share of all as it should be."""
        return min(int(spent_s / (_FRUITLESS_SHARE * self.costs.plain.at(self._decoding))), _LONGEST_PAUSE_STEPS)

    # --- learning -------------------------------------------------------------------------------------------------

    def _measure_plain(self, step_tokens: int, step_s: float) -> None:
        """Learn from a step with which speculation had nothing to do."""
        plain = self.costs.plain
        plain.observe(step_tokens, step_s)
        if plain.known:
            usual_s = plain.at(step_tokens)
            self._slowness += (min(step_s / usual_s, _LONGEST_STEP) - self._slowness) * _SLOWNESS_MEMORY
            self._budget.earn(self._unbilled_s, 0.0, usual_s)
            self._meter.step_s += self._unbilled_s
            self._meter.plain_s += self._unbilled_s
            self._unbilled_s = 0.0

    def _learn(self, track: _Track, new: list[int], checked: int) -> int:
        """Compare what was proposed with the tokens that came, also where it was not checked; how many were right."""
        right = 0
        if checked:
            draft = track.guessed if track.offered is self._model else track.found
            while right < min(checked, len(new)) and new[right] == draft.token_ids[right]:
                right += 1
        for draft, proposer, bias in (
            (track.found, self._lookup, track.lookup_bias),
            (track.guessed, self._model, track.model_bias),
        ):
            if proposer is None:
                continue
            for guess, grade, token in zip(draft.token_ids, draft.grades, new, strict=False):
                bias.observe(proposer.acceptance.rate(grade), guess == token)
                proposer.acceptance.observe(grade, guess == token)
                if guess != token:
                    break
        return right

    def _begin(self, decoding: list[SequenceState]) -> list[_Track]:
        """The sequences' tracks, cleared for a new step."""
        tracks = []
        for sequence in decoding:
            track = self._tracks.get(sequence)
            if track is None:
                track = self._tracks[sequence] = _Track()
            track.found = track.guessed = EMPTY
            track.offered = None
            track.known = len(sequence.output_ids)
            tracks.append(track)
        self.asked = True
        return tracks

    def _forget_all_but(self, running: Sequence[SequenceState]) -> None:
        """Drop what is kept for sequences that ended or were preempted."""
        if len(self._tracks) <= len(running) and all(sequence.is_running for sequence in self._tracks):
            return
        for sequence in [s for s in self._tracks if not s.is_running or not running]:
            del self._tracks[sequence]
            for proposer in (self._lookup, self._model):
                if proposer is not None:
                    proposer.finish(sequence)


def _room(sequence: SequenceState) -> int:
    """Drafts after which there is still room for the target's own token."""
    return max(0, sequence.max_new_tokens - len(sequence.output_ids) - 1)


def _yield(chances: Sequence[float], floor: float) -> float:
    """Tokens that drafts of these chances bring, less what they cost."""
    total, gain = 0.0, 1.0
    for chance in chances:
        gain *= chance
        if gain < floor:
            break
        total += gain - floor
    return total
