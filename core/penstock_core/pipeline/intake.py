"""From an EngineRequest to the sequences that the batcher runs and the progress that the pipeline keeps.

A pure construction: what it needs of the model is in `Intake`, and nothing is queued here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock_core.batching import BatchingConfig, SequenceState
from penstock_core.cache import root_digest
from penstock_core.models.tokenizer import Tokenizer
from penstock_core.pipeline.progress import ChoiceProgress, RequestProgress
from penstock_core.pipeline.requests import EngineRequest
from penstock_core.sampling import Detokenizer, TextStream

UNLIMITED_OUTPUT_TOKENS = 1024  # what a choice without max_tokens counts for in the pipeline's capacity


def reserved_tokens(request: EngineRequest, max_model_len: int) -> int:
    """Tokens of the page pool that a request may come to need, were nothing shared: prompt and output of every choice.

    What is shared, among its choices or with other requests, the cache knows, and capacity gives back.
    """
    length, params = len(request.prompt_token_ids), request.sampling
    output = min(max_model_len - length, params.max_tokens or UNLIMITED_OUTPUT_TOKENS)
    return (length + output) * params.num_choices


@dataclass(frozen=True, slots=True)
class Intake:
    """Opens requests for one model."""

    tokenizer: Tokenizer
    detokenizer: Detokenizer
    batching: BatchingConfig
    eos_token_ids: frozenset[int]

    def open(self, request: EngineRequest, seed: int, now_s: float, first_arrival: int) -> RequestProgress:
        """The progress of a new request, with one sequence per choice. Choices that are at their end stay as they are.

        Args:
            request: one that `RequestDoor.validate` passed.
            seed: of its noise, where its options name none.
            now_s: its arrival time, where it names none.
            first_arrival: arrival number of its first choice.
        """
        params = request.sampling
        prompt = np.array(request.prompt_token_ids, dtype=np.int32)
        room = self.batching.max_model_len - len(prompt)
        limit = min(room, params.max_tokens or room)
        arrival_s = now_s if request.arrival_s is None else request.arrival_s
        progress = RequestProgress(request, params, seed if params.seed is None else params.seed, arrival_s)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.eos_token_ids
        root = root_digest(request.cache_salt)
        urgency = self.batching.urgency(arrival_s, request.priority)
        prefix = self._prompt_text(request) if params.echo else ""
        group: list[SequenceState] = []
        for index in range(params.num_choices):
            sequence = SequenceState(
                request_id=request.request_id,
                index=index,
                prompt_ids=prompt,
                max_new_tokens=limit,
                urgency=urgency,
                arrival=first_arrival + index,
                root=root,
                deadline_s=request.deadline_s,
                stop_ids=stop_ids,
                min_tokens=params.min_tokens,
                siblings=group,
            )
            group.append(sequence)
            choice = ChoiceProgress(sequence, self._text_stream(request), params.include_stop, prefix)
            if params.logprobs is not None or progress.ranked:
                choice.logprobs = []
            progress.choices.append(choice)
        for resumed in request.resume:
            progress.choices[resumed.index].replay(resumed)
        unfinished = [choice for choice in progress.choices if choice.finish_reason is None]
        if params.prompt_logprobs is not None:
            progress.prompt_logprobs = [None] * len(prompt)
            if not unfinished:
                progress.choices[0].reopen(self._text_stream(request))
                unfinished = [progress.choices[0]]
            unfinished[0].sequence.wants_prompt_logits = True
        progress.open_choices = len(unfinished)
        progress.reserved_tokens = reserved_tokens(request, self.batching.max_model_len)
        return progress

    def _text_stream(self, request: EngineRequest) -> TextStream:
        """A detokeniser for one choice; it keeps a leading space where the output goes on from a text."""
        continues = request.prompt_text is not None or request.sampling.echo
        return self.detokenizer.stream(request.sampling, continues)

    def _prompt_text(self, request: EngineRequest) -> str:
        if request.prompt_text is not None:
            return request.prompt_text
        return self.tokenizer.decode(list(request.prompt_token_ids), request.sampling.skip_special_tokens)
