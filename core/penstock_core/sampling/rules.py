"""The sampling options of one request, checked against the model's vocabulary and made ready for arrays.

Built once per request at the door (`SamplingRules.compile` raises `InvalidRequest`, naming the field) and shared by its
choices. Knows no sequence state: counts, masks in progress and grammar positions live in `table.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import SamplingParams
from penstock_core.sampling.edits import Values
from penstock_core.sampling.noise import Int64

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them leaves only the most likely token anyway."""


class Encoder(Protocol):
    """What bad words need of a tokenizer."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRules:
    """Options of one request in the form the sampler applies them.

    Attributes:
        params: what was asked for.
        bias_ids, bias: token ids and what is added to their logits, [b].
        allowed: sorted ids outside of which nothing is sampled, or None.
        bad_words: token sequences whose last token is banned after the others.
        late_ids: ids banned before `min_tokens`: end of sequence and stop ids.
    """

    params: SamplingParams
    bias_ids: Int64
    bias: Values
    allowed: Int64 | None
    bad_words: tuple[tuple[int, ...], ...]
    late_ids: Int64

    @classmethod
    def compile(
        cls, params: SamplingParams, vocab_size: int, eos_token_ids: Iterable[int], tokenizer: Encoder | None = None
    ) -> SamplingRules:
        """Check `params` against the vocabulary; raises `InvalidRequest`.

        `tokenizer` is needed for `bad_words` only.
        """
        bias = params.logit_bias or {}
        _check_ids("sampling.logit_bias", bias, vocab_size)
        _check_ids("sampling.stop_token_ids", params.stop_token_ids, vocab_size)
        _check_ids("sampling.allowed_token_ids", params.allowed_token_ids or (), vocab_size)
        late = sorted(token for token in {*params.stop_token_ids, *eos_token_ids} if token < vocab_size)
        words = _bad_word_sequences(params.bad_words, tokenizer)
        allowed = sorted(set(params.allowed_token_ids)) if params.allowed_token_ids is not None else None
        if allowed is not None and params.response_format is not None:
            raise InvalidRequest(
                "sampling.allowed_token_ids", "cannot be combined with response_format; express both in one grammar"
            )
        banned = {word[0] for word in words if len(word) == 1}

        def none_left(without: set[int]) -> bool:
            return len(without) >= vocab_size if allowed is None else without.issuperset(allowed)

        if none_left(banned):
            raise InvalidRequest("sampling.bad_words", "bans every token that could be sampled; remove some words")
        if params.min_tokens and none_left(banned | set(late)):
            raise InvalidRequest(
                "sampling.min_tokens",
                f"is {params.min_tokens}, but only end-of-sequence and stop tokens are allowed; set it to 0",
            )
        return cls(
            params=params,
            bias_ids=np.fromiter(bias.keys(), np.int64, len(bias)),
            bias=np.fromiter(bias.values(), np.float32, len(bias)),
            allowed=None if allowed is None else np.array(allowed, dtype=np.int64),
            bad_words=words,
            late_ids=np.array(late if params.min_tokens else [], dtype=np.int64),
        )

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs the tokens so far."""
        p = self.params
        return p.presence_penalty != 0.0 or p.frequency_penalty != 0.0 or p.repetition_penalty != 1.0

    @property
    def edits_logits(self) -> bool:
        """Whether anything but temperature and filters is asked for."""
        p = self.params
        return bool(
            self.counts_tokens
            or len(self.bias_ids)
            or self.allowed is not None
            or self.bad_words
            or len(self.late_ids)
            or p.response_format is not None
        )

    def allowed_mask(self, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        """`allowed` as a mask [vocab_size], or None."""
        if self.allowed is None:
            return None
        mask = np.zeros(vocab_size, dtype=np.bool_)
        mask[self.allowed] = True
        return mask

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.params.temperature < GREEDY_BELOW


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise InvalidRequest(field, f"token id {token} is outside the model's vocabulary of {vocab_size} tokens")


def _bad_word_sequences(words: Sequence[str], tokenizer: Encoder | None) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the start of a word and in the middle of one, with and without a space before."""
    if not words:
        return ()
    if tokenizer is None:
        raise InvalidRequest("sampling.bad_words", "needs a tokenizer, and this model was loaded without one")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in dict.fromkeys((word, " " + word.lstrip(" "))):
            sequence = tuple(tokenizer.encode(text, add_special=False))
            if not sequence:
                raise InvalidRequest("sampling.bad_words", f"{word!r} has no tokens in this model's vocabulary")
            found[sequence] = None
    return tuple(found)
