"""Needle and RULER prompts: the answer is where it is promised, lengths are kept, and a seed always makes the same text."""

import collections
import re

import pytest
from eval_checkpoint import readable_checkpoint

from hga_jax.eval.answering import CHUNK, shared_length
from hga_jax.eval.haystack import Task, fit, render, spread
from hga_jax.eval.needle import MAX_NEW_TOKENS, needle_prompts, needle_tasks
from hga_jax.eval.ruler import ruler_prompt
from hga_jax.eval.ruler_tasks import FAMILIES, NEEDLE, niah_multikey_dense, string_match
from hga_jax.eval.words import WORDS
from hga_jax.text.tokenizer import Tokenizer

DEPTHS = [0.0, 0.25, 0.5, 1.0]
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_directory(readable_checkpoint(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE))


def test_needles_are_at_their_depths_once():
    sentences = 200
    for depth, task in zip(DEPTHS, needle_tasks(sentences, DEPTHS, seed=3), strict=True):
        (answer,) = task.answers
        assert task.before.count(answer) == 1
        assert f"{task.opening} {answer}." in task.before
        assert answer not in task.question + task.opening
        ahead = task.before[: task.before.index(task.opening)]
        filler = [part for part in ahead.split(". ") if part and not re.search(r"\d", part)]
        assert len(filler) == round(depth * sentences)


def test_filler_holds_no_digits():
    text = needle_tasks(500, [0.5], seed=1)[0].before
    assert re.findall(r"\d+", text) == list(needle_tasks(500, [0.5], seed=1)[0].answers)


def test_needle_tasks_of_a_text_differ_in_the_question_alone(tokenizer):
    prompts = needle_prompts(tokenizer, 2048, DEPTHS, seed=0, chat=True)
    assert len({prompt.task.before for prompt in prompts}) == 1
    assert len({prompt.task.question for prompt in prompts}) == len(DEPTHS)
    shared = shared_length([prompt.tokens for prompt in prompts])
    assert shared % CHUNK == 0
    assert tokenizer.decode(prompts[0].tokens[:shared]) in "[" + prompts[0].task.before + prompts[0].task.question
    assert shared > 0.8 * 2048


@pytest.mark.parametrize("length", [1024, 3000, 8192])
def test_needle_lengths_are_kept(tokenizer, length):
    longest = max(len(prompt.tokens) for prompt in needle_prompts(tokenizer, length, DEPTHS, seed=0, chat=False))
    assert length - 150 < longest + MAX_NEW_TOKENS <= length  # one more sentence of up to 150 characters would not fit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [2500, 8192])
def test_ruler_lengths_are_kept_and_seeds_repeat(tokenizer, family, length):
    prompt = ruler_prompt(tokenizer, family, length, 5, False)
    assert length - 0.1 * length < len(prompt.tokens) + FAMILIES[family][1] <= length
    assert prompt.task == ruler_prompt(tokenizer, family, length, 5, False).task
    assert prompt.task != ruler_prompt(tokenizer, family, length, 6, False).task


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("niah")])
def test_ruler_needles_are_in_the_text_once(family):
    task = FAMILIES[family][0](100, 2)
    values = {"niah_single": 1, "niah_multikey": 4, "niah_multikey_dense": 100, "niah_multivalue": 4, "niah_multiquery": 4}[family]
    stated = re.findall(re.escape(NEEDLE).replace(r"\{key\}", r"(\S+)").replace(r"\{value\}", r"(\d+)"), task.before)
    assert len(stated) == values
    asked = re.search(r"numbers? for (.*) mentioned", task.question).group(1).replace(", and ", ", ").split(", ")
    assert [value for name in asked for key, value in stated if key == name].sort() == list(task.answers).sort()
    assert {value for key, value in stated if key in asked} == set(task.answers)


def test_variables_are_handed_on_in_order():
    task = FAMILIES["variable_tracking"][0](50, 4)
    lines = [line for line in task.before.split("\n") if line.startswith("VAR")][5:]  # the first five are the example's
    value = re.search(r"value (\d+)", task.question).group(1)
    assert lines[0] == f"VAR {task.answers[0]} = {value}"
    assert lines[1:] == [f"VAR {later} = VAR {earlier}" for earlier, later in zip(task.answers, task.answers[1:], strict=False)]


@pytest.mark.parametrize("words", [100, 500, 5000, 30000])
def test_common_words_are_the_common_ones(words):
    task = FAMILIES["common_words"][0](words, 1)
    listed = re.findall(r"\d+\. (\w+)", task.before.split("Below is")[2])
    counts = collections.Counter(listed)
    assert words * 0.9 < len(listed) < words * 1.2
    common = [counts.pop(word) for word in task.answers]
    assert len(set(common)) == 1
    assert common[0] >= 2 * max(counts.values())


@pytest.mark.parametrize("words", [20, 300, 20000])
def test_frequent_words_are_the_frequent_ones(words):
    task = FAMILIES["frequent_words"][0](words, 1)
    counts = collections.Counter(word for word in task.before.split(".\n")[1].split() if word != "...")
    assert [word for word, _ in counts.most_common(3)] == list(task.answers)
    assert len({count for _, count in counts.most_common(4)}) == 4  # no ties: the answer is unique


def test_more_needles_than_words():
    assert len(set(niah_multikey_dense(5000, 0).before.split("numbers for "))) == 5001
    assert len(set(WORDS)) == len(WORDS)


def test_string_match_is_the_share_of_answers_found():
    assert string_match("It is 12, and ABC.", ["12", "abc", "99", "7"]) == 0.5


def test_spread_keeps_order_and_ends():
    assert spread(["a", "b"], [(1.0, "Z"), (0.0, "A"), (0.0, "B"), (0.5, "M")]) == "A B a M b Z"


def test_answer_tokens_continue_the_prompt(tokenizer):
    task = Task("Context.", " Question?", "It is", ("12", "34"))
    for chat, start in ((True, "[Context. Question?]>It is"), (False, "Context. Question?\nIt is")):
        prompt = render(task, tokenizer, chat)
        assert tokenizer.decode(prompt.tokens) == start
        assert tokenizer.decode(prompt.answer_tokens) == " 12, 34"


def test_what_cannot_be_fitted_is_said(tokenizer):
    with pytest.raises(ValueError, match="raise the length 150"):
        needle_prompts(tokenizer, 150, DEPTHS, seed=0, chat=False)
    with pytest.raises(ValueError, match="cannot grow beyond"):
        fit(lambda units: [Task("same", "?", ":", ("1",))], tokenizer, False, 200, 8)
    with pytest.raises(ValueError, match="ask for fewer depths"):
        needle_tasks(10, [i / 20 for i in range(20)], seed=0)
