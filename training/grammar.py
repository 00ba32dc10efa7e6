"""The machinery of the story grammar: template expansion, sentence case, articles, and characters.

A template is a line of English with `{slots}` and `[inline|alternatives]`; `Scene` holds the slots of one document
and its random stream, so that one name, one object or one storm stays the same from the first line to the last.
Everything is a pure function of the random stream it is given.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from training import lexicon

T = TypeVar("T")

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (\"?\w+)")
_SENTENCE_START = re.compile(r"(^|\n|[.!?] +|\.\" +|: (?=\"))(\"?)([a-zà-ž])")
_SPACES = re.compile(r" {2,}")
_CONSONANT_SOUND = ("one", "use", "uni", "eu")
_VOWEL_SOUND = ("hour", "honest", "heir")


def expand(template: str, rng: random.Random) -> str:
    """Replace every `[a|b|c]` of `template`, innermost first, by one of its alternatives."""
    while (match := _ALTERNATIVES.search(template)) is not None:
        chosen = rng.choice(match.group(1).split("|"))
        template = template[: match.start()] + chosen + template[match.end() :]
    return template


def _article(match: re.Match[str]) -> str:
    letter, word = match.groups()
    bare = word.lstrip('"').lower()
    vowel = bare.startswith(_VOWEL_SOUND) or (bare[0] in "aeiou" and not bare.startswith(_CONSONANT_SOUND))
    return f"{letter}{'n' if vowel else ''} {word}"


def polish(text: str) -> str:
    """Choose `a` or `an` for every `a(n)`, close double spaces and start each sentence with a capital."""
    text = _SPACES.sub(" ", _ARTICLE.sub(_article, text)).strip()
    return _SENTENCE_START.sub(lambda m: m.group(1) + m.group(2) + m.group(3).upper(), text)


def with_article(noun: str) -> str:
    """`an otter` for `otter`."""
    return _ARTICLE.sub(_article, f"a(n) {noun}")


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


_PLURALS = {
    "deer": "deer", "goose": "geese", "moose": "moose", "mouse": "mice", "octopus": "octopuses", "salmon": "salmon",
    "sheep": "sheep", "wolf": "wolves",
}  # fmt: skip


def plural(noun: str) -> str:
    """`foxes` for `fox`, `geese` for `goose`."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items, in random order."""
    return rng.sample(list(items), count)


def title_case(text: str) -> str:
    """Title case that leaves the small words small."""
    small = {"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "who", "with"}
    words = text.split(" ")
    return " ".join(w if w in small and i else w[:1].upper() + w[1:] for i, w in enumerate(words))


@dataclass(frozen=True, slots=True)
class Character:
    """Someone in a story: what they are called, what they are, and the pronoun that follows them throughout."""

    name: str
    female: bool
    role: str  # "miller", "otter"
    age: int
    animal: bool = False

    def slots(self, prefix: str = "") -> dict[str, str]:
        """Pronoun slots: `{he} {him} {his} {He} {His} {himself}`, each preceded by `prefix`."""
        he, him, his = ("she", "her", "her") if self.female else ("he", "him", "his")
        forms = {"he": he, "him": him, "his": his, "himself": him + "self"}
        return {f"{prefix}{k}": v for k, v in forms.items()} | {
            f"{prefix}He": he.capitalize(),
            f"{prefix}His": his.capitalize(),
        }


def invented_name(rng: random.Random) -> str:
    """A name outside the lists, so that the model learns to carry names it has never seen."""
    name = rng.choice(lexicon.NAME_STARTS) + rng.choice(lexicon.NAME_MIDDLES) + rng.choice(lexicon.NAME_ENDS)
    return name[:1].upper() + name[1:]


def person(rng: random.Random, *, female: bool | None = None, taken: Sequence[str] = ()) -> Character:
    """A person whose name and trade are not in `taken`."""
    is_female = rng.random() < 0.5 if female is None else female
    names = lexicon.WOMEN if is_female else lexicon.MEN
    while True:
        name = invented_name(rng) if rng.random() < 0.12 else rng.choice(names)
        if name not in taken:
            break
    trade = rng.choice([t for t in lexicon.TRADES if t not in taken])
    return Character(name, is_female, trade, rng.randint(18, 79))


def animal(rng: random.Random, *, kind: str | None = None, taken: Sequence[str] = ()) -> Character:
    """An animal with a name that nobody in `taken` has."""
    female = rng.random() < 0.5
    while True:
        name = invented_name(rng) if rng.random() < 0.12 else rng.choice(lexicon.ANIMAL_NAMES)
        if name not in taken:
            break
    return Character(name, female, kind or rng.choice(lexicon.ANIMALS), rng.randint(1, 12), animal=True)


@dataclass(slots=True)
class Scene:
    """The slots of one document and its random stream."""

    rng: random.Random
    slots: dict[str, str] = field(default_factory=dict)

    def set(self, **slots: str) -> None:
        """Bind slots; a value may itself hold slots that are already bound."""
        for key, value in slots.items():
            self.slots[key] = self._raw(value)

    def cast(self, role: str, who: Character) -> None:
        """Bind a character as `{role}`, `{role_kind}` and its pronouns (the hero's have no prefix)."""
        prefix = "" if role == "hero" else f"{role}_"
        self.slots |= {role: who.name, f"{role}_kind": who.role, f"{role}_age": str(who.age)} | who.slots(prefix)

    def setting(self) -> None:
        """Bind village, river, season, weather and the season's details."""
        rng = self.rng
        season = rng.choice(list(lexicon.SEASONS))
        weather, sky, ground = rng.choice(lexicon.SEASONS[season])
        self.set(
            season=season,
            weather=weather,
            sky=sky,
            ground=ground,
            village=rng.choice(lexicon.VILLAGES),
            river=rng.choice(lexicon.RIVERS),
            time=rng.choice(lexicon.TIMES),
            mark=rng.choice(lexicon.SEASON_MARKS[season]),
        )

    def _raw(self, template: str) -> str:
        return expand(template, self.rng).format_map(self.slots)

    def say(self, *options: str) -> str:
        """One of the templates, filled in and polished."""
        return polish(self._raw(self.rng.choice(options)))

    def maybe(self, chance: float, *options: str) -> str:
        """`say` with probability `chance`, else nothing."""
        return self.say(*options) if self.rng.random() < chance else ""

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return self.rng.choice(options)


@dataclass(frozen=True, slots=True)
class Tale:
    """A finished story with what is true in it, for questions, summaries and JSON records about it."""

    genre: str
    title: str
    paragraphs: tuple[str, ...]
    summary: str
    facts: Mapping[str, str]
    questions: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The paragraphs, with an empty line between them."""
        return "\n\n".join(self.paragraphs)


def paragraph(*sentences: str) -> str:
    """Join the sentences that are not empty."""
    return " ".join(s for s in sentences if s)
