"""The jobs of the demo: three tenants, three priorities, shared system prompts, every seed fixed.

Fixed seeds make the proof possible (the same request must give the same tokens) and the evening repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STORYTELLER = "You write short tales about rivers, mills and the people who live beside them."
# A passage several jobs ask about: its pages are computed once per worker and found in the prefix cache afterwards.
PASSAGE = (
    "Once there was a young otter named Pebble who lived under the old bridge at Millford. Pebble wanted to see the "
    "sea. Every morning she asked the barges where they were going, and every morning they were already gone. At last "
    "an old heron told her to follow the water, because all water goes to the sea in the end. So Pebble swam past the "
    "mill, the weir and the lock house, and on the third day the river tasted of salt."
)
STORIES = (
    "a fox who wants to see the sea",
    "a mole who wants to fly",
    "an otter who wants to learn to read",
    "a mouse who wants to sail a boat",
    "a heron who wants to find a friend",
    "a badger who wants to build a bridge",
    "a goose who wants to cross the mountains",
    "a hedgehog who wants to win a race",
    "a frog who wants to sing at the fair",
    "an owl who wants to see the sunrise",
    "a miller who loses a hat",
    "a ferry keeper who loses a key",
    "a clockmaker who loses a spoon",
    "a baker who loses a ring",
    "a lighthouse keeper who loses a lantern",
    "a shepherd who loses a bell",
)
LONG_STORIES = tuple(
    f"Write a short story about {about}."
    for about in (
        "a broken mill", "a flood", "a broken clock", "a lock keeper", "a boatbuilder", "a broken bell", "a beekeeper",
        "a mapmaker", "a weaver", "a glassblower", "a broken bridge", "a teacher", "a carpenter", "a fisher",
        "a potter",        "a blacksmith", "a bell ringer", "a gardener", "a bookbinder", "a cobbler",
    )
)  # fmt: skip
QUESTIONS = (
    "Summarise this story.",
    "Quote the first paragraph.",
    "Where did the otter live?",
    "What did the otter want?",
    "Who helped the otter?",
    "What was the otter's name?",
    "What was it about?",
    "Sum it up in one sentence.",
)


@dataclass(frozen=True, slots=True)
class Part:
    """One job of the programme: what is asked, by whom, how urgently, and how much it may say."""

    number: int
    title: str
    tenant: str
    priority: int
    messages: tuple[dict[str, str], ...]
    sampling: dict[str, Any]
    affinity: str | None = None

    @property
    def max_tokens(self) -> int:
        """Output limit in tokens."""
        return int(self.sampling["max_tokens"])


_STORY_LIMIT, _STORY_LEAST = 280, 150


def opening() -> list[Part]:
    """The jobs that wait in the queue before any worker is up, in the order of their submission."""
    parts = [_library(number) for number in range(len(LONG_STORIES))]
    return parts + [_bedtime(len(parts) + number) for number in range(len(STORIES))]


def urgent(number: int, turn: int) -> Part:
    """A short question at the highest priority; all of them share one long passage."""
    question = QUESTIONS[turn % len(QUESTIONS)]
    sampling = {"temperature": 0.0, "seed": number, "max_tokens": 64}
    return Part(number, question, "chat", 9, _messages(f"{PASSAGE}\n\n{question}"), sampling)


def more(number: int) -> Part:
    """There is always another story to write."""
    return _library(number) if number % 2 else _bedtime(number)


def _library(number: int) -> Part:
    return _story(number, "library", 2, LONG_STORIES[number % len(LONG_STORIES)])


def _bedtime(number: int) -> Part:
    return _story(number, "bedtime", 5, f"Tell me a story about {STORIES[number % len(STORIES)]}.")


def _story(number: int, tenant: str, priority: int, asked: str) -> Part:
    sampling = {
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 1000 + number,
        "max_tokens": _STORY_LIMIT,
        "min_tokens": _STORY_LEAST,
    }
    title = f"about {asked.partition(' about ')[2].rstrip('.')}"
    # The system prompt alone is soon in every worker's cache: no story need wait for a particular one.
    return Part(number, title, tenant, priority, _messages(asked), sampling, affinity="")


def _messages(asked: str) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": STORYTELLER}, {"role": "user", "content": asked})
