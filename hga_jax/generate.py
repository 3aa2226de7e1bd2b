"""`python -m hga_jax.generate`: answer from a long prompt, and report what it cost.

python -m hga_jax.generate --ctx 65536                                  a short demonstration on the built-in small model
python -m hga_jax.generate --ctx 65536 --prompt-file report.txt         your own prompt (also --prompt TEXT, or piped in)
python -m hga_jax.generate --session report --prompt "And why?"         goes on with a conversation stored by an earlier run
python -m hga_jax.generate --model Qwen/Qwen3-0.6B --plan               the byte table, nothing is loaded
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m hga_jax.generate", description="Generate text from a long prompt with hierarchical global attention.",
        epilog="With neither a prompt nor piped input it runs a demonstration: a document with one planted fact, and a question about it.",
    )  # fmt: skip
    p.add_argument("--ctx", type=int, default=65536, help="tokens there is room for, prompt and answer (default 65536)")
    p.add_argument("--model", help="directory, GGUF file, converted checkpoint or hub id (default: SmolLM2-135M-Instruct, fetched once)")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the prompt itself")
    source.add_argument("--prompt-file", help="a UTF-8 text file holding the prompt")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--attention", choices=("hga", "dense"), default="hga")
    p.add_argument("--policy", choices=("sketch", "paper"), help="hga: how pages are chosen (default: the library's)")
    p.add_argument(
        "--quality", metavar="fast|balanced|best|TAU", help="sketch policy: how much attention mass opens a page (default balanced)"
    )
    p.add_argument("--kv-store", default="auto", metavar="auto|device|host|DIR", help="where the K/V history lives (default auto)")
    p.add_argument(
        "--host-memory", type=float, metavar="GIB", help="with --kv-store DIR: host memory for pages read from it (default a quarter)"
    )
    p.add_argument(
        "--session", metavar="NAME", help="go on with, or begin, a conversation that is stored on disk after every run (in DIR, if given)"
    )
    p.add_argument("--rope-scaling", default="auto", metavar="auto|none|yarn:F", help="beyond the native context (default auto: YaRN)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)")
    p.add_argument("--no-chat", action="store_true", help="do not wrap the prompt in the model's chat template")
    p.add_argument("--dtype", choices=DTYPES, help="weights and K/V (default: float32 on a CPU, bfloat16 elsewhere; FP8 stays FP8)")
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="where to run (default: a GPU when JAX sees one)")
    p.add_argument("--json", metavar="OUT", help="write the result as JSON to this file (- for standard output)")
    p.add_argument("--plan", action="store_true", help="print what the run would hold in memory, and stop")
    return p


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
    if options.ctx < 2:
        raise ValueError(f"--ctx {options.ctx} must be at least 2")
    if options.json and options.json != "-":
        _check_writable(Path(options.json))
    prompt, demo = (None, False) if options.plan else read_prompt(options)

    # Imported here so that wrong options are answered at once: JAX takes a second or two to load.
    import jax
    import jax.numpy as jnp

    from hga_jax.cache.tiers import choose_tier
    from hga_jax.config import HGAConfig, parse_threshold
    from hga_jax.language_model import make_backend
    from hga_jax.loading import default_dtype, load_model, locate_model
    from hga_jax.plan import allow_pinning_all, layers_to_host, place_history

    allow_pinning_all()
    choose_device(jax, options.device)
    use_compilation_cache(jax)
    choose_tier(options.kv_store)
    hga = HGAConfig()
    if options.policy:
        hga = replace(hga, policy=options.policy)
    if options.quality:
        if hga.policy != "sketch":
            raise ValueError(f"--quality {options.quality} belongs to the sketch policy: leave it out with --policy {hga.policy}")
        hga = replace(hga, threshold=parse_threshold(options.quality))
    dtype = jnp.dtype(options.dtype) if options.dtype else default_dtype()

    def plan_for(config: Any, dtype: Any) -> Any:
        backend = make_backend(options.attention, config, hga)
        layers = layers_to_host(config, backend, options.ctx, dtype, options.kv_store)
        return place_history(config, backend, options.ctx, dtype, options.kv_store, options.host_memory, host_experts=layers)[1]

    def check(config: Any, dtype: Any) -> int:
        plan = plan_for(config, dtype)
        plan.check()
        return plan.expert_layers

    if options.plan:
        from convert import read_config

        path, name = locate_model(options.model)
        plan = plan_for(read_config(path), dtype)
        print(f"{name}, ctx {options.ctx:,}, {jnp.dtype(dtype).name}, attention {options.attention}")
        print(plan.table())
        if options.json:
            _write_json(options.json, {"model": name, "ctx": options.ctx, "plan": plan.as_json()})
        return 0

    with _bar(None, "loading", unit="B", unit_scale=True) as bar:
        model = load_model(
            options.model, dtype=dtype, progress=lambda done, total: _advance(bar, done, total),
            before_weights=check,
        )  # fmt: skip
    if demo:
        print_demo(prompt)
    with _bar(None, "prefill", unit="tok") as bar:

        def on_prefill(done: float, total: int) -> None:
            _advance(bar, round(done), total)
            if done >= total:
                bar.close()

        where = {
            "ctx": options.ctx, "attention": options.attention, "hga": hga, "kv_store": options.kv_store,
            "host_memory": options.host_memory, "rope_scaling": options.rope_scaling,
            "on_notice": lambda line: print(f"note: {line}", file=sys.stderr),
        }  # fmt: skip
        how = {
            "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k,
            "seed": options.seed, "chat": False if options.no_chat else None, "stop": options.stop,
            "on_text": lambda text: print(text, end="", flush=True), "on_prefill": on_prefill,
        }  # fmt: skip
        if options.session is None:
            result = model.generate(prompt, **where, **how)
        else:
            from hga_jax.session.folder import session_path

            with model.session(session_path(options.session, options.kv_store), **where) as session:
                result = session.generate(prompt, **how)
    print()
    print(report(result), file=sys.stderr)
    if options.json:
        _write_json(options.json, result.as_json())
    return 0


def read_prompt(options: argparse.Namespace) -> tuple[str, bool]:
    """The prompt and whether it is the demonstration's. Raises ValueError when there is none to read."""
    if options.prompt is not None:
        return options.prompt, False
    if options.prompt_file is not None:
        try:
            return Path(options.prompt_file).read_text(encoding="utf-8"), False
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompt_file} is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise ValueError(f"cannot read {options.prompt_file}: {error.strerror}") from None
    if not sys.stdin.isatty():
        piped = sys.stdin.buffer.read()
        if piped.strip():
            try:
                return piped.decode("utf-8"), False
            except UnicodeDecodeError as error:
                raise ValueError(f"standard input is not UTF-8 text (byte {error.start})") from None
    from hga_jax.demo import build_prompt

    return build_prompt(), True


def print_demo(prompt: str) -> None:
    """Show what the demonstration asks, and how much it hides the answer in."""
    from hga_jax.demo import FACT, QUESTION

    lines = prompt.splitlines()
    place = next(i for i, line in enumerate(lines) if FACT in line)
    print(f"No prompt given: a demonstration. A log of {len(lines):,} lines has one planted fact, in line {place + 1}:\n  {FACT}")
    print(f"Question: {QUESTION}\nAnswer: ", end="", flush=True)


def report(result: Any) -> str:
    """The lines printed after an answer."""
    mib = 2**20

    def share(prefill: float, decode: float | None) -> str:
        return f"{prefill:.1%} in prefill" + (f", {decode:.1%} in decode" if decode is not None else "")

    rate = f"{result.decode_tokens_per_second:.1f} tokens/s" if result.decode_tokens_per_second else "too short to time"
    from_disk = ""
    if result.disk_read_bytes_per_token is not None:
        from_disk = f", {result.disk_read_bytes_per_token / mib:,.2f} MiB read from disk a token, {result.bank_hit_rate:.0%} of pages found"
    stored = f"; {result.disk_history_bytes / mib:,.1f} MiB on disk" if result.disk_history_bytes else ""
    reused = f" ({result.reused_tokens:,} reused)" if result.reused_tokens else ""
    rows = [
        ("model", f"{result.model}, attention {result.attention}, rope scaling {result.rope_scaling}"),
        ("tokens", f"{result.prompt_tokens:,} prompt{reused} + {result.new_tokens:,} new (ended by {result.stopped_by})"),
        ("attended", share(result.attended_fraction, result.decode_attended_fraction) + " of the causal keys"),
        ("fetched", share(result.fetched_fraction, result.decode_fetched_fraction) + " of the history, per query block and kv head"),
        *_selection_rows(result),
        ("prefill", f"{result.prefill_seconds:.1f} s, {result.prefill_tokens_per_second:,.0f} tokens/s"),
        ("decode", rate + from_disk),
        ("history", f"{result.history_bytes / mib:,.1f} MiB, tier {result.history_tier}{stored}"),
        ("memory", f"peak {result.device_peak_bytes / mib:,.0f} MiB on the device, {result.host_history_bytes / mib:,.0f} MiB on the host"),
    ]
    return "\n".join(["", *(f"{name:9} {text}" for name, text in rows)])


def _selection_rows(result: Any) -> list[tuple[str, str]]:
    """What the sketch policy left out, where it was used."""
    if result.unopened_mass is None:
        return []
    refused = f"; {result.refused_pages:,.0f} page requests refused for lack of room" if result.refused_pages else ""
    return [("unopened", f"{result.unopened_mass:.2%} of the attention mass, by estimate{refused}")]


def choose_device(jax: Any, device: str) -> None:
    """Hold JAX to the device asked for. Raises ValueError when a GPU is demanded and JAX sees none."""
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if device == "gpu" and jax.default_backend() != "gpu":
        raise ValueError(
            "--device gpu: JAX sees no GPU here; install 'hga-jax[cuda]' on a machine with an NVIDIA driver, or use --device cpu"
        )


def use_compilation_cache(jax: Any) -> None:
    """Keep compiled programs in the user's cache directory, so that only the first run waits for the compiler."""
    if jax.config.jax_compilation_cache_dir:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hga_jax" / "compiled"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # an unwritable home costs compile time, nothing else
    jax.config.update("jax_compilation_cache_dir", str(base))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _bar(total: int | None, name: str, **unit: Any) -> tqdm:
    return tqdm(total=total, desc=name, leave=False, file=sys.stderr, disable=None, mininterval=0.2, **unit)


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.resolve().parent.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"--json {path}: cannot be written there")


def _write_json(target: str, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False)
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
