"""Short forms that are not tales: letters, recipes, weather reports, logs, instructions, riddles, notices, verses.

Each function makes one request and its answer; plain documents use the answer alone.
"""

# ruff: noqa: E501 -- a template is one line

import random
from collections.abc import Callable, Mapping

from training import lexicon
from training.grammar import Scene, animal, join_words, person, polish, sample, with_article
from training.records import Exchange
from training.tales.refrains import VERSES
from training.tales.sea import CARGOES


def letter(rng: random.Random) -> Exchange:
    """A letter between two named people: greeting, news, one request, farewell."""
    scene = Scene(rng)
    scene.setting()
    writer = person(rng)
    reader = person(rng, taken=(writer.name, writer.role))
    scene.cast("hero", writer)
    scene.cast("reader", reader)
    workplace, tool, _ = lexicon.TRADES[writer.role]
    scene.set(
        workplace=workplace,
        tool=tool,
        thing=scene.pick(lexicon.THINGS),
        food=scene.pick(lexicon.FOODS),
        more=scene.pick(lexicon.FOODS),
    )
    subject, body = scene.pick((
        ("the {thing}", "thank you for the {thing}. It arrived [yesterday|on Tuesday|this morning], wrapped in straw, and it is more beautiful than I had hoped. [I keep it by my bed.|I carry it with me wherever I go.]"),
        ("the flood", "the {river} came over its banks last week, and we carried everything upstairs. Nobody was hurt. [The hens are living in the kitchen.|The boat was in the garden, which made the children laugh.]"),
        ("a visit", "will you come to {village} this {season}? There is a bed for you under the roof, and the {river} is [calm|clear]. [You can help me at {workplace}.|We can walk along the {river} as we used to.]"),
        ("the new work", "I have been a(n) {hero_kind} for a month now. My hands hurt, but I am learning. [Yesterday I was allowed to use the {tool} by myself.|Soon I will be allowed to use the {tool} by myself.]"),
        ("the winter", "we have had {weather} for [nine|ten|twelve] days, and the road is closed. Do not worry about us. There is [enough wood|enough {food}], and in the evenings we tell stories."),
        ("a quarrel", "I have thought about what I said, and I am sorry. You were right about the {thing}, and I was [tired|too proud] to see it. Can we begin again?"),
        ("good news", "I have good news. After all these years the {thing} has been found! [It was behind the clock.|It was under the stairs.|The children found it in the barn.] I wish you had been here to see it."),
    ))  # fmt: skip
    scene.set(subject=subject, body=body)
    text = "\n\n".join((
        scene.say("dear {reader},", "my dear {reader},"),
        scene.say("{body}"),
        scene.say(
            "please send me some {more} if you have any to spare.", "write soon and tell me how you are.",
            "the {hero_kind}'s life is a good one, and I think of you often.", "it is late and the candle is short, so I will stop here.",
            "P.S. it is {season} here, and the {river} is [quiet|high|low].",
        ),
        f"{scene.say('Your friend,', 'With love,', 'Yours,', 'As ever,')}\n{writer.name}",
    ))  # fmt: skip
    request = scene.say(
        "write a letter from {hero} to {reader} about {subject}.", "write a short letter to {reader} about {subject}. Sign it {hero}.",
        "{hero} the {hero_kind} writes to {reader} about {subject}. Write the letter.",
    )  # fmt: skip
    return Exchange(request, text)


# dish, ingredients, steps
RECIPES = (
    ("oat cakes", ("two cups of oats", "one spoon of butter", "a pinch of salt", "half a cup of warm water"),
     ("Mix the oats and the salt.", "Melt the butter and stir it in with the water.", "Press the dough flat and cut it into squares.", "Bake on a hot stone until the edges are brown.")),
    ("mushroom soup", ("a basket of mushrooms", "one onion", "two spoons of butter", "a jug of milk", "salt and pepper"),
     ("Cut the mushrooms and the onion into small pieces.", "Fry them gently in the butter.", "Pour in the milk and let it simmer.", "Add salt and pepper and serve with bread.")),
    ("honey bread", ("three cups of flour", "one cup of warm milk", "a little yeast", "four spoons of honey"),
     ("Stir the yeast and the honey into the milk.", "Add the flour and knead for ten minutes.", "Let the dough rest until it has doubled.", "Bake until it sounds hollow when you knock on it.")),
    ("apple pie", ("six apples", "two cups of flour", "one cup of butter", "three spoons of sugar", "a little cinnamon"),
     ("Rub the butter into the flour and add a splash of cold water.", "Roll out the dough and line the dish with it.", "Fill it with sliced apples, sugar and cinnamon.", "Cover it with the rest of the dough and bake until golden.")),
    ("fish stew", ("two trout", "three potatoes", "one leek", "a spoon of butter", "a bunch of parsley"),
     ("Clean the fish and cut it into large pieces.", "Boil the potatoes and the leek until they are soft.", "Lay the fish on top and cover the pot.", "After ten minutes stir in the butter and the parsley.")),
    ("pancakes", ("two eggs", "one cup of flour", "two cups of milk", "a pinch of salt"),
     ("Beat the eggs with the milk.", "Stir in the flour and the salt until there are no lumps.", "Let the batter stand while the pan gets hot.", "Fry thin pancakes on both sides.")),
    ("bean soup", ("one cup of beans", "two carrots", "a piece of bacon", "one bay leaf"),
     ("Soak the beans overnight.", "Boil them with the bay leaf until they are tender.", "Add the carrots and the bacon.", "Take out the bay leaf before you serve it.")),
    ("plum jam", ("a bucket of plums", "half as much sugar", "the juice of one lemon"),
     ("Take the stones out of the plums.", "Boil the plums with the sugar and stir all the time.", "Add the lemon when a drop stays firm on a cold plate.", "Fill clean jars to the rim and close them while they are hot.")),
    ("ginger biscuits", ("two cups of flour", "one cup of brown sugar", "two spoons of ginger", "one egg", "a little butter"),
     ("Stir everything together in one bowl.", "Roll the dough into small balls.", "Set them far apart, for they will spread.", "Bake for as long as it takes to sing four songs.")),
)  # fmt: skip


def recipe(rng: random.Random) -> Exchange:
    """A short recipe: ingredients as a list, numbered steps, one piece of advice."""
    scene = Scene(rng)
    dish, ingredients, steps = scene.pick(RECIPES)
    cook = person(rng)
    scene.cast("hero", cook)
    scene.set(dish=dish, number=scene.pick(("two", "four", "six")), first=ingredients[0])
    heading = scene.say("{hero}'s {dish}", "{dish}", "{dish} for {number}")
    listed = "\n".join(f"- {item}" for item in ingredients)
    numbered = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    advice = scene.maybe(
        0.7, "eat it [warm|with friends|on the same day].", "tip: take your time.", "it tastes even better [the next day|by a window|after a walk].",
        "keep a little for the neighbours.",
    )  # fmt: skip
    request = scene.say(
        "give me a recipe for {dish}.", "how do I make {dish}?", "write a short recipe for {dish}.", "I would like to cook {dish}. What do I need?",
    )  # fmt: skip
    return Exchange(request, f"{heading}\n\nYou need:\n{listed}\n\n{numbered}" + (f"\n\n{advice}" if advice else ""))


def weather_report(rng: random.Random) -> Exchange:
    """Weather by time of day with temperatures that fit the season."""
    scene = Scene(rng)
    scene.setting()
    low, high = {"spring": (4, 16), "summer": (14, 31), "autumn": (3, 15), "winter": (-9, 3)}[scene.slots["season"]]
    morning = rng.randint(low, (low + high) // 2)
    noon = rng.randint((low + high) // 2, high)
    night = rng.randint(low - 3, morning)
    scene.set(day=scene.pick(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")), morning=str(morning), noon=str(noon), night=str(night),
              wind=scene.pick(("north", "south", "east", "west", "north-west", "south-east")), force=scene.pick(("light", "fresh", "strong")))  # fmt: skip
    text = "\n".join((
        scene.say("weather for {village}, {day}"),
        "",
        scene.say("morning: [mist over the {river}|clear and quiet|a few clouds|{weather}], {morning} °C."),
        scene.say("noon: [sun and cloud|{weather} at times|bright|mostly cloudy], {noon} °C."),
        scene.say("night: [clear|cloudy|{weather}|still], {night} °C."),
        scene.say("wind: {force}, from the {wind}."),
        scene.say(
            "advice: [take a coat|leave the umbrella at home|bring in the washing|close the shutters|a good day for the garden|a good day to stay by the stove].",
            "the {river} is [low|high|falling slowly|rising slowly] at the bridge.",
        ),
    ))  # fmt: skip
    request = scene.say(
        "write a weather report for {village} on {day} in {season}.", "what is the weather like in {village} on {day}? It is {season}.",
        "give me the weather for {village}, {day}, in {season}.",
    )  # fmt: skip
    return Exchange(request, text)


def ship_log(rng: random.Random) -> Exchange:
    """Four to six entries of a ship's log; ship, captain and cargo stay the same and the days count up."""
    scene = Scene(rng)
    captain = person(rng)
    pet = animal(rng, kind=scene.pick(("cat", "dog", "parrot", "goat")), taken=(captain.name,))
    scene.cast("hero", captain)
    scene.cast("pet", pet)
    home, target = sample(rng, lexicon.PORTS, 2)
    scene.set(
        ship=scene.pick(lexicon.SHIPS),
        home=home,
        target=target,
        cargo=scene.pick(CARGOES),
        island=scene.pick(lexicon.ISLANDS),
    )
    days = rng.randint(4, 6)
    middle = (
        "wind from the [north|south|west|east]. [Good speed.|Slow going.|The crew is well.]",
        "passed {island} at [noon|dawn|dusk]. [Seals on the rocks.|A light was burning there.|Nobody to be seen.]",
        "fog. [Rang the bell every minute.|Could not see {pet} at the other end of the deck.|Anchored and waited.]",
        "[Rain and more rain.|Heavy sea.] [Checked the {cargo}: dry.|One sail torn and mended.|Everyone is wet.]",
        "calm. [Washed the deck.|Mended nets.|Painted the boat.] {pet} the {pet_kind} [slept|caught a fish|sat on the chart].",
        "whales in the [morning|evening]. [Nobody spoke for an hour.|Counted nine of them.]",
    )
    entries = [scene.say("day 1. Left {home} with {cargo} for {target}. [All well.|Fair wind.]")]
    entries += [
        scene.say(f"day {i}. {line[0].upper() + line[1:]}") for i, line in enumerate(sample(rng, middle, days - 2), 2)
    ]
    entries.append(
        scene.say(
            f"day {days}. Arrived in {{target}} with all the {{cargo}}. [All well.|Signed, {{hero}}.|Hot pies for the crew.]"
        )
    )
    text = scene.say("log of the {ship}, captain {hero}") + "\n\n" + "\n".join(entries)
    request = scene.say(
        f"write the log of the ship {{ship}}, sailing from {{home}} to {{target}} in {days} days.",
        f"write a ship's log of {days} days. The ship is the {{ship}} and the captain is {{hero}}.",
    )
    return Exchange(request, text)


HOW_TO = (
    ("mend a net", ("Spread the net on the grass and look for the hole.", "Cut away the torn threads until the hole has clean edges.", "Start at a knot that holds, and copy the size of the old meshes.", "Pull every new knot tight before you tie the next one.")),
    ("light a fire", ("Choose a dry place out of the wind.", "Build a small tent of thin twigs over a handful of dry grass.", "Light the grass from below and wait until the twigs burn.", "Add thicker wood little by little, and keep a bucket of water near.")),
    ("cross a ford", ("Take off your boots and hang them around your neck.", "Cut a strong stick that reaches to your shoulder.", "Face the current and move one foot at a time.", "If the water comes above your knees, go back and look for another place.")),
    ("plant a tree", ("Dig a hole twice as wide as the roots.", "Set the tree so that it stands as deep as before.", "Fill the hole and step on the earth gently.", "Give it two buckets of water, and come back every day.")),
    ("sharpen a knife", ("Wet the stone.", "Lay the blade flat and lift its back by the width of a coin.", "Draw it over the stone ten times on each side.", "Try it on a blade of grass and never on your thumb.")),
    ("read the clouds", ("Look up three times a day.", "High thin feathers mean that the weather will change.", "Towers with flat tops mean thunder.", "Write down what you saw and what came of it.")),
    ("oil a clock", ("Stop the pendulum with one finger.", "Wipe the old oil away with a soft cloth.", "Put one small drop on each end of each axle.", "Start the pendulum again and listen for an even beat.")),
    ("steer a small boat", ("Sit where the boat lies level.", "Choose a tree on the far bank and keep your eyes on it.", "Push the tiller the other way from where you want to go.", "Make small movements and wait for the boat to answer.")),
    ("wash wool", ("Shake out the straw.", "Lay the wool in warm water with a little soap.", "Press it and never rub it.", "Rinse it twice and dry it in the shade.")),
)  # fmt: skip


def how_to(rng: random.Random) -> Exchange:
    """Four numbered steps."""
    task, steps = rng.choice(HOW_TO)
    scene = Scene(rng)
    scene.set(task=task)
    text = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    if rng.random() < 0.5:
        text = scene.say("how to {task}") + "\n\n" + text
    return Exchange(
        scene.say("how do I {task}?", "tell me how to {task}.", "explain in four steps how to {task}."), text
    )


RIDDLES = (
    ("a river", "I run all day and never leave my bed", "I have a mouth and never eat"),
    ("a bridge", "I cross the water and never get wet", "people walk on my back and I do not complain"),
    ("an echo", "I answer everyone and know nothing", "the louder you ask, the louder I speak"),
    ("a shadow", "I am long in the morning and short at noon", "I follow you and never overtake you"),
    ("a candle", "I grow shorter the longer I live", "I die in the wind and weep while I work"),
    ("a clock", "I have hands and cannot hold anything", "I count all day and never learn"),
    ("snow", "I fall and am never hurt", "I cover the village and make no sound"),
    ("a key", "I am small and every house obeys me", "I turn and do not get dizzy"),
    ("a bell", "I have a tongue and no teeth", "I speak only when I am struck"),
    ("a mill wheel", "I walk all day and stay where I am", "the river is my road and bread is my reward"),
    ("a map", "I have rivers without water and towns without people", "you fold me up and put the valley in your pocket"),
    ("the wind", "I knock on the door and have no hands", "nobody has seen me, but every tree bows to me"),
)  # fmt: skip


def riddle(rng: random.Random) -> Exchange:
    """A riddle with its answer, or the guessing of one."""
    answer, one, two = rng.choice(RIDDLES)
    scene = Scene(rng)
    clues = (one, two) if rng.random() < 0.5 else (two, one)
    text = polish(f"{clues[0]}. {clues[1]}. What am I?")
    solution = polish(f"{answer}.")
    if rng.random() < 0.4:
        return Exchange(text, scene.say(f"you are {answer}.", f"{answer}!", f"that must be {answer}."))
    return Exchange(
        scene.say("tell me a riddle.", "do you know a riddle?", f"make a riddle about {answer}."),
        f"{text}\n\nAnswer: {solution}",
    )


def notice(rng: random.Random) -> Exchange:
    """A notice for the board on the village square."""
    scene = Scene(rng)
    scene.setting()
    owner = person(rng)
    scene.cast("hero", owner)
    workplace, _, _ = lexicon.TRADES[owner.role]
    thing = scene.pick(lexicon.THINGS)
    scene.set(thing=thing, workplace=workplace, day=scene.pick(("Monday", "Wednesday", "Friday", "Saturday", "Sunday")), hour=scene.pick(("eight", "ten", "noon", "three", "six")),
              food=scene.pick(lexicon.FOODS), place=scene.pick(("the bridge", "the well", "the mill", "the market", "the ferry landing")))  # fmt: skip
    kind = scene.pick(("lost", "found", "sale", "meeting"))
    texts = {
        "lost": ("LOST: {a_thing}, near {place}. Whoever finds it, please bring it to {hero} at {workplace}. Reward: [a basket of {food}|a warm supper|a good story].",
                 "a lost {thing}"),
        "found": ("FOUND: {a_thing}, near {place}. The owner may collect it from {hero} at {workplace}[| and must tell us what is special about it].", "a found {thing}"),
        "sale": ("FOR SALE: {a_thing}, [as good as new|a little worn|well cared for]. Ask for {hero} at {workplace}, [any morning|after sunset|on {day}].", "a(n) {thing} for sale"),
        "meeting": ("MEETING on {day} at {hour}, in front of {place}. We will speak about the {river} and [the repair of the road|the harvest|the new roof of the school]. Bring [a chair|a lantern|{food}]. {hero}, {hero_kind}.",
                    "a village meeting on {day}"),
    }  # fmt: skip
    template, subject = texts[kind]
    text = scene.say(template.replace("{a_thing}", with_article(thing)))
    request = scene.say(
        f"write a notice about {subject} for {{village}}.",
        f"write a short notice by {{hero}} the {{hero_kind}} about {subject}.",
    )
    return Exchange(request, text)


RHYMES = (
    (("the {a} ran over the hill", "and came to a stop at the mill"), ("the {a} lay down by the mill", "and slept while the evening grew still")),
    (("the {a} looked up at the moon", "and hummed an agreeable tune"), ("the {a} came home about noon", "and slept through the whole afternoon")),
    (("the {a} went out in the rain", "and came back much wetter again"), ("the {a} wrote its name on the pane", "and waited for sunshine in vain")),
    (("the {a} set sail in a hat", "with nothing to eat but a sprat"), ("the {a} said good day to the cat", "who lay in the sun on the mat")),
    (("the {a} built a boat out of bark", "and sailed it about in the dark"), ("the {a} sang along with the lark", "and painted a sail on the ark")),
    (("the {a} found a coin in the sand", "and held it all day in its hand"), ("the {a} swam ashore to the land", "where people were making a band")),
)  # fmt: skip


def verse(rng: random.Random) -> Exchange:
    """Two couplets about one animal, or a song with its refrain."""
    scene = Scene(rng)
    animal_kind = rng.choice(lexicon.ANIMALS)
    scene.set(a=animal_kind)
    if rng.random() < 0.3:
        refrain = rng.choice(VERSES)
        first, second = sample(rng, RHYMES, 2)
        lines = [first[0][0] + ",", first[0][1] + ".", refrain, second[1][0] + ",", second[1][1] + ".", refrain]
        request = scene.say("write a song about a(n) {a} with a refrain.")
    else:
        first, second = sample(rng, RHYMES, 2)
        lines = [first[0][0] + ",", first[0][1] + ";", second[1][0] + ",", second[1][1] + "."]
        request = scene.say(
            "write a short poem about a(n) {a}.",
            "write four lines of verse about a(n) {a}.",
            "a poem about a(n) {a}, please.",
        )
    return Exchange(request, "\n".join(scene.say(line) for line in lines))


def stock_list(rng: random.Random) -> Exchange:
    """A list of things with counts, copied in another order: by name or by number."""
    things = sample(rng, lexicon.THINGS, rng.randint(3, 6))
    counts = sample(rng, range(1, 60), len(things))
    rows = [f"{thing}: {count}" for thing, count in zip(things, counts, strict=True)]
    listed = "\n".join(rows)
    draw = rng.random()
    if draw < 0.35:
        return Exchange(f"Sort this list by name:\n\n{listed}", "\n".join(sorted(rows)))
    if draw < 0.7:
        return Exchange(f"Repeat this list:\n\n{listed}", listed)
    thing, count = rng.choice(list(zip(things, counts, strict=True)))
    return Exchange(f"{listed}\n\nWhat number stands after {thing}?", f"{count}")


def talk(rng: random.Random) -> Exchange:
    """A dialogue of two people at work, each line with its speaker."""
    scene = Scene(rng)
    scene.setting()
    one = person(rng)
    two = person(rng, taken=(one.name, one.role))
    scene.cast("hero", one)
    scene.cast("friend", two)
    workplace, tool, _ = lexicon.TRADES[one.role]
    scene.set(tool=tool, workplace=workplace, food=scene.pick(lexicon.FOODS), thing=scene.pick(lexicon.THINGS))
    opening = (
        (
            "Good morning. How is the {river} today?",
            "[Higher than yesterday|Lower than yesterday|As calm as milk]. And how is the work?",
        ),
        ("Have you seen my {tool}?", "It is [behind you|on the bench|where you left it], as always."),
        ("Is it true that you found a(n) {thing}?", "Yes, and I am looking for its owner."),
        ("You look tired. Did you sleep?", "Not much. There was {weather} all night."),
    )
    middle = (
        ("Shall we share some {food}?", "Gladly. I have been hungry since dawn."),
        ("They say {mark}.", "Then it really is {season}."),
        ("Do you ever think of leaving {village}?", "Every morning. And every evening I am glad that I stayed."),
        ("What would you do with a free day?", "[Sleep.|Walk to the sea.|Sit here and talk to you.]"),
    )
    closing = (
        ("Well, the work will not do itself.", "No. But it can wait until we have finished our tea."),
        ("It is getting late.", "Then until tomorrow, {speaker}."),
        ("Thank you for the talk.", "Come again."),
    )
    lines = []
    for pair in (scene.pick(opening), *sample(rng, middle, rng.randint(1, 2)), scene.pick(closing)):
        lines.append(f"{one.name}: " + scene.say(pair[0]))
        lines.append(f"{two.name}: " + scene.say(pair[1].replace("{speaker}", "{hero}")))
    request = scene.say(
        "write a dialogue between {hero} the {hero_kind} and {friend} the {friend_kind}.",
        "write a short conversation between {hero} and {friend}.",
    )
    return Exchange(request, "\n".join(lines))


def naming(rng: random.Random) -> Exchange:
    """A list of words on request: names, trades, things."""
    number, word = rng.choice(((2, "two"), (3, "three"), (4, "four"), (5, "five")))
    kind, options = rng.choice((
        ("animals", lexicon.ANIMALS), ("trades", list(lexicon.TRADES)), ("things to eat", lexicon.FOODS), ("rivers", lexicon.RIVERS),
        ("ships", lexicon.SHIPS), ("villages", lexicon.VILLAGES), ("names for a cat", lexicon.ANIMAL_NAMES), ("colours", lexicon.COLOURS),
    ))  # fmt: skip
    scene = Scene(rng)
    words = sample(rng, options, number)
    request = scene.say(f"name {word} {kind}.", f"tell me {word} {kind}.", f"give me a list of {word} {kind}.")
    if "list" in request:
        return Exchange(request, "\n".join(f"- {w}" for w in words))
    return Exchange(request, polish(join_words(words)) + ".")


FORMS: Mapping[Callable[[random.Random], Exchange], float] = {
    letter: 2.0, recipe: 1.4, weather_report: 1.4, ship_log: 1.2, how_to: 0.8, riddle: 0.8, notice: 1.0, verse: 0.9,
    stock_list: 0.8, talk: 1.0, naming: 0.6,
}  # fmt: skip
PLAIN = (letter, recipe, weather_report, ship_log, how_to, notice, verse, talk)


def any_form(rng: random.Random) -> Exchange:
    """A request for a short form, and its answer."""
    make: Callable[[random.Random], Exchange] = rng.choices(list(FORMS), list(FORMS.values()))[0]
    return make(rng)
