"""The requests that have no result yet, and what of them is to be delivered.

Every way in which a choice can end goes through here, so the sequences counted as open and the tokens counted as
reserved are always those of the requests there are.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock_core.batching import TokenBatcher
from penstock_core.pipeline.progress import RequestProgress
from penstock_core.pipeline.requests import FinishedRequest, RequestOutput
from penstock_core.protocol.jobs import FinishReason


class OpenRequests:
    """The open requests by id.

    Args:
        batcher: runs their sequences.

    Attributes:
        sequences: choices without a finish reason.
        reserved_tokens: room in the page pool that they may come to need.
    """

    def __init__(self, batcher: TokenBatcher) -> None:
        self._batcher = batcher
        self._open: dict[str, RequestProgress] = {}
        self._changed: dict[str, RequestProgress] = {}
        self.sequences = 0
        self.reserved_tokens = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def __getitem__(self, request_id: str) -> RequestProgress:
        return self._open[request_id]

    def get(self, request_id: str) -> RequestProgress | None:
        """The request of this id, if it is open."""
        return self._open.get(request_id)

    @property
    def has_news(self) -> bool:
        """Whether `deliver` has anything to deliver."""
        return bool(self._changed)

    def add(self, progress: RequestProgress) -> None:
        """Take a request in, and queue its choices; a resumed choice may be at its end already."""
        request_id = progress.request.request_id
        self._open[request_id] = progress
        self.sequences += progress.open_choices
        self.reserved_tokens += progress.reserved_tokens
        for choice in progress.choices:
            if choice.finish_reason is None:
                self._batcher.add(choice.sequence)
            elif not choice.ended:
                self._changed[request_id] = progress
        if not progress.open_choices:
            self._changed[request_id] = progress

    def changed(self, progress: RequestProgress) -> None:
        """There is something of it to deliver."""
        self._changed[progress.request.request_id] = progress

    def close_choice(self, progress: RequestProgress) -> None:
        """Count a choice as ended that has its finish reason."""
        progress.open_choices -= 1
        self.sequences -= 1

    def end_choice(self, progress: RequestProgress, index: int, reason: FinishReason) -> None:
        """End a choice from outside; its sequence too, unless the batcher did that already."""
        choice = progress.choices[index]
        if choice.sequence.finish_reason is None:
            self._batcher.finish(choice.sequence, reason)
        choice.end(reason)
        self.close_choice(progress)
        self.changed(progress)

    def end(self, progress: RequestProgress, reason: FinishReason) -> None:
        """End all its choices that have not ended."""
        for choice in progress.choices:
            if choice.finish_reason is None:
                self.end_choice(progress, choice.sequence.index, reason)
        self.changed(progress)

    def discard(self) -> None:
        """End and forget every request, without results."""
        for progress in list(self._open.values()):
            self.end(progress, FinishReason.CANCELLED)
        self._open.clear()
        self._changed.clear()

    def deliver(self, finish: Callable[[RequestProgress], FinishedRequest]) -> list[RequestOutput]:
        """What is new, at most one output per request; `finish` makes the result of one that has ended."""
        outputs = []
        for request_id, progress in self._changed.items():
            chunks = progress.take_chunks()
            result = None
            if not progress.open_choices:
                result = finish(progress)
                del self._open[request_id]
                self.reserved_tokens -= progress.reserved_tokens
            if chunks or result is not None:
                outputs.append(RequestOutput(request_id, chunks, result))
        self._changed.clear()
        return outputs
