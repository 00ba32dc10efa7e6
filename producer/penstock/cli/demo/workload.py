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
LONG_STORIES = (
    "Write a short story about a broken mill.",
    "Write a short story about a flood.",
    "Write a short story about a broken clock.",
    "Write a short story about a lock keeper.",
    "Write a short story about a boatbuilder.",
    "Write a short story about a broken bell.",
    "Write a short story about a beekeeper.",
    "Write a short story about a mapmaker.",
    "Write a short story about a weaver.",
    "Write a short story about a glassblower.",
    "Write a short story about a broken bridge.",
    "Write a short story about a teacher.",
)
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
    wave: int = 0

    @property
    def max_tokens(self) -> int:
        """Output limit in tokens."""
        return int(self.sampling["max_tokens"])


def programme(scale: float = 1.0) -> list[Part]:
    """The jobs in the order they are submitted. `scale` multiplies the output limits of the stories."""
    parts: list[Part] = []

    def add(
        title: str, tenant: str, priority: int, asked: str, system: str, limit: int, wave: int, **more: Any
    ) -> None:
        number = len(parts)
        messages = ({"role": "system", "content": system}, {"role": "user", "content": asked})
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 1000 + number, "max_tokens": limit} | more
        parts.append(Part(number, title, tenant, priority, messages, sampling, wave))

    def story_limit(limit: int) -> int:
        return max(32, int(limit * scale))

    for asked in LONG_STORIES:
        limit = story_limit(320)
        add(asked.removeprefix("Write a short story ").rstrip("."), "library", 2, asked, STORYTELLER, limit, 0,
            min_tokens=limit * 3 // 4)  # fmt: skip
    for about in STORIES:
        limit = story_limit(280)
        add(f"about {about}", "bedtime", 5, f"Tell me a story about {about}.", STORYTELLER, limit, 0,
            min_tokens=limit * 3 // 4)  # fmt: skip
    for wave, question in enumerate(QUESTIONS):
        add(question, "chat", 9, f"{PASSAGE}\n\n{question}", STORYTELLER, 64, wave % 4, temperature=0.0)
    return parts
