"""`eval ruler`: RULER's task families at any length, scored by string match; dense beside any policies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hga_jax.eval.answering import Reader
from hga_jax.eval.choices import Choice
from hga_jax.eval.haystack import Prompt, fit
from hga_jax.eval.reporting import Progress, table
from hga_jax.eval.ruler_tasks import FAMILIES, string_match
from hga_jax.language_model import LanguageModel
from hga_jax.text.tokenizer import Tokenizer


def ruler_prompt(tokenizer: Tokenizer, family: str, length: int, seed: int, chat: bool) -> Prompt:
    """One task of a family that with its answer fills `length` tokens. Raises ValueError when it cannot."""
    make, new_tokens = FAMILIES[family]
    return fit(lambda units: [make(units, seed)], tokenizer, chat, length, new_tokens)[0]


def evaluate(
    model: LanguageModel, families: Sequence[str], lengths: Sequence[int], choices: Sequence[Choice], samples: int, seed: int
) -> dict[str, Any]:
    """The report of `eval ruler`: cells {family, length, attention, score, total}, score 0..1 averaged over samples, and every answer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer: prompts cannot be turned into tokens")
    chat = tokenizer.chat_template is not None
    prompt_of = partial(ruler_prompt, tokenizer, chat=chat)
    prompts = {(f, n, s): prompt_of(f, n, seed + s) for f in families for n in lengths for s in range(samples)}
    cells, answers = [], []
    with Progress(sum(lengths) * len(families) * samples * len(choices), "ruler") as bar:
        for length in lengths:
            for choice in choices:
                reader = Reader(model, model.backend("dense") if choice.hga is None else model.backend("hga", choice.hga), length)
                for family in families:
                    scores = []
                    for sample in range(samples):
                        bar.note(f"{choice.name}, {family}, {length:,} tokens, {sample + 1} of {samples}")
                        prompt, report = prompts[family, length, sample], partial(bar.within, bar.done)
                        said = tokenizer.decode(reader.generated([prompt], FAMILIES[family][1], report)[0])
                        bar.finish(length)
                        scores.append(string_match(said, prompt.task.answers))
                        answers.append(
                            {"family": family, "length": length, "prompt_tokens": len(prompt.tokens), "attention": choice.name,
                             "sample": sample, "wanted": list(prompt.task.answers), "said": said, "score": scores[-1]}
                        )  # fmt: skip
                    score = float(np.mean(scores))
                    cells.append({"family": family, "length": length, "attention": choice.name, "score": score, "total": samples})
    return {
        "model": model.name, "seed": seed, "dtype": str(np.dtype(model.dtype)), "chat_template": chat,
        "scoring": "share of the wanted strings in the greedy answer",
        "settings": {choice.name: choice.settings for choice in choices}, "cells": cells, "answers": answers,
    }  # fmt: skip


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
