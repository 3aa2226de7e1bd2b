"""Stored history: the disk beside plain files, resuming beside reading the same bytes, prefill while storing, decode from disk.

python -m hga_jax.bench session disk --dir DIR                          write, read, random pages beside plain file I/O
python -m hga_jax.bench session resume --dir DIR --shape qwen3-30b-a3b  random K/V of --tokens stored, then brought back
python -m hga_jax.bench session run --dir DIR [--model M]               a prompt stored and not stored; decode with --share of it in memory

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax import programs
from hga_jax.attention import HGAAttention
from hga_jax.bench.decode import SHAPES
from hga_jax.cache.disk import PAGES, BlockStore, BlockWriter, block_id
from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
from hga_jax.language_model import LanguageModel
from hga_jax.loading import load_model
from hga_jax.model import Decoder
from hga_jax.session.recording import WRITERS
from hga_jax.session.reuse import load_states, longest_stored, open_pages
from hga_jax.session.state_format import StateFormat

GB = 1e9
ROOT = "00" * 16
THREADS = 16


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench session", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("disk", "resume", "run"))
    parser.add_argument("--dir", type=Path, required=True, help="an empty directory on the disk to measure")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--tier", choices=("device", "host"), default="host" if jax.default_backend() == "gpu" else "device")
    parser.add_argument("--model", help="run: checkpoint (default: random weights of --shape, without experts)")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.25, help="run: of the history that the page cache may hold")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = {
        "command": f"session {options.part}", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "machine": platform.platform(), "cores": os.cpu_count(), "shape": options.shape, "tokens": options.tokens,
    }  # fmt: skip
    report |= {"disk": bench_disk, "resume": bench_resume, "run": bench_run}[options.part](options)
    for name, value in report.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def random_blocks(form: StateFormat, store: BlockStore, staging: Path, tokens: np.ndarray) -> int:
    """Store random pages and zero summaries for these tokens, a few blocks at a time as a recorder does; bytes written."""
    generator = np.random.default_rng(0)
    pool = generator.integers(0, 2**15, (form.kv_heads, form.pages(form.block_tokens), 2, form.group_size, form.head_dim + 64), np.uint16)
    parents = [ROOT]
    for first in range(0, len(tokens), form.block_tokens):
        parents.append(block_id(parents[-1], tokens[first : first + form.block_tokens]))

    def write_block(index: int) -> int:
        first = index * form.block_tokens
        writer = BlockWriter(store, staging, parents[index], first, tokens[first : first + form.block_tokens])
        specs = form.arrays(len(writer.tokens), first + len(writer.tokens), 1)
        for name, spec in specs.items():
            writer.create(name, spec)
            if name != PAGES:
                writer.write(name, np.zeros(spec.shape, jnp.dtype(spec.dtype)))
        for layer in range(form.layers):
            data = np.ascontiguousarray(pool[..., layer % 64 : layer % 64 + form.head_dim]).view(jnp.dtype(form.dtype))
            writer.write(PAGES, data[:, : specs[PAGES].shape[2]], layer)
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


def read_plainly(files: list[Path]) -> float:
    """Seconds to read whole files with a few threads into memory that is there already."""
    largest = max(path.stat().st_size for path in files)

    def read_some(mine: list[Path]) -> None:
        room = np.empty(largest, np.uint8)
        room[:] = 0  # touched, so that page faults are not timed
        begins.append(time.perf_counter())
        for path in mine:
            with open(path, "rb", buffering=0) as file:
                file.readinto(room)

    begins: list[float] = []
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read_some, [files[i::THREADS] for i in range(THREADS)]))
    return time.perf_counter() - min(begins)


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


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - begin


def stored_history(options: argparse.Namespace) -> tuple[BlockStore, StateFormat, HGAAttention, ModelConfig, np.ndarray, dict[str, Any]]:
    """Random history of the shape on disk, and how fast it was written."""
    config, backend, form = shape_form(options)
    store = BlockStore(options.dir)
    tokens = np.random.default_rng(2).integers(0, 256, options.tokens).astype(np.int32)
    size: list[int] = []
    spent = seconds(lambda: size.append(random_blocks(form, store, options.dir / "staging", tokens)))
    per_file = form.kv_heads * form.pages(form.block_tokens) * form.page_bytes
    count = min(max(1, size[0] // per_file), 2**31 // per_file)
    plain = write_plainly(options.dir / "plain", per_file, count)
    shutil.rmtree(options.dir / "plain")
    written = {"bytes": size[0], "write_gb_s": size[0] / spent / GB, "plain_write_gb_s": count * per_file / plain / GB}
    return store, form, backend, config, tokens, written


def bench_disk(options: argparse.Namespace) -> dict[str, Any]:
    """Sequential and random reading of stored pages beside plain file I/O."""
    store, form, _, _, tokens, report = stored_history(options)
    files = [path for path in files_of(options.dir / "blocks") if path.parent.name == PAGES]
    chain = longest_stored(store, form, ROOT, tokens, len(tokens)).chain
    total = sum(path.stat().st_size for path in files)

    def read_all() -> None:
        arrays = [open_pages(store, header) for header in chain]
        for layer in range(form.layers):
            for future in [array[layer].read() for array in arrays]:
                future.result()

    for name in ("cold", "warm"):
        if name == "cold":
            drop_from_page_cache(files)
        report[f"read_{name}_gb_s"] = total / seconds(read_all) / GB
        if name == "cold":
            drop_from_page_cache(files)
        report[f"plain_read_{name}_gb_s"] = total / read_plainly(files) / GB
    generator = np.random.default_rng(3)
    per_chunk = form.chunk_size // form.group_size
    wanted, piece = 256, per_chunk * form.page_bytes
    arrays = [open_pages(store, header) for header in chain]

    def random_pieces(layer: int) -> None:
        heads, blocks = generator.integers(0, form.kv_heads, wanted), generator.integers(0, len(arrays), wanted)
        pages = generator.integers(0, form.pages(form.block_tokens) // per_chunk, wanted)[:, None] * per_chunk + np.arange(per_chunk)
        futures = [
            arrays[b][layer].vindex[heads[blocks == b][:, None], pages[blocks == b]].read() for b in np.unique(blocks)
        ]  # fmt: skip
        for future in futures:
            future.result()

    def plain_pieces(_: int) -> None:
        places = zip(generator.integers(0, len(files), wanted), generator.integers(0, 16, wanted), strict=True)
        jobs = [(files[index], int(place) * piece) for index, place in places]

        def read_one(job: tuple[Path, int]) -> None:
            descriptor = os.open(job[0], os.O_RDONLY)
            os.pread(descriptor, piece, job[1])
            os.close(descriptor)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read_one, jobs))

    for name, action in (("random", random_pieces), ("plain_random", plain_pieces)):
        for state in ("cold", "warm"):
            if state == "cold":
                drop_from_page_cache(files)
            times = [seconds(lambda layer=layer, action=action: action(layer)) for layer in range(min(8, form.layers))]
            report[f"{name}_{state}_gb_s"] = wanted * piece / statistics.median(times) / GB
    shutil.rmtree(options.dir / "blocks")
    return report | {"random_piece_bytes": piece}


def bench_resume(options: argparse.Namespace) -> dict[str, Any]:
    """From a closed session to states that decode can go on from, beside reading the same files."""
    _, form, backend, config, tokens, report = stored_history(options)
    files = files_of(options.dir / "blocks")
    decoder = Decoder.abstract(config, jnp.bfloat16)

    def resume() -> Any:
        fresh = BlockStore(options.dir)
        stored = longest_stored(fresh, form, ROOT, tokens, len(tokens))
        empty = programs.new_states(decoder, backend, options.tokens, jnp.bfloat16)
        return load_states(fresh, form, stored, empty)

    seconds(resume)  # programs compiled, allocators grown
    for name in ("cold", "warm"):
        for kind, action in (("resume", lambda: seconds(resume)), ("plain_read", lambda: read_plainly(files))):
            if name == "cold":
                drop_from_page_cache(files)
            report[f"{kind}_{name}_seconds"] = action()
        report[f"resume_{name}_over_plain"] = report[f"resume_{name}_seconds"] / report[f"plain_read_{name}_seconds"]
    shutil.rmtree(options.dir / "blocks")
    return report | {"tier": options.tier}


def bench_run(options: argparse.Namespace) -> dict[str, Any]:
    """Prefill with and without storing; decode in memory and from disk; resuming. One model, one prompt."""
    if options.model is None:
        config, _, _ = shape_form(options)
        model = LanguageModel(Decoder(config, jnp.bfloat16), config)
    else:
        model = load_model(options.model)
    config = model.config
    tokens = np.random.default_rng(2).integers(0, 256, options.tokens).astype(np.int32)
    ctx = options.tokens + 2 * options.new_tokens + 1
    how = {"max_new_tokens": options.new_tokens}
    place = {"ctx": ctx, "kv_store": options.tier}
    history = ctx * config.layers * config.kv_heads * config.head_dim * 2 * jnp.dtype(model.dtype).itemsize
    report: dict[str, Any] = {"layers": config.layers, "history_bytes": history}
    runs: dict[str, Any] = {}
    for name in ("first", "second"):  # the first compiles
        runs["memory"] = model.generate(tokens, **how, **place)
        with model.session(options.dir / name / "stored", **place) as session:
            runs["stored"] = session.generate(tokens, **how)
        on_disk = place | {"kv_store": str(options.dir / name), "host_memory": options.share * history / 2**30}
        tokens_again = np.concatenate([tokens[:-1], tokens[-1:] + 1])  # shares all but the last segment
        with model.session(options.dir / name / "question", **place) as session:
            runs["question"] = session.generate(tokens_again, **how)
        with model.session(options.dir / name / "disk", **on_disk) as session:
            runs["disk"] = session.generate(tokens, **how)
            before = replace(session._disk.cache.counters)
            begin = time.perf_counter()
            runs["disk_decode"] = session.generate(tokens[:1], **how)
            report["disk_turn_seconds"] = time.perf_counter() - begin
            read = session._disk.cache.counters.bytes_read - before.bytes_read
            report["disk_read_bytes_per_token"] = read / options.new_tokens
        shutil.rmtree(options.dir / name)
    same = np.array_equal(runs["disk"].tokens, runs["memory"].tokens)
    report |= {
        "prefill_seconds": runs["memory"].prefill_seconds, "prefill_stored_seconds": runs["stored"].prefill_seconds,
        "second_question_prefill_seconds": runs["question"].prefill_seconds, "second_question_reused": runs["question"].reused_tokens,
        "decode_tokens_per_second": runs["memory"].decode_tokens_per_second,
        "disk_decode_tokens_per_second": runs["disk_decode"].decode_tokens_per_second, "disk_hit_rate": runs["disk_decode"].bank_hit_rate,
        "disk_same_tokens": same, "share": options.share,
    }  # fmt: skip
    return report | {"prefill_stored_over_not": report["prefill_stored_seconds"] / report["prefill_seconds"]}
