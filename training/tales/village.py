"""Tales of the river villages: something lost, something broken, the water rising."""

# ruff: noqa: E501 -- a template is one line

import random

from training import lexicon
from training.grammar import Scene, Tale, animal, paragraph, person, title_case

OPENINGS = (
    "in the village of {village}, [where the river {river} bends|beside the river {river}|on the bank of the {river}], "
    "there [lived|once lived] a(n) {hero_kind} [called|named] {hero}.",
    "{hero} was the {hero_kind} of {village}[| and knew everyone by name|, and had been for years].",
    "it was {season} in {village}, and {mark}. {hero} the {hero_kind} was at work as always.",
    "[nobody|no one] in {village} worked harder than {hero} the {hero_kind}.",
    "[long ago|once upon a time|once|years ago], when {village} had only one street, there was a(n) {hero_kind} called {hero}.",
    "everyone on the river {river} knew {hero} the {hero_kind}.",
)
WORK = (
    "{he} spent {his} days at {workplace}, {work}.",
    "{his} days were spent at {workplace}, {work}, and {he} [loved|liked] the work.",
    "from dawn to dusk {he} was at {workplace}, {work}.",
)
SEASON_LINES = (
    "that {season} {mark}, and there was {ground} [everywhere|all along the river].",
    "it was {season}, with {sky} and {ground}.",
    "{time} in {season}, under {sky}, {he} [came|walked] down to the water.",
    "{mark}, and {sky} hung over the [roofs|river|fields].",
)

# where a thing is found, how it came there; `shiny` things can go to the magpie
SPOTS = (
    (
        "in the pocket of {his} other coat",
        "it had been there [all along|the whole time]",
        "searching {his} own pockets",
    ),
    (
        "under the bench by the mill pond",
        "it had slipped out while {he} was [resting|eating {his} lunch]",
        "retracing {his} steps",
    ),
    ("between two stones of the weir", "the river had carried it there", "following the current"),
    ("at the bottom of a flour sack", "it had fallen in while the sacks were being filled", "emptying every sack"),
    (
        "in the hay above the stable",
        "{he} had slept there [on the night of the storm|after the fair]",
        "climbing up to the hay",
    ),
    (
        "in the bow of the old ferry",
        "it had rolled there when the boat tipped",
        "looking under the planks of the ferry",
    ),
    (
        "behind the clock in the schoolroom",
        "one of the children had put it there to keep it safe",
        "asking the children",
    ),
    ("in the dog's basket", "the dog had taken it because it smelled of {him}", "following the dog"),
    (
        "under the loose step of the bridge",
        "it had dropped through the gap",
        "kneeling on the wet boards of the bridge",
    ),
    ("in the roots of the great willow", "{he} had set it down there to listen to the river", "sitting down to think"),
)
MAGPIE = ("in a magpie's nest in the tall ash tree", "the magpie had taken it because it shone", "watching the magpie")
WRONG = (
    "{he} looked under the bed and behind the stove, but found only [dust|a sock|two buttons].",
    "{he} searched [the yard|the garden|the path to the well], but it was not there.",
    "{he} asked at the bakery, but the baker only shook his head.",
    "{he} turned out every drawer in the house and found [nothing but string|only old letters].",
    "{he} went back along the lane with a lantern, looking at every stone.",
    "at the inn they had seen [nothing|no such thing].",
)
WHY = (
    "it had belonged to {his} grandmother",
    "it had been a present from {his} [sister|brother|father|mother]",
    "{he} had carried it since {he} was a child",
    "{he} had worked a whole winter to pay for it",
    "an old sailor had given it to {him}",
    "{he} had found it on the first day of [spring|summer] and thought it brought luck",
)


def lost(rng: random.Random) -> Tale:
    """Something is lost, looked for in the wrong places, and found where the story says why."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    friend = person(rng, female=not hero.female if rng.random() < 0.8 else hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("friend", friend)
    workplace, tool, work = lexicon.TRADES[hero.role]
    scene.set(thing=scene.pick(lexicon.THINGS), workplace=workplace, tool=tool, work=work)
    spots = (*SPOTS, MAGPIE, MAGPIE) if scene.slots["thing"] in lexicon.SHINY else SPOTS
    spot, reason, by = scene.pick(spots)
    scene.set(spot=spot, reason=reason, by=by, why=scene.pick(WHY))
    title = scene.say("the lost {thing}", "{hero} and the {thing}", "where the {thing} was", "the {hero_kind}'s {thing}",
                      "the {hero_kind} of {village}")  # fmt: skip
    first = paragraph(
        scene.say(*OPENINGS),
        scene.maybe(0.3, *WORK),
        scene.say(
            "{hero} owned one thing that {he} would not have sold for any money: a(n) {thing}.",
            "{hero} never went anywhere without {his} {thing}.",
            "of all the things {hero} had, the one {he} loved best was a(n) {thing}.",
        ),
        scene.say("{why}.", "{why}, and {he} kept it [clean and safe|close]."),
    )
    second = paragraph(
        scene.say(
            "{time} the {thing} was gone.",
            "then, {time}, {he} put {his} hand in {his} bag and the {thing} was not there.",
            "but {time}, when the {weather} came over the hills, {hero} saw that the {thing} was missing.",
        ),
        *(scene.say(line) for line in rng.sample(WRONG, rng.randint(1, 2))),
        scene.maybe(0.5, "the {weather} did not make it easier.", "by noon {he} was [tired and sad|cold and cross]."),
    )
    third = paragraph(
        scene.say(
            "{friend} the {friend_kind} [saw|noticed] {his} face and asked what was wrong.",
            "in the end {he} went to {friend} the {friend_kind}, who was good at [thinking|finding things|riddles].",
            "on the road {he} met {friend} the {friend_kind}.",
        ),
        scene.say(
            '"I have lost my {thing}," said {hero}. "I have looked everywhere."',
            '"My {thing} is gone," {he} said, "and I do not know where to look."',
        ),
        scene.say(
            '"Nobody looks everywhere," said {friend}. "Where were you when you last had it?"',
            '"Then let us look where you have not looked," {friend} [said|answered].',
            '"Things do not walk," said {friend}. "Let us think slowly."',
            '"Two pairs of eyes are better than one," said {friend}, and put on {friend_his} coat.',
        ),
    )
    fourth = paragraph(
        scene.say(
            "so they began by {by}, and there it was, {spot}.",
            "they tried {by}. And there, {spot}, was the {thing}.",
            "it was {friend} who thought of {by}, and that is how they found the {thing} {spot}.",
        ),
        scene.say("{reason}.", "{reason}, and nobody had noticed.", "of course: {reason}."),
    )
    fifth = paragraph(
        scene.say(
            "{hero} [laughed|laughed out loud|held it to the light] and [thanked {friend}|shook {friend}'s hand].",
            "{hero} was so glad that {he} [danced in the lane|kissed it|could not speak].",
        ),
        scene.say(
            "from that day the {thing} hung on a nail by the door[|, and {he} looked at it every morning].",
            "after that {he} tied the {thing} to {his} belt with a strong cord.",
            "that evening they drank [tea|cider] together, with the {thing} on the table between them.",
            "and {friend} never had to pay at {workplace} again.",
            '"Next time," said {friend}, "look slowly first and worry afterwards."',
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "friend_kind": friend.role,
        "village": scene.slots["village"], "season": scene.slots["season"],
        "lost": scene.slots["thing"], "found": scene.slots["thing"], "spot": scene.slots["spot"],
    }  # fmt: skip
    return Tale(
        "village",
        title_case(title),
        (first, second, third, fourth, fifth),
        scene.say(
            "{hero} the {hero_kind} lost a(n) {thing} and found it {spot} with the help of {friend}.",
            "a(n) {hero_kind} loses a(n) {thing}, and {friend} the {friend_kind} helps to find it {spot}.",
        ),
        facts,
        (
            (f"What did {hero.name} lose?", scene.say("{hero} lost a(n) {thing}.")),
            ("Where was it found?", scene.say("it was found {spot}.")),
            (f"Who helped {hero.name}?", scene.say("{friend} the {friend_kind} helped {hero}.")),
            (f"Who was {hero.name}?", scene.say("{hero} was a(n) {hero_kind}.")),
        ),
    )


# machine, place, sign of trouble, what depends on it, cause, remedy, tool, sound when it works again
MACHINES = (
    ("mill wheel", "mill", "the wheel of the mill stood still", "there would be no flour for bread",
     "a branch as thick as an arm was wedged under the paddles", "cut the branch in two and drew it out", "saw",
     "the paddles dipped and the great wheel groaned and turned"),
    ("church clock", "tower", "the church clock stopped at seven", "nobody would know when the market opened",
     "a jackdaw had built its nest among the gears", "lifted the nest out whole and set it on a ledge", "pair of thick gloves",
     "the pendulum swung and the bell struck the hour"),
    ("sluice gate", "weir", "the sluice gate would not open", "the water would run over the fields",
     "the chain had rusted into one solid lump", "worked oil into the chain link by link", "can of oil",
     "the chain ran free and the gate rose with a sigh"),
    ("harbour lamp", "pier", "the harbour lamp went out", "the fishing boats could not come home in the dark",
     "salt had blocked the little pipe that fed the flame", "cleaned the pipe until the air blew through it", "long needle",
     "the flame jumped up and lit the whole pier"),
    ("village pump", "square", "the village pump gave only air", "there would be no water for the gardens",
     "the leather washer had dried and cracked", "cut a new washer from an old boot", "sharp knife",
     "the pump coughed twice and then the water came"),
    ("ferry rope", "landing", "the ferry stuck fast in the middle of the river", "the children could not get to school",
     "the rope had jumped off its pulley", "lifted the rope back into its groove", "iron bar",
     "the pulley squeaked and the ferry slid to the bank"),
    ("bakery oven", "bakery", "the bakery oven filled the street with smoke", "there would be no loaves for the feast",
     "a brick had fallen into the chimney", "reached up and hooked the brick out", "boat hook",
     "the smoke rose straight up and the fire burned clear"),
    ("big loom", "weaving shed", "the big loom tore every thread", "the blankets would not be ready before the snow",
     "a splinter was sticking out of the beam", "smoothed the beam until silk could slide over it", "piece of sandpaper",
     "the shuttle flew and the cloth grew under it"),
)  # fmt: skip


def repair(rng: random.Random) -> Tale:
    """A machine stops, a first try fails, the cause is found by looking closely, and the machine runs again."""
    scene = Scene(rng)
    scene.setting()
    hero = person(rng)
    friend = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    scene.cast("hero", hero)
    scene.cast("friend", friend)
    machine, place, trouble, need, cause, remedy, tool, sound = scene.pick(MACHINES)
    workplace, _, work = lexicon.TRADES[hero.role]
    scene.set(machine=machine, place=place, trouble=trouble, need=need, cause=cause, remedy=remedy, tool=tool,
              sound=sound, workplace=workplace, work=work)  # fmt: skip
    title = scene.say("the {machine}", "the day the {machine} stopped", "how {hero} mended the {machine}",
                      "{hero} and the {machine}", "the {machine} of {village}")  # fmt: skip
    first = paragraph(
        scene.say(
            "{time} in {season}, {trouble}.",
            "it was {season} in {village} when {trouble}.",
            "in {village} nobody thought about the {machine} until {trouble}.",
        ),
        scene.say(
            '"This is bad," said {friend} the {friend_kind}. "Now {need}."',
            "{friend} the {friend_kind}, who was there, said what everyone thought: now {need}.",
            "{friend} the {friend_kind} tried to count the days, for {need}.",
        ),
    )
    second = paragraph(
        scene.say(
            "they sent for {hero} the {hero_kind}, who was at {workplace}, {work}.",
            "{hero} the {hero_kind} heard the noise and came [running|at once|with rolled-up sleeves].",
            "only {hero}, the {hero_kind}, did not shout. {He} walked around the {machine} [twice|three times] and listened.",
        ),
        scene.say(
            "first {he} [pushed it|kicked it|shook it], but nothing happened.",
            "first {he} pulled with all {his} strength, and fell over backwards, and {friend} laughed.",
            "first {he} asked everyone to push together, but it would not move.",
            "first {he} tried [hot water|soap|kind words], and that was no use at all.",
        ),
        scene.maybe(0.5, "the {weather} [dripped|beat|lay] on {his} hat, and still {he} did not give up.",
                    "{hero} sat down and thought."),
    )  # fmt: skip
    third = paragraph(
        scene.say(
            "then {he} [lay down|knelt] and looked [closely|from underneath], and saw it: {cause}.",
            "then {friend} held the lantern, and {hero} saw what was wrong. {cause}.",
            '"Look," said {hero}. "[No wonder|That is why]. {cause}."',
        ),
        scene.say(
            "{he} asked for a(n) {tool}.",
            '"Bring me a(n) {tool}," {he} said[|, and {friend} ran to fetch one].',
            "{friend} lent {him} a(n) {tool}.",
        ),
        scene.say(
            "slowly and carefully {he} {remedy}.",
            "with the {tool} {he} {remedy}.",
            "it took [an hour|the whole afternoon|a long time], but {he} {remedy}.",
        ),
    )
    fourth = paragraph(
        scene.say("for a moment nothing moved. Then {sound}.", "then {sound}.", "at last {sound}."),
        scene.say(
            "everyone [cheered|clapped|threw their hats in the air].",
            '"It works!" cried {friend}.',
            "the children ran through the streets to tell the news.",
        ),
        scene.say(
            '"How did you know?" asked {friend}. "I did not," said {hero}. "I looked."',
            "{hero} gave back the {tool} and went home to [supper|bed].",
            "since then the {machine} of {village} has never stopped again, and a(n) {tool} hangs beside it, [just in case|to be safe].",
            "that night there was [music|dancing|singing] in {village}, and the first dance was for {hero}.",
            'and when people asked what {he} wanted for it, {hero} said, "A cup of tea would be nice."',
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "friend_kind": friend.role,
        "village": scene.slots["village"], "season": scene.slots["season"], "machine": machine, "tool": tool,
        "cause": cause,
    }  # fmt: skip
    return Tale(
        "workshop",
        title_case(title),
        (first, second, third, fourth),
        scene.say(
            "the {machine} of {village} stopped because {cause}, and {hero} the {hero_kind} mended it with a(n) {tool}.",
            "{hero} the {hero_kind} finds out why the {machine} stopped and mends it with a(n) {tool}.",
        ),
        facts,
        (
            ("What was broken?", scene.say("the {machine} was broken.")),
            (f"What tool did {hero.name} use?", scene.say("{hero} used a(n) {tool}.")),
            (f"Why did the {machine} stop?", scene.say("it stopped because {cause}.")),
            ("Who mended it?", scene.say("{hero} the {hero_kind} mended it.")),
        ),
    )


SIGNS = (
    ("the ducks had left the pond", "the ducks"),
    ("the frogs were sitting on the roofs", "the frogs"),
    ("the cows would not lie down", "the cows"),
    ("the moles had moved to the top of the hill", "the moles"),
    ("the otters were carrying their young uphill", "the otters"),
)


def flood(rng: random.Random) -> Tale:
    """The river rises, one person reads the signs, the village works through the night."""
    scene = Scene(rng)
    scene.setting()
    scene.set(season=scene.pick(("spring", "autumn")))
    hero = person(rng)
    friend = person(rng, female=not hero.female, taken=(hero.name, hero.role))
    pet = animal(
        rng,
        kind=scene.pick(("dog", "cat", "goat", "donkey", "goose")),
        taken=(hero.name, friend.name, hero.role, friend.role),
    )
    scene.cast("hero", hero)
    scene.cast("friend", friend)
    scene.cast("pet", pet)
    sign, who = scene.pick(SIGNS)
    scene.set(sign=sign, who=who, days=scene.pick(("three", "four", "five", "six", "seven")),
              load=scene.pick(("sacks of sand", "baskets of stones", "old doors and planks", "barrels of clay")),
              mark_stone=scene.pick(("the third step of the bridge", "the iron ring on the wall", "the miller's doorstep")))  # fmt: skip
    title = scene.say("the night of the flood", "when the {river} rose", "high water at {village}", "{hero} and the river",
                      "the wall of {village}")  # fmt: skip
    first = paragraph(
        scene.say(
            "it had rained for {days} days on {village}.",
            "that {season} the rain fell on {village} for {days} days [without stopping|without a pause].",
            "for {days} days nobody in {village} had seen the sun.",
        ),
        scene.say(
            "the river {river} was brown and fast, and it had reached {mark_stone}.",
            "the {river} had climbed to {mark_stone}.",
        ),
        scene.say(
            "{hero}, the {hero_kind}, saw that {sign}.",
            "{hero} the {hero_kind} went out with {his} {pet_kind} {pet} and saw that {sign}.",
        ),
    )
    second = paragraph(
        scene.say(
            '"{who} know something," {he} said. "The water will come tonight."',
            '"I trust {who} more than the calendar," said {hero}. "We must build a wall before dark."',
        ),
        scene.say(
            "some people laughed, but {friend} the {friend_kind} did not.",
            '"Then what are we waiting for?" said {friend} the {friend_kind}.',
            "{friend} the {friend_kind} looked at the river, then at the sky, and fetched a shovel.",
        ),
        scene.say(
            "{hero} rang the bell until every door was open.",
            "{pet} the {pet_kind} ran from door to door, making such a noise that everyone came out.",
        ),
    )
    third = paragraph(
        scene.say(
            "all night they carried {load} to the bank.",
            "they made a line from the square to the river and passed {load} from hand to hand.",
        ),
        scene.say(
            "the old ones held the lanterns, and the children brought [hot soup|bread and tea].",
            "{friend} sang, and the others sang with {friend_him}, so that nobody fell asleep.",
            "when {hero} was too tired to lift, {friend} lifted for two.",
        ),
        scene.say(
            "at midnight the water reached the top of the wall, and there it stopped.",
            "before dawn the river pushed against the wall with all its weight, but the wall held.",
        ),
    )
    fourth = paragraph(
        scene.say(
            "in the morning the fields were a lake, but the houses of {village} were dry.",
            "when the sun rose, {village} stood like an island in the brown water, and not one house was wet.",
        ),
        scene.say(
            "{hero} sat down on the wall and slept with {pet} the {pet_kind} across {his} feet.",
            '{friend} put a blanket over {hero} and said, "Next time we will listen to {who} sooner."',
            "and {who}? They came back the very same day.",
            "they left the wall where it was, and in summer the children of {village} walk along it with their arms out.",
        ),
    )
    facts = {
        "hero": hero.name, "kind": hero.role, "friend": friend.name, "friend_kind": friend.role, "pet": pet.name,
        "pet_kind": pet.role, "village": scene.slots["village"], "river": scene.slots["river"],
        "season": scene.slots["season"], "load": scene.slots["load"],
    }  # fmt: skip
    return Tale(
        "village",
        title_case(title),
        (first, second, third, fourth),
        scene.say(
            "{hero} the {hero_kind} sees that {sign} and saves {village} from the flood with a wall of {load}.",
            "after {days} days of rain, {hero} and {friend} save {village} with a wall of {load}.",
        ),
        facts,
        (
            ("How long did it rain?", scene.say("it rained for {days} days.")),
            ("What was the wall made of?", scene.say("it was made of {load}.")),
            ("Which river rose?", scene.say("the river {river} rose.")),
            (f"How did {hero.name} know?", scene.say("{hero} saw that {sign}.")),
        ),
    )
