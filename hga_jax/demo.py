"""The self-contained demonstration: a document of a few thousand tokens with one planted fact, and the question about it."""

from __future__ import annotations

import random

FACT = "The secret password of the old lighthouse is 'purple elephant'."
QUESTION = "What is the secret password of the old lighthouse?"
ANSWER = "purple elephant"

_PEOPLE = ("Marta", "Tomas", "Ingrid", "Pavel", "Noor", "Elias", "Greta", "Hamid", "Sofia", "Anton")
_BOATS = ("the Heron", "the Juniper", "the Kestrel", "the Marigold", "the Northern Star", "the Petrel", "the Swallow", "the Tern")
_CARGO = ("salted cod", "timber", "roof tiles", "barley", "rope and canvas", "glass bottles", "sheep's wool", "coal", "apples")
_WEATHER = ("light wind from the west", "thick fog until noon", "steady rain", "a clear sky", "a hard frost", "a heavy swell")
_EVENTS = (
    "{person} repaired the crane on the north quay and oiled its chain.",
    "{boat} arrived with {cargo} and was unloaded before dark.",
    "{boat} left for the islands with {count} crates of {cargo}.",
    "{person} counted {count} gulls on the breakwater and wrote to the museum about it.",
    "{person} and {other} painted the door of the customs house.",
    "The school children visited, and {person} showed them how to tie a bowline.",
    "{person} reported a torn net; {other} promised to mend it by Friday.",
    "Two barrels of {cargo} went missing and were found behind the chapel.",
    "{boat} waited outside the bar for {count} hours until the tide turned.",
    "The post brought {count} letters, most of them for {person}.",
)


def build_prompt(entries: int = 100, fact_at: float = 0.45, seed: int = 7) -> str:
    """A harbour master's log of `entries` days with FACT at the given share of it, and QUESTION at the end."""
    draw = random.Random(seed)
    lines = []
    for day in range(entries):
        person, other = draw.sample(_PEOPLE, 2)
        event = draw.choice(_EVENTS).format(
            person=person, other=other, boat=draw.choice(_BOATS), cargo=draw.choice(_CARGO), count=draw.randint(3, 60)
        )
        lines.append(f"Day {day + 1}, {draw.choice(_WEATHER)}. {event[0].upper()}{event[1:]}")
    lines.insert(int(entries * fact_at), FACT)
    return "Here is the log of the harbour master.\n\n" + "\n".join(lines) + f"\n\nUsing the log above, answer the question. {QUESTION}"
