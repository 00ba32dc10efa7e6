"""Tokens to text as they come: never half a character, never the beginning of a stop string, always the same pieces.

A `Detokenizer` belongs to a tokenizer and remembers what each token adds; a `TextStream` is one choice's text. Joined,
the pieces are the text of the whole: splitting a text into steps, preempting or resuming it (by appending its tokens
again) changes nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from penstock_core.protocol.requests import SamplingParams
from penstock_core.sampling.stop_strings import StopMatcher, stop_matcher


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("penstock.replace_each_byte", _replace_each_byte)
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TokenizerText(Protocol):
    """What detokenising needs of a tokenizer; `penstock_core.models.Tokenizer` has it."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that may be left out of the text."""
        ...

    @property
    def byte_level(self) -> bool:
        """Whether a text is the UTF-8 decoding of its tokens' bytes."""
        ...

    @property
    def byte_fallback(self) -> bool:
        """Whether some tokens stand for single bytes."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Whether decoding drops a space at the very start."""
        ...

    def id_to_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds in the middle of a text."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some tokens."""
        ...


class Detokenizer:
    """What each token adds to a text, remembered; one per tokenizer, shared by its streams.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen) and sentencepiece ones (Llama 2, Mistral, Gemma, Phi-3) are decoded
    token by token. Any other decoder may look at neighbours: its text is decoded over a short window of tokens.
    """

    def __init__(self, tokenizer: TokenizerText) -> None:
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self._bytes: dict[int, bytes] = {}
        self._single_byte: dict[int, bool] = {}

    def stream(self, params: SamplingParams, continues: bool = False) -> TextStream:
        """The text of a choice of a request; see `TextStream`."""
        return TextStream(
            self,
            stop=params.stop,
            include_stop=params.include_stop,
            min_tokens=params.min_tokens,
            skip_special=params.skip_special_tokens,
            continues=continues,
        )

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes the token adds in the middle of a text."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self.tokenizer.token_bytes(token_id)
        return found

    def is_byte(self, token_id: int) -> bool:
        """Whether the token stands for a single byte (`<0x0A>`)."""
        found = self._single_byte.get(token_id)
        if found is None:
            piece = self.tokenizer.id_to_piece(token_id) or ""
            found = len(piece) == 6 and piece.startswith("<0x") and len(self.bytes_of(token_id)) == 1
            self._single_byte[token_id] = found
        return found

    def text(self, skip_special: bool, continues: bool) -> _Text:
        """A decoder for one text."""
        if self.tokenizer.byte_level:
            return _ByteText(self)
        if self.tokenizer.byte_fallback or self.tokenizer.strips_leading_space:
            return _PieceText(self, continues)
        return _WindowText(self.tokenizer, skip_special)


class _Text(Protocol):
    """The characters that tokens complete; tokens that are to be skipped never arrive here."""

    def add(self, token_id: int) -> str: ...

    def end(self) -> str: ...


class _ByteText:
    """Byte-level: every token adds bytes; malformed ones become U+FFFD as in the tokenizers library."""

    __slots__ = ("_of", "_utf8")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._of = detokenizer.bytes_of
        self._utf8 = _Utf8Decoder("replace")

    def add(self, token_id: int) -> str:
        return self._utf8.decode(self._of(token_id))

    def end(self) -> str:
        return self._utf8.decode(b"", True)


class _PieceText:
    """Sentencepiece: tokens add text, except those that stand for a byte and together spell characters.

    Of a malformed run of bytes every byte becomes U+FFFD. (The tokenizers library also throws away the characters that
    stand whole in such a run; waiting for the end of a run to know would hold back good text.)
    """

    __slots__ = ("_at_start", "_detokenizer", "_utf8")

    def __init__(self, detokenizer: Detokenizer, continues: bool) -> None:
        self._detokenizer = detokenizer
        self._utf8 = _Utf8Decoder("penstock.replace_each_byte")
        self._at_start = not continues and detokenizer.tokenizer.strips_leading_space

    def add(self, token_id: int) -> str:
        added = self._detokenizer.bytes_of(token_id)
        if not added:
            return ""
        if self._detokenizer.is_byte(token_id):
            text = self._utf8.decode(added)
            if text and self._at_start:
                self._at_start = False
                return text.removeprefix(" ")
            return text
        unfinished = self._utf8.decode(b"", True)
        self._utf8.reset()
        if self._at_start and not unfinished:
            self._at_start = False
            return self._detokenizer.tokenizer.decode([token_id], False)
        self._at_start = False
        return unfinished + added.decode()

    def end(self) -> str:
        return self._utf8.decode(b"", True)


class _WindowText:
    """Decodes the tokens since the text before last was released, and releases what the newest add to it."""

    __slots__ = ("_ids", "_released", "_skip", "_tokenizer")

    def __init__(self, tokenizer: TokenizerText, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._ids: list[int] = []
        self._released = 0  # how many of them have been released

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        text, added = self._text()
        if not added or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._released]
        self._released = len(self._ids)
        return added

    def end(self) -> str:
        return self._text()[1]

    def _text(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[: self._released], self._skip)
        text = self._tokenizer.decode(self._ids, self._skip)
        return text, text[len(before) :]


class TextStream:
    """The text of one choice. `bytes_of` tells what any token adds in the middle of a text."""

    __slots__ = (
        "_held",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_skipped",
        "_state",
        "_text",
        "_tokens",
        "bytes_of",
        "stopped",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special: bool = True,
        continues: bool = False,
    ) -> None:
        """An empty text.

        Args:
            detokenizer: of the model's tokenizer.
            stop: strings that end the text.
            include_stop: whether the stop string that was found is part of the text.
            min_tokens: a stop string does not count if it is complete within this many tokens.
            skip_special: leave special tokens out.
            continues: the text goes on from another one (a prompt), so a leading space belongs to it; sentencepiece
                tokenizers drop it otherwise.
        """
        self._text = detokenizer.text(skip_special, continues)
        self.bytes_of = detokenizer.bytes_of
        self._skipped = detokenizer.special_ids if skip_special else frozenset()
        self._matcher: StopMatcher | None = stop_matcher(tuple(stop)) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._state = 0
        self._held = ""
        self._tokens = 0
        self.stopped = False

    def append(self, token_id: int, hidden: bool = False) -> tuple[str, bool]:
        """Add a token; returns the text it releases, and whether that ends with (or before) a stop string.

        A `hidden` token (one that ended the choice) counts, but leaves no text.
        """
        self._tokens += 1
        if hidden or token_id in self._skipped:
            return "", False
        text = self._text.add(token_id)
        if self._matcher is None or not text:
            return text, False
        return self._release(text, self._tokens > self._min_tokens)

    def flush(self) -> str:
        """The text still held back, when the choice ends for another reason than a stop string."""
        if self.stopped:
            return ""
        text, self._held = self._held + self._text.end(), ""
        return text

    def _release(self, text: str, counts: bool) -> tuple[str, bool]:
        matcher, state = self._matcher, self._state
        assert matcher is not None, "only texts with stop strings hold anything back"
        pending = self._held + text
        for place, character in enumerate(text, len(self._held) + 1):
            state = matcher.advance(state, character)
            if counts and matcher.matched[state]:
                self.stopped, self._held = True, ""
                return pending[: place if self._include_stop else place - matcher.matched[state]], True
        self._state = state
        end = len(pending) - matcher.held[state]
        self._held = pending[end:]
        return pending[:end], False
