"""Tales with a refrain: the same verse or exchange comes back word for word, as in stories told aloud."""

# ruff: noqa: E501 -- a template is one line

import random

from training import lexicon
from training.grammar import Scene, Tale, animal, paragraph, person, title_case

VERSES = (
    "Roll, river, roll, by night and by day; what goes down the river will come back one day.",
    "Turn, wheel, turn, and never stand still; there's flour for the baker and rest for the mill.",
    "Blow, wind, blow, from the west to the east; the longest of journeys will end in a feast.",
    "Ring, bell, ring, over roof, over tree; the lost and the late will come home with me.",
    "Row, brothers, row, with the stars overhead; there's soup in the kettle and straw in the bed.",
    "Step, stone, step, through the dark and the rain; who walks with a friend will not walk in vain.",
)
DOORS = (
    ("a troll under the bridge", "troll", "the bridge"),
    ("a grey gatekeeper", "gatekeeper", "the gate"),
    ("a very old heron", "heron", "the ford"),
    ("a giant asleep across the road", "giant", "the pass"),
    ("a stone lion that could talk", "lion", "the stairs"),
)


def toll(rng: random.Random) -> Tale:
    """Three travellers and one guardian. The guardian asks each the same question in the same words."""
    scene = Scene(rng)
    scene.setting()
    kinds = rng.sample(lexicon.ANIMALS, 3)
    first, second, third = (animal(rng, kind=kind) for kind in kinds)
    while len({first.name, second.name, third.name}) < 3:
        first, second, third = (animal(rng, kind=kind) for kind in kinds)
    for role, who in (("first", first), ("second", second), ("hero", third)):
        scene.cast(role, who)
    guard, short, way = scene.pick(DOORS)
    scene.set(guard=guard, short=short, way=way, verse=scene.pick(VERSES))
    question = scene.say(
        '"Stop!" said the {short}. "Nobody crosses {way} without paying. What will you give me?"',
        '"Who is there?" growled the {short}. "Nobody passes {way} for nothing. What do you bring me?"',
        '"Not so fast," said the {short}. "{way} is mine. What is it worth to you?"'.replace(
            '"{way}', '"' + way[0].upper() + way[1:]
        ),
    )
    gifts = rng.sample(
        (
            "a bag of acorns",
            "a shiny button",
            "a piece of cheese",
            "a blue feather",
            "a warm sock",
            "three plums",
            "a silver coin",
        ),
        2,
    )
    gift, worth = scene.pick((
        ("a story", "told the story of the river from its source to the sea"),
        ("a song", "sang it twice, and the second time the whole valley was quiet"),
        ("company for an hour", "sat down and talked about the weather, and mothers, and the stars"),
        ("a question", "asked when anyone had last said thank you for keeping the way safe"),
    ))  # fmt: skip
    scene.set(question=question, gift1=gifts[0], gift2=gifts[1], gift=gift, worth=worth)
    title = scene.say(
        "three at {way}",
        "the {short} of {way}",
        "what {hero} paid",
        "the {short} and the {hero_kind}",
        "the price of {way}",
    )
    paragraphs = (
        paragraph(
            scene.say(
                "at {way} on the road to {village} there lived {guard}.",
                "everyone who wanted to go to {village} had to cross {way}, and there sat {guard}.",
            ),
            scene.say(
                "one {season} day three travellers came, one after the other.",
                "{time} in {season} three friends came along, but not together.",
            ),
        ),
        paragraph(
            scene.say("the first was {first} the {first_kind}. {question}"),
            scene.say('"I have {gift1}," said {first}.', '"Here is {gift1}," said {first}, trembling.'),
            scene.say(
                '"I have plenty of those," said the {short}. "Go home."',
                'the {short} shook its head. "That is not enough."',
            ),
        ),
        paragraph(
            scene.say("the second was {second} the {second_kind}. {question}"),
            scene.say('"I have {gift2}," said {second}.', '"Take {gift2}," said {second}. "It is all I own."'),
            scene.say('"I cannot use it," said the {short}. "Go home."', 'the {short} sighed. "Nobody understands."'),
        ),
        paragraph(
            scene.say("the third was {hero} the {hero_kind}. {question}"),
            scene.say(
                '"I have nothing to carry," said {hero}, "so I will give you {gift}."',
                '"I can only give you {gift}," said {hero}.',
            ),
            scene.say("and {he} {worth}."),
            scene.say(
                'the {short} was silent for a long time. Then it moved aside. "You may pass," it said, "and so may your friends."',
                'a tear as big as an apple ran down the {short}\'s face. "That is what I wanted," it said. "You may all cross."',
            ),
        ),
        scene.say(
            "since then nobody pays at {way} with anything else.",
            "and when you come to {way}, and hear somebody ask, remember what {hero} gave.",
            'the {short} is still there, but now it asks, "How are you?"',
        ),
    )
    facts = {
        "hero": third.name, "kind": third.role, "friend": first.name, "friend_kind": first.role, "guardian": short,
        "place": way, "gift": gift, "season": scene.slots["season"],
    }  # fmt: skip
    return Tale(
        "animals",
        title_case(title),
        paragraphs,
        scene.say("three animals come to {way}, and only {hero} the {hero_kind} knows what to give: {gift}."),
        facts,
        (
            (f"What did {third.name} give?", scene.say("{hero} gave {gift}.")),
            ("Who guarded the way?", scene.say("{guard} guarded {way}.")),
            (f"What did {first.name} offer?", scene.say("{first} offered {gift1}.")),
            (f"What did {second.name} offer?", scene.say("{second} offered {gift2}.")),
        ),
    )


def song(rng: random.Random) -> Tale:
    """A walk home through three dangers with the same song before each."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    friend = animal(rng, kind=scene.pick(("dog", "donkey", "goat", "goose", "horse")), taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("friend", friend)
    scene.set(verse=scene.pick(VERSES), food=scene.pick(lexicon.FOODS), port=scene.pick(lexicon.PORTS))
    places = rng.sample((
        ("the wood", "the branches reached for their hats", "the branches drew back"),
        ("the moor", "green lights danced over the wet ground", "the lights went out, one by one"),
        ("the ford", "the water pulled at their knees", "the water grew calm"),
        ("the old graveyard", "something white moved between the stones", "the white thing turned out to be a goat, and it came along"),
        ("the long bridge", "the boards groaned and the wind pushed", "the boards held"),
        ("the empty inn", "a door opened and closed by itself", "the door stayed shut"),
    ), 3)  # fmt: skip
    title = scene.say(
        "the song", "{hero}'s way home", "the road to {village}", "a song for the dark", "{hero} and {friend}"
    )
    first = paragraph(
        scene.say(
            "{hero} the {hero_kind} had to walk home from {port} to {village} by night, with a sack of {food} and {his} {friend_kind} {friend}.",
            "the market in {port} had ended late, and {hero} the {hero_kind} walked home to {village} in the dark. Beside {him} went {friend} the {friend_kind}.",
        ),
        scene.say(
            "to keep up their courage {he} sang the song {his} mother had taught {him}:",
            "{he} was afraid, and so {he} sang:",
        ),
        scene.say('"{verse}"'),
    )
    stages = []
    for i, (where, danger, relief) in enumerate(places):
        scene.set(where=where, danger=danger, relief=relief)
        stages.append(paragraph(
            scene.say(("first they came to {where}.", "then they came to {where}.", "last of all they came to {where}.")[i]),
            scene.say("there {danger}.", "and {danger}."),
            scene.say('{friend} stopped. But {hero} sang: "{verse}"', 'they stood still, and {hero} sang: "{verse}"'),
            scene.say("and {relief}."),
        ))  # fmt: skip
    last = paragraph(
        scene.say("at last they saw a light in the window.", "then the lamps of {village} shone in front of them."),
        scene.say(
            '"Were you not afraid?" asked {his} mother. "Very much," said {hero}. "But I had a song."',
            "that night {friend} the {friend_kind} got the best {food} in the house.",
            "{hero} hung up {his} coat and sang it once more, softly, for {friend}.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "friend_kind": friend.role, "from": scene.slots["port"],
        "to": scene.slots["village"], "verse": scene.slots["verse"],
    }  # fmt: skip
    return Tale(
        "village",
        title_case(title),
        (first, *stages, last),
        scene.say("{hero} and {friend} walk home from {port} to {village} by night, and a song keeps them safe."),
        facts,
        (
            ("What did the song say?", scene.say('it said: "{verse}"')),
            (f"Where did {hero.name} walk?", scene.say("{hero} walked from {port} to {village}.")),
            (f"Who went with {hero.name}?", scene.say("{friend} the {friend_kind} went with {hero}.")),
        ),
    )
