"""`eval needle`: numbers hidden at several depths of a long made-up text, each asked for; dense beside any policies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hga_jax.eval.answering import make_readers
from hga_jax.eval.choices import Choice
from hga_jax.eval.haystack import Prompt, Task, fit, spread
from hga_jax.eval.reporting import Progress, side_by_side, table
from hga_jax.eval.words import number, sentence
from hga_jax.language_model import LanguageModel
from hga_jax.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 16
QUESTION = "\n\nUsing the text above, answer the question. {question}"
# Facts that share no words: models of 0.1 billion parameters mix up needles that differ in a name alone (measured on SmolLM2-135M).
FACTS = (
    ("The telephone number of Doctor Almond is", "What is the telephone number of Doctor Almond?"),
    ("The password of the castle vault is", "What is the password of the castle vault?"),
    ("The winning lottery ticket had the number", "What number did the winning lottery ticket have?"),
    ("The asteroid that the twins discovered was named", "What was the name of the asteroid that the twins discovered?"),
    ("The price of the diamond necklace was exactly", "What exactly was the price of the diamond necklace?"),
    ("The population of Zanzibar in the census was", "What was the population of Zanzibar in the census?"),
    ("The serial number of the submarine engine is", "What is the serial number of the submarine engine?"),
    ("The library card of Professor Quill has the code", "What code does the library card of Professor Quill have?"),
    ("The radio station of the polar explorers used frequency", "Which frequency did the radio station of the polar explorers use?"),
    ("The distance that the marathon elephant walked in metres was", "How many metres did the marathon elephant walk?"),
    ("The bank account that holds the pirate gold is", "Which bank account holds the pirate gold?"),
    ("The flight on which Queen Beatrix escaped was", "On which flight did Queen Beatrix escape?"),
)


def needle_tasks(sentences: int, depths: Sequence[float], seed: int, digits: int = 5) -> list[Task]:
    """One text of `sentences` filler sentences with a different fact at every depth; one task a depth, in that order."""
    draw = random.Random(seed)
    if len(depths) > len(FACTS):
        raise ValueError(f"{len(depths)} depths are asked for and there are {len(FACTS)} facts to hide: ask for fewer depths")
    facts = draw.sample(FACTS, len(depths))
    values = [number(draw, digits) for _ in facts]
    needles = [(depth, f"{opening} {value}.") for depth, (opening, _), value in zip(depths, facts, values, strict=True)]
    before = spread([sentence(draw) for _ in range(sentences)], needles)
    return [
        Task(before, QUESTION.format(question=question), opening, (value,))
        for (opening, question), value in zip(facts, values, strict=True)
    ]


def needle_prompts(tokenizer: Tokenizer, length: int, depths: Sequence[float], seed: int, chat: bool) -> list[Prompt]:
    """The tasks of one text, as prompts that with their answers fill `length` tokens. Raises ValueError when they cannot."""
    return fit(lambda n: needle_tasks(n, depths, seed), tokenizer, chat, length, MAX_NEW_TOKENS)


def evaluate(
    model: LanguageModel,
    lengths: Sequence[int],
    depths: Sequence[float],
    choices: Sequence[Choice],
    samples: int,
    seed: int,
    scoring: str,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """The report of `eval needle`: cells {length, depth, attention, correct, total}, and every single answer.

    keep: gets the report so far, `complete` false and finished cells alone, after every text.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer: prompts cannot be turned into tokens")
    chat = tokenizer.chat_template is not None
    teacher = scoring == "teacher" or (scoring == "auto" and not chat)
    keys = [(n, s) for n in lengths for s in range(samples)]
    made = side_by_side("texts", [partial(needle_prompts, tokenizer, n, depths, seed + s, chat) for n, s in keys])
    texts = dict(zip(keys, made, strict=True))
    readers = make_readers(model, choices, {n: [texts[n, s] for s in range(samples)] for n in lengths}, teacher)
    cells, answers, wanted = [], [], len(texts) * len(depths) * len(choices)
    all_cells = len(lengths) * len(choices) * len(depths)

    def report() -> dict[str, Any]:
        return {
            "model": model.name, "seed": seed, "dtype": str(np.dtype(model.dtype)),
            "scoring": "argmax of the answer's tokens, teacher-forced" if teacher else f"answer in {MAX_NEW_TOKENS} greedy tokens",
            "chat_template": chat, "complete": len(cells) == all_cells,
            "settings": {choice.name: choice.settings for choice in choices}, "cells": cells, "answers": answers,
        }  # fmt: skip

    with Progress(sum(lengths) * samples * len(choices), "needle") as bar:
        for length in lengths:
            for choice in choices:
                reader, right = readers[length, choice.name], np.zeros(len(depths), int)
                for sample in range(samples):
                    bar.note(f"prompt {len(answers) + 1} of {wanted}: {choice.name}, {length:,} tokens")
                    prompts = texts[length, sample]
                    if teacher:
                        correct, said = reader.predicted(prompts, bar.inside()), [None] * len(prompts)
                    else:
                        said = [tokenizer.decode(ids) for ids in reader.generated(prompts, MAX_NEW_TOKENS, bar.inside())]
                        correct = [prompt.task.answers[0] in text for prompt, text in zip(prompts, said, strict=True)]
                    right += np.array(correct)
                    bar.finish(length)
                    answers += [
                        {"length": length, "prompt_tokens": len(prompt.tokens), "depth": depth, "attention": choice.name, "sample": sample,
                         "wanted": prompt.task.answers[0], "said": text, "correct": bool(ok)}
                        for prompt, depth, text, ok in zip(prompts, depths, said, correct, strict=True)
                    ]  # fmt: skip
                    keep(report())
                cells += [
                    {"length": length, "depth": depth, "attention": choice.name, "correct": int(count), "total": samples}
                    for depth, count in zip(depths, right, strict=True)
                ]
    return report()


def as_text(report: dict[str, Any]) -> str:
    """One table an attention, depths down, lengths across."""
    cells, parts = report["cells"], [f"{report['model']}, {report['dtype']}; scoring: {report['scoring']}"]
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    for attention in dict.fromkeys(cell["attention"] for cell in cells):
        found = {(cell["length"], cell["depth"]): f"{cell['correct']}/{cell['total']}" for cell in cells if cell["attention"] == attention}
        rows = [[f"depth {depth:.0%}", *(found[length, depth] for length in lengths)] for depth in depths]
        parts.append(table((attention, *(f"{length:,}" for length in lengths)), rows))
    return "\n\n".join(parts)
