"""python -m convert SRC DST: a Hugging Face directory or a GGUF file into an Orbax checkpoint directory that load_model opens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax
from tqdm import tqdm

from convert.load import DTYPES
from convert.save import convert_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code. Errors are one line on stderr and 2."""
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", help="checkpoint directory (config.json and safetensors) or GGUF file")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights that are not FP8 (default: the source's)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is an earlier conversion")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing here computes: leave accelerators to others
    bar = tqdm(desc="converting", unit="B", unit_scale=True, unit_divisor=1024, disable=None)

    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        with bar:
            target = convert_checkpoint(options.source, options.target, dtype=options.dtype, overwrite=options.overwrite, progress=advance)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
