"""Stored history: the disk beside plain files, resuming beside reading the same bytes, prefill while storing, decode from disk.

python -m hga_jax.bench session disk --dir DIR                          write, read, random pages beside plain file I/O
python -m hga_jax.bench session resume --dir DIR --shape qwen3-30b-a3b  random K/V of --tokens stored, then brought back
python -m hga_jax.bench session run --dir DIR [--model M]               prefill while storing; first token after reopening; second question
                                                                        about the same text; decoding with --share of the history in memory

Files are dropped from the page cache before what is called cold. Compare the numbers with the plain ones of the same run: disks are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax.attention import HGAAttention
from hga_jax.bench.decode import SHAPES
from hga_jax.cache.disk import PAGES, PIECE_SUMS, BlockStore, BlockWriter, block_id, piece_sums
from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
from hga_jax.generation import Generation
from hga_jax.language_model import LanguageModel
from hga_jax.loading import load_model
from hga_jax.model import Decoder
from hga_jax.plan import place_history
from hga_jax.sampling import Sampling
from hga_jax.session.recording import CPU_SEGMENT, WRITERS
from hga_jax.session.reuse import Spent, StoredPages, load_states, longest_stored, read_sums
from hga_jax.session.state_format import StateFormat
from pallas_kernels.dispatch import on_cuda

GB = 1e9
ROOT = "00" * 16
THREADS = 16
PARTS = ("prefill", "reopen", "question", "disk")
QUESTION = 64  # tokens of a second question
Run = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench session", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("disk", "resume", "run"))
    parser.add_argument("--dir", type=Path, required=True, help="an empty directory on the disk to measure")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--tier", choices=("device", "host"), default="host" if jax.default_backend() == "gpu" else "device")
    parser.add_argument("--model", help="run: checkpoint (default: random weights of --shape, without experts)")
    parser.add_argument("--text", type=Path, help="run: a file whose beginning is the prompt (default: random tokens); needs --model")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="resume: leave the stored history in --dir, for a second run")
    parser.add_argument(
        "--states", nargs="+", choices=("cold", "warm"), default=("cold", "warm"), help="resume: of the system's file cache"
    )
    parser.add_argument("--no-first", action="store_true", help="resume: do not time the first one of the process apart")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="run: what to measure (reopen needs prefill)")
    parser.add_argument("--share", type=float, default=0.25, help="run: of the history that the page cache may hold")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = {
        "command": f"session {options.part}", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "machine": platform.platform(), "cores": os.cpu_count(), "shape": options.shape, "tokens": options.tokens,
    }  # fmt: skip
    show(report)
    found = {"disk": bench_disk, "resume": bench_resume, "run": bench_run}[options.part](options)
    report |= found
    if options.part != "run":
        show(found)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def show(found: Run) -> None:
    """As it is found: a long run that is stopped has said what it knows."""
    for name, value in found.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}", flush=True)


def random_blocks(form: StateFormat, store: BlockStore, staging: Path, tokens: np.ndarray) -> int:
    """Store random pages and zero summaries for these tokens, a few blocks at a time as a recorder does; bytes written."""
    generator = np.random.default_rng(0)
    shape = (form.kv_heads, form.pages(form.block_tokens), 2, form.group_size, form.head_dim)
    pages = [generator.integers(0, 2**15, shape, np.uint16).view(jnp.dtype(form.dtype)) for _ in range(8)]
    parents = [ROOT]
    for first in range(0, len(tokens), form.block_tokens):
        parents.append(block_id(parents[-1], tokens[first : first + form.block_tokens]))

    def write_block(index: int) -> int:
        first = index * form.block_tokens
        writer = BlockWriter(store, staging, parents[index], first, tokens[first : first + form.block_tokens])
        specs = form.arrays(len(writer.tokens), first + len(writer.tokens), 1)
        for name, spec in specs.items():
            writer.create(name, spec)
            if name not in (PAGES, PIECE_SUMS):
                writer.write(name, np.zeros(spec.shape, jnp.dtype(spec.dtype)))
        sums = []
        for layer in range(form.layers):
            data = pages[layer % len(pages)][:, : specs[PAGES].shape[2]]
            writer.write(PAGES, data, layer)
            sums.append(piece_sums(data, form.piece_pages))
        writer.write(PIECE_SUMS, np.stack(sums))
        return writer.finish([first + len(writer.tokens)]).bytes

    with ThreadPoolExecutor(WRITERS) as pool_of_threads:
        return sum(pool_of_threads.map(write_block, range(len(parents) - 1)))


def shape_form(options: argparse.Namespace) -> tuple[ModelConfig, HGAAttention, StateFormat]:
    layers, heads, kv_heads, head_dim = SHAPES[options.shape]
    layers = options.layers or layers
    config = ModelConfig("qwen3", 256, 1024, layers, heads, kv_heads, head_dim, 3072, 262144, RopeConfig(1e7), qk_norm=True)
    backend = HGAAttention(HGAConfig(), config.rope, tier=options.tier)
    return config, backend, StateFormat.of(backend, config, jnp.bfloat16)


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def drop_from_page_cache(files: Iterable[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class PlainReader:
    """Reads whole files side by side into one piece of memory that is there already, each to its own place: the ceiling."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.places = np.cumsum([0, *(path.stat().st_size for path in files)])
        self.memory = np.empty(self.places[-1], np.uint8)
        self.seconds()  # once, so that page faults are not timed

    def seconds(self) -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._read, range(len(self.files))))
        return time.perf_counter() - begin

    def _read(self, index: int) -> None:
        with open(self.files[index], "rb", buffering=0) as file:
            file.readinto(self.memory[self.places[index] : self.places[index + 1]])


def write_plainly(directory: Path, size: int, count: int) -> float:
    """Seconds to write files of `size` bytes and sync each, with a few threads."""
    data = np.random.default_rng(1).integers(0, 256, size, np.uint8).data

    def write_one(index: int) -> None:
        with open(directory / str(index), "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    directory.mkdir(parents=True)
    begin = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write_one, range(count)))
    return time.perf_counter() - begin


def random_tokens(options: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, options.tokens).astype(np.int32)


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - begin


def stored_history(options: argparse.Namespace) -> tuple[BlockStore, StateFormat, HGAAttention, ModelConfig, np.ndarray, dict[str, Any]]:
    """Random history of the shape on disk, and how fast it was written."""
    config, backend, form = shape_form(options)
    store = BlockStore(options.dir)
    tokens = random_tokens(options)
    size: list[int] = []
    spent = seconds(lambda: size.append(random_blocks(form, store, options.dir / "staging", tokens)))
    per_file = form.kv_heads * form.pages(form.block_tokens) * form.page_bytes
    count = min(max(1, size[0] // per_file), 2**30 // per_file)
    plain = write_plainly(options.dir / "plain", per_file, count)
    shutil.rmtree(options.dir / "plain")
    written = {"bytes": size[0], "write_gb_s": size[0] / spent / GB, "plain_write_gb_s": count * per_file / plain / GB}
    return store, form, backend, config, tokens, written


def bench_disk(options: argparse.Namespace) -> dict[str, Any]:
    """Sequential and random reading of stored pages beside plain file I/O."""
    store, form, _, _, tokens, report = stored_history(options)
    files = [path for path in files_of(options.dir / "blocks") if path.parent.name == PAGES and path.name != "zarr.json"]
    chain = longest_stored(store, form, ROOT, tokens, len(tokens)).chain
    total = sum(path.stat().st_size for path in files)
    stored = StoredPages(store, form, chain, form.pages(len(tokens)))
    layer_shape = (form.kv_heads, form.pages(len(tokens)), 2, form.group_size, form.head_dim)
    places = [np.ones(layer_shape, jnp.dtype(form.dtype)) for _ in range(min(4, form.layers))]
    plain = PlainReader(files)

    def read_all() -> None:
        reads = [stored.start(layer, places[layer]) for layer in range(len(places))]
        for layer in range(form.layers):
            stored.wait(layer, reads[layer])
            if len(reads) < form.layers:
                reads.append(stored.start(len(reads), places[layer % len(places)]))

    for name in ("cold", "warm"):
        for kind, action in (("read", lambda: seconds(read_all)), ("plain_read", plain.seconds)):
            if name == "cold":
                drop_from_page_cache(files)
            before = time.process_time()
            report[f"{kind}_{name}_gb_s"] = total / action() / GB
            report[f"{kind}_{name}_cpu_seconds_a_gb"] = (time.process_time() - before) / total * GB
    generator = np.random.default_rng(3)
    wanted, piece = 256, form.piece_pages * form.page_bytes
    sums = [read_sums(store, header) for header in chain]
    pieces = form.pages(form.block_tokens) // form.piece_pages
    full = [b for b, header in enumerate(chain) if len(header.tokens) == form.block_tokens]

    def choose() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return generator.choice(full, wanted), generator.integers(0, form.kv_heads, wanted), generator.integers(0, pieces, wanted)

    def random_pieces(layer: int) -> None:
        blocks, heads, places = choose()
        reads = []
        for b in np.unique(blocks):
            mine = blocks == b
            first, stated = places[mine] * form.piece_pages, sums[b][layer, heads[mine], places[mine]]
            reads.append(store.read_pieces(chain[b], layer, heads[mine], first, form.piece_pages, stated))
        for read in reads:
            read()

    def plain_pieces(layer: int) -> None:
        def read_one(job: tuple[int, int, int]) -> None:
            folder = store.folder(chain[job[0]].parent, chain[job[0]].id) / PAGES
            descriptor = os.open(folder / f"{layer}.0.0.0.0.0", os.O_RDONLY)
            os.pread(descriptor, piece, (job[1] * pieces + job[2]) * piece)
            os.close(descriptor)

        list(threads.map(read_one, zip(*choose(), strict=True)))

    with ThreadPoolExecutor(THREADS) as threads:
        for name, action in (("random", random_pieces), ("plain_random", plain_pieces)):
            for state in ("cold", "warm"):
                drop_from_page_cache(files) if state == "cold" else plain.seconds()
                times = [seconds(lambda layer=layer, action=action: action(layer)) for layer in range(min(8, form.layers))]
                report[f"{name}_{state}_gb_s"] = wanted * piece / statistics.median(times) / GB
    shutil.rmtree(options.dir / "blocks")
    return report | {"random_piece_bytes": piece}


def bench_resume(options: argparse.Namespace) -> dict[str, Any]:
    """From a closed session to states that decode can go on from, beside reading the same files.

    What --keep left is used again: then `resume_first_seconds` is what a new process needs, allocation and compilation included.
    """
    if (options.dir / "blocks").exists():
        _, backend, form = shape_form(options)
        tokens, report = random_tokens(options), {}
    else:
        _, form, backend, _, tokens, report = stored_history(options)
    files = files_of(options.dir / "blocks")
    report |= {"bytes": sum(path.stat().st_size for path in files)}
    spent: list[Spent] = []

    def resume() -> Any:
        fresh = BlockStore(options.dir)
        spent.append(Spent())
        with spent[-1].on("finding blocks"):
            stored = longest_stored(fresh, form, ROOT, tokens, len(tokens))
        if stored.length != len(tokens):
            raise ValueError(f"{options.dir} holds {stored.length} of {len(tokens)} tokens ({stored.problems[:1]}): give an empty --dir")
        return load_states(fresh, form, stored, backend, options.tokens, spent[-1])

    jax.block_until_ready(jnp.zeros(1))  # the device is there
    if not options.no_first:
        report["resume_first_seconds"] = seconds(resume)
        report["of_it_first"] = rounded(spent[-1])
    plain = PlainReader(files)
    for name in options.states:
        for kind, action in (("resume", lambda: seconds(resume)), ("plain_read", plain.seconds)):
            if name == "cold":
                drop_from_page_cache(files)
            before = time.process_time()
            report[f"{kind}_{name}_seconds"] = action()
            report[f"{kind}_{name}_cpu_seconds"] = time.process_time() - before  # of all threads: what a busy machine does not change much
        report[f"resume_{name}_gb_s"] = report["bytes"] / report[f"resume_{name}_seconds"] / GB
        report[f"resume_{name}_over_plain"] = report[f"resume_{name}_seconds"] / report[f"plain_read_{name}_seconds"]
        report[f"of_it_{name}"] = rounded(spent[-1])
    if not options.keep:
        shutil.rmtree(options.dir / "blocks")
    return report | {"tier": options.tier}


def rounded(spent: Spent) -> dict[str, float]:
    """Seconds of threads on each thing, of which several go on at a time."""
    return {what: round(seconds, 3) for what, seconds in spent.seconds.items()}


def bench_run(options: argparse.Namespace) -> dict[str, Any]:
    """A model and a prompt: prefill with and without storing, first token after reopening, a second question, decoding from disk."""
    if options.model is None:
        config, _, _ = shape_form(options)
        model = LanguageModel(Decoder(config, jnp.bfloat16), config)
    else:
        model = load_model(options.model)
    config = model.config
    tokens = random_tokens(options)
    if options.text is not None:
        tokens = model.encode_prompt(options.text.read_text(encoding="utf-8"), chat=False)[: options.tokens]
        if len(tokens) < options.tokens:
            raise SystemExit(f"error: {options.text} has {len(tokens)} tokens and --tokens is {options.tokens}")
    ctx = options.tokens + QUESTION + 2 * options.new_tokens + 1
    place = {"ctx": ctx, "kv_store": options.tier}
    history = ctx * config.layers * config.kv_heads * config.head_dim * 2 * jnp.dtype(model.dtype).itemsize
    shape = options.shape if options.model is None else model.name
    report: dict[str, Any] = {
        "shape": shape,
        "layers": config.layers,
        "dtype": jnp.dtype(model.dtype).name,
        "tier": options.tier,
        "history_bytes": history,
    }
    show(report)
    for name in ("first", "second"):  # the first compiles
        directory = options.dir / name
        for part in options.parts:
            measure = {"prefill": run_prefill, "reopen": run_reopen, "question": run_question, "disk": run_disk}[part]
            print(f"{part}, {'programs being compiled' if name == 'first' else 'programs compiled'}", flush=True)
            found = measure(options, model, tokens, directory, place, history)
            show(found)
            report |= found
        shutil.rmtree(directory, ignore_errors=True)
    return report


def run_prefill(options: argparse.Namespace, model: LanguageModel, tokens: np.ndarray, directory: Path, place: Run, history: int) -> Run:
    """Storing behind compute: what it costs prefill, and what is left to wait for at the end of the turn."""
    backend, plan = place_history(model.config, model.backend(), place["ctx"], model.dtype, place["kv_store"])
    segment = plan.segment if on_cuda() else CPU_SEGMENT  # on a CPU, as storing has them throughout
    before = time.process_time()
    plain = Generation(model, backend, tokens, place["ctx"], Sampling.checked(0.0, 0, 1.0), 0, (), segment=segment)
    plain = plain.run(1, plan.tier, "none", None, None)
    plain_cpu = time.process_time() - before
    with model.session(directory / "stored", **place) as session:
        begin, before = time.perf_counter(), time.process_time()
        stored = session.generate(tokens, max_new_tokens=1)
        turn, stored_cpu = time.perf_counter() - begin, time.process_time() - before
    return {
        "prefill_seconds": plain.prefill_seconds, "prefill_stored_seconds": stored.prefill_seconds,
        "prefill_stored_over_not": stored.prefill_seconds / plain.prefill_seconds,
        "prefill_cpu_seconds": plain_cpu, "turn_stored_cpu_seconds": stored_cpu,
        "stored_bytes": stored.disk_history_bytes, "wait_for_disk_seconds": turn - stored.prefill_seconds,
    }  # fmt: skip


def run_reopen(options: argparse.Namespace, model: LanguageModel, tokens: np.ndarray, directory: Path, place: Run, history: int) -> Run:
    """The first token after a restart: session opened, history brought back, one token of the next turn computed."""
    report, copy = {}, directory.parent / f"{directory.name}-copy"
    files = files_of(directory / "blocks")
    plain = PlainReader(files)
    for name in ("cold", "warm"):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory / "stored", copy / "stored")
        shutil.copytree(directory / "blocks", copy / "blocks", copy_function=os.link)  # a session adds and removes files, and changes none
        if name == "cold":
            drop_from_page_cache(files)
        begin = time.perf_counter()
        with model.session(copy / "stored", **place) as session:
            opened = time.perf_counter() - begin
            result = session.generate(tokens[:1], max_new_tokens=1)
        if name == "cold":
            drop_from_page_cache(files)
        report |= {
            f"first_token_{name}_seconds": opened + result.load_seconds + result.prefill_seconds,
            f"of_it_{name}_loading": result.load_seconds, f"plain_read_{name}_seconds": plain.seconds(),
        }  # fmt: skip
        report[f"first_token_{name}_over_plain"] = report[f"first_token_{name}_seconds"] / report[f"plain_read_{name}_seconds"]
    shutil.rmtree(copy)
    return report


def run_question(options: argparse.Namespace, model: LanguageModel, tokens: np.ndarray, directory: Path, place: Run, history: int) -> Run:
    """Another conversation that begins with the same document and goes on differently."""
    question = np.random.default_rng(3).integers(0, 256, QUESTION).astype(np.int32)
    with model.session(directory / "question", **place) as session:
        result = session.generate(np.concatenate([tokens, question]), max_new_tokens=1)
    return {
        "second_question_prefill_seconds": result.prefill_seconds, "second_question_load_seconds": result.load_seconds,
        "second_question_reused": result.reused_tokens,
    }  # fmt: skip


def run_disk(options: argparse.Namespace, model: LanguageModel, tokens: np.ndarray, directory: Path, place: Run, history: int) -> Run:
    """Decoding with --share of the history in memory and the rest on disk, beside decoding with all of it in memory."""
    how = {"max_new_tokens": options.new_tokens}
    on_disk = place | {"kv_store": str(directory), "host_memory": options.share * history / 2**30}
    with model.session(directory / "memory", **place) as session:
        first = [session.generate(tokens, **how), session.generate(tokens[:1], **how)]
    with model.session(directory / "disk", **on_disk) as session:
        second = [session.generate(tokens, **how), session.generate(tokens[:1], **how)]
    last = second[1]
    return {
        "share": options.share, "disk_same_tokens": [r.tokens for r in first] == [r.tokens for r in second],
        "decode_tokens_per_second": first[1].decode_tokens_per_second, "disk_decode_tokens_per_second": last.decode_tokens_per_second,
        "disk_hit_rate": last.bank_hit_rate, "disk_read_bytes_per_token": last.disk_read_bytes_per_token,
    }  # fmt: skip


if __name__ == "__main__":
    main()
