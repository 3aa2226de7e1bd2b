"""A question about a long file, answered while you watch.

    python examples/ask_file.py FILE "QUESTION" [--model PATH] [--max-new-tokens 128]

Prints the answer as it comes, then what it cost: prompt tokens, seconds to read them, tokens a second, and the share of the history that
each query attended to. Beyond the model's native context YaRN is switched on, and a line says so.
"""

import argparse
import sys
from pathlib import Path

import hga_jax


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    model = hga_jax.load_model(options.model)
    prompt = f"{options.file.read_text(encoding='utf-8')}\n\nUsing the text above, answer the question. {options.question}"
    result = model.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        on_text=lambda piece: print(piece, end="", flush=True),
        on_notice=lambda line: print(line, file=sys.stderr),
    )
    print(
        f"\n{result.prompt_tokens} tokens read in {result.prefill_seconds:.1f} s, {result.attended_fraction:.0%} of the keys attended to, "
        f"{result.decode_tokens_per_second or float('nan'):.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
