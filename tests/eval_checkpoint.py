"""A tiny random checkpoint that can read text: one of the golden directories with a tokenizer of one token a character beside it."""

import json
import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

GOLDEN = Path(__file__).parent / "golden" / "transformers"
VOCABULARY = {character: i for i, character in enumerate(["\n", *map(chr, range(32, 127))])}  # 96, as the checkpoints have


def readable_checkpoint(folder: Path, family: str = "qwen3", chat_template: str | None = None) -> Path:
    """Copy a golden checkpoint into `folder` and give it a tokenizer."""
    target = folder / family
    shutil.copytree(GOLDEN / family, target)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(target / "tokenizer.json"))
    if chat_template is not None:
        (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
    return target
