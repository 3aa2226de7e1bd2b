"""Make tests/golden/text/*.json: what other implementations make of the same text.

    pip install transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6 regex sentencepiece==0.2.3
    python tests/golden/make_text_goldens.py

splits.json: how each model family's published pattern cuts text, by the `regex` module (Qwen2's and Llama 3's pattern as transformers has
them). sentencepiece.json: a SentencePiece BPE vocabulary (byte fallback, space prefix) trained on this repository's LICENSE, and its own
encodings. chat.json: chat templates that use what the two real models' templates do not, rendered by transformers.
"""

import inspect
import io
import json
import re
from pathlib import Path

import regex
import sentencepiece
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, convert_slow_tokenizer

HERE = Path(__file__).parent
TEXTS = [
    "Hello, world! I'll we've DON'T they'd",
    "  two  spaces   \n\n\ttabs \r\n  end  ",
    "12 345 6789 3.14159 x1y22z333 ٣٤٥ Ⅷ ½",
    "camelCaseWords HTTPServer XMLHttpRequest iPhone ÉCOLE Straße",
    "path/to/file.py //comment\n/* a */ a/\n end.\n//next...\r\n/",
    "naïve e\u0301te\u0301 你好，世界！ 日本語 हिन्दी ไทย Ελλάδα",
    "👩\u200d👩\u200d👧 🇨🇭 ∑ᵢ xᵢ² ≤ ∞ … — “quoted”",
    "if(a[i]!=b){return -1;}   # done",
]

# GPT-2's pattern (its release, encoder.py), Mistral's (the `pattern` of its tekken.json); SmolLM cuts single digits first, then like GPT-2.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_splits() -> dict:
    qwen2 = re.search(r'r"""(.*?)"""', inspect.getsource(convert_slow_tokenizer.Qwen2Converter))[1]
    llama3 = inspect.signature(convert_slow_tokenizer.TikTokenConverter.__init__).parameters["pattern"].default
    patterns = {"gpt-2": GPT2, "qwen2": qwen2, "llama-bpe": llama3, "tekken": TEKKEN}
    splits = {name: [regex.findall(pattern, text) for text in TEXTS] for name, pattern in patterns.items()}
    digits_first = [[part for part in regex.split(r"(\p{N})", text) if part] for text in TEXTS]
    splits["smollm"] = [[word for part in parts for word in regex.findall(GPT2, part)] for parts in digits_first]
    return {"texts": TEXTS, "splits": splits}


def make_sentencepiece() -> dict:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((HERE.parents[1] / "LICENSE").read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=1.0,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = processor.get_piece_size()
    kinds = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1 for i in range(count)]
    texts = [
        "Unless required by applicable law or agreed to in writing",
        "License",
        "  leading and  double spaces ",
        "the work's copyright\nnotice\n\n   indented",
        "2004, 3.14 and 12345",
        "unseen: é 你好 🙂 \t tab",
        "aaaa bbbb ==== ----",
        "",
    ]
    return {
        "pieces": [processor.id_to_piece(i) for i in range(count)],
        "scores": [processor.get_score(i) for i in range(count)],
        "kinds": kinds,
        "texts": texts,
        "ids": [processor.encode(text) for text in texts],
        "decoded": [processor.decode(processor.encode(text)) for text in texts],
    }


def make_chats() -> list[dict]:
    user = [{"role": "user", "content": '<b>Grüße</b> & "quotes" 你好'}]
    turns = [
        {"role": "system", "content": "Be brief."},
        *user,
        {"role": "assistant", "content": "Hi.", "calls": [{"a": 1, "ü": [None, True]}]},
    ]
    cases = [
        ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}", turns, {}),
        ("{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}", user, {}),
        (
            "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}\n        {%- break %}\n    {%- endif %}\n"
            "{{ m.content }}\n{%- endfor %}",
            turns,
            {},
        ),
        ("{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|{% endfor %}", turns, {}),
        (
            "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n  "
            "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
            "  {% else %}\n  {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
            turns,
            {},
        ),
        (
            "{{ enable_thinking is defined and enable_thinking is false }}{{ tools is none }}{{ missing }}.",
            user,
            {"enable_thinking": False},
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", turns, {}),
        ("{{ strftime_now('%%') }}{% if add_generation_prompt %}>{% endif %}", user, {}),
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    return [
        {
            "template": template,
            "messages": messages,
            "variables": variables,
            "text": tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False, **variables
            ),
        }
        for template, messages, variables in cases
    ]


def main() -> None:
    for name, value in (("splits", make_splits()), ("sentencepiece", make_sentencepiece()), ("chat", make_chats())):
        path = HERE / "text" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=True) + "\n")
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
