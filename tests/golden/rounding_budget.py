"""What each rounding costs a full-width FP8 checkpoint: a float32 forward pass with one rounding to bfloat16 switched on at a time.

    python tests/golden/rounding_budget.py DIR OUT.npz      of compare_full_width.py; needs torch, none of our code, 4 bytes a parameter

Experts are those that float32 chooses, so that near ties of the router do not count. Prints a line a rounding: relative error of the
logits against transformers in float32, and the share of positions with the same most likely token. The roundings are those that our prefill
in plain XLA had when everything was bfloat16. Two layers of Qwen3-30B-A3B's width, 256 tokens, on a CPU: all together 9.3e-3 (ours measured
9.6e-3), none 1e-6; singly from 1.4e-3 to 4.4e-3, most for the weights of the projections, least inside the experts; a single one changes up
to 1.6 % of the most likely tokens. With five more (heads before their norm and before rotation, products of o and the experts' mix before
and after they were added to float32) it was 1.13e-2. With all but `hidden` and the head's input in float16 and products of experts not
rounded, which is what we do now, 2.8e-3, and 1.1e-3 with those two as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from compare_full_width import dequantised, describe
from torch import Tensor

ROUNDINGS = {
    "projection_weights": "q, k, v, o: values times scales",
    "expert_weights": "the same of experts' gate and up",
    "down_weights": "the same of their down",
    "attention_norm": "input of q, k, v",
    "values": "product of v",
    "rotated": "queries and keys after rotation",
    "probabilities": "before their sum over values",
    "attention_out": "input of o",
    "mlp_norm": "input of router and experts",
    "gate_up": "their products",
    "silu": "of gate",
    "hidden": "input of down",
    "down": "its product",
    "final_norm": "input of the output head",
}


class Network:
    """experts [L, T, k]: those that tokens are given."""

    def __init__(self, directory: Path, tokens: np.ndarray, experts: Tensor):
        self.weights, self.config = dequantised(directory), json.loads((directory / "config.json").read_text())
        self.tokens, self.experts = torch.from_numpy(tokens).long(), experts
        half = torch.arange(0, self.config["head_dim"], 2, dtype=torch.float64) / self.config["head_dim"]
        angle = torch.arange(len(tokens), dtype=torch.float64)[:, None, None] / self.config["rope_theta"] ** half
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def logits(self, roundings: dict[str, torch.dtype]) -> np.ndarray:
        """With the named roundings, each to its type."""
        self.types = roundings
        x = self.weights["model.embed_tokens.weight"][self.tokens]
        for layer in range(self.config["num_hidden_layers"]):
            x = x + self.attention(f"model.layers.{layer}.self_attn", self.norm("attention_norm", x))
            x = x + self.mixture(f"model.layers.{layer}.mlp", self.norm("mlp_norm", x), self.experts[layer])
        return (self.norm("final_norm", x) @ self.weights["lm_head.weight"].T).numpy()

    def round(self, name: str, x: Tensor) -> Tensor:
        return x.to(self.types[name]).float() if name in self.types else x

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The checkpoint's norm weights are ones."""
        return self.round(name, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]))

    def product(self, x: Tensor, name: str, weights: str) -> Tensor:
        return x @ self.round(weights, self.weights[f"{name}.weight"]).T

    def attention(self, name: str, x: Tensor) -> Tensor:
        tokens, width = len(x), self.config["head_dim"]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (self.product(x, f"{name}.{part}_proj", "projection_weights").view(tokens, -1, width) for part in "qkv")
        q, k, v = self.rotate(self.norm("heads", q)), self.rotate(self.norm("heads", k)), self.round("values", v)
        scores = torch.einsum("tkgh,skh->kgts", q.view(tokens, kv_heads, heads // kv_heads, width), k) / width**0.5
        scores += torch.full((tokens, tokens), -torch.inf).triu(1)
        exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
        out = torch.einsum("kgts,skh->kgth", self.round("probabilities", exponentials), v) / exponentials.sum(-1, keepdim=True)
        out = self.round("attention_out", out.permute(2, 0, 1, 3).reshape(tokens, -1))
        return self.product(out, f"{name}.o_proj", "projection_weights")

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return self.round("rotated", torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], -1))

    def mixture(self, name: str, x: Tensor, chosen: Tensor) -> Tensor:
        weights = torch.softmax(self.product(x, f"{name}.gate", "router"), -1).gather(1, chosen)
        weights /= weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(self.config["num_experts"]):
            tokens, choice = torch.where(chosen == expert)
            if not len(tokens):
                continue
            path = f"{name}.experts.{expert}"
            gate, up = (self.round("gate_up", self.product(x[tokens], f"{path}.{part}_proj", "expert_weights")) for part in ("gate", "up"))
            hidden = self.round("hidden", self.round("silu", torch.nn.functional.silu(gate)) * up)
            down = self.round("down", self.product(hidden, f"{path}.down_proj", "down_weights"))
            out.index_add_(0, tokens, down * weights[tokens, choice, None])
        return out


def main(directory: Path, file: Path) -> None:
    golden = np.load(file)
    expected = golden["float32"]
    chosen = json.loads((directory / "config.json").read_text())["num_experts_per_tok"]
    network = Network(directory, golden["tokens"], torch.from_numpy(golden["scores"]).topk(chosen, dim=-1).indices)
    every = dict.fromkeys(ROUNDINGS, torch.bfloat16)
    unbounded = {"hidden", "down_weights", "final_norm"}
    ours = {name: torch.bfloat16 if name in unbounded else torch.float16 for name in ROUNDINGS if name not in ("gate_up", "silu", "down")}
    with torch.inference_mode():
        describe("no rounding", network.logits({}), expected)
        describe("all", network.logits(every), expected)
        squares = [describe(f"{name} ({what})", network.logits({name: every[name]}), expected)[0] ** 2 for name, what in ROUNDINGS.items()]
        print(f"root of the sum of squares of the single ones: {sum(squares) ** 0.5:.2e}")
        describe(
            "all but those of weights", network.logits({name: kind for name, kind in every.items() if "weights" not in name}), expected
        )
        describe("ours now", network.logits(ours), expected)
        describe("the same, all of them float16", network.logits(dict.fromkeys(ours, torch.float16)), expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
