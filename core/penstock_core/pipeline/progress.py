"""How far a request has come: the text, log-probabilities and end of each choice, and the result of them all.

The pipeline moves these from step to step; the batcher knows only the sequences in them. Text is a pure function of the
tokens, so a resumed choice replays its tokens and goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from penstock_core.batching import SequenceState
from penstock_core.pipeline.requests import ChoiceChunk, EngineRequest, FinishedRequest, ResumedChoice
from penstock_core.protocol.jobs import Choice, FinishReason, Speculation, Timings, TokenLogprob, Usage
from penstock_core.protocol.requests import SamplingParams
from penstock_core.sampling import TextStream


def spell(record: TokenLogprob, token_id: int, bytes_of: Callable[[int], bytes]) -> TokenLogprob:
    """The record of a token with the bytes of it and of the likeliest ones."""
    if record.spelled:
        return record
    return replace(record, spelled=(bytes_of(token_id), *(bytes_of(other) for other, _ in record.top)))


@dataclass(slots=True)
class ChoiceProgress:
    """One choice.

    Attributes:
        prefix: text to put before the first piece (the prompt, with `echo`).
        pieces: the text that each token released. tail: what the end released beyond the last token's.
        logprobs: per token, where asked for.
        delivered: tokens that are published, by this attempt or an earlier one.
        ended: the finish reason is published too.
    """

    sequence: SequenceState
    stream: TextStream
    include_stop: bool
    prefix: str = ""
    pieces: list[str] = field(default_factory=list)
    tail: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    delivered: int = 0
    ended: bool = False

    def advance(self, tokens: list[int], reason: FinishReason | None) -> int:
        """Turn new tokens into text; `reason` is why the last of them ends the choice, if it does.

        Returns how many tokens are kept: a stop string may end the choice before the last.
        """
        pieces, stream = self.pieces, self.stream
        cut = reason is FinishReason.STOP and not self.include_stop and tokens[-1] in self.sequence.stop_ids
        for kept, token in enumerate(tokens, 1):
            piece, stopped = stream.append(token, cut and kept == len(tokens))
            if self.prefix:
                piece, self.prefix = self.prefix + piece, ""
            pieces.append(piece)
            if stopped:
                self.finish_reason = FinishReason.STOP
                return kept
        if reason is not None:
            self.end(reason)
        return len(tokens)

    def end(self, reason: FinishReason) -> None:
        """End the choice here: release the text that was held back for a possible stop string."""
        self.finish_reason = reason
        self.tail = self.prefix + self.stream.flush()
        self.prefix = ""

    def replay(self, resumed: ResumedChoice) -> None:
        """Go through the tokens of an earlier attempt; the choice may turn out to be at its end."""
        sequence, tokens = self.sequence, list(resumed.token_ids)
        sequence.output_ids = tokens
        if self.logprobs is not None:
            self.logprobs = list(resumed.logprobs or ())
        reason = resumed.finish_reason
        if reason is None and tokens:
            if tokens[-1] in sequence.stop_ids and len(tokens) > sequence.min_tokens:
                reason = FinishReason.STOP
            elif len(tokens) >= sequence.max_new_tokens:
                reason = FinishReason.LENGTH
        self.advance(tokens, reason)
        self.delivered = len(tokens)
        self.ended = resumed.finish_reason is not None

    def reopen(self, stream: TextStream) -> None:
        """Choose the last token again, without publishing it again: the request is not done with its prompt."""
        tokens, logprobs = self.sequence.output_ids[:-1], self.logprobs
        self.sequence.output_ids, self.pieces, self.tail, self.finish_reason = [], [], "", None
        self.stream = stream
        self.replay(ResumedChoice(self.sequence.index, tokens, logprobs[:-1] if logprobs else None))
        self.delivered, self.ended = len(tokens) + 1, True

    def chunk(self, index: int, *, logprobs: bool) -> ChoiceChunk:
        """What is not delivered yet, as choice `index` of the request; from now on it is."""
        output, offset = self.sequence.output_ids, self.delivered
        self.delivered = len(output)
        pieces = self.pieces[offset:]
        if self.finish_reason is not None:
            self.ended = True
            if pieces:
                pieces[-1] += self.tail
            else:
                pieces.append(self.tail)
        return ChoiceChunk(
            index=index,
            offset=offset,
            token_ids=tuple(output[offset:]),
            pieces=tuple(pieces),
            finish_reason=self.finish_reason,
            logprobs=self._spelled(offset) if logprobs else None,
        )

    def choice(self, index: int, *, logprobs: bool) -> Choice:
        """The whole choice, for the result."""
        assert self.finish_reason is not None
        return Choice(
            index=index,
            text="".join(self.pieces) + self.tail,
            token_ids=tuple(self.sequence.output_ids),
            finish_reason=self.finish_reason,
            logprobs=self._spelled(0) if logprobs else None,
        )

    def _spelled(self, first: int) -> tuple[TokenLogprob, ...] | None:
        """The records from token `first` on, with their tokens' bytes."""
        if self.logprobs is None:
            return None
        for place, token in enumerate(self.sequence.output_ids[first:], first):
            self.logprobs[place] = spell(self.logprobs[place], token, self.stream.bytes_of)
        return tuple(self.logprobs[first:])

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens, by which `best_of` ranks."""
        if not self.logprobs:
            return float("-inf")
        return sum(record.logprob for record in self.logprobs) / len(self.logprobs)


@dataclass(slots=True)
class RequestProgress:
    """One request with its choices.

    Attributes:
        params: the sampling options, seed resolved.
        open_choices: choices without a finish reason.
        prompt_logprobs: filled by chunks of the prompt, where asked for.
        reserved_tokens: room in the page pool that it may come to need.
    """

    request: EngineRequest
    params: SamplingParams
    seed: int
    arrival_s: float
    choices: list[ChoiceProgress] = field(default_factory=list)
    open_choices: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    reserved_tokens: int = 0
    first_token_s: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    error: str | None = None

    @property
    def ranked(self) -> bool:
        """Whether only the best of its choices are returned, and nothing is delivered before the end."""
        return self.params.num_choices > self.params.n

    def take_chunks(self) -> list[ChoiceChunk]:
        """What is new of each choice."""
        logprobs = self.params.logprobs is not None
        if not self.ranked:
            return [
                choice.chunk(index, logprobs=logprobs)
                for index, choice in enumerate(self.choices)
                if not choice.ended
                and (choice.finish_reason is not None or len(choice.sequence.output_ids) > choice.delivered)
            ]
        if self.open_choices:
            return []
        return [choice.chunk(rank, logprobs=logprobs) for rank, choice in enumerate(self._chosen())]

    def finish(self, now_s: float, speculation: Speculation | None = None) -> FinishedRequest:
        """The outcome; every choice has its finish reason."""
        logprobs = self.params.logprobs is not None
        sequences = [choice.sequence for choice in self.choices]
        admitted = min((s.admitted_s for s in sequences if s.admitted_s is not None), default=now_s)
        first = self.first_token_s if self.first_token_s is not None else now_s
        return FinishedRequest(
            choices=tuple(choice.choice(rank, logprobs=logprobs) for rank, choice in enumerate(self._chosen())),
            usage=Usage(
                prompt_tokens=len(self.request.prompt_token_ids),
                completion_tokens=sum(len(s.output_ids) for s in sequences),
                cached_tokens=next((s.cached_tokens for s in sequences if s.cached_tokens is not None), 0),
            ),
            timings=Timings(
                queue_ms=(admitted - self.arrival_s) * 1e3,
                prefill_ms=(first - admitted) * 1e3,
                ttft_ms=(first - self.arrival_s) * 1e3,
                decode_ms=(now_s - first) * 1e3,
                preemptions=sum(s.preemptions for s in sequences),
                drafted_tokens=self.drafted_tokens,
                accepted_tokens=self.accepted_tokens,
            ),
            prompt_logprobs=self._prompt_logprobs(),
            error=self.error,
            speculation=speculation,
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        if self.prompt_logprobs is None:
            return None
        bytes_of = self.choices[0].stream.bytes_of
        return tuple(
            None if record is None else spell(record, token, bytes_of)
            for record, token in zip(self.prompt_logprobs, self.request.prompt_token_ids, strict=True)
        )

    def _chosen(self) -> list[ChoiceProgress]:
        """The choices to return: all, or the best ones, best first."""
        if not self.ranked:
            return self.choices
        return sorted(self.choices, key=lambda choice: -choice.mean_logprob)[: self.params.n]
