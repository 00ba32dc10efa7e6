"""The plots of the story grammar, one module per genre. Each plot is a function from a random stream to a `Tale`."""

import random
from collections.abc import Callable, Mapping

from training.grammar import Tale
from training.tales import animals, country, refrains, sea, village, workshop

Plot = Callable[[random.Random], Tale]

PLOTS: Mapping[str, tuple[Plot, float]] = {
    "lost": (village.lost, 1.3),
    "repair": (village.repair, 1.0),
    "flood": (village.flood, 0.8),
    "wish": (animals.wish, 2.6),
    "voyage": (sea.voyage, 1.2),
    "beacon": (sea.beacon, 0.7),
    "bottle": (sea.bottle, 0.7),
    "invention": (workshop.invention, 1.0),
    "apprentice": (workshop.apprentice, 0.8),
    "mystery": (country.mystery, 0.9),
    "swap": (country.swap, 0.7),
    "rescue": (country.rescue, 0.8),
    "planting": (country.planting, 0.6),
    "toll": (refrains.toll, 0.8),
    "song": (refrains.song, 0.6),
}


def any_tale(rng: random.Random) -> Tale:
    """A tale with a plot drawn by weight."""
    plots, weights = zip(*PLOTS.values(), strict=True)
    plot: Plot = rng.choices(plots, weights)[0]
    return plot(rng)
