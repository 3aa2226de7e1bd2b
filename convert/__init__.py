"""Checkpoints into the decoder, and into our own checkpoint format (`python -m convert SRC DST`)."""

from convert.load import load_decoder, read_config, read_tokenizer, with_weights

__all__ = ["load_decoder", "read_config", "read_tokenizer", "with_weights"]
