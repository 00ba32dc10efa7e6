"""The words of the story grammar: names, trades, animals, places, seasons, things. Data only."""

# ruff: noqa: SIM905, E501

WOMEN = (
    "Ada Agnes Alma Anna Astrid Beatrix Bella Clara Cora Dora Edith Elin Ella Elsa Emma Etta Fay Flora Freya Greta "
    "Hanna Hazel Hilda Ida Ines Ingrid Iris Ivy Jana Judith Kaya Lena Lila Lotte Lucy Mabel Maja Marta Mina Mira "
    "Nadia Nell Nora Olga Olive Petra Rosa Ruth Sara Selma Signe Sofia Tessa Thea Tilda Una Vera Wanda Willa Zoë"
).split()
MEN = (
    "Abel Adam Albert Anton Arlo Arne Axel Basil Bela Ben Bruno Carl Caspar Daniel David Edgar Emil Erik Ezra Felix "
    "Finn Franz Gus Hamid Hans Henry Hugo Ian Igor Isak Ivan Jakob Joel Johan Jonas Josef Karl Kofi Lars Leo Levi "
    "Luca Magnus Marco Martin Max Milo Nils Noah Olaf Omar Oscar Otto Paul Pedro Peter René Rolf Sam Sven Theo "
    "Tom Victor Walter Wim"
).split()
ANIMAL_NAMES = (
    "Acorn Amber Barley Basil Bean Bramble Brook Button Clover Copper Dandelion Dusty Fern Fidget Finch Hazel "
    "Juniper Lentil Maple Marble Minnow Mistle Moss Nettle Nutmeg Oat Olive Pebble Pepper Pip Poppy Quill Reed "
    "Rowan Rusty Sable Saffron Sedge Snowdrop Sorrel Tansy Teasel Thimble Thistle Tumble Whistle Willow Wren"
).split()
NAME_STARTS = tuple(
    "bel bra cor dal dre el fal gal har is jor kel lor mal mor nal or per quel ros sel tam tor ul vel wen yar zan".split()
)
NAME_MIDDLES = ("", "a", "i", "o", "la", "li", "mi", "na", "ne", "ri", "va", "ve")
NAME_ENDS = tuple("bek da din fa ka lan lin mar nell ra rik ron sa than va vik wyn zel".split())

# trade: (workplace, tool, what is made or done there)
TRADES: dict[str, tuple[str, str, str]] = {
    "miller": ("the mill", "wooden rake", "grinding the village's grain"),
    "baker": ("the bakery", "long wooden peel", "baking bread before sunrise"),
    "ferry keeper": ("the ferry landing", "boat hook", "carrying people across the river"),
    "beekeeper": ("the orchard", "smoke pot", "looking after forty hives"),
    "blacksmith": ("the forge", "heavy hammer", "shoeing horses and mending ploughs"),
    "carpenter": ("the workshop", "hand plane", "making doors, chairs and cradles"),
    "clockmaker": ("the clock shop", "small brass screwdriver", "mending clocks that had stopped"),
    "weaver": ("the weaving shed", "shuttle", "weaving blankets of grey wool"),
    "potter": ("the pottery", "wire cutter", "turning jugs and bowls"),
    "shepherd": ("the high pasture", "crook", "watching over sixty sheep"),
    "gardener": ("the walled garden", "iron spade", "growing beans, leeks and roses"),
    "fisher": ("the jetty", "landing net", "catching trout and perch"),
    "lock keeper": ("the lock house", "iron windlass", "letting the barges through"),
    "lighthouse keeper": ("the lighthouse", "oil can", "keeping the lamp lit"),
    "mapmaker": ("the map room", "pair of compasses", "drawing maps of the valley"),
    "bell ringer": ("the bell tower", "pot of grease", "ringing the hours"),
    "bookbinder": ("the bindery", "bone folder", "sewing pages into books"),
    "cobbler": ("the shoe shop", "curved awl", "mending boots"),
    "teacher": ("the schoolhouse", "piece of chalk", "teaching the children to count and read"),
    "boatbuilder": ("the boatyard", "caulking iron", "building small strong boats"),
    "cooper": ("the barrel yard", "wooden mallet", "making barrels and buckets"),
    "glassblower": ("the glassworks", "blowpipe", "blowing bottles and lamps"),
}

ANIMALS = (
    "badger bear beaver cat crow deer dog donkey duck fox frog goat goose hare hedgehog heron horse kingfisher "
    "lamb mole moth mouse otter owl pig rabbit rat raven robin salmon seal snail sparrow squirrel swan toad "
    "tortoise turtle vole weasel wolf"
).split()
FAR_ANIMALS = (
    "alligator ant ape bat bee beetle bull butterfly camel chicken cow crab crocodile dolphin dragon eagle elephant elk ferret giraffe "
    "hamster hen hippo kangaroo koala lion lizard llama lobster lynx monkey moose newt octopus ostrich panda parrot "
    "peacock penguin pigeon pony puffin rhino rooster shark sheep snake spider stork tiger unicorn whale worm yak zebra"
).split()

VILLAGES = (
    "Alderbrook Ashford Birchwater Coldbridge Elmstead Fallowmere Fernhollow Greywater Hazelden Kettleby Larkfield "
    "Millford Mossgate Netherby Oakmere Otterbank Redmarsh Rushford Saltholm Sedgeley Stonebeck Thornby Underhill "
    "Waterlow Wendover Willowby Withy"
).split()
RIVERS = ("Wend", "Alder", "Brim", "Lune", "Tarn", "Isk", "Marl", "Oder", "Sill", "Teal", "Yarrow", "Ouse")
ISLANDS = ("Sand Island", "Gull Island", "the Skerries", "Lamp Island", "Seal Rock", "North Holm", "Pepper Island")
PORTS = ("Saltholm", "Port Ansel", "Blackhaven", "Eastquay", "Corran", "Vestby", "Limehouse", "Old Harbour", "Marisk")

TIMES = ("one morning", "one evening", "one afternoon", "early one morning", "late one evening", "one quiet day")

# season: (weather, sky, ground)
SEASONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "spring": (
        ("rain", "a soft grey sky", "wet grass"),
        ("sunshine", "a pale blue sky", "new grass"),
        ("mist", "a white sky", "wet fields"),
        ("wind", "a sky full of quick clouds", "muddy lanes"),
    ),
    "summer": (
        ("heat", "a hard blue sky", "dry grass"),
        ("thunder", "a dark purple sky", "dusty roads"),
        ("sunshine", "a clear sky", "warm stones"),
        ("warm rain", "a low yellow sky", "steaming fields"),
    ),
    "autumn": (
        ("fog", "a sky the colour of wool", "fallen leaves"),
        ("wind", "a sky of torn clouds", "yellow leaves"),
        ("rain", "a heavy grey sky", "deep puddles"),
        ("cold sunshine", "a high thin sky", "brown leaves"),
    ),
    "winter": (
        ("snow", "a white sky", "deep snow"),
        ("frost", "a sky full of stars", "hard frost"),
        ("sleet", "a dark sky", "grey slush"),
        ("ice", "a pale cold sky", "frozen mud"),
    ),
}
SEASON_MARKS: dict[str, tuple[str, ...]] = {
    "spring": (
        "the swallows had come back",
        "the apple trees were in flower",
        "the lambs were out",
        "the cuckoo called",
    ),
    "summer": (
        "the hay was cut",
        "the bees were loud in the lime trees",
        "the river ran low",
        "the cherries were ripe",
    ),
    "autumn": (
        "the apples were in the barrels",
        "the geese were flying south",
        "the leaves were turning",
        "the barley was in",
    ),
    "winter": (
        "the pond was frozen",
        "the nights were long",
        "smoke rose from every chimney",
        "the robins came to the door",
    ),
}

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "silver", "golden")
MOODS = (
    "happy",
    "calm",
    "curious",
    "proud",
    "shy",
    "tired",
    "brave",
    "patient",
    "cheerful",
    "quiet",
    "worried",
    "kind",
)
THINGS = (
    "brass key", "silver thimble", "blue scarf", "red kite", "wooden flute", "copper whistle", "little compass",
    "leather notebook", "pocket watch", "glass marble", "carved spoon", "knitted hat", "tin drum", "bone needle",
    "green ribbon", "gold ring", "small lantern", "feather pen", "old map", "clay cup", "steel fish hook",
    "iron bell", "paper boat", "pearl button", "magnifying glass", "music box", "horseshoe", "wicker basket",
)  # fmt: skip
SHINY = frozenset({
    "brass key", "silver thimble", "copper whistle", "little compass", "pocket watch", "glass marble", "bone needle",
    "gold ring", "steel fish hook", "iron bell", "pearl button", "magnifying glass",
})  # fmt: skip
FOODS = (
    "bread", "cheese", "apples", "plums", "honey", "soup", "oat cakes", "walnuts", "pears", "milk", "butter",
    "eggs", "mushrooms", "turnips", "beans", "cherries", "smoked fish", "barley",
)  # fmt: skip
SHIPS = (
    "Kittiwake", "Grey Goose", "Morning Star", "Patience", "Silver Eel", "Two Sisters", "Windflower", "Old Hare",
    "Petrel", "Long Summer", "Salt Cat", "Good Intent", "Lady of Corran",
)  # fmt: skip
