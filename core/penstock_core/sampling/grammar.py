"""Structured output: JSON schema, regex, choice and Lark grammars compiled by llguidance into token bitmasks.

`check_response_format` refuses a bad constraint at the door and needs no tokenizer. A `GrammarCompiler` belongs to one
tokenizer and keeps recent grammars compiled; a `GrammarState` is one sequence's position in one, advanced token by
token and rolled back after drafts. A resumed sequence replays its tokens: nothing of a state is ever stored.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import llguidance
import numpy as np
import numpy.typing as npt

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import ResponseFormat

_FIELD = "sampling.response_format"
_KEPT_GRAMMARS = 64


def grammar_source(response_format: ResponseFormat) -> tuple[str, str]:
    """The constraint as llguidance reads it, and the name of the field it came from."""
    if response_format.json_schema is not None:
        return llguidance.LLMatcher.grammar_from_json_schema(response_format.json_schema), "json_schema"
    if response_format.regex is not None:
        pattern = llguidance.regex_to_lark(response_format.regex, "d")  # \d is 0 to 9, not every script's digits
        return llguidance.LLMatcher.grammar_from_lark(f"start: /{pattern}/"), "regex"
    if response_format.choice is not None:
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in response_format.choice)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {alternatives}"), "choice"
    assert response_format.grammar is not None, "ResponseFormat holds exactly one constraint"
    return llguidance.LLMatcher.grammar_from_lark(response_format.grammar), "grammar"


def check_response_format(response_format: ResponseFormat) -> None:
    """Raise `InvalidRequest` naming the field if the constraint does not compile; needs no tokenizer."""
    source, field = grammar_source(response_format)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source)
    if failed:
        raise InvalidRequest(f"{_FIELD}.{field}", " ".join(" ".join(messages).split()))


class GrammarState:
    """One sequence's position in a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token: int) -> bool:
        """Advance by `token`; False, and no change, if the grammar does not allow it here."""
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def rollback(self, tokens: int) -> None:
        """Take back the last `tokens` accepted tokens."""
        if tokens and not self._matcher.rollback(tokens):
            raise RuntimeError(f"cannot roll the grammar back by {tokens} tokens: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        """Whether the text satisfies the grammar and nothing can follow: the choice ends with `stop`."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """What llguidance gave up on (a grammar too complex to follow), or an empty string."""
        return str(self._matcher.get_error())

    def allowed(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        """Tokens that may come next, [vocab_size]; none after an error."""
        if self._matcher.is_error():
            return np.zeros(vocab_size, dtype=np.bool_)
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=min(vocab_size, len(packed) * 8), bitorder="little").view(np.bool_)
        return bits if len(bits) == vocab_size else np.pad(bits, (0, vocab_size - len(bits)))


class GrammarCompiler:
    """Compiles constraints for one tokenizer; the most recent grammars stay compiled."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Remember the vocabulary; the token tree (a second for a large one) is built at the first `start`.

        Args:
            tokenizer_json: contents of the checkpoint's `tokenizer.json`.
            vocab_size: tokens the tokenizer knows (the model's logits may be wider).
            eos_token_ids: tokens that end a text; at least one.
        """
        self._source = tokenizer_json, vocab_size, list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def start(self, response_format: ResponseFormat, output: Iterable[int] = ()) -> GrammarState:
        """A state at the beginning, or after replaying `output`; raises `InvalidRequest`."""
        if self._tokenizer is None:
            text, vocab_size, eos = self._source
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=eos)
        source, field = grammar_source(response_format)
        matcher = self._compiled.get(source)
        if matcher is None:
            matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
            if matcher.is_error():
                raise InvalidRequest(f"{_FIELD}.{field}", " ".join(str(matcher.get_error()).split()))
            self._compiled[source] = matcher
            if len(self._compiled) > _KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(source)
        state = GrammarState(matcher.deep_copy())
        for token in output:
            if not state.accept(token):
                raise InvalidRequest(_FIELD, f"the resumed output does not follow the grammar at token {token}")
        return state
