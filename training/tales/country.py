"""Country tales: a mystery with a harmless culprit, a chain of swaps, a rescue, a promise kept through the seasons."""

# ruff: noqa: E501 -- a template is one line

import itertools
import random

from training import lexicon
from training.grammar import Scene, Tale, animal, join_words, paragraph, person, title_case, with_article

# what happens every night, the clue, the culprit kind, why, the settlement
MYSTERIES = (
    ("a loaf of bread vanished from the bakery window", "a trail of crumbs that led to the barn", ("hedgehog", "badger", "fox", "raven"),
     "there were little ones in the straw", "the baker leaves the old crusts by the barn door"),
    ("the church bell rang by itself at midnight", "a tuft of white hair on the rope", ("goat", "donkey"),
     "the rope tasted of salt", "there is a block of salt behind the church"),
    ("somebody blew out the lamp on the bridge", "a feather in the lantern", ("owl", "moth", "crow"),
     "the light was shining straight into a nest", "the lamp has a small tin hat on that side"),
    ("wet footprints crossed the floor of the mill", "a fish bone on the third step", ("otter", "seal", "duck"),
     "the warm millstone was the best bed in winter", "there is a cushion beside the millstone"),
    ("one shoe disappeared from every doorstep", "a heap of leaves that was breathing", ("dog", "fox"),
     "the ground was cold and shoes make a soft bed", "there is a blanket under the leaves"),
    ("strange music came from the empty house", "an old fiddle with one string", ("mouse", "cat", "squirrel"),
     "the string made a fine swing", "nobody is afraid of the empty house any more"),
    ("the apples on the lowest branches were eaten", "hoof marks under the tree", ("deer", "horse", "pig"),
     "the fence had a gap just as wide as a hungry nose", "the lowest branch belongs to the visitor"),
)  # fmt: skip


def mystery(rng: random.Random) -> Tale:
    """Something odd happens every night; two suspects are innocent; the culprit is an animal with a good reason."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    friend = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    suspect = person(rng, taken=(hero.name, friend.name, hero.role, friend.role))
    event, clue, culprits, reason, settlement = scene.pick(MYSTERIES)
    culprit = animal(rng, kind=scene.pick(culprits), taken=(hero.name, friend.name, suspect.name))
    for role, who in (("hero", hero), ("friend", friend), ("suspect", suspect), ("culprit", culprit)):
        scene.cast(role, who)
    scene.set(
        event=event,
        clue=clue,
        reason=reason,
        settlement=settlement,
        nights=scene.pick(("three", "four", "five", "six")),
    )
    title = scene.say(
        "the mystery of {village}",
        "who was it?",
        "{hero} investigates",
        "the {culprit_kind} of {village}",
        "strange nights in {village}",
    )
    first = paragraph(
        scene.say(
            "in {village}, for {nights} nights in a row, {event}.",
            "it began in {season}, when {mark}. Every night in {village} {event}.",
            "nobody in {village} could explain it, but night after night {event}.",
        ),
        scene.say(
            '"It is {suspect} the {suspect_kind}," whispered some. But {suspect} had been in bed with a cold all week.',
            "some blamed {suspect} the {suspect_kind}, and some blamed the wind. But {suspect} had been away at the market, and there had been no wind.",
            '{suspect} the {suspect_kind} was the first to be blamed. "I sleep at night," said {suspect}, "as honest people do." And that was true.',
        ),
    )
    second = paragraph(
        scene.say(
            '{hero} the {hero_kind} did not believe in ghosts. "Somebody is doing it," {he} said, "and I will find out who."',
            "{hero}, the {hero_kind}, liked a riddle better than {his} supper.",
        ),
        scene.say(
            "{he} asked {friend} the {friend_kind} to watch with {him}.",
            "together with {friend} the {friend_kind} {he} looked at everything by daylight.",
        ),
        scene.say(
            "what they found was this: {clue}.",
            "there was only one clue: {clue}.",
            "{friend} was the one who noticed {clue}.",
        ),
    )
    third = paragraph(
        scene.say(
            "that night they hid [behind the cart|under a blanket|behind the wall] and waited.",
            "they sat in the dark with a covered lantern, back to back, and shared a bag of walnuts.",
        ),
        scene.maybe(
            0.6,
            "the {weather} crept into their coats.",
            "an owl called, and the church clock struck [one|two].",
            "{friend} was almost asleep when something moved.",
        ),
        scene.say(
            "then {hero} lifted the lantern, and two bright eyes looked back. It was a(n) {culprit_kind}.",
            '"Now," whispered {hero}, and took the cover from the lantern. In front of them stood a(n) {culprit_kind}.',
        ),
        scene.say(
            "and {friend} saw why: {reason}.",
            "it did not run away, and soon they knew why. {reason}.",
            '"Look," said {friend} quietly. "{reason}."',
        ),
    )
    fourth = paragraph(
        scene.say(
            "{hero} went to {suspect} and [said sorry for the whole village|shook hands].",
            "in the morning everyone said sorry to {suspect}, who was kind about it.",
            "{suspect} laughed louder than anyone when {he} heard.".replace("{he}", "{suspect_he}"),
        ),
        scene.say(
            "the children named the {culprit_kind} {culprit}, and since then {settlement}.",
            "since then {settlement}, and the {culprit_kind} is called {culprit}.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "suspect": suspect.name, "culprit": culprit.role,
        "culprit_name": culprit.name, "village": scene.slots["village"], "season": scene.slots["season"], "clue": clue,
    }  # fmt: skip
    return Tale(
        "village",
        title_case(title),
        (first, second, third, fourth),
        scene.say("{hero} and {friend} find out that it was a(n) {culprit_kind}: {reason}.",
                  "every night {event}, and {hero} the {hero_kind} discovers that a(n) {culprit_kind} is behind it."),
        facts,
        (
            ("Who was blamed first?", scene.say("{suspect} the {suspect_kind} was blamed first.")),
            ("What was the clue?", scene.say("the clue was {clue}.")),
            ("Who was it in the end?", scene.say("it was a(n) {culprit_kind}.")),
            ("What is the animal called now?", scene.say("it is called {culprit}.")),
        ),
    )  # fmt: skip


SWAPS = (
    "sack of potatoes", "clay jug", "pair of boots", "wool blanket", "copper pot", "three-legged stool", "fishing net",
    "straw hat", "good axe", "jar of honey", "rocking chair", "saddle", "feather pillow", "coil of rope", "garden spade",
    "cheese", "barrel of cider", "pair of skates", "wheelbarrow", "hen",
)  # fmt: skip


def swap(rng: random.Random) -> Tale:
    """A chain of trades; at the end all of it is recounted in order, word for word."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    scene.cast("hero", hero)
    count = rng.randint(3, 4)
    things = rng.sample(SWAPS, count)
    start = scene.pick(("pearl button", "needle", "blue feather", "glass marble", "peach stone", "brass bell"))
    chain = [start, *things]
    scene.set(
        start=start,
        last=things[-1],
        wish=scene.pick(
            (
                "to give {his} mother a present",
                "to have something of {his} own",
                "to see what {he} could get for it",
                "to bring something home for the winter",
            )
        ),
    )
    traders = [person(rng, taken=(hero.name, hero.role)) for _ in range(count)]
    title = scene.say(
        "the {start}",
        "a fair exchange",
        "{hero} goes to market",
        "from a(n) {start} to a(n) {last}",
        "the long way home",
    )
    opening = paragraph(
        scene.say(
            "{hero} had nothing in the world but a(n) {start}. So {he} went out {wish}.",
            "one {season} day {hero} of {village} put a(n) {start} in {his} pocket and set out {wish}.",
        ),
        scene.maybe(0.6, "{mark}.", "it was {season}, with {sky}."),
    )
    meetings = []
    for i, trader in enumerate(traders):
        scene.cast("trader", trader)
        scene.set(have=chain[i], want=chain[i + 1])
        meetings.append(paragraph(
            scene.say(
                "[first|at the bridge|at the mill|by the well] {he} met a(n) {trader_kind} with a(n) {want}." if i == 0
                else "[then|next|a little further on|at the crossroads] {he} met a(n) {trader_kind} with a(n) {want}."
            ),
            scene.say(
                '"That is a fine {have}," said the {trader_kind}. "Will you take my {want} for it?"',
                '"Just what I need, a(n) {have}!" cried the {trader_kind}. "I will give you my {want}."',
                '"I would give this {want} for your {have}," said the {trader_kind}.',
            ),
            scene.say("{hero} [agreed|thought about it and nodded].", '"Done," said {hero}.', "they shook hands on it."),
        ))  # fmt: skip
    steps = join_words([f"{with_article(a)} for {with_article(b)}" for a, b in itertools.pairwise(chain)])
    scene.set(steps=steps)
    closing = paragraph(
        scene.say(
            'when {he} came home with the {last}, everyone asked how {he} had got it. "It is simple," said {hero}. "I gave {steps}."',
            '"Where did you get that {last}?" asked {his} mother. "I gave {steps}," said {hero}.',
        ),
        scene.say(
            '"And now," said {his} mother, "what would you take for the {last}?" "Nothing," said {hero}. "The walk is over."',
            "and the {last} is in the house to this day.",
            "nobody had lost anything, and everybody had what they needed.",
        ),
    )
    facts = {
        "hero": hero.name,
        "kind": "trader",
        "first": start,
        "last": things[-1],
        "village": scene.slots["village"],
        "season": scene.slots["season"],
    }
    return Tale(
        "village",
        title_case(title),
        (opening, *meetings, closing),
        scene.say("{hero} trades a(n) {start} step by step for a(n) {last}.", "{hero} gave {steps}."),
        facts,
        (
            (f"What did {hero.name} have at first?", scene.say("at first {hero} had a(n) {start}.")),
            (f"What did {hero.name} have at the end?", scene.say("at the end {hero} had a(n) {last}.")),
            ("What were the trades?", scene.say("{hero} gave {steps}.")),
        ),
    )


# who is in trouble and where, why the obvious way fails, what works
RESCUES = (
    ("calf", "stood up to its neck in the marsh", "the more they pulled, the deeper it sank", "laid doors and ladders on the mud and slid the calf out on its side"),
    ("kitten", "sat on a floating plank in the middle of the river", "no boat could get past the weir", "let down a basket with a fish in it from the bridge"),
    ("lamb", "was stuck on a ledge above the quarry", "the path had broken away", "lowered the smallest of them on two ropes tied to the old oak"),
    ("foal", "had fallen into the dry well", "the rope was too short", "threw straw into the well, armful by armful, until the foal could climb out"),
    ("puppy", "was trapped on a sheet of ice", "the ice would not carry a grown man", "pushed a long ladder out over the ice and crept along it"),
    ("swan", "was frozen to the pond by one wing", "it bit everyone who came near", "covered its head with a coat and melted the ice with warm tea"),
)  # fmt: skip


def rescue(rng: random.Random) -> Tale:
    """An animal in danger, an obvious way that does not work, and one that does."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    friend = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("friend", friend)
    kind, trouble, fails, works = scene.pick(RESCUES)
    if kind in ("puppy", "swan"):
        season = "winter"
        scene.set(
            season=season, mark=scene.pick(lexicon.SEASON_MARKS[season]), weather=scene.pick(("snow", "frost", "ice"))
        )
    named = animal(rng, kind=kind, taken=(hero.name, friend.name, hero.role, friend.role))
    scene.set(animal=kind, trouble=trouble, fails=fails, works=works, named=named.name, food=scene.pick(lexicon.FOODS))
    title = scene.say(
        "the {animal}",
        "the rescue of the {animal}",
        "{hero} and the {animal}",
        "how {named} got a name",
        "a(n) {animal} in trouble",
    )
    first = paragraph(
        scene.say(
            "{time} in {season} {hero} the {hero_kind} heard a thin cry.",
            "{hero} the {hero_kind} was on the way to {village} when {he} heard something.",
            "it was {season}, and {mark}. {hero} the {hero_kind} stopped on the road and listened.",
        ),
        scene.say("a(n) {animal} {trouble}.", "{he} followed the sound and saw it: a(n) {animal} {trouble}."),
        scene.say(
            "{he} ran to fetch {friend} the {friend_kind}.",
            "{he} called for help, and {friend} the {friend_kind} came running.",
        ),
    )
    second = paragraph(
        scene.say("they tried the obvious way first, but {fails}.", "it was harder than it looked, for {fails}."),
        scene.say('"It is getting dark," said {friend}.', "the {animal} looked at them and cried.", "the {weather} was getting worse.", '"Do not be afraid," {hero} said to the {animal}, although {he} was afraid {himself}.'),
        scene.say('"Wait," said {hero}. "Strength will not do it. We need [patience|a better idea]."', '"There must be another way," said {friend}, and they both thought hard.'),
    )  # fmt: skip
    third = paragraph(
        scene.say(
            "then they {works}.",
            "and this is what they did: they {works}.",
            "slowly, so as not to frighten it, they {works}.",
        ),
        scene.say(
            "it took [an hour|half the night], but it worked.",
            "{hero} lost a boot and {friend} lost {friend_his} hat, but it worked.",
        ),
        scene.say(
            "the {animal} shook itself and [licked|sniffed|looked at] {hero}'s hand.",
            "the {animal} stood there, trembling and safe.",
        ),
    )
    fourth = paragraph(
        scene.say(
            "they wrapped it in a blanket and gave it [warm milk|water].",
            "{friend} carried it home under {friend_his} coat.",
        ),
        scene.say("they called it {named}.", '"What shall we call it?" asked {friend}. "{named}," said {hero}.'),
        scene.say(
            "{named} still follows {hero} everywhere, even to church.",
            "and {named}? {named} has never gone near that place again.",
            "now {named} is [big and strong|fat and happy], and comes when {hero} whistles.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "friend_kind": friend.role, "animal": kind,
        "animal_name": named.name, "village": scene.slots["village"], "season": scene.slots["season"],
    }  # fmt: skip
    return Tale(
        "village",
        title_case(title),
        (first, second, third, fourth),
        scene.say(
            "{hero} and {friend} save a(n) {animal} and call it {named}.",
            "a(n) {animal} {trouble}, and {hero} and {friend} save it.",
        ),
        facts,
        (
            ("Which animal was in trouble?", scene.say("it was a(n) {animal}.")),
            ("What did they call it?", scene.say("they called it {named}.")),
            ("How was it saved?", scene.say("they {works}.")),
            (f"Who helped {hero.name}?", scene.say("{friend} the {friend_kind} helped {hero}.")),
        ),
    )


PLANTS = ("apple tree", "rose", "pear tree", "vine", "walnut tree", "cherry tree", "lilac", "plum tree", "willow")
YEAR = (
    ("in spring", "two green leaves came up", "it was no taller than a spoon", "a late frost came, and {hero} covered it with {his} own hat"),
    ("in summer", "the sun burned down and the ground cracked", "every leaf hung down", "{hero} carried water from the river, two buckets at a time"),
    ("in autumn", "the wind tried to pull it out", "it bent like a bow", "{hero} tied it to a stick with a piece of soft wool"),
    ("in winter", "the snow lay deep", "nothing could be seen of it", "{hero} put a ring of stones around it, so that nobody would step on it"),
)  # fmt: skip


def planting(rng: random.Random) -> Tale:
    """A seed, a year of care told season by season, and what came of it."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    elder = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("elder", elder)
    scene.set(plant=scene.pick(PLANTS), years=scene.pick(("five", "seven", "ten", "twelve")), place=scene.pick(("the school", "the bridge", "the well", "the old wall", "{his} grandmother's house")),
              kin=("grandmother" if elder.female else "grandfather"))  # fmt: skip
    title = scene.say(
        "the {plant}",
        "the {plant} of {village}",
        "{hero}'s {plant}",
        "a year with a(n) {plant}",
        "what {elder} planted",
    )
    first = paragraph(
        scene.say(
            "when {hero} was [six|seven|eight], {his} {kin} {elder} gave {him} a(n) {plant} no longer than a finger.",
            '{elder}, {hero}\'s {kin}, put a small pot into {his} hands. "A(n) {plant}," {elder_he} said.',
        ),
        scene.say(
            '"It needs three things," said {elder}. "Water, light, and somebody who comes back."',
            '"Plant it where people walk," said {elder}, "and come back every day."',
        ),
        scene.say("{hero} planted it beside {place}."),
    )
    order = rng.sample(range(4), 1)[0]
    middle = []
    for season_name, event, state, care in [YEAR[(order + k) % 4] for k in range(4)]:
        scene.set(season_name=season_name, event=event, state=state, care=care)
        middle.append(
            scene.say(
                "{season_name} {event}, and {state}. {care}.",
                "{season_name} {event}. {care}.",
                "{season_name} {event}, but {care}.",
            )
        )
    third = paragraph(
        scene.say(
            "and when the year was over, the {plant} was as tall as {hero}.",
            "so a year went by, and the {plant} was still there, and so was {hero}.",
        ),
        scene.say(
            '"You came back," said {elder}. That was all {elder_he} said, but {elder_he} smiled.',
            "{elder} measured it with {elder_his} stick and was pleased.",
        ),
    )
    fourth = paragraph(
        scene.say(
            "{years} years later there was a bench in its shade, and on the bench sat {elder}.",
            "it took {years} years until the {plant} was higher than the roof.",
        ),
        scene.say(
            'people in {village} say, "We will meet at {hero}\'s {plant}."',
            "{hero} is grown up now, and has given away [eleven|twenty|forty] small pots, each with the same three pieces of advice.",
            "and whenever {hero} came home from a journey, {he} went there first.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": "child", "friend": elder.name, "friend_kind": scene.slots["kin"], "plant": scene.slots["plant"],
        "place": scene.slots["place"], "village": scene.slots["village"],
    }  # fmt: skip
    return Tale(
        "village",
        title_case(title),
        (first, paragraph(*middle), third, fourth),
        scene.say(
            "{hero} plants a(n) {plant} beside {place} and looks after it through all the seasons.",
            "{elder} gives {hero} a(n) {plant}, and {hero} comes back every day.",
        ),
        facts,
        (
            (f"What did {hero.name} plant?", scene.say("{hero} planted a(n) {plant}.")),
            (f"Who was {elder.name}?", scene.say("{elder} was {hero}'s {kin}.")),
            ("Where was it planted?", scene.say("it was planted beside {place}.")),
        ),
    )
