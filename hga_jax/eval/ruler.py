"""`eval ruler`: RULER's task families at any length, scored by string match; dense beside any policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hga_jax.eval.answering import make_readers
from hga_jax.eval.choices import Choice
from hga_jax.eval.haystack import Prompt, fit
from hga_jax.eval.reporting import Progress, side_by_side, table
from hga_jax.eval.ruler_tasks import FAMILIES, string_match
from hga_jax.language_model import LanguageModel
from hga_jax.text.tokenizer import Tokenizer


def ruler_prompt(tokenizer: Tokenizer, family: str, length: int, seed: int, chat: bool) -> Prompt:
    """One task of a family that with its answer fills `length` tokens. Raises ValueError when it cannot."""
    make, new_tokens = FAMILIES[family]
    return fit(lambda units: [make(units, seed)], tokenizer, chat, length, new_tokens)[0]


def evaluate(
    model: LanguageModel,
    families: Sequence[str],
    lengths: Sequence[int],
    choices: Sequence[Choice],
    samples: int,
    seed: int,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """The report of `eval ruler`: cells {family, length, attention, score, total}, score 0..1 averaged over samples, and every answer.

    keep: gets the report so far, `complete` false and finished cells alone, after every answer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer: prompts cannot be turned into tokens")
    chat = tokenizer.chat_template is not None
    prompt_of = partial(ruler_prompt, tokenizer, chat=chat)
    keys = [(n, f, s) for n in lengths for f in families for s in range(samples)]
    prompts = dict(zip(keys, side_by_side("texts", [partial(prompt_of, f, n, seed + s) for n, f, s in keys]), strict=True))
    readers = make_readers(model, choices, {n: [[prompt] for key, prompt in prompts.items() if key[0] == n] for n in lengths})
    cells, answers, wanted = [], [], len(prompts) * len(choices)
    all_cells = len(lengths) * len(choices) * len(families)

    def report() -> dict[str, Any]:
        return {
            "model": model.name, "seed": seed, "dtype": str(np.dtype(model.dtype)), "chat_template": chat,
            "scoring": "share of the wanted strings in the greedy answer", "complete": len(cells) == all_cells,
            "settings": {choice.name: choice.settings for choice in choices}, "cells": cells, "answers": answers,
        }  # fmt: skip

    with Progress(sum(lengths) * len(families) * samples * len(choices), "ruler") as bar:
        for length in lengths:
            for choice in choices:
                reader = readers[length, choice.name]
                for family in families:
                    scores = []
                    for sample in range(samples):
                        bar.note(f"prompt {len(answers) + 1} of {wanted}: {choice.name}, {family}, {length:,} tokens")
                        prompt = prompts[length, family, sample]
                        said = tokenizer.decode(reader.generated([prompt], FAMILIES[family][1], bar.inside())[0])
                        bar.finish(length)
                        scores.append(string_match(said, prompt.task.answers))
                        answers.append(
                            {"family": family, "length": length, "prompt_tokens": len(prompt.tokens), "attention": choice.name,
                             "sample": sample, "wanted": list(prompt.task.answers), "said": said, "score": scores[-1]}
                        )  # fmt: skip
                        keep(report())
                    score = float(np.mean(scores))
                    cells.append({"family": family, "length": length, "attention": choice.name, "score": score, "total": samples})
    return report()


def as_text(report: dict[str, Any]) -> str:
    """Families down, attention and length across, in percent."""
    cells = report["cells"]
    columns = list(dict.fromkeys((cell["length"], cell["attention"]) for cell in cells))
    score = {(cell["family"], cell["length"], cell["attention"]): cell["score"] for cell in cells}
    families = list(dict.fromkeys(cell["family"] for cell in cells))
    rows = [[family, *(f"{score[family, *column]:.1%}" for column in columns)] for family in families]
    rows.append(["mean", *(f"{np.mean([score[family, *column] for family in families]):.1%}" for column in columns)])
    head = f"{report['model']}, {report['dtype']}; {cells[0]['total']} samples a cell; score: {report['scoring']}"
    return head + "\n\n" + table(("family", *(f"{length:,} {attention}" for length, attention in columns)), rows)
