"""Text in and out: tokenizers, chat templates, streaming text."""

from hga_jax.text.chat import render_chat
from hga_jax.text.streaming import TextStream
from hga_jax.text.tokenizer import Tokenizer

__all__ = ["TextStream", "Tokenizer", "render_chat"]
