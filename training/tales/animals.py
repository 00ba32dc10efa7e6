"""Animal tales: an animal who wants something, tries, is helped, and gets it (or something better)."""

# ruff: noqa: E501 -- a template is one line

import random
from dataclasses import dataclass

from training import lexicon
from training.grammar import Character, Scene, Tale, animal, paragraph, plural, title_case


@dataclass(frozen=True, slots=True)
class Wish:
    """A wish with the scenes that belong to it; every string is a template."""

    goal: str  # after "wanted to"
    doubt: str  # what the others said
    attempt: str  # the first try
    failure: str  # and how it went wrong
    advice: str  # what the helper says
    success: str
    after: str


WISHES = (
    Wish("learn to swim", "you will sink like a stone", "{he} jumped straight into the deep part of the {river}",
         "{he} swallowed half the river and had to be pulled out by the ears",
         "start where the water only reaches your knees", "on the [fifth|seventh|tenth] day {he} let go of the bank and floated, and then {he} swam",
         "{hero} swims across the {river} every morning, and back again before breakfast"),
    Wish("fly", "you have no wings", "{he} tied two cabbage leaves to {his} arms and jumped off the {perch}",
         "the leaves tore and {he} landed in a heap of straw",
         "you do not need wings, you need something the wind can hold", "together they built a kite as big as a door, and the wind lifted {hero} over the {river} and set {him} down softly on the other side",
         "whenever the wind is steady, {hero} sails over the fields and waves to those below"),
    Wish("see the sea", "it is too far for the likes of you", "{he} set off at once, without a map",
         "the next day {he} found that {he} had walked in a circle and was home again",
         "the river knows the way, so follow the river", "{he} followed the {river} for [three|four|nine] days, until the banks fell away and there was nothing but bright water",
         "{hero} keeps a shell from that day and listens to it before {he} sleeps"),
    Wish("find a friend", "nobody talks to you", "{he} hung a sign on a tree that said FRIEND WANTED",
         "the rain washed the letters away before anyone had read it",
         "do not wait for a friend, be one", "{hero} carried wood for the old, sat with the sick, and one evening {he} looked around and saw that {helper} had stayed for supper",
         "{hero} and {helper} share one fire, and there is always a third chair for somebody new"),
    Wish("build a boat", "you cannot even hold a hammer", "{he} nailed a few boards together in a great hurry",
         "the boat went down so fast that the nails were still warm",
         "bend the boards with steam and fill the cracks with moss and tar", "the second boat was small and round, but it floated as lightly as a leaf",
         "{hero} ferries beetles, mice and other travellers across the {river} and charges one acorn each"),
    Wish("bake bread", "you will burn the kitchen down", "{he} mixed flour and water and put it straight into the fire",
         "what came out was as hard as a brick, and the {other} used it to hold the door open",
         "dough needs yeast and a warm place and, most of all, time", "{he} waited until the dough had doubled, and the loaf came out brown and singing",
         "on [Saturdays|cold mornings] the whole wood smells of {hero}'s bread"),
    Wish("sing in the choir", "you sound like a gate", "{he} sang as loudly as {he} could",
         "two windows broke and the choir moved to another field",
         "listen first, and then sing under the others, not over them", "{he} found the lowest note of all, and suddenly the whole choir sounded warm",
         "no one would think of a concert without {hero} in the back row"),
    Wish("touch the moon", "the moon is further than far", "{he} climbed to the top of the tallest tree",
         "the branch broke, and the moon was still just as far away",
         "sometimes the moon comes down to those who are patient", "on a still night the moon lay on the pond, round and white, and {hero} touched the very middle of it",
         "every full moon {hero} goes down to the pond to say good evening"),
    Wish("win the race", "you always come last", "{he} ran as fast as {he} could from the very first step",
         "halfway along {he} had to lie down in the grass, and even a snail went by",
         "run your own race, and keep a little for the end", "{he} began slowly, breathed evenly, and passed the {other} ten steps before the line",
         "the ribbon hangs over {hero}'s door, but {he} still likes the practice best"),
    Wish("learn to read", "books are for people", "{he} stared at a page until {his} eyes hurt",
         "the letters looked like ants and {he} fell asleep on them",
         "learn one letter a day, and begin with your own name", "after [thirty|forty] days {he} read the sign at the bridge aloud, and it said: WELCOME, WALK SLOWLY",
         "in the evenings {hero} reads to the young ones, and does all the voices"),
    Wish("stop being afraid of the dark", "the dark is full of teeth", "{he} lit every candle in the house",
         "by midnight they had all burned down, and the dark was bigger than before",
         "go and look at what you are afraid of, and take a friend", "they sat outside and listened, and every terrible sound turned out to be someone {he} knew: the owl, the brook, the wind in the reeds",
         "{hero} goes for a walk every night and greets the dark like a neighbour"),
    Wish("grow the biggest pumpkin", "nothing grows in that garden", "{he} watered one seed twenty times a day",
         "the seed floated away",
         "give it sun and old leaves, and then leave it alone", "by autumn the pumpkin was so big that {hero} had to climb onto it to see the other side",
         "there was soup for everyone until the snow came"),
    Wish("cross the mountains", "there is nothing there but wind", "{he} packed [seven|nine] bags and a chair",
         "{he} was tired before {he} reached the first stone",
         "take only what you can carry uphill and singing", "with one small bag {he} climbed over the pass, and on the other side lay a green valley full of bells",
         "{hero} has friends on both sides of the mountains"),
    Wish("mend the old mill", "that wheel has not turned for years", "{he} pushed the wheel with all {his} strength",
         "it moved one finger wide and squeaked and stopped",
         "first clean the stream, for a mill is only as good as its water", "{he} cleared the stones from the stream, greased the axle, and one morning the wheel turned by itself",
         "the mill grinds acorns and barley, and {hero} sleeps best when it rumbles"),
    Wish("catch a star", "stars are nailed to the sky", "{he} threw a net as high as {he} could",
         "the net came down over the {other}, who was not pleased",
         "some stars live in the grass on warm nights", "in the long grass {he} found a glow-worm, and it climbed up beside {him} and stayed there, shining",
         "{hero} never catches them any more; {he} only sits among them"),
    Wish("be the captain of the ferry", "captains must be tall", "{he} took the ferry out alone, without asking",
         "the ferry turned round and round and bumped into the bridge",
         "learn the ropes before you hold the wheel", "{he} coiled ropes, scrubbed boards and read the currents, until the old captain put the cap on {his} head",
         "{hero} knows every stone in the {river}, and nobody has ever got wet feet"),
)  # fmt: skip

FIND = ("a blue feather", "the source of the {river}", "a four-leaved clover", "the singing stone", "a warm hat",
        "the old bell", "a door in the hill", "the quietest place in the world", "a winter home", "the golden pear")  # fmt: skip
MAKE = ("a lantern", "a garden", "a bridge", "a raft", "a drum", "a clock", "a ladder", "a wind harp", "a snow house",
        "a tree house", "a telescope", "a birthday cake")  # fmt: skip


# goals with no scenes of their own
SKILLS = (
    "dance", "dance the tango", "play the fiddle", "play the drum", "paint the sunset", "whistle", "tell jokes", "cook soup", "knit a scarf", "count to a thousand",
    "ride a bicycle", "skate on the ice", "climb the church tower", "speak with the trees", "write a letter", "write a poem", "be polite", "be brave", "be a teacher",
    "be a doctor", "be an astronaut", "be the mayor", "juggle", "walk on a rope", "jump over the moon", "stand on one leg", "sleep in a bed", "drive a train",
    "sail around the world", "draw maps", "ring the bells", "make the king laugh", "keep a secret", "say sorry", "roar like a lion", "sing", "run a shop",
    "open a library", "save the forest", "make friends with the wind", "dig the deepest well", "play chess", "say no", "wait", "grow roses",
)  # fmt: skip


def skill_wish(rng: random.Random) -> Wish:
    """Any goal at all: it is tried too fast, and reached by beginning small."""
    goal = rng.choice(SKILLS)
    return Wish(
        goal, rng.choice(("nobody like you has ever done that", "that is not for you", "who do you think you are", "you will only make a fool of yourself")),
        rng.choice(("{he} tried it all at once, in front of everybody", "{he} tried it alone, in the middle of the night", "{he} read half a book about it and began")),
        rng.choice(("{he} fell over {his} own feet, and everyone laughed", "{he} made such a noise that the whole wood woke up", "it ended in a ditch")),
        rng.choice(("begin small, and do it every day", "nobody learns it in a day, so take a hundred days", "find someone who can do it and watch closely")),
        rng.choice((f"on the hundredth day somebody said that they had never seen anyone {goal} so well", f"little by little {{he}} learned how to {goal}", f"one day {{he}} noticed that {{he}} could {goal} without thinking about it")),
        rng.choice((f"others come to {{hero}} when they want to {goal}, and {{he}} tells them to begin small", "{hero} says that the hundred days were the best part", "{hero} teaches the young ones, and never laughs at anybody")),
    )  # fmt: skip


def made_wish(rng: random.Random) -> Wish:
    """A wish put together from a verb and a thing, so that goals outside the list above have a story too."""
    if rng.random() < 0.45:
        return skill_wish(rng)
    if rng.random() < 0.5:
        thing = rng.choice(FIND)
        the_thing = thing if thing.startswith("the ") else "the " + thing.split(" ", 1)[1]
        return Wish(
            f"find {thing}", "you will never find it", "{he} looked under every stone between the bridge and the wood",
            "{he} found only [worms|mud and a rusty spoon]", "ask those who look at the ground all day, and those who look from above",
            f"the moles and the swallows told {{him}} where to go, and behind the waterfall {{he}} found {thing}",
            f"{{hero}} will show {the_thing} to anyone who asks politely",
        )  # fmt: skip
    thing = rng.choice(MAKE)
    the_thing = "the " + thing.split(" ", 1)[1]
    return Wish(
        f"make {thing}", "you cannot even tie a knot", "{he} began without a plan and without counting the pieces",
        f"{the_thing} fell apart as soon as {{he}} let go of it", "draw it first, measure twice, and only then begin",
        f"{{he}} drew a plan, gathered good wood and string, and worked until {the_thing} was finished",
        f"people come from [Millford|Thornby|Oakmere] to see {the_thing} that {{hero}} made",
    )  # fmt: skip


# who could do it from birth, and so cannot long for it
BORN_TO = {
    "learn to swim": frozenset(
        {"beaver", "duck", "frog", "goose", "otter", "salmon", "seal", "swan", "turtle", "toad"}
    ),
    "fly": frozenset(
        {"crow", "duck", "goose", "heron", "kingfisher", "moth", "owl", "raven", "robin", "sparrow", "swan"}
    ),
    "see the sea": frozenset({"seal", "salmon"}),
    "stop being afraid of the dark": frozenset({"owl", "mole", "moth", "rat"}),
}


def may_want(kind: str, goal: str) -> bool:
    """Whether an animal of this kind can wish for it: ducks do not long to swim."""
    return kind not in BORN_TO.get(goal, ())


OPENINGS = (
    "there was once a(n) {adjective} {hero_kind} [called|named] {hero} who wanted to {goal}.",
    "[once upon a time|once|long ago], [beside|near] the river {river}, there lived a(n) {hero_kind} [called|named] {hero}. More than anything, {hero} wanted to {goal}.",
    "{hero} was a(n) {adjective} {hero_kind} with one great wish: {he} wanted to {goal}.",
    "in the reeds by the {river} lived {hero}, a(n) {adjective} {hero_kind}, who wanted to {goal}.",
    "all the {hero_kinds} on the river {river} were [content|happy with what they had], except {hero}, who wanted to {goal}.",
)


def wish(rng: random.Random) -> Tale:
    """An animal wants something it cannot do yet, fails, is given advice, and succeeds."""
    scene = Scene(rng)
    scene.setting()
    hero = animal(rng, kind=rng.choice(lexicon.FAR_ANIMALS) if rng.random() < 0.2 else None)
    other = rng.choice([a for a in lexicon.ANIMALS if a != hero.role])
    helper = animal(
        rng, kind=rng.choice([a for a in lexicon.ANIMALS if a not in (hero.role, other)]), taken=(hero.name, hero.role)
    )
    helper = Character(helper.name, not hero.female, helper.role, helper.age, animal=True)
    scene.cast("hero", hero)
    scene.cast("helper", helper)
    scene.set(hero_kinds=plural(hero.role))
    chosen = rng.choice([w for w in WISHES if may_want(hero.role, w.goal)]) if rng.random() < 0.6 else made_wish(rng)
    scene.set(
        adjective=scene.pick(
            ("small", "young", "shy", "curious", "stubborn", "cheerful", "clumsy", "brave", "quiet", "lonely")
        ),
        other=other,
        perch=scene.pick(("barn roof", "mill", "old wall", "bridge")),
    )
    scene.set(goal=chosen.goal, doubt=chosen.doubt, advice=chosen.advice)
    scene.set(attempt=chosen.attempt, failure=chosen.failure, success=chosen.success, after=chosen.after)
    title = scene.say(
        "the {hero_kind} who wanted to {goal}", "{hero} the {hero_kind}", "{hero}'s wish", "the {adjective} {hero_kind}",
        "{hero} and {helper}",
    )  # fmt: skip
    first = paragraph(
        scene.say(*OPENINGS),
        scene.say(
            '"{doubt}," said the {other}[|, and the other animals laughed|, shaking its head].',
            'the {other} [laughed|only yawned]. "{doubt}," it said.',
        ),
        scene.maybe(
            0.6, "but {hero} did not [listen|give up so easily].", "{hero} said nothing, but {he} did not forget it."
        ),
    )
    second = paragraph(
        scene.say("{time} in {season}, {attempt}.", "so {time}, when {mark}, {attempt}.", "{time} {attempt}."),
        scene.say("but {failure}.", "it went badly: {failure}."),
        scene.maybe(0.5, "{hero} sat in the grass and [sighed|sniffed|looked at {his} feet].",
                    '"Perhaps they are right," {he} thought.'),
    )  # fmt: skip
    third = paragraph(
        scene.say(
            "then {helper} the {helper_kind} came by and asked what was the matter.",
            "an old {helper_kind} called {helper} had seen it all.",
            "that night {he} told {helper} the {helper_kind} about it.",
        ),
        scene.say(
            '"I want to {goal}," said {hero}, "and I do not know how."',
            '"I only want to {goal}," said {hero}.',
            "{hero} told {helper_him} everything.",
        ),
        scene.say(
            '{helper} [thought for a while|scratched {helper_his} ear|smiled]. "{advice}," {helper_he} said.',
            '"Listen," said {helper}. "{advice}."',
        ),
    )
    fourth = paragraph(
        scene.say(
            "{hero} did as {helper} said[|, day after day|, and {helper} helped].",
            "so they began again, this time together.",
            "{hero} tried again[|, and again|, slowly this time].",
        ),
        scene.say("{success}.", "and then it happened. {success}.", "at last {success}."),
    )
    fifth = paragraph(
        scene.say(
            "even the {other} [clapped|was impressed|had nothing to say].",
            '"Well," said the {other}, "I always knew you could do it."',
            '"Thank you," said {hero}. "You did it yourself," said {helper}.',
        ),
        scene.say("to this day {after}.", "since then {after}.", "now {after}."),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": helper.name, "friend_kind": helper.role, "goal": scene.slots["goal"],
        "season": scene.slots["season"], "river": scene.slots["river"], "mood": scene.slots["adjective"],
    }  # fmt: skip
    return Tale(
        "animals",
        title_case(title),
        (first, second, third, fourth, fifth),
        scene.say(
            "{hero} the {hero_kind} wants to {goal}, fails at first, and succeeds with the help of {helper} the {helper_kind}.",
            "a(n) {adjective} {hero_kind} learns how to {goal}."
            if not chosen.goal.startswith("learn")
            else "a(n) {adjective} {hero_kind} wants to {goal}, and does.",
        ),
        facts,
        (
            (f"What did {hero.name} want?", scene.say("{hero} wanted to {goal}.")),
            (f"Who helped {hero.name}?", scene.say("{helper} the {helper_kind} helped {hero}.")),
            (f"What kind of animal was {hero.name}?", scene.say("{hero} was a(n) {hero_kind}.")),
            (f"What did {helper.name} say?", scene.say('{helper} said: "{advice}."')),
        ),
    )
