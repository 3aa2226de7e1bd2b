"""A needle test: one fact in a long log, at several depths, and whether the model answers with it.

    python examples/needle.py [--days 100] [--depths 0.1 0.5 0.9] [--model PATH]

Prints one line a depth and attention (dense, then routed): found or not, what the model said, and the share of keys attended to.
`python -m hga_jax.eval needle` is the thorough form: several lengths, texts and policies, scores in JSON.
"""

import argparse

import hga_jax
from hga_jax.demo import ANSWER, build_prompt


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=100, help="entries of the log: about 23 tokens each")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--model")
    options = parser.parse_args(arguments)
    model = hga_jax.load_model(options.model)
    for depth in options.depths:
        prompt = build_prompt(entries=options.days, fact_at=depth)
        for attention in ("dense", "hga"):
            result = model.generate(prompt, max_new_tokens=24, attention=attention)
            found = "found" if ANSWER in result.text else "lost "
            print(
                f"depth {depth:4.0%} of {result.prompt_tokens} tokens, {attention:5}: {found}, {result.attended_fraction:.0%} attended"
                f" | {result.text!r}"
            )


if __name__ == "__main__":
    main()
