"""The command line of `python -m hga_jax.eval`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hga_jax.config import HGAConfig, parse_threshold
from hga_jax.eval.choices import Choice, parse_choices, with_dense
from hga_jax.eval.reporting import Progress, check_plotting, check_writable, keeper, provenance, read_texts, write_json

DTYPES = ("float32", "bfloat16", "float16")
POLICY_HELP = (
    "dense, sketch, paper or windows (sinks and local window alone), each with settings of its own if wanted, as in "
    "paper:top_chunks=20,top_groups=32; several are compared in one run (default: dense and the default policy)"
)
SCORING_HELP = (
    "generate: the greedy continuation holds the answer; teacher: each token of the answer is the most likely one when the answer is fed; "
    "auto (default): generate for checkpoints with a chat template, teacher for others"
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m hga_jax.eval", description="Measure what hierarchical global attention costs beside dense.")
    tasks = p.add_subparsers(dest="task", required=True, metavar="|".join(TASKS))
    nll = tasks.add_parser("nll", help="loss on texts: dense and policies on the same tokens")
    sweep = tasks.add_parser("sweep", help="the same over thresholds or budgets: gap against fetched tokens")
    mass = tasks.add_parser("mass", help="attention mass that a policy leaves closed, per layer and head")
    needle = tasks.add_parser("needle", help="facts hidden in a long text, each asked for: length x depth")
    ruler = tasks.add_parser("ruler", help="RULER's task families that need no outside data")
    for task in (nll, sweep, mass, needle, ruler):
        _common(task)
    for task in (nll, sweep, mass):
        _texts(task)
    for task in (nll, mass, needle, ruler):
        _policies(task)
    for task in (needle, ruler):
        task.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], metavar="N", help="tokens of prompt and answer")
        task.add_argument("--samples", type=int, default=3, help="texts per length (needle) or per length and family (ruler); default 3")
        task.add_argument("--seed", type=int, default=0, help="of the made-up texts")
    _windows(sweep)
    sweep.add_argument("--thresholds", nargs="*", default=[], metavar="TAU", help="sketch policy: share of mass that opens a page")
    sweep.add_argument("--budgets", nargs="*", default=[], metavar="CHUNKS/GROUPS", help="paper policy, as in 16/64")
    needle.add_argument("--depths", type=float, nargs="+", default=[0, 25, 50, 75, 100], metavar="PERCENT", help="where facts are hidden")
    needle.add_argument("--scoring", choices=("auto", "generate", "teacher"), default="auto", help=SCORING_HELP)
    ruler.add_argument("--families", nargs="+", metavar="NAME", help="default: all")
    return p


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", help="directory, GGUF file, converted checkpoint or hub id (default: SmolLM2-135M-Instruct, fetched once)")
    p.add_argument("--dtype", choices=DTYPES, help="weights and K/V (default: float32 on a CPU, bfloat16 elsewhere; FP8 stays FP8)")
    p.add_argument("--rope-scaling", default="auto", metavar="auto|none|yarn:F", help="beyond the native context (default auto: YaRN)")
    p.add_argument("--json", metavar="OUT", help="write the report to this file (- for standard output); needle, ruler: as answers come")
    p.add_argument("--plot", metavar="PNG", help="draw the figure to this file (needs matplotlib: the extra `plot`)")


def _texts(p: argparse.ArgumentParser) -> None:
    p.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 texts; the first --length tokens of each are used")
    p.add_argument("--length", type=int, default=8192, help="tokens of each text (default 8192)")
    p.add_argument("--skip", type=int, default=1024, help="losses over positions beyond this one (default 1024)")


def _policies(p: argparse.ArgumentParser) -> None:
    p.add_argument("--policy", nargs="+", default=["dense", HGAConfig().policy], metavar="NAME", help=POLICY_HELP)
    p.add_argument("--threshold", metavar="TAU", help="sketch: share of a query's attention mass that opens a page, or fast|balanced|best")
    p.add_argument("--top-chunks", type=int, help="paper: chunks")
    p.add_argument("--top-groups", type=int, help="paper: groups")
    _windows(p)


def _windows(p: argparse.ArgumentParser) -> None:
    p.add_argument("--sink-chunks", type=int, help="first chunks, always attended")
    p.add_argument("--local-chunks", type=int, help="chunks before the query's own, always attended")


def choices_of(options: argparse.Namespace, words: list[str]) -> list[Choice]:
    """The attentions asked for, with the settings given as flags. Raises ValueError."""
    names = ("threshold", "top_chunks", "top_groups", "sink_chunks", "local_chunks")
    common = {name: getattr(options, name, None) for name in names}
    if common["threshold"] is not None:
        common["threshold"] = parse_threshold(common["threshold"])
    return parse_choices(words, common)


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
    choices, texts = with_dense(choices_of(options, options.policy)), check_texts(options)
    from hga_jax.eval import nll, plots

    model = open_model(options, options.length, choices)
    report = nll.evaluate(model, texts, options.length, choices, options.skip)
    return report, nll.as_text(report), plots.plot_nll


def run_sweep(options: argparse.Namespace) -> tuple[dict[str, Any], str, Any]:
    from hga_jax.eval.sweep import add_points, as_text, sweep_words

    choices, texts = with_dense(choices_of(options, sweep_words(options.thresholds, options.budgets))), check_texts(options)
    from hga_jax.eval import nll, plots

    model = open_model(options, options.length, choices)
    report = add_points(nll.evaluate(model, texts, options.length, choices, options.skip))
    return report, as_text(report), plots.plot_sweep


def run_mass(options: argparse.Namespace) -> tuple[dict[str, Any], str, Any]:
    choices, texts = [choice for choice in choices_of(options, options.policy) if choice.hga], check_texts(options)
    if not choices:
        raise ValueError("--policy dense: dense attention misses nothing, name a policy")
    from hga_jax.eval import mass, plots

    model = open_model(options, options.length, choices)
    report = mass.evaluate(model, texts, options.length, choices, options.skip)
    return report, mass.as_text(report), plots.plot_mass


def run_needle(options: argparse.Namespace) -> tuple[dict[str, Any], str, Any]:
    choices = choices_of(options, options.policy)
    check_prompts(options)
    if bad := [depth for depth in options.depths if not 0 <= depth <= 100]:
        raise ValueError(f"--depths {bad[0]:g} must lie between 0 and 100 percent")
    from hga_jax.eval import needle, plots

    model = open_model(options, max(options.lengths), choices)
    depths = [depth / 100 for depth in dict.fromkeys(options.depths)]
    report = needle.evaluate(model, options.lengths, depths, choices, options.samples, options.seed, options.scoring, keeper(options.json))
    return report, needle.as_text(report), plots.plot_needle


def run_ruler(options: argparse.Namespace) -> tuple[dict[str, Any], str, Any]:
    choices = choices_of(options, options.policy)
    check_prompts(options)
    from hga_jax.eval.ruler_tasks import FAMILIES

    families = list(dict.fromkeys(options.families or FAMILIES))
    if unknown := [name for name in families if name not in FAMILIES]:
        raise ValueError(f"--families {unknown[0]} is not known: choose {', '.join(FAMILIES)}")
    from hga_jax.eval import plots, ruler

    model = open_model(options, max(options.lengths), choices)
    report = ruler.evaluate(model, families, options.lengths, choices, options.samples, options.seed, keeper(options.json))
    return report, ruler.as_text(report), plots.plot_ruler


def check_prompts(options: argparse.Namespace) -> None:
    """Raises ValueError for lengths and samples that cannot be."""
    options.lengths = sorted(set(options.lengths))
    if options.lengths[0] < 128:
        raise ValueError(f"--lengths {options.lengths[0]} is too short for a question and its answer: give at least 128 tokens")
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples} must be at least 1")


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
    with Progress(None, "loading", unit="B") as bar:
        model = load_model(options.model, dtype=dtype, progress=bar.of, before_weights=check)
    rope, note = resolve_rope(model.config, tokens, options.rope_scaling)
    if rope == model.config.rope:
        return model
    print(f"note: {note}", file=sys.stderr)
    return model.with_rope(rope)


TASKS = {"nll": run_nll, "sweep": run_sweep, "mass": run_mass, "needle": run_needle, "ruler": run_ruler}


if __name__ == "__main__":
    sys.exit(main())
