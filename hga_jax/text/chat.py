"""A conversation rendered as the prompt that the checkpoint was trained on, by the checkpoint's own Jinja template."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from hga_jax.text.tokenizer import Tokenizer


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Messages ({"role": ..., "content": ...}) as prompt text: encode it without add_special, the template writes its own begin token.

    add_generation_prompt: end with the opening of the assistant's turn. tools: JSON schemas, for templates that know them.
    variables: anything else the template reads, e.g. enable_thinking=False for Qwen3.
    Raises ValueError, in one line, when the checkpoint has no template or the template does not accept the messages.

    >>> render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    """
    if tokenizer.chat_template is None:
        raise ValueError("this checkpoint has no chat template: it is a base model; pass plain text as the prompt instead of messages")
    special = {name: token for name in ("bos_token", "eos_token") if (token := getattr(tokenizer, name)) is not None}
    values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    return render_template(tokenizer.chat_template, special | values | variables)


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """Render Jinja source with the filters, globals and whitespace rules that transformers gives chat templates.

    The template comes from a download, so it runs in jinja2's immutable sandbox and sees plain JSON data only.
    Raises ValueError, in one line: the template's own message (raise_exception), or what is wrong with it.
    """
    plain = {name: _plain(value) for name, value in variables.items()}
    try:
        return _compile(template).render(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {_one_line(error)}") from error
    except Exception as error:  # templates are programs: they divide, index and add as they like
        raise ValueError(f"chat template: {_one_line(error) or type(error).__name__}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own tojson escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _plain(value: Any) -> Any:
    """The same data in plain JSON types: methods of a caller's own objects stay out of the template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise ValueError(f"chat messages hold text, numbers, lists and dicts only, not {type(value).__name__}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
