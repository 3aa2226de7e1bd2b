"""Made-up text without end: filler sentences, plain words, coded words. All of it is written here, none is anybody's data."""

from __future__ import annotations

import itertools
import random
import string

_PEOPLE = (
    "the baker", "the miller", "a young sailor", "the old gardener", "the schoolmaster", "a travelling painter", "the ferryman",
    "the carpenter", "a tired farmer", "the librarian", "the blacksmith", "the widow next door", "a quiet child", "the postman",
    "the mayor's cousin", "the shepherd", "a violin player", "the cook", "the night watchman", "the weaver", "a retired captain",
    "the potter", "the doctor", "a merchant from the coast", "the beekeeper", "the clockmaker", "the tailor", "the innkeeper",
)  # fmt: skip
_DEEDS = (
    "carried {thing} to {place}", "looked for {thing} behind {place}", "sold {thing} at {place}", "forgot {thing} near {place}",
    "mended {thing} inside {place}", "painted {thing} in front of {place}", "found {thing} under {place}", "hid {thing} in {place}",
    "talked about {thing} on the way to {place}", "dreamt of {thing} and of {place}", "cleaned {thing} beside {place}",
    "borrowed {thing} from someone at {place}", "admired {thing} that stood by {place}", "wrapped {thing} and left for {place}",
    "dropped {thing} on the steps of {place}", "gave away {thing} at {place}", "asked for {thing} at {place}",
)  # fmt: skip
_THINGS = (
    "a basket of apples", "an old lantern", "a wooden chair", "two loaves of bread", "a coil of rope", "a silver spoon", "a torn coat",
    "a jar of honey", "the broken clock", "a pair of boots", "a bundle of letters", "a copper kettle", "the heavy hammer",
    "a blue scarf", "a sack of flour", "a small mirror", "an empty bottle", "the church bell", "a cart of hay", "a painted box",
    "a book of songs", "a loaf of cheese", "the garden gate", "a fishing net", "a pot of soup", "a bunch of flowers", "a lame horse",
    "a stack of plates",
)  # fmt: skip
_PLACES = (
    "the market", "the mill", "the harbour", "the church", "the bridge", "the orchard", "the school", "the river bank", "the stables",
    "the old tower", "the inn", "the forest path", "the town hall", "the well", "the lighthouse", "the railway station", "the vineyard",
    "the quarry", "the chapel on the hill", "the bakery", "the courtyard", "the barn", "the cemetery wall", "the ferry landing",
)  # fmt: skip
_TIMES = (
    "In the morning", "Before sunrise", "Late in the evening", "On a rainy day", "After the storm", "During the harvest",
    "One cold night", "Towards noon", "While the others slept", "At the end of the week", "As soon as the snow melted",
    "Every now and then", "Without a word", "For no good reason", "To everyone's surprise", "With great care",
)  # fmt: skip
_ENDINGS = (
    "", "", "", " and said nothing more", " because the days were growing short", " and went home content", " while the rain fell",
    " as people in that valley always did", " and nobody wondered why", " before anyone could object", " although it was late",
)  # fmt: skip

_FIRST = (
    "stone", "river", "winter", "silver", "forest", "candle", "copper", "garden", "harbour", "summer", "thunder", "velvet", "amber",
    "meadow", "iron", "shadow", "morning", "ocean", "paper", "sugar", "cotton", "desert", "feather", "golden", "hollow", "ivory",
    "jungle", "lemon", "marble", "needle", "orange", "pepper", "quiet", "rocket", "salt", "timber", "umber", "valley", "willow",
    "yellow", "bitter", "cloud",
)  # fmt: skip
_SECOND = (
    "bridge", "field", "light", "gate", "horse", "house", "ship", "song", "stone", "tower", "water", "wheel", "wind", "wood", "bird",
    "bell", "book", "box", "clock", "cloth", "corn", "cup", "door", "drum", "fish", "flower", "glass", "hammer", "hill", "key", "knife",
    "ladder", "lamp", "leaf", "letter", "mirror", "nail", "path", "plate", "road", "rope", "sand", "seed", "shell", "spoon", "star",
    "storm", "thread",
)  # fmt: skip
_NAMES = (
    "Lisbon", "Nairobi", "Oslo", "Quito", "Havana", "Dublin", "Cairo", "Vienna", "Lima", "Seoul", "Prague", "Tunis", "Madrid", "Boston",
    "Kyoto", "Geneva", "Athens", "Warsaw", "Toronto", "Manila", "Berlin", "Accra", "Bogota", "Jakarta", "Sydney", "Riga", "Milan",
    "Dakar", "Hanoi", "Tehran", "Moscow", "Denver", "Zurich", "Naples", "Bergen", "Cardiff", "Perth", "Osaka", "Lagos", "Delhi",
)  # fmt: skip

WORDS = tuple(first + second for first, second in itertools.product(_FIRST, _SECOND))
NAMES = _NAMES


def sentence(draw: random.Random) -> str:
    """One filler sentence; without digits, so that no filler can look like an answer."""
    deed = draw.choice(_DEEDS).format(thing=draw.choice(_THINGS), place=draw.choice(_PLACES))
    return f"{draw.choice(_TIMES)} {draw.choice(_PEOPLE)} {deed}{draw.choice(_ENDINGS)}."


def number(draw: random.Random, digits: int = 7) -> str:
    """A number that does not begin with 0."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def coded_word(draw: random.Random, letters: int = 6) -> str:
    """Letters that spell nothing."""
    return "".join(draw.choices(string.ascii_lowercase, k=letters))
