"""Prompts of an exact length in tokens: how tasks are filled up, rendered for the model and fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hga_jax.text.chat import render_chat
from hga_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """One question about a long context. before: instruction and context, question: what follows it, opening: how the answer begins
    (the model continues it), answers: the strings that the continuation must hold."""

    before: str
    question: str
    opening: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A task as tokens. answer_tokens: what follows when the answers are written out, separated by commas."""

    task: Task
    tokens: Int[np.ndarray, " T"]
    answer_tokens: Int[np.ndarray, " A"]


def render(task: Task, tokenizer: Tokenizer, chat: bool) -> Prompt:
    """The tokens of a task, in the checkpoint's chat template or as plain text."""
    text = task.before + task.question
    if chat:
        start = render_chat(tokenizer, [{"role": "user", "content": text}]) + task.opening
    else:
        start = f"{text}\n{task.opening}"
    tokens = tokenizer.encode(start, add_special=not chat)
    full = tokenizer.encode(f"{start} {', '.join(task.answers)}", add_special=not chat)
    same = tokens[: len(full)] == full[: len(tokens)]
    shared = len(same) if same.all() else int(same.argmin())
    return Prompt(task, tokens[:shared] if shared < len(tokens) else tokens, full[shared:])


def fit(build: Callable[[int], Sequence[Task]], tokenizer: Tokenizer, chat: bool, length: int, reserve: int) -> list[Prompt]:
    """The prompts of build(n) for the largest n whose longest one leaves room for `reserve` new tokens within `length`.

    build: tasks over a context of n units (sentences, words, ...), growing with n. Raises ValueError when not even one unit fits.
    """

    def size(units: int) -> int:
        return max(len(prompt.tokens) for prompt in prompts(units)) + reserve

    def prompts(units: int) -> list[Prompt]:
        return [render(task, tokenizer, chat) for task in build(units)]

    smallest = size(1)
    if smallest > length:
        raise ValueError(f"a context of one unit already takes {smallest} tokens with its question and answer: raise the length {length}")
    low, high = 1, 2
    while (reached := size(high)) <= length:
        if high > length:  # a unit is at least a token: this context has stopped growing
            raise ValueError(f"this task's context cannot grow beyond {reached} tokens: lower the length {length}")
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle)
    return prompts(low)


def spread(filler: Sequence[str], needles: Sequence[tuple[float, str]], separator: str = " ") -> str:
    """Filler with each needle put in at its depth (0: before everything, 1: after everything)."""
    places = sorted(((round(depth * len(filler)), i) for i, (depth, _) in enumerate(needles)), reverse=True)
    pieces = list(filler)
    for place, i in places:
        pieces.insert(place, needles[i][1])
    return separator.join(pieces)
