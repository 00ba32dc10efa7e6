"""SpeculativeDecoder: before each step, guesses at what follows; after it, what they were worth.

The sampler is stateless, so the target's token at each position is determined before anyone guesses: a draft is right
exactly when it equals that token, and no draft, depth or proposer can change an output. All this class decides is
speed. The pipeline calls `propose` before the batcher schedules, and `observe` after it updates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock_core.batching import SequenceState, TokenBatch
from penstock_core.sampling.noise import Float64
from penstock_core.speculative.acceptance import SequenceBias
from penstock_core.speculative.config import SpeculationConfig
from penstock_core.speculative.cost import StepCost
from penstock_core.speculative.depth import choose_depths, draft_depth, least_paying_chance
from penstock_core.speculative.draft_model import DraftModelProposer
from penstock_core.speculative.ngram import NgramProposer
from penstock_core.speculative.proposer import EMPTY, Draft, Proposer
from penstock_core.speculative.statistics import SpeculationMeter, SpeculationStatistics
from penstock_core.speculative.suffix import SuffixProposer

_HOPELESS = 0.95  # if even drafts this likely would not pay, nobody is asked
_FRUITLESS_SHARE = 0.01  # of a step's time that proposing in vain may take, on average
_LONGEST_PAUSE_STEPS = 32
_PROBE_STEPS = 64
_PLAIN_EVERY_STEPS = 32
_LONGEST_PROBE_STEPS = 4096
_TRIES, _TRY_DEPTH = 8, 4
_NO_CHANCES = np.zeros(0)


@dataclass(slots=True)
class _Track:
    """What speculation remembers of one sequence.

    Attributes:
        found, guessed: this step's lookup and the draft model's guess, in full; less of one of them may be checked.
        offered: whose draft goes into the step, if any. known: output tokens before the step.
        lookup_bias, model_bias: how this sequence's drafts fare against expectation.
        resting: steps until a fruitless lookup is tried again.
        quiet: steps without the draft model.
    """

    found: Draft = EMPTY
    guessed: Draft = EMPTY
    offered: Proposer | None = None
    known: int = 0
    lookup_bias: SequenceBias = field(default_factory=SequenceBias)
    model_bias: SequenceBias = field(default_factory=SequenceBias)
    resting: int = 0
    quiet: int = 0


class SpeculativeDecoder:
    """Drafts for the running sequences of one pipeline.

    Args:
        config: settings.
        model: the proposer with a draft model, if there is one.
        clock: seconds, for the cost of drafting.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        model: DraftModelProposer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.cost = StepCost()
        self._clock = clock
        self._model = model if config.may_use_draft_model else None
        self._lookup: NgramProposer | SuffixProposer | None = None
        if config.proposer == "ngram":
            self._lookup = NgramProposer(config.min_match, config.max_match)
        elif config.proposer in ("suffix", "auto"):
            self._lookup = SuffixProposer(config.min_match, config.max_match, config.learned_tokens)
        names = [proposer.name for proposer in (self._lookup, self._model) if proposer is not None]
        self._meter = SpeculationMeter(config.max_depth, names)
        self._tracks: dict[SequenceState, _Track] = {}
        self._asked = False  # whether anyone was asked to propose for the coming step
        self._offered = False  # whether anything was
        self._pause = 0  # steps that a fruitless proposal is worth waiting after
        self._idle = 0  # steps until anyone is asked again
        self._model_idle = 0  # steps until the draft model is tried again where it is not expected to pay
        self._tries = 0  # of the draft model, in a row
        self._trying: int | None = None  # place of the sequence it drafts for in such a try
        self._since_plain = 0  # steps with drafts
        self._spent_s = 0.0  # on proposing for the coming step
        self._saved = (0, 1.0)  # drafts in the latest step, and how many plain steps would have given its tokens

    def propose(self, running: Sequence[SequenceState], waiting_tokens: int = 0) -> None:
        """Give drafts to the running sequences for which they are likely to pay.

        Args:
            running: sequences that hold a row of the table.
            waiting_tokens: prompt tokens of waiting sequences that the next step is likely to take in.
        """
        began = self._clock()
        self._asked = self._offered = False
        self._spent_s = 0.0
        self._forget_all_but(running)
        if self._idle:
            self._idle -= 1
            return
        if self._since_plain >= _PLAIN_EVERY_STEPS and self.config.fixed_depth is None:
            self._since_plain = 0  # a plain step now and then, or its cost would be that of other times
            return
        unread = [sequence.num_tokens - sequence.num_computed for sequence in running]
        decoding = [sequence for sequence, tokens in zip(running, unread, strict=True) if tokens == 1]
        if self.config.fixed_depth is not None:
            self._propose_fixed(decoding, self.config.fixed_depth)
        elif decoding and self.cost.known:
            self._propose_paying(decoding, sum(unread) + waiting_tokens)
            # What was spent in vain is made up for by not trying again for a while; nothing is lost where it is cheap.
            self._pause = min(self._steps_worth(self._clock() - began, len(decoding)), _LONGEST_PAUSE_STEPS)
            self._idle = 0 if self._offered or self._tries else self._pause
            self._since_plain = self._since_plain + 1 if self._offered else 0
        self._spent_s = self._clock() - began

    def observe(self, batch: TokenBatch, grown: Sequence[tuple[SequenceState, int, int]]) -> None:
        """Learn what the drafts of a step were worth.

        Args:
            batch: what was computed.
            grown: what `TokenBatcher.update` returned: sequence, its first place, number of new tokens.
        """
        meter = self._meter
        self._saved = (0, 1.0)
        if not self._asked:
            meter.depths[0] += len(grown)
            return
        samples = {id(sequence): number for sequence, number in zip(batch.sequences, batch.num_samples, strict=True)}
        emitted = drafts = 0
        for sequence, _, count in grown:
            emitted += count
            track = self._tracks.get(sequence)
            if track is None or track.known != len(sequence.output_ids) - count:
                continue  # it computed its prompt in this step
            checked = samples[id(sequence)] - 1
            drafts += checked
            meter.depths[checked] += 1
            self._learn(track, sequence.output_ids[track.known :], checked)
        if drafts:
            self._saved = (drafts, emitted / len(grown))

    def measure(self, step_tokens: int, step_s: float) -> None:
        """Learn what the step cost: its tokens, and all its seconds, those of `propose` included."""
        step_s -= self._spent_s
        self.cost.observe(step_tokens, step_s)
        drafts, steps = self._saved
        meter = self._meter
        meter.step_s += step_s
        meter.propose_s += self._spent_s
        plain_s = self.cost.at(step_tokens - drafts) * steps if drafts and self.cost.known else step_s
        meter.plain_s += plain_s

    def statistics(self) -> SpeculationStatistics:
        """Counters since the start."""
        return self._meter.read()

    def close(self) -> None:
        """Give up everything kept for sequences."""
        self._forget_all_but(())

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
        if least_paying_chance(step_tokens, emitting, self.cost) > _HOPELESS:
            return
        if self._model is None:
            decoding = self._rested(decoding)
            if not decoding:
                return
        self._trying = None
        tracks = self._begin(decoding)
        self._look_up(decoding, tracks, [min(self.config.max_depth, _room(sequence)) for sequence in decoding])
        found = [self._chances(track.found, self._lookup, track.lookup_bias) for track in tracks]
        if self._model is not None:
            depths, floor = self._model_depths(decoding, tracks, found, step_tokens)
            self._guess(decoding, tracks, depths, floor)
        drafts = [track.guessed if track.guessed.token_ids else track.found for track in tracks]
        chances = [
            self._chances(track.guessed, self._model, track.model_bias) if track.guessed.token_ids else looked_up
            for track, looked_up in zip(tracks, found, strict=True)
        ]
        chosen = choose_depths(chances, step_tokens, emitting, self.cost)
        if self._trying is not None:
            chosen[self._trying] = max(chosen[self._trying], len(tracks[self._trying].guessed.token_ids))
        for sequence, track, draft, depth in zip(decoding, tracks, drafts, chosen, strict=True):
            self._offer(sequence, track, draft, depth)
            track.resting = 0 if depth else self._pause

    def _rested(self, decoding: list[SequenceState]) -> list[SequenceState]:
        """The sequences worth a lookup: those whose last one was not fruitless, or was long enough ago."""
        rested = []
        for sequence in decoding:
            track = self._tracks.get(sequence)
            if track is None or track.resting == 0:
                rested.append(sequence)
            else:
                track.resting -= 1
        return rested

    def _model_depths(
        self, decoding: list[SequenceState], tracks: list[_Track], found: list[Float64], step_tokens: int
    ) -> tuple[list[int], float]:
        """How deep the draft model guesses for each sequence, and the chance below which it stops."""
        assert self._model is not None
        mean = np.array([self._model.acceptance.mean])
        chances = np.array([track.model_bias.adjust(mean)[0] for track in tracks])
        emitting = len(decoding)
        depth, floor = draft_depth(
            chances,
            step_tokens,
            emitting,
            self.cost,
            self._model.start_cost,
            self._model.cost,
            self.config.max_depth,
        )
        depths = []
        for sequence, track, chance, looked_up in zip(decoding, tracks, chances, found, strict=True):
            levels = chance ** np.arange(1, depth + 1)
            gain, other = float((levels - floor).sum()), float(np.maximum(np.cumprod(looked_up) - floor, 0.0).sum())
            track.quiet += 1
            if depth and chance >= floor and gain > other:
                # A guess that turns out surer than the mean is worth going on from, up to the limit.
                depths.append(min(self.config.max_depth, _room(sequence)))
                track.quiet = 0
            elif depth and track.quiet >= _PROBE_STEPS:
                depths.append(min(1, _room(sequence)))
                track.quiet = 0
            else:
                depths.append(0)
        if not depth:
            if self._model_idle:
                self._model_idle -= 1
            else:
                floor = self._try_model(decoding, tracks, depths)
        return depths, floor

    def _try_model(self, decoding: list[SequenceState], tracks: list[_Track], depths: list[int]) -> float:
        """Let the model draft for one sequence, and check it, some steps in a row: is it worth asking by now?

        In a row, because a model not used for a while finds its weights out of the caches: a single try would show it
        slower than it is. Returns the chance below which it stops: none.
        """
        assert self._model is not None
        quietest = max(range(len(decoding)), key=lambda place: tracks[place].quiet)
        depth = depths[quietest] = min(_TRY_DEPTH, self.config.max_depth, _room(decoding[quietest]))
        self._trying = quietest if depth else None
        self._tries += 1
        if self._tries == _TRIES:
            self._tries = 0
            tracks[quietest].quiet = 0
            emitting = len(decoding)
            spent_s = self.cost.at(emitting + depth) - self.cost.at(emitting)
            for known, times in ((self._model.start_cost, 1), (self._model.cost, depth)):
                spent_s += known.at(1) * times if known.known else 0.0
            self._model_idle = self._steps_worth(_TRIES * spent_s, emitting)
        return 0.0

    def _steps_worth(self, spent_s: float, step_tokens: int) -> int:
        """Steps after which time spent in vain is as small a share of all as it should be."""
        return min(int(spent_s / (_FRUITLESS_SHARE * self.cost.at(step_tokens))), _LONGEST_PROBE_STEPS)

    def _look_up(self, decoding: list[SequenceState], tracks: list[_Track], depths: list[int]) -> None:
        if self._lookup is None:
            return
        for track, draft in zip(tracks, self._lookup.propose(decoding, depths), strict=True):
            track.found = draft

    def _guess(self, decoding: list[SequenceState], tracks: list[_Track], depths: list[int], floor: float) -> None:
        if self._model is not None and any(depths):
            for track, draft in zip(tracks, self._model.propose(decoding, depths, floor), strict=True):
                track.guessed = draft

    def _offer(self, sequence: SequenceState, track: _Track, draft: Draft, depth: int) -> None:
        tokens = draft.token_ids[:depth]
        track.offered = None
        if tokens:
            self._offered = True
            track.offered = self._model if draft is track.guessed else self._lookup
            sequence.propose(tokens)

    def _chances(self, draft: Draft, proposer: Proposer | None, bias: SequenceBias) -> Float64:
        if proposer is None or not draft.token_ids:
            return _NO_CHANCES
        return bias.adjust(proposer.acceptance.rates(draft.grades))

    # --- learning -------------------------------------------------------------------------------------------------

    def _learn(self, track: _Track, new: list[int], checked: int) -> None:
        """Compare what was proposed with the tokens that came, also where it was not checked."""
        if checked and track.offered is not None:
            draft = track.guessed if track.offered is self._model else track.found
            right = 0
            while right < min(checked, len(new)) and new[right] == draft.token_ids[right]:
                right += 1
            self._meter.count(track.offered.name, checked, right)
        for draft, proposer, bias in (
            (track.found, self._lookup, track.lookup_bias),
            (track.guessed, self._model, track.model_bias),
        ):
            if proposer is None:
                continue
            for guess, grade, token in zip(draft.token_ids, draft.grades.tolist(), new, strict=False):
                bias.observe(proposer.acceptance.rate(grade), guess == token)
                proposer.acceptance.observe(grade, guess == token)
                if guess != token:
                    break

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
        self._asked = True
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
