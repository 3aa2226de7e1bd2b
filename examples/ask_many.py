"""Several questions about one long file: it is read once, and stored; every question goes on from there.

    python examples/ask_many.py FILE STORE "QUESTION 1" "QUESTION 2" ... [--model PATH] [--max-new-tokens 64]

Each question is a session of its own in the directory STORE. Sessions share equal beginnings, so the first one reads the file and the
others, also those of a later run, find its keys and values on disk. Prints each answer, how many tokens were read anew, and the seconds.
"""

import argparse
import secrets
from pathlib import Path

import hga_jax


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    model = hga_jax.load_model(options.model)
    document = options.file.read_text(encoding="utf-8")
    for question in options.questions:
        prompt = f"{document}\n\nUsing the text above, answer the question. {question}"
        with model.session(options.store / f"question-{secrets.token_hex(4)}") as session:
            result = session.generate(prompt, max_new_tokens=options.max_new_tokens)
        fresh = result.prompt_tokens - result.reused_tokens
        print(f"{question}\n  {result.text.strip()}")
        print(f"  {fresh} of {result.prompt_tokens} tokens read anew, {result.prefill_seconds:.2f} s")


if __name__ == "__main__":
    main()
