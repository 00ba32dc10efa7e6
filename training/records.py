"""JSON answers: requests for a record, and records whose keys are exactly the keys that were asked for.

Every answer parses, has its keys in the order of the request, and repeats whatever the request fixed (a name, a trade).
"""

# ruff: noqa: E501 -- a template is one line

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from training import lexicon
from training.grammar import Scene, Tale, animal, expand, join_words, person, sample, with_article

Value = str | int | float | bool | list[str]
Field = Callable[[random.Random], Value]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user message and the assistant's answer."""

    request: str
    answer: str


def _one_of(options: tuple[str, ...] | list[str]) -> Field:
    return lambda rng: rng.choice(options)


def _some_of(options: tuple[str, ...] | list[str], least: int = 1, most: int = 3) -> Field:
    return lambda rng: sample(rng, options, rng.randint(least, most))


def _whole(low: int, high: int) -> Field:
    return lambda rng: rng.randint(low, high)


SHARED: dict[str, Field] = {
    "place": _one_of(lexicon.VILLAGES),
    "mood": _one_of(lexicon.MOODS),
    "items": _some_of(lexicon.THINGS),
    "likes": _some_of(lexicon.FOODS),
    "colour": _one_of(lexicon.COLOURS),
}
PERSON: dict[str, Field] = SHARED | {
    "name": lambda rng: person(rng).name,
    "age": _whole(18, 79),
    "job": _one_of(list(lexicon.TRADES)),
    "pet": _one_of(("dog", "cat", "goat", "donkey", "goose", "hen", "none")),
    "married": lambda rng: rng.random() < 0.5,
}
ANIMAL: dict[str, Field] = SHARED | {
    "name": lambda rng: animal(rng).name,
    "age": _whole(1, 12),
    "kind": _one_of([*lexicon.ANIMALS, *lexicon.ANIMALS, *lexicon.FAR_ANIMALS]),
    "friends": lambda rng: sample(rng, lexicon.ANIMAL_NAMES, rng.randint(1, 3)),
    "can_swim": lambda rng: rng.random() < 0.5,
}
VILLAGE: dict[str, Field] = {
    "name": _one_of(lexicon.VILLAGES),
    "river": _one_of(lexicon.RIVERS),
    "people": _whole(20, 900),
    "has_mill": lambda rng: rng.random() < 0.5,
    "trades": _some_of(list(lexicon.TRADES), 2, 4),
    "season": _one_of(list(lexicon.SEASONS)),
    "founded": _whole(1120, 1890),
}
SHIP: dict[str, Field] = {
    "name": lambda rng: rng.choice(lexicon.SHIPS),
    "captain": lambda rng: person(rng).name,
    "port": _one_of(lexicon.PORTS),
    "cargo": _some_of(lexicon.FOODS, 1, 3),
    "crew": _whole(2, 40),
    "length_m": lambda rng: round(rng.uniform(6, 60), 1),
    "at_sea": lambda rng: rng.random() < 0.5,
}
WEATHER: dict[str, Field] = {
    "place": _one_of(lexicon.VILLAGES),
    "season": _one_of(list(lexicon.SEASONS)),
    "sky": _one_of(("clear", "cloudy", "overcast", "hazy", "stormy")),
    "temperature": _whole(-12, 34),
    "wind": _one_of(("calm", "light", "fresh", "strong", "gale")),
    "rain": lambda rng: rng.random() < 0.5,
}
KINDS: dict[str, tuple[dict[str, Field], str | None]] = {  # kind: fields, the field that names the kind
    "person": (PERSON, "job"),
    "animal": (ANIMAL, "kind"),
    "village": (VILLAGE, None),
    "ship": (SHIP, None),
    "weather": (WEATHER, None),
}


def dump(record: dict[str, Value], indented: bool = False) -> str:
    """JSON text as the model writes it."""
    return json.dumps(record, ensure_ascii=False, indent=2 if indented else None)


def describe(rng: random.Random) -> Exchange:
    """`Describe a miller as JSON`, with or without a name, an age, or a list of keys."""
    kind = rng.choices(list(KINDS), (5, 4, 2, 1.5, 1.5))[0]
    fields, what = KINDS[kind]
    record = {key: make(rng) for key, make in fields.items()}
    asked = rng.random() < 0.6
    keys = (
        sample(rng, list(fields), rng.randint(2, len(fields)))
        if asked
        else [k for k in fields if k != what or rng.random() < 0.3]
    )
    if not asked:
        keys.sort(
            key=lambda k: (
                ("name", "kind", "job", "age", "place").index(k) if k in ("name", "kind", "job", "age", "place") else 9
            )
        )
        keys = keys[: rng.randint(4, 6)]
    if rng.random() < 0.5 and "name" in keys:
        keys.remove("name")
        keys.insert(0, "name")
    subject = with_article(str(record[what])) if what else {"weather": "the weather"}.get(kind, f"a {kind}")
    if what is None and kind in ("village", "ship") and rng.random() < 0.4:
        subject = expand(
            f"a {kind} [named|called] {record['name']}" if kind == "village" else f"the ship {record['name']}", rng
        )
    elif what and rng.random() < 0.5:
        name = record["name"]
        subject = expand(f"[{subject} [named|called] {name}|{name} the {record[what]}]", rng)
        if kind == "person" and rng.random() < 0.2:
            subject += f", who is {record['age']} years old"
    indented = rng.random() < 0.15
    listed = join_words(keys) if rng.random() < 0.6 else ", ".join(keys)
    how = expand("[ with indentation|, formatted over several lines|, pretty-printed]", rng) if indented else ""
    if asked:
        request = expand(
            f"[Describe {subject} as JSON{how} with the keys {listed}.|Describe {subject} as JSON{how}. Keys: {listed}."
            f"|Write a JSON object{how} about {subject} with {listed}.|Give me {subject} as a JSON object{how} with these keys: {listed}.]",
            rng,
        )
    else:
        request = expand(
            f"[Describe {subject} as JSON{how}.|Write a JSON object{how} about {subject}.|Invent {subject} and answer in JSON{how}."
            f"|Describe {subject}. Answer as JSON{how}.|Make a JSON record{how} for {subject}.]",
            rng,
        )
    return Exchange(request, dump({key: record[key] for key in keys}, indented))


def extract(rng: random.Random) -> Exchange:
    """A sentence or two about somebody, to be turned into JSON."""
    scene = Scene(rng)
    scene.setting()
    who = person(rng) if rng.random() < 0.6 else animal(rng)
    scene.cast("hero", who)
    mood, things = rng.choice(lexicon.MOODS), sample(rng, lexicon.THINGS, rng.randint(1, 3))
    scene.set(mood=mood, things=join_words([with_article(t) for t in things]))
    text = scene.say(
        "{hero} is a(n) {mood} {hero_kind} from {village}. {He} is {hero_age} years old and owns {things}.",
        "in {village} lives {hero}, a(n) {hero_kind} of {hero_age}. {He} is {mood} and carries {things}.",
        "{hero} the {hero_kind} is {hero_age} years old. {He} has {things}, lives in {village} and is {mood}.",
    )
    record: dict[str, Value] = {
        "name": who.name, "kind" if who.animal else "job": who.role, "age": who.age,
        "place": scene.slots["village"], "mood": mood, "items": things,
    }  # fmt: skip
    keys = sample(rng, list(record), rng.randint(2, len(record)))
    listed = join_words(keys)
    request = scene.say(
        f"Read this and answer as JSON with the keys {listed}.\n\n{text}",
        f"Extract {listed} as JSON:\n\n{text}",
        f"{text}\n\nWrite that as a JSON object with {listed}.",
    )
    return Exchange(request, dump({key: record[key] for key in keys}))


def about_tale(rng: random.Random, tale: Tale) -> Exchange:
    """Facts of a story that was just told, as JSON: only such as its text names."""
    told = tale.text.lower()
    known = [key for key, value in tale.facts.items() if value.lower() in told]
    keys = sample(rng, known, rng.randint(2, min(5, len(known))))
    listed = join_words(keys)
    request = expand(
        f"[Now give me {listed} as JSON.|Write {listed} of this story as JSON.|Answer as JSON with the keys {listed}.]",
        rng,
    )
    return Exchange(request, dump({key: tale.facts[key] for key in keys}))
