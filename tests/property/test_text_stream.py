"""Streamed text is whole text: for any tokens, any split and any stop strings."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_core.sampling import Detokenizer, TextStream
from tests.unit.sampling import vocabularies

KINDS = {
    "byte_level": vocabularies.byte_level,
    "sentencepiece": vocabularies.sentencepiece,
    "gemma": vocabularies.gemma,
    "words": vocabularies.words,
    "bundled": vocabularies.bundled,
}
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("aeiou the 你好世界안녕привет é—🙂👩‍👩‍👧‍👦🇳🇴👍🏽ｅ\u0301\n\t {}"),
    ),
    max_size=40,
)


def stream_all(stream: TextStream, ids: list[int]) -> tuple[list[str], bool]:
    pieces = []
    for token in ids:
        piece, stopped = stream.append(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    pieces.append(stream.flush())
    return pieces, False


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_pieces_of_a_text_join_to_the_decoded_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text, add_special=False)
    pieces, _ = stream_all(TextStream(Detokenizer(tokenizer)), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if kind != "words":
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@pytest.mark.parametrize("kind", ["byte_level", "bundled"])
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary_stream_to_their_decoded_text(
    kind: str, skip: bool, data: st.DataObject
) -> None:
    tokenizer = KINDS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    pieces, _ = stream_all(TextStream(Detokenizer(tokenizer), skip_special=skip), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip)


def _runs_are_pure(ids: list[int], vocab_size: int) -> bool:
    """Whether each run of byte tokens spells characters only or none at all: the library drops those of mixed runs."""
    visible = [token for token in ids if 3 <= token < vocab_size]
    runs = [
        bytes(token - 3 for token in run) for is_byte, run in groupby(visible, lambda token: token < 259) if is_byte
    ]
    return all(
        set(run.decode(errors="replace")) <= {"\ufffd"} or "\ufffd" not in run.decode(errors="replace") for run in runs
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "gemma"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_tokens_of_a_byte_fallback_vocabulary_stream_to_their_decoded_text(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]()
    token = st.one_of(st.integers(3 + 0x80, 258), st.integers(259, tokenizer.vocab_size + 3), st.integers(0, 2))
    ids = data.draw(st.lists(token, max_size=30))
    ids = ids if _runs_are_pure(ids, tokenizer.vocab_size) else [token for token in ids if token < 3 or token >= 259]
    pieces, _ = stream_all(TextStream(Detokenizer(tokenizer)), ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "gemma", "bundled"])
@given(text=TEXT, more=TEXT)
@settings(max_examples=100, deadline=None)
def test_no_piece_ends_inside_a_character(kind: str, text: str, more: str) -> None:
    """Every prefix of the pieces is a prefix of the whole text: nothing is ever taken back."""
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text + more, add_special=False)
    whole = tokenizer.decode(ids)
    stream, so_far = TextStream(Detokenizer(tokenizer)), ""
    for token in ids:
        so_far += stream.append(token)[0]
        assert whole.startswith(so_far)


@pytest.mark.parametrize("kind", ["sentencepiece", "gemma", "byte_level"])
@given(prompt=TEXT, text=TEXT)
@settings(max_examples=100, deadline=None)
def test_a_continuing_text_keeps_the_space_that_belongs_to_it(kind: str, prompt: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    first, second = tokenizer.encode("a" + prompt, add_special=False), tokenizer.encode(text, add_special=False)
    pieces, _ = stream_all(TextStream(Detokenizer(tokenizer), continues=True), second)
    assert tokenizer.decode(first) + "".join(pieces) == tokenizer.decode(first + second)


STOPS = st.lists(st.text("abn 🙂é", min_size=1, max_size=4), min_size=1, max_size=4)


@pytest.mark.parametrize("include", [True, False])
@given(text=st.text("abn 🙂é", max_size=40), stops=STOPS, minimum=st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_the_text_ends_at_the_first_stop_string_to_be_complete(
    include: bool, text: str, stops: list[str], minimum: int
) -> None:
    tokenizer = vocabularies.byte_level()
    ids = tokenizer.encode(text, add_special=False)
    stream = TextStream(Detokenizer(tokenizer), stop=stops, include_stop=include, min_tokens=minimum)
    pieces, stopped = stream_all(stream, ids)

    # Reference: after each token, look for stop strings that end in the text it completed.
    expected, done, seen = text, False, 0
    plain = TextStream(Detokenizer(tokenizer))
    for count, token in enumerate(ids, 1):
        end = seen + len(plain.append(token)[0])
        for place in range(seen + 1, end + 1):
            matches = [stop for stop in stops if text[:place].endswith(stop)]
            if matches and count > minimum and not done:
                expected, done = text[: place if include else place - max(map(len, matches))], True
        seen = end
    assert stopped == done
    assert "".join(pieces) == expected


@given(text=st.text("abn ", max_size=40), stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_no_released_text_could_still_become_a_stop_string(text: str, stops: list[str]) -> None:
    tokenizer = vocabularies.byte_level()
    stream, so_far = TextStream(Detokenizer(tokenizer), stop=stops), ""
    ids = tokenizer.encode(text, add_special=False)
    for count, token in enumerate(ids, 1):
        piece, stopped = stream.append(token)
        so_far += piece
        if stopped:
            break
        whole = tokenizer.decode(ids[:count])
        begun = [length for stop in stops for length in range(1, len(stop)) if whole.endswith(stop[:length])]
        assert len(whole) - len(so_far) == max(begun, default=0)


@given(text=TEXT, cut=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_replaying_tokens_gives_the_same_pieces(text: str, cut: int) -> None:
    tokenizer = vocabularies.sentencepiece()
    ids = tokenizer.encode(text, add_special=False)
    detokenizer = Detokenizer(tokenizer)
    whole, _ = stream_all(TextStream(detokenizer, stop=["e t", "\n"]), ids)
    resumed = TextStream(detokenizer, stop=["e t", "\n"])
    for token, piece in zip(ids[:cut], whole, strict=False):
        assert resumed.append(token)[0] == piece
    if not resumed.stopped:
        assert stream_all(resumed, ids[cut:])[0] == whole[min(cut, len(ids)) :]


def test_a_hidden_token_counts_but_leaves_no_text() -> None:
    tokenizer = vocabularies.byte_level()
    stream = TextStream(Detokenizer(tokenizer), stop=["zz"], min_tokens=2)
    assert stream.append(tokenizer.encode("a", add_special=False)[0], hidden=True) == ("", False)
    assert stream.flush() == ""
