"""The command line of `python -m hga_jax.eval`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hga_jax.config import HGAConfig
from hga_jax.eval.choices import Choice, parse_choices, with_dense
from hga_jax.eval.reporting import Progress, check_plotting, check_writable, provenance, read_texts, write_json

DTYPES = ("float32", "bfloat16", "float16")
POLICY_HELP = (
    "dense, sketch, paper or windows (sinks and local window alone), each with settings of its own if wanted, as in "
    "paper:top_chunks=20,top_groups=32; several are compared in one run (default: dense and the default policy)"
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m hga_jax.eval", description="Measure what hierarchical global attention costs beside dense.")
    tasks = p.add_subparsers(dest="task", required=True, metavar="nll")
    nll = tasks.add_parser("nll", help="loss on texts: dense and policies on the same tokens")
    _common(nll)
    _texts(nll)
    _policies(nll)
    return p


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", help="directory, GGUF file, converted checkpoint or hub id (default: SmolLM2-135M-Instruct, fetched once)")
    p.add_argument("--dtype", choices=DTYPES, help="weights and K/V (default: float32 on a CPU, bfloat16 elsewhere; FP8 stays FP8)")
    p.add_argument("--rope-scaling", default="auto", metavar="auto|none|yarn:F", help="beyond the native context (default auto: YaRN)")
    p.add_argument("--json", metavar="OUT", help="write the report as JSON to this file (- for standard output)")
    p.add_argument("--plot", metavar="PNG", help="draw the figure to this file (needs matplotlib: the extra `plot`)")


def _texts(p: argparse.ArgumentParser) -> None:
    p.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 texts; the first --length tokens of each are used")
    p.add_argument("--length", type=int, default=8192, help="tokens of each text (default 8192)")
    p.add_argument("--skip", type=int, default=1024, help="losses over positions beyond this one (default 1024)")


def _policies(p: argparse.ArgumentParser) -> None:
    p.add_argument("--policy", nargs="+", default=["dense", HGAConfig().policy], metavar="NAME", help=POLICY_HELP)
    p.add_argument("--threshold", type=float, help="sketch: share of a query's attention mass that opens a page")
    p.add_argument("--top-chunks", type=int, help="paper: chunks")
    p.add_argument("--top-groups", type=int, help="paper: groups")
    p.add_argument("--sink-chunks", type=int, help="first chunks, always attended")
    p.add_argument("--local-chunks", type=int, help="chunks before the query's own, always attended")


def choices_of(options: argparse.Namespace) -> list[Choice]:
    """The attentions asked for, dense first. Raises ValueError."""
    names = ("threshold", "top_chunks", "top_groups", "sink_chunks", "local_chunks")
    return with_dense(parse_choices(options.policy, {name: getattr(options, name) for name in names}))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (ValueError, NotImplementedError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Everything the command does. Raises ValueError for wrong input."""
    check_writable("--json", options.json)
    check_plotting(options.plot)
    report, text, plot = TASKS[options.task](options)
    print(text)
    report |= provenance()
    if options.plot:
        plot(report, options.plot)
    if options.json:
        write_json(options.json, report)
    return 0


def run_nll(options: argparse.Namespace) -> tuple[dict[str, Any], str, Any]:
    choices, texts = choices_of(options), check_texts(options)
    from hga_jax.eval import nll, plots

    model = open_model(options, options.length, choices)
    report = nll.evaluate(model, texts, options.length, choices, options.skip)
    return report, nll.as_text(report), plots.plot_nll


def check_texts(options: argparse.Namespace) -> dict[str, str]:
    if options.skip < 0:
        raise ValueError(f"--skip {options.skip} must not be negative")
    if options.length < options.skip + 2:
        raise ValueError(f"--length {options.length} leaves no position beyond --skip {options.skip}: raise the one or lower the other")
    return read_texts(options.text)


def open_model(options: argparse.Namespace, tokens: int, choices: list[Choice]) -> Any:
    """The model, its rope set for `tokens` tokens, after checking that every choice fits in memory. Raises ValueError."""
    import jax
    import jax.numpy as jnp

    from hga_jax.generate import use_compilation_cache
    from hga_jax.language_model import make_backend
    from hga_jax.loading import load_model
    from hga_jax.plan import make_plan
    from hga_jax.rope import resolve_rope

    use_compilation_cache(jax)

    def check(config: Any, dtype: Any) -> None:
        resolve_rope(config, tokens, options.rope_scaling)
        for choice in choices:
            backend = make_backend("dense" if choice.hga is None else "hga", config, choice.hga)
            make_plan(config, backend, tokens, dtype).check()

    dtype = jnp.dtype(options.dtype) if options.dtype else None
    with Progress(0, "loading") as bar:
        model = load_model(options.model, dtype=dtype, progress=lambda done, total: bar.within(0, done), before_weights=check)
    rope, note = resolve_rope(model.config, tokens, options.rope_scaling)
    if rope == model.config.rope:
        return model
    print(f"note: {note}", file=sys.stderr)
    return model.with_rope(rope)


TASKS = {"nll": run_nll}


if __name__ == "__main__":
    sys.exit(main())
