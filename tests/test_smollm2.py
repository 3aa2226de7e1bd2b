"""The built-in model against transformers: greedy text, and what HGA must equal when its windows cover everything."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.config import HGAConfig
from hga_jax.language_model import LanguageModel
from hga_jax.loading import load_model

pytestmark = pytest.mark.model
GREEDY = np.load(Path(__file__).parent / "golden" / "transformers" / "smollm2_greedy.npz")


@pytest.fixture(scope="module")
def smollm2():
    """The built-in model with weights rounded to bfloat16, as the golden's checkpoint holds them, computed in float32."""
    model = load_model(None, dtype=jnp.float32)
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    return LanguageModel(rounded, model.config, model.tokenizer, model.name)


@pytest.mark.parametrize("prompt", ["short", "story", "code", "list", "long", "chat"])
def test_greedy_text_equals_transformers(smollm2, prompt):
    """64 tokens each; `long` has 4,564 prompt tokens. The smallest gap between the two best logits is 3.5e-3, far above float32 noise."""
    endless = LanguageModel(smollm2.params, replace(smollm2.config, eos_token_ids=()))  # as the golden: no end token stops it
    result = endless.generate(GREEDY[f"{prompt}_prompt"], max_new_tokens=64, attention="dense")
    assert result.tokens == GREEDY[f"{prompt}_ids"].tolist()


def test_windows_that_cover_everything_give_dense_logits(smollm2):
    tokens = GREEDY["long_prompt"][None, :1000]
    dense = smollm2.logits(tokens, attention="dense")
    backend = smollm2.backend("hga", HGAConfig(local_chunks=16))
    np.testing.assert_allclose(smollm2.logits(tokens, attention=backend), dense, atol=1e-4, rtol=0)
