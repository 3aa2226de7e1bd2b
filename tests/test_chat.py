"""Chat prompts, against what transformers renders from the same templates."""

import json

import pytest
from tiny_tokenizers import GOLDEN, byte_level_metadata

from hga_jax.default_model import default_model_path
from hga_jax.text import Tokenizer, render_chat
from hga_jax.text.chat import render_template

USER = [{"role": "user", "content": "Hello"}]
REAL = json.loads((GOLDEN / "transformers" / "chat_templates.json").read_text())


def with_template(template):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(**{"tokenizer.chat_template": template}))
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


@pytest.mark.parametrize("case", REAL["chats"], ids=[f"{i}-{case['model']}" for i, case in enumerate(REAL["chats"])])
def test_real_templates_render_as_in_transformers(case):
    tokenizer = with_template(REAL["templates"][case["model"]])
    text = render_chat(tokenizer, case["messages"], tools=case["tools"], add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]


@pytest.mark.model
def test_the_default_models_chats_encode_as_in_transformers():
    tokenizer = Tokenizer.from_gguf(default_model_path())
    cases = [case for case in REAL["chats"] if case["model"] == "smollm2-135m"]
    assert cases
    for case in cases:
        text = render_chat(tokenizer, case["messages"], tools=case["tools"], add_generation_prompt=case["add_generation_prompt"])
        assert text == case["text"]
        assert tokenizer.encode(text).tolist() == case["ids"]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "text" / "chat.json").read_text()), ids=lambda case: case["template"][:40])
def test_features_that_templates_rely_on_render_as_in_transformers(case):
    assert render_chat(with_template(case["template"]), case["messages"], **case["variables"]) == case["text"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must\n  alternate') }}", "chat template: Roles must alternate"),
        ("{% for m in messages %}\n{{ m.content }", "chat template, line 2:"),
        ("{{ messages[0].content + 1 }}", "chat template: can only concatenate str"),
        ("{{ messages[0]['parts'][0] }}", "chat template:"),
        ("{{ 1 // 0 }}", "chat template:"),
        ("{{ messages.append(1) }}", "chat template:.*(unsafe|not safely)"),
        ("{{ messages.__class__.__mro__ }}", "chat template:.*unsafe"),
        ("{% include 'other' %}", "chat template:"),
    ],
)
def test_what_a_template_refuses_is_one_line(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(with_template(template), USER)
    assert "\n" not in str(caught.value)


def test_a_base_model_without_template_says_so():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(**{"tokenizer.chat_template": None}))
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(tokenizer, USER)


def test_templates_see_plain_data_only():
    class Text(str):
        def secret(self):
            return "leaked"

    with pytest.raises(ValueError, match="no attribute 'secret'"):
        render_template("{{ text.secret() }}", {"text": Text("x")})
    with pytest.raises(ValueError, match="not object"):
        render_template("{{ text }}", {"text": object()})
