"""The RULER task families that need no outside data (arXiv 2404.06654), each generated here from a seed at any size.

Every function takes the size of the context in its own units (sentences, needles, words) and the seed, and makes one task that grows with
the size. Wording and word lists are ours; the structure, the counts and the scoring are RULER's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from hga_jax.eval.haystack import Task, spread
from hga_jax.eval.words import NAMES, WORDS, coded_word, number, sentence

NEEDLE = "One of the special magic numbers for {key} is: {value}."
EXAMPLE = 1_000_003  # seed of the example in a prompt, relative to the prompt's
INSTRUCTION = "Some special magic numbers are hidden in the following text. Memorize them, you will be asked about them afterwards.\n"


def _keys(draw: random.Random, count: int) -> list[str]:
    pairs = draw.sample(range(len(NAMES) * len(WORDS)), count)
    return [f"{NAMES[pair % len(NAMES)]}-{WORDS[pair // len(NAMES)]}" for pair in pairs]


def _needles(sentences: int, seed: int, keys: int, values: int, asked: int) -> Task:
    """`keys` keys with `values` numbers each at random depths among filler; the numbers of the first `asked` keys are wanted."""
    draw = random.Random(seed)
    names = _keys(draw, keys)
    numbers = {name: [number(draw) for _ in range(values)] for name in names}
    needles = [(draw.random(), NEEDLE.format(key=name, value=value)) for name in names for value in numbers[name]]
    text = spread([sentence(draw) for _ in range(sentences)], needles)
    return _needle_task(text, names[:asked], [value for name in names[:asked] for value in numbers[name]])


def _needle_task(text: str, names: Sequence[str], wanted: Sequence[str]) -> Task:
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"
    one = len(wanted) == 1
    subject = f"special magic {'number' if one else 'numbers'} for {listed} mentioned in the text"
    question = f"\nWhat {'is' if one else 'are all'} the {subject}?"
    return Task(INSTRUCTION + text, question, f"The {subject} {'is' if one else 'are'}", tuple(wanted))


def niah_single(sentences: int, seed: int) -> Task:
    """One needle."""
    return _needles(sentences, seed, keys=1, values=1, asked=1)


def niah_multikey(sentences: int, seed: int) -> Task:
    """Four needles with different keys, one is asked for."""
    return _needles(sentences, seed, keys=4, values=1, asked=1)


def niah_multikey_dense(needles: int, seed: int) -> Task:
    """Nothing but needles with different keys, one is asked for (RULER's multikey_2)."""
    draw = random.Random(seed)
    needles = min(needles, len(NAMES) * len(WORDS))
    names = _keys(draw, needles)
    values = [number(draw) for _ in names]
    asked = draw.randrange(needles)
    text = " ".join(NEEDLE.format(key=name, value=value) for name, value in zip(names, values, strict=True))
    return _needle_task(text, [names[asked]], [values[asked]])


def niah_multivalue(sentences: int, seed: int) -> Task:
    """Four numbers for one key, all are wanted."""
    return _needles(sentences, seed, keys=1, values=4, asked=1)


def niah_multiquery(sentences: int, seed: int) -> Task:
    """Four keys with one number each, all are asked for."""
    return _needles(sentences, seed, keys=4, values=1, asked=4)


def _with_example(task: Task, example: Task) -> Task:
    """A task after a small solved one, as RULER has it where the form of the answer is not obvious."""
    solved = f"{example.before}{example.question} {example.opening} {' '.join(example.answers)}\n\n"
    return replace(task, before=solved + task.before)


def variable_tracking(sentences: int, seed: int) -> Task:
    """One number assigned to a variable and handed on four times; all variables that hold it are wanted. An example goes first."""
    return _with_example(_variables(sentences, seed), _variables(5, seed + EXAMPLE))


def _variables(sentences: int, seed: int, hops: int = 4) -> Task:
    draw = random.Random(seed)
    names = [f"{coded_word(draw, 5).upper()}" for _ in range(hops + 1)]
    value = number(draw, 5)
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {later} = VAR {earlier}" for earlier, later in itertools.pairwise(names))]
    depths = sorted(draw.random() for _ in lines)
    text = spread([sentence(draw) for _ in range(sentences)], list(zip(depths, lines, strict=True)), separator="\n")
    return Task(
        "Memorize and track the chain of variable assignments hidden in the following text.\n\n" + text,
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        f"Answer: According to the chain of variable assignments in the text above, {len(names)} variables are assigned the value {value}, "
        "they are:",
        tuple(names),
    )


def common_words(words: int, seed: int) -> Task:
    """A numbered list in which ten words come ten times as often as the others; they are asked for. An example goes first.

    30 and 3 times, as in RULER; lists of fewer than 600 words 10 and 1 times (short ones less), very long ones multiples of 30 and 3, once
    there are no new words left.
    """
    return _with_example(_listed_words(words, seed), _listed_words(40, seed + EXAMPLE))


def _listed_words(words: int, seed: int, wanted: int = 10) -> Task:
    draw = random.Random(seed)
    seldom = 1 if words < 600 else 3
    while (words - 10 * seldom * wanted) // seldom > len(WORDS) - wanted:
        seldom += 3
    often = 10 * seldom if words >= 200 else max(min(10, words // (2 * wanted)), 2)
    chosen = draw.sample(WORDS, wanted + max((words - wanted * often) // seldom, 1))
    listed = chosen[:wanted] * often + chosen[wanted:] * seldom
    draw.shuffle(listed)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return Task(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
        + text,
        f"\nQuestion: What are the {wanted} most common words in the above list?",
        f"Answer: The top {wanted} words that appear most often in the list are:",
        tuple(chosen[:wanted]),
    )


def frequent_words(words: int, seed: int, exponent: float = 2.0, vocabulary: int = 2000) -> Task:
    """Coded words drawn by Zipf's law with dots as noise; the three most frequent are wanted.

    Counts follow the law itself (word k comes words / k^exponent / zeta times), so that the ranks cannot be a matter of luck.
    """
    draw = random.Random(seed)
    zeta = sum(rank**-exponent for rank in range(1, vocabulary + 1))
    distinct: dict[str, None] = {}
    while len(distinct) < vocabulary:
        distinct[coded_word(draw)] = None
    coded = list(distinct)
    counts = [round(words * rank**-exponent / zeta) for rank in range(1, vocabulary + 1)]
    counts[:4] = [max(counts[0], 4), max(counts[1], 3), max(counts[2], 2), min(max(counts[3], 1), max(counts[2], 2) - 1)]
    listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
    draw.shuffle(listed)
    return Task(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words.\n"
        + " ".join(f"{word} ..." if draw.random() < 0.1 else word for word in listed),
        "\nQuestion: Do not provide any explanation. Please ignore the dots '...'. What are the three most frequently appeared words in "
        "the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(coded[:3]),
    )


# Family -> (generator, new tokens that the answer may take, as in RULER).
FAMILIES: dict[str, tuple[Callable[[int, int], Task], int]] = {
    "niah_single": (niah_single, 32),
    "niah_multikey": (niah_multikey, 32),
    "niah_multikey_dense": (niah_multikey_dense, 32),
    "niah_multivalue": (niah_multivalue, 128),
    "niah_multiquery": (niah_multiquery, 128),
    "variable_tracking": (variable_tracking, 64),
    "common_words": (common_words, 120),
    "frequent_words": (frequent_words, 50),
}


def string_match(text: str, answers: Sequence[str]) -> float:
    """RULER's score: the share of the wanted strings that the text holds, case ignored."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)
