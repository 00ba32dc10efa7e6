"""Sea tales: a voyage with a cargo, a lamp in the fog, a bottle with a message."""

# ruff: noqa: E501 -- a template is one line

import random

from training import lexicon
from training.grammar import Scene, Tale, animal, paragraph, person, title_case

VESSELS = ("schooner", "cutter", "brig", "barge", "sloop", "fishing boat", "ketch")
CARGOES = (
    "barrels of honey", "sacks of barley", "bales of wool", "crates of oranges", "church bells", "roof slates",
    "coils of rope", "dried fish", "window glass", "clay jugs", "seed potatoes", "printing paper",
)  # fmt: skip

# trouble at sea: what happened, what the crew feared, who or what showed the way out, what was done
TROUBLES = (
    ("the wind dropped and the sails hung like washing", "they would sit there until the water ran out",
     "{pet} the ship's {pet_kind} kept looking north", "put out the two small boats and rowed north, towing the ship behind them, until a breeze found them"),
    ("a fog came down so thick that the bow could not be seen from the wheel", "they would run onto the rocks",
     "{mate} heard a bell buoy, once every nine waves", "counted the waves between one stroke and the next and kept the sound on the left hand"),
    ("a storm broke over them and tore the big sail from top to bottom", "the next wave would roll them over",
     "{mate} remembered the spare sail under the {cargo}", "sewed all night with needles as long as a hand, and hoisted the patched sail at dawn"),
    ("the steering chain snapped with a bang", "the ship would drift onto the shore",
     "{mate} saw that the anchor rope was just as long as the chain", "ran the anchor rope around the rudder and steered by pulling on it, four hands to each side"),
    ("water came up between the planks faster than the pump could throw it out", "they would have to leave the ship",
     "{pet} the ship's {pet_kind} was found sitting beside the leak", "stuffed the hole with wool and tar and nailed a board over it"),
    ("a whale as long as the ship lay down to sleep in front of them", "it would wake up angry",
     "{mate} remembered an old saying, that whales dislike drums", "beat softly on an empty barrel until the whale sighed and swam away"),
)  # fmt: skip


def voyage(rng: random.Random) -> Tale:
    """A ship carries a cargo from one port to another, with one trouble on the way."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    mate = person(rng, female=not hero.female if rng.random() < 0.8 else hero.female, taken=(hero.name, hero.role))
    pet = animal(rng, kind=scene.pick(("cat", "dog", "goat", "parrot", "hen")), taken=(hero.name, mate.name))
    scene.cast("hero", hero)
    scene.cast("mate", mate)
    scene.cast("pet", pet)
    home, target = rng.sample(lexicon.PORTS, 2)
    scene.set(ship=scene.pick(lexicon.SHIPS), vessel=scene.pick(VESSELS), cargo=scene.pick(CARGOES), home=home, target=target,
              days=scene.pick(("four", "six", "eight", "nine", "eleven", "twelve")), crew=scene.pick(("five", "six", "seven", "nine", "a dozen")),
              island=scene.pick(lexicon.ISLANDS), day=scene.pick(("third", "second", "fourth")))  # fmt: skip
    happened, feared, sign, done = scene.pick(TROUBLES)
    scene.set(happened=happened, feared=feared, sign=sign, done=done)
    title = scene.say("the voyage of the {ship}", "captain {hero}", "from {home} to {target}", "the {ship}",
                      "{cargo} for {target}")  # fmt: skip
    first = paragraph(
        scene.say(
            "the {vessel} {ship} left {home} in {season} with {cargo} for {target}.",
            "in {season}, when {mark}, the {ship} sailed from {home}. She was a(n) [small|sturdy|old] {vessel}, and she carried {cargo} for {target}.",
            "captain {hero} had promised to bring {cargo} from {home} to {target}, and so the {vessel} {ship} put to sea in {season}.",
        ),
        scene.say(
            "captain {hero} stood at the wheel, {mate} kept the sails, and there was a crew of {crew}.",
            "{hero} was the captain, {mate} was the mate, and the rest were {crew} sailors and a(n) {pet_kind} called {pet}.",
            "{hero} was her captain. {He} had been at sea since {he} was [nine|ten|twelve], and {mate}, the mate, had been with {him} for years.",
        ),
        scene.maybe(0.6, "for two days the wind was kind.", "past {island} the sea was [smooth|green and quiet].",
                    "the gulls followed them as far as {island}."),
    )  # fmt: skip
    second = paragraph(
        scene.say("on the {day} day {happened}.", "then, two hours past {island}, {happened}.", "off {island} {happened}."),
        scene.say(
            "the crew [grew quiet|looked at one another], for they were afraid that {feared}.",
            '"Captain," said one of the sailors, and said no more. They all thought that {feared}.',
            "everyone thought that {feared}.",
        ),
        scene.say(
            '"Then let us not waste time being afraid," said {hero}.',
            "{hero} did not raise {his} voice. \"What do we know?\" {he} asked.",
            '"Breathe," said captain {hero}. "And then tell me what you see."',
        ),
    )  # fmt: skip
    third = paragraph(
        scene.say("it was then that {sign}.", "and {sign}.", "now {sign}."),
        scene.say(
            "that gave {hero} an idea.",
            '{hero} [nodded|laughed]. "That is it," {he} said.',
            '"[Good|Well done]," said {hero}. "All hands!"',
        ),
        scene.say("they {done}.", "quickly, and without a word, they {done}.", "the crew {done}."),
    )
    fourth = paragraph(
        scene.say(
            "{days} days after leaving {home} the {ship} came into {target} with all her {cargo}.",
            "so the {ship} reached {target} on the evening of the next day, tired and whole, and not one piece of the cargo was lost.",
            "when they tied up in {target}, the harbour master counted the {cargo} and found nothing missing.",
        ),
        scene.say(
            "{hero} bought hot pies for the whole crew, and the largest was for {mate}.",
            'in the log {hero} wrote: "Sailed from {home}. Some trouble on the way. Arrived in {target}. All well."',
            "{pet} the {pet_kind} was the first to go ashore.",
            'when people in {target} asked about the crossing, {mate} only said, "We had a good captain." And {hero} said, "I had a good mate."',
            "the next morning they loaded again and sailed for home.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": "captain", "friend": mate.name, "friend_kind": "mate", "ship": scene.slots["ship"],
        "cargo": scene.slots["cargo"], "from": home, "to": target, "season": scene.slots["season"],
    }  # fmt: skip
    return Tale(
        "sea",
        title_case(title),
        (first, second, third, fourth),
        scene.say(
            "captain {hero} and {mate} bring the {ship} and her {cargo} safely from {home} to {target}.",
            "the {ship} sails from {home} to {target} with {cargo}, and although {happened}, she arrives safely.",
        ),
        facts,
        (
            ("What did the ship carry?", scene.say("the {ship} carried {cargo}.")),
            ("Where did the ship sail to?", scene.say("she sailed from {home} to {target}.")),
            ("Who was the captain?", scene.say("{hero} was the captain.")),
            ("What was the ship called?", scene.say("she was called the {ship}.")),
            ("What went wrong?", scene.say("{happened}.")),
        ),
    )


def beacon(rng: random.Random) -> Tale:
    """The lighthouse lamp fails while a ship is near, and the keeper finds another way to show the rocks."""
    scene = Scene(rng)
    scene.setting()
    scene.set(season=scene.pick(("autumn", "winter")))
    hero = person(rng)
    child = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("child", child)
    scene.set(ship=scene.pick(lexicon.SHIPS), island=scene.pick(lexicon.ISLANDS), port=scene.pick(lexicon.PORTS),
              kin=("daughter" if child.female else "son"), number=scene.pick(("fourteen", "nineteen", "twenty-two", "thirty")))  # fmt: skip
    cause, plan, seen = scene.pick((
        ("the oil had frozen in the pipe", "lit a row of barrels along the rocks", "saw a line of fire"),
        ("the wind had broken the glass and blown out the flame", "rang the fog bell by hand, three strokes and a pause", "heard three strokes and a pause"),
        ("a wild goose had flown into the lens", "hung every lantern and mirror of the house in the windows", "saw a house full of light"),
        ("the clockwork that turned the lamp had stopped", "turned the great lens by hand, once every ten seconds", "saw the light, turning as it always did"),
    ))  # fmt: skip
    scene.set(cause=cause, plan=plan, seen=seen)
    title = scene.say(
        "the lamp on {island}",
        "the night of the {ship}",
        "{hero} and the lamp",
        "the keeper's {kin}",
        "light for the {ship}",
    )
    first = paragraph(
        scene.say(
            "{hero} kept the lighthouse on {island}, and {his} {kin} {child} kept {him} company.",
            "on {island} there is a lighthouse, and {hero} was its keeper. {He} lived there with {his} {kin} {child}.",
        ),
        scene.say(
            "one [wild|black|bitter] night in {season} the lamp went out, for {cause}.",
            "in {season}, on the worst night of the year, {cause}, and the lamp went out.",
        ),
    )
    second = paragraph(
        scene.say(
            '"There is a ship out there," said {child}. "I can see her lights. It is the {ship}."',
            "and out at sea, small and rocking, were the lights of the {ship}.",
        ),
        scene.say(
            "she was bound for {port}, with {number} people on board, and she was heading for the rocks.",
            "there were {number} people on board, and without the lamp they could not know where the rocks were.",
        ),
        scene.say(
            '"I cannot mend it in time," said {hero}. "Then we must show them in another way," said {child}.',
            '{hero} worked at the lamp with numb fingers. "It is no use," {he} said. But {child} had an idea.',
        ),
    )
    third = paragraph(
        scene.say("so father and child {plan}.".replace("father", "mother" if hero.female else "father"), "together they {plan}.", "they ran down the stairs and {plan}.")
        if "barrels" in plan else scene.say("together they {plan}.", "they did not lose a minute: they {plan}."),
        scene.say("their arms ached and the {weather} stung their faces, but they went on [until morning|for six hours].",
                  "hour after hour they kept at it, taking turns, and neither of them slept."),
        scene.say("on the {ship} the helmsman {seen}, and turned the wheel.", "and the {ship}? Her captain {seen} and turned away from the rocks."),
    )  # fmt: skip
    fourth = paragraph(
        scene.say(
            "at sunrise the {ship} lay safe in {port}, and {number} people ate breakfast as if nothing had happened.",
            "when the sun came up, the {ship} was at anchor in calm water, and all {number} people were well.",
        ),
        scene.say(
            'a week later a parcel came to {island}. In it was a [warm coat|telescope|box of oranges], and a note: "For the keeper\'s {kin}, from the {ship}."',
            '{hero} wrote in the book: "Lamp out at eight. {child} had an idea. No ship lost."',
            "since that night {child} has {his_child} own line in the lighthouse book, right below {hero}'s.".replace(
                "{his_child}", "{child_his}"
            ),
        ),
    )
    facts = {
        "hero": hero.name, "kind": "lighthouse keeper", "friend": child.name, "friend_kind": scene.slots["kin"],
        "ship": scene.slots["ship"], "place": scene.slots["island"], "people": scene.slots["number"], "season": scene.slots["season"],
    }  # fmt: skip
    return Tale(
        "sea",
        title_case(title),
        (first, second, third, fourth),
        scene.say("when the lamp on {island} goes out, {hero} and {child} save the {ship} in another way.",
                  "the lamp fails, and the keeper and {his} {kin} {child} save {number} people on the {ship}."),
        facts,
        (
            ("Why did the lamp go out?", scene.say("it went out because {cause}.")),
            ("Which ship was in danger?", scene.say("the {ship} was in danger.")),
            ("How many people were on board?", scene.say("there were {number} people on board.")),
            ("Who had the idea?", scene.say("{child} had the idea.")),
        ),
    )  # fmt: skip


def bottle(rng: random.Random) -> Tale:
    """A message in a bottle, its exact words, and the answer it gets. The message is quoted twice, verbatim."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    writer = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("writer", writer)
    scene.set(island=scene.pick(lexicon.ISLANDS), port=scene.pick(lexicon.PORTS), food=scene.pick(lexicon.FOODS), thing=scene.pick(lexicon.THINGS),
              adjective=scene.pick(("green", "brown", "dark blue", "salt-white")), number=scene.pick(("three", "four", "five", "seven")))  # fmt: skip
    message = scene.say(
        "my name is {writer}. I live on {island} with {number} goats and nobody to talk to. If you find this, please write.",
        "to whoever finds this: I have plenty of {food} but no one to share it with. Come to {island}. {writer}.",
        "this is {writer} of {island}. My boat is broken. I am well, but I would like to hear another voice.",
        "I threw this bottle into the sea to see how far kindness can swim. Answer me on {island}. {writer}.",
    )
    scene.set(message=message)
    title = scene.say(
        "the bottle", "a message from {island}", "the {adjective} bottle", "{hero} and the bottle", "words in a bottle"
    )
    first = paragraph(
        scene.say(
            "after the [storm|spring tide] {hero} the {hero_kind} found a(n) {adjective} bottle on the beach of {port}.",
            "{time} in {season} a(n) {adjective} bottle rolled against the boots of {hero}, the {hero_kind}, who was walking on the beach near {port}.",
        ),
        scene.say("there was a [piece of paper|rolled letter] inside.", "inside was a letter, and it was dry."),
        scene.say('it said: "{message}"', '{hero} pulled out the cork and read: "{message}"'),
    )
    second = paragraph(
        scene.say(
            "{hero} read it once standing and once sitting down.",
            '"{island}," said {hero}. "That is [two|three] days away."',
            "that night {he} could not sleep, for {he} kept hearing the words.",
        ),
        scene.say(
            'again and again {he} heard it: "{message}"',
            'in the morning {he} read it to everyone in the harbour: "{message}"',
        ),
        scene.say(
            "then {he} packed {food}, {a_thing} and a warm blanket, and borrowed a boat.".replace(
                "{a_thing}", "a(n) {thing}"
            ),
            "by noon {he} had a boat, a bag of {food}, and a(n) {thing} as a present.",
        ),
    )
    third = paragraph(
        scene.say(
            "on {island} somebody was sitting on the rocks, looking out to sea.",
            "when {hero} landed on {island}, a thin figure came running down the rocks.",
        ),
        scene.say(
            '"Did you throw a bottle into the sea?" asked {hero}. "Every year," said {writer}. "You are the first who came."',
            '"You must be {writer}," said {hero}. "I am the answer to your letter."',
        ),
    )
    fourth = paragraph(
        scene.say(
            "they ate {food} and talked until the stars came out.",
            "{writer} liked the {thing} very much, and they talked all night.",
        ),
        scene.say(
            "every {season} since then {hero} has sailed to {island}, and the {adjective} bottle stands on the table with flowers in it.",
            "now {writer} lives in {port}, two doors from {hero}, and still throws a bottle into the sea every year, for somebody else.",
            "and if you find a bottle on the beach one day, do not be too busy to open it.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": writer.name, "place": scene.slots["island"],
        "to": scene.slots["port"], "season": scene.slots["season"], "message": message,
    }  # fmt: skip
    return Tale(
        "sea",
        title_case(title),
        (first, second, third, fourth),
        scene.say(
            "{hero} the {hero_kind} finds a message in a bottle and sails to {island} to meet {writer}.",
            "a bottle brings {hero} and {writer} together.",
        ),
        facts,
        (
            ("What did the message say?", f'It said: "{message}"'),
            ("Who wrote the message?", scene.say("{writer} wrote it.")),
            (f"Where did {hero.name} sail?", scene.say("{hero} sailed to {island}.")),
            (f"Where did {hero.name} find the bottle?", scene.say("{hero} found it on the beach of {port}.")),
        ),
    )
