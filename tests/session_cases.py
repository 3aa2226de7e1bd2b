"""A tiny model and its sessions, as the tests of stored history use them; also run as a program that is killed while it stores.

python tests/session_cases.py FOLDER      stores turn after turn, and prints conversation and number of each once it is stored
"""

import sys
from pathlib import Path

import numpy as np

from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
from hga_jax.language_model import LanguageModel
from hga_jax.model import Decoder
from hga_jax.session import Session

HGA = HGAConfig(chunk_size=8, group_size=4, sink_chunks=1, local_chunks=2, threshold=0.01, votes=0)  # blocks of 128 tokens
CTX = 512
TURNS = 12  # of a conversation that is killed


def tiny_model(seed: int = 3) -> LanguageModel:
    """Two layers of random weights over a vocabulary of 96."""
    config = ModelConfig("qwen3", 96, 32, 2, 4, 2, 16, 64, 4096, RopeConfig(1e4), qk_norm=True, tie_embeddings=True)
    return LanguageModel(Decoder(config, seed=seed), config)


def prompt(seed: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, tokens).astype(np.int32)


def turn(session: Session, seed: int, tokens: int = 20, new: int = 10) -> list[int]:
    """One turn. At most 128 tokens: prefill of a block of tokens is then the only size that is compiled."""
    return session.generate(prompt(seed, tokens), max_new_tokens=new).tokens


def turns(session: Session, seed: int, tokens: int, new: int = 10) -> list[int]:
    """As many turns as `tokens` tokens of prompt need."""
    made = []
    for number in range(-(-tokens // 128)):
        made += turn(session, 1000 * (number + 1) + seed, min(128, tokens - 128 * number), new)
    return made


if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), tiny_model()
    for conversation in range(100):
        with model.session(folder / f"s{conversation}", ctx=CTX, hga=HGA) as session:
            for number in range(TURNS):
                turn(session, 100 * conversation + number)
                print(conversation, number, flush=True)
