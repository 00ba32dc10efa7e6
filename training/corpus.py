"""The training text: an endless, deterministic sequence of short documents.

`document(seed, index)` is a pure function, so any part of the corpus can be made again without the rest, training
and held-out text never share a stream, and nothing has to be stored. All of the text comes from the grammar in this
folder; no outside data is used.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from training import chat, forms, tales
from training.markers import BOS, EOS

HELD_OUT = "held-out"
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Document:
    """One training document: its kind, and its text with the special tokens written out."""

    kind: str
    text: str


def stream(seed: int, index: int, split: str = TRAIN) -> random.Random:
    """The random stream of one document."""
    return random.Random(f"{split}:{seed}:{index}")


def _plain_tale(rng: random.Random) -> str:
    tale = tales.any_tale(rng)
    draw = rng.random()
    body = tale.text if draw < 0.3 else f"{tale.title}\n\n{tale.text}"
    if draw > 0.85:
        body += f"\n\nIn short: {tale.summary}"
    elif draw > 0.7:
        chosen = rng.sample(tale.questions, rng.randint(1, len(tale.questions)))
        body += "\n\n" + "\n".join(f"Q: {q}\nA: {a}" for q, a in chosen)
    return body


def _book(rng: random.Random) -> str:
    """Several tales one after the other, so that long contexts are seen whole."""
    told = [tales.any_tale(rng) for _ in range(rng.randint(2, 4))]
    return "\n\n\n".join(f"{tale.title}\n\n{tale.text}" for tale in told)


def document(seed: int, index: int, split: str = TRAIN) -> Document:
    """Document number `index` of the corpus with this seed."""
    rng = stream(seed, index, split)
    draw = rng.random()
    if draw < 0.66:
        return Document("chat", chat.document(rng))
    if draw < 0.93:
        return Document("tale", f"{BOS}{_plain_tale(rng)}{EOS}")
    if draw < 0.99:
        return Document("form", f"{BOS}{rng.choice(forms.PLAIN)(rng).answer}{EOS}")
    return Document("book", f"{BOS}{_book(rng)}{EOS}")


def documents(seed: int, start: int = 0, split: str = TRAIN) -> Iterator[Document]:
    """All documents from number `start` on. Never ends."""
    index = start
    while True:
        yield document(seed, index, split)
        index += 1
