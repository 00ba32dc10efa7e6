"""From job results and token chunks to OpenAI's response objects. Pure: no I/O."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import Choice, TokenLogprob, Usage

Kind = Literal["chat", "text"]

_OBJECTS: dict[tuple[Kind, bool], str] = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}


class Answer:
    """The head that every object of one answer shares.

    Args:
        kind: which of the two routes.
        job_id: of the answer's first job.
        model: the served name asked for.
    """

    def __init__(self, kind: Kind, job_id: str, model: str) -> None:
        self.kind = kind
        self._head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{job_id}", "created": int(time.time())}
        self._model = model

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self._object(streamed=False), "choices": list(choices), "usage": usage_object(usage)}

    def piece(self, choices: Sequence[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """One event of a stream."""
        counts = {} if usage is None else {"usage": usage_object(usage)}
        return {**self._object(streamed=True), "choices": list(choices), **counts}

    def _object(self, *, streamed: bool) -> dict[str, Any]:
        return {**self._head, "object": _OBJECTS[self.kind, streamed], "model": self._model}

    def choice(self, index: int, choice: Choice, logprobs: Logprobs | None) -> dict[str, Any]:
        """A finished choice."""
        shown = None if logprobs is None else logprobs.shown(self.kind)
        reason = str(choice.finish_reason)
        if self.kind == "chat":
            message = {"role": "assistant", "content": choice.text}
            return {"index": index, "message": message, "finish_reason": reason, "logprobs": shown}
        return {"index": index, "text": choice.text, "finish_reason": reason, "logprobs": shown}

    def delta(self, index: int, chunk: TokenChunk, logprobs: Logprobs | None) -> dict[str, Any]:
        """What one chunk adds to a choice."""
        reason = None if chunk.finish_reason is None else str(chunk.finish_reason)
        shown = None if logprobs is None else logprobs.shown(self.kind)
        if self.kind == "chat":
            delta = {"content": chunk.text} if chunk.text or chunk.token_ids else {}
            return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": shown}
        return {"index": index, "text": chunk.text, "finish_reason": reason, "logprobs": shown}

    def opening(self, index: int) -> dict[str, Any]:
        """The first delta of a chat's choice: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


class Logprobs:
    """Log-probabilities of some tokens of one choice, with their texts."""

    def __init__(self, text_offset: int = 0) -> None:
        self._entries: list[tuple[str, TokenLogprob]] = []
        self._text_offset = text_offset

    @classmethod
    def of(cls, chunks: Iterable[TokenChunk], text_offset: int = 0) -> Logprobs:
        """Those of the chunks, in order; `text_offset` characters came before."""
        made = cls(text_offset)
        for chunk in chunks:
            made._entries += zip(chunk.pieces, chunk.logprobs or (), strict=False)
        return made

    def shown(self, kind: Kind) -> dict[str, Any]:
        """As the route gives them."""
        return self._chat() if kind == "chat" else self._text()

    def _chat(self) -> dict[str, Any]:
        content = []
        for piece, entry in self._entries:
            chosen, *others = _names(entry, piece)
            top = [
                {"token": name, "logprob": value, "bytes": spelling}
                for (_, value), (name, spelling) in zip(entry.top, others, strict=True)
            ]
            content.append({"token": chosen[0], "logprob": entry.logprob, "bytes": chosen[1], "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _text(self) -> dict[str, Any]:
        offsets, at = [], self._text_offset
        for piece, _ in self._entries:
            offsets.append(at)
            at += len(piece)
        names = [[name for name, _ in _names(entry, piece)] for piece, entry in self._entries]
        return {
            "tokens": [chosen for chosen, *_ in names],
            "token_logprobs": [entry.logprob for _, entry in self._entries],
            "top_logprobs": [
                {name: value for name, (_, value) in zip(others, entry.top, strict=True)}
                for (_, *others), (_, entry) in zip(names, self._entries, strict=True)
            ],
            "text_offset": offsets,
        }


def _names(entry: TokenLogprob, piece: str) -> list[tuple[str, list[int] | None]]:
    """Text and bytes of the chosen token, then of the likeliest; what a worker did not spell goes by its id."""
    if entry.spelled:
        return [(name, list(spelling)) for name, spelling in zip(entry.tokens, entry.spelled, strict=True)]
    return [(piece, list(piece.encode())), *((f"token_id:{token_id}", None) for token_id, _ in entry.top)]


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total(usages: Iterable[Usage]) -> Usage:
    """The sum of several jobs' counts."""
    prompt = completion = cached = 0
    for usage in usages:
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
    return Usage(prompt, completion, cached)
