"""Workshop tales: an invention that goes wrong before it goes right, and an apprentice who learns to see."""

# ruff: noqa: E501 -- a template is one line

import random

from training import lexicon
from training.grammar import Scene, Tale, paragraph, person, title_case

# invention, need, first version, how it failed, the insight, the second version, what it does now
INVENTIONS = (
    ("rain clock", "the farmers never knew how long the rain had lasted", "a bucket with a bell on the rim",
     "a sparrow drank from it and the bell rang on a sunny day", "the water had to be hidden from birds",
     "a closed jar with a float that moved a needle", "tells the whole village how long it has rained"),
    ("bread lift", "the baker had to carry every loaf up forty steps", "a basket on a rope and a very patient dog",
     "the dog saw a cat and the bread flew over the roofs", "weight is more patient than dogs",
     "two baskets, so that the empty one goes down while the full one goes up", "carries three hundred loaves before breakfast"),
    ("walking lamp", "the path along the weir was black at night", "a lantern on wheels that rolled ahead of you",
     "it rolled into the river and went out with a hiss", "a lamp should follow and not lead",
     "a lantern on a long bent pole that rests on the shoulder", "lights the way for anyone who comes home late"),
    ("letter kite", "the postman could not cross the river in flood", "a big kite with a bag full of letters",
     "it flew very well, and was last seen above the sea", "a kite needs a string at both ends",
     "a ring of cord from bank to bank, with the kite to pull it along", "brings the post across even in the worst weather"),
    ("apple ladder", "the best apples always hung too high", "a pair of stilts with a seat",
     "it walked off by itself, down the hill, with the inventor on top", "what is tall must also be wide",
     "a ladder with three legs and a basket at the top", "is borrowed by every orchard in the valley"),
    ("snow plough", "the road to the school was closed all winter", "a door pulled by two goats",
     "the goats ate the rope and went home", "snow should be parted, not pushed",
     "two planks joined in the shape of a V, with a stone on top", "clears the road before the first bell"),
    ("singing kettle", "everyone let the water boil away", "a kettle with a whistle as loud as a ship's",
     "the hens stopped laying and the neighbours complained", "a warning may be polite",
     "a kettle with three small reeds that play a chord", "sings so well that people come to tea only to hear it"),
    ("egg counter", "nobody knew how many eggs the hens had laid", "a trained hen with a piece of chalk",
     "she wrote what she liked", "hens are for laying and wheels are for counting",
     "a little gate that turned a wheel by one tooth for each egg", "counts to a thousand and then begins again"),
    ("wind drum", "the fishers slept when the storm came up", "a drum with a stick tied to a weathercock",
     "it drummed in every breeze, and soon nobody listened", "an alarm must be silent until it matters",
     "a heavier stick that only a storm could lift", "has woken the harbour four times, and each time it was right"),
)  # fmt: skip


def invention(rng: random.Random) -> Tale:
    """A need, a first version that fails in public, an insight, and a second version that lasts."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    friend = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("friend", friend)
    invention_name, need, first_try, failure, insight, second_try, now = scene.pick(INVENTIONS)
    scene.set(invention=invention_name, need=need, first_try=first_try, failure=failure, insight=insight, second_try=second_try, now=now,
              days=scene.pick(("nine", "ten", "twenty", "thirty")), fair=scene.pick(("the fair", "the market", "the village feast", "the town hall")))  # fmt: skip
    title = scene.say(
        "the {invention}",
        "{hero}'s {invention}",
        "how the {invention} was invented",
        "{hero} the inventor",
        "the inventor of {village}",
    )
    first = paragraph(
        scene.say(
            "{hero} of {village} was a(n) {hero_kind} by day and an inventor by night.",
            "in {village} lived an inventor called {hero}, who earned {his} bread as a(n) {hero_kind}.",
            "{hero}, the {hero_kind} of {village}, could not see a problem without reaching for a pencil.",
        ),
        scene.say(
            "one thing troubled {him}: {need}.",
            "that {season} everyone [complained about|spoke of] the same thing: {need}.",
            '"It cannot go on like this," people said, for {need}.',
        ),
        scene.say("so {he} decided to build a(n) {invention}.", '"What we need," said {hero}, "is a(n) {invention}."'),
    )
    second = paragraph(
        scene.say(
            "the first one was {first_try}.", "after {days} nights of sawing and hammering it was ready: {first_try}."
        ),
        scene.say(
            "{he} showed it at {fair}.",
            "at {fair} everybody came to look.",
            "the whole village gathered to see it work.",
        ),
        scene.say("it did not go well: {failure}.", "for a minute all was well. Then {failure}."),
        scene.say(
            "people laughed until they had to sit down. Only {friend} the {friend_kind} was quiet.",
            "{friend} the {friend_kind} tried not to laugh, and failed.",
            "{hero} went home by the back lane, and {friend} the {friend_kind} carried the pieces.",
        ),
    )
    third = paragraph(
        scene.say(
            'but {hero} did not throw the drawings away. {He} wrote under them: "{insight}."',
            '{friend} came by with [soup|tea]. "What have you learned?" {friend_he} asked. {hero} thought about it. "That {insight}," {he} said.',
            'for three days {he} said nothing at all. On the fourth {he} sat up in bed and cried, "Of course! {insight}!"',
        ),
        scene.say(
            "the second one was {second_try}.",
            "so {he} began again and made {second_try}.",
            "{he} took the old one apart and built {second_try}.",
        ),
        scene.maybe(0.5, "{friend} [held the lamp|handed {him} the nails|sharpened the saws]."),
    )
    fourth = paragraph(
        scene.say(
            "this time nobody laughed.",
            "this time it worked.",
            "it worked on the first day, and on the second, and it works still.",
        ),
        scene.say("today the {invention} {now}.", "the {invention} {now}."),
        scene.say(
            '"What will you invent next?" asked {friend}. "Something that fails," said {hero}. "That is how it starts."',
            "and on the wall of the workshop hangs the first one, because {hero} says that it was the better teacher.",
            "{hero} never sold it. {He} drew the plan on the wall of the inn, so that anyone could copy it.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "friend_kind": friend.role, "village": scene.slots["village"],
        "season": scene.slots["season"], "invention": invention_name, "need": need,
    }  # fmt: skip
    return Tale(
        "workshop",
        title_case(title),
        (first, second, third, fourth),
        scene.say("{hero} invents a(n) {invention}. The first one fails, but the second one works.",
                  "because {need}, {hero} of {village} builds a(n) {invention}, and learns that {insight}."),
        facts,
        (
            (f"What did {hero.name} invent?", scene.say("{hero} invented a(n) {invention}.")),
            ("Why was it needed?", scene.say("it was needed because {need}.")),
            ("What went wrong with the first one?", scene.say("{failure}.")),
            (f"What did {hero.name} learn?", scene.say("{hero} learned that {insight}.")),
        ),
    )  # fmt: skip


# craft task, the flaw a beginner makes, the master's test, what the apprentice learns
LESSONS = (
    ("make a chair", "one leg was shorter than the others", "set a full cup of water on the seat", "measure every leg against the same stick"),
    ("sew a boot", "the seam let in the rain", "stood in the brook with one foot", "wax the thread before every stitch"),
    ("bake a loaf", "the crust was black and the middle was raw", "knocked on the bottom and listened", "let the oven cool to the heat of a summer stone"),
    ("draw a map", "the river ran uphill", "gave it to a stranger and waited for him to come back", "walk every road before drawing it"),
    ("mend a clock", "it ran eleven minutes fast", "put it beside the church clock for a week", "turn the screw by less than you think"),
    ("weave a basket", "it leaned to one side", "filled it with eggs", "pull each willow rod as hard as the last"),
    ("throw a bowl", "the rim was as wavy as a leaf", "laid a flat board on top", "keep still and let the clay move"),
    ("forge a hook", "it bent like butter", "hung a sack of grain on it", "cool the iron slowly"),
    ("build a barrel", "it leaked at every joint", "filled it at night and looked at the floor in the morning", "trust the hoop and not the nail"),
)  # fmt: skip


def apprentice(rng: random.Random) -> Tale:
    """An apprentice makes something three times; the master's only teaching is a test."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    master = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("master", master)
    task, flaw, test, learned = scene.pick(LESSONS)
    thing = task.split(" ")[-1]
    scene.set(task=task, flaw=flaw, test=test, learned=learned, thing=thing, years=scene.pick(("three", "four", "five", "seven")),
              food=scene.pick(lexicon.FOODS))  # fmt: skip
    title = scene.say(
        "the apprentice", "{hero} learns", "{master}'s apprentice", "the third {thing}", "how {hero} learned to {task}"
    )
    first = paragraph(
        scene.say(
            "when {hero} was thirteen, {he} was sent to {village} to learn a trade from old {master}.",
            "{hero} was the youngest apprentice that {master} of {village} had ever taken.",
            "old {master} of {village} spoke little, and had one apprentice, whose name was {hero}.",
        ),
        scene.say(
            '"Today," said {master}, "you will {task}."',
            "one day in {season} {master} told {him} to {task}, and went out.",
        ),
    )
    second = paragraph(
        scene.say(
            "{hero} worked [quickly|until noon] and was pleased with it.",
            "{hero} had seen it done a hundred times, and was done in an hour.",
        ),
        scene.say(
            "{master} said nothing. {He_m} only {test}.".replace("{He_m}", "{master_He}"),
            "{master} came in, nodded, and {test}.",
        ),
        scene.say("then {hero} saw that {flaw}.", "now anyone could see that {flaw}."),
        scene.say('"Again," said {master}.', '{master} smiled a little. "Again," {master_he} said.'),
    )
    third = paragraph(
        scene.say(
            'the second {thing} was better, but not good. Once more {master} {test}, and once more {master_he} said, "Again."',
            '{hero} tried to hurry, and the second {thing} was worse than the first. "Again," said {master}.',
        ),
        scene.say(
            "that evening {hero} [sat alone|ate {his} {food} in silence] and watched {master_his} hands at work. Then {he} understood: {learned}.",
            "{hero} did not sleep much. In the night it came to {him}: {learned}.",
            '"What am I doing wrong?" asked {hero}. "{learned}," said {master}, and that was the longest speech {he} ever heard from {master_him}.',
        ),
    )
    fourth = paragraph(
        scene.say("the third {thing} took the whole day.", "for the third {thing} {hero} took three days."),
        scene.say(
            "{master} {test}, and waited, and waited. Nothing was wrong with it.",
            "when {master} {test}, nothing happened at all, and that was the best thing that could happen.",
        ),
        scene.say(
            '"Good," said {master}. "Now we can begin."',
            '{master} put it in the window. "Not for sale," {master_he} said.',
            'after {years} years {hero} had a workshop and an apprentice too. And when the work was done too quickly, {he} smiled and said, "Again."',
        ),
    )
    facts = {
        "hero": hero.name, "kind": "apprentice", "friend": master.name, "friend_kind": "master", "village": scene.slots["village"],
        "task": task, "season": scene.slots["season"],
    }  # fmt: skip
    return Tale(
        "workshop",
        title_case(title),
        (first, second, third, fourth),
        scene.say(
            "{hero} learns from {master} to {task}: {learned}.", "an apprentice fails twice and learns how to {task}."
        ),
        facts,
        (
            (f"What did {hero.name} have to do?", scene.say("{hero} had to {task}.")),
            ("What was wrong with the first one?", scene.say("{flaw}.")),
            (f"Who taught {hero.name}?", scene.say("{master} taught {hero}.")),
            ("How was it tested?", scene.say("{master} {test}.")),
        ),
    )
