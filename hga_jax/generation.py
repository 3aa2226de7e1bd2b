"""One run of generate: prefill, decode in dispatches that keep the text flowing, stop rules, and the figures of the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax import programs
from hga_jax.attention import HGAAttention
from hga_jax.backend import AttentionBackend, DenseAttention, Stats
from hga_jax.plan import purpose
from hga_jax.sampling import Sampling
from hga_jax.text.streaming import TextStream

if TYPE_CHECKING:
    from hga_jax.language_model import LanguageModel
    from hga_jax.session.disk_tier import DiskTier
    from hga_jax.session.recording import Recorder

DISPATCH_SECONDS = 0.2  # a decode dispatch makes about as many tokens as this allows, so that text keeps flowing
DISPATCH_ROOM = 64  # a dispatch over 48 layers costs about 19 ms beside its tokens on an H100, a token 5


@dataclass(frozen=True)
class GenerateResult:
    """What a generation made and what it cost. Field names are those of the command's JSON."""

    model: str
    attention: str
    prompt_tokens: int
    new_tokens: int
    text: str
    tokens: list[int]
    stopped_by: str
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    attended_fraction: float
    fetched_fraction: float
    decode_attended_fraction: float | None
    decode_fetched_fraction: float | None
    unopened_mass: float | None
    refused_pages: float
    bank_hit_rate: float | None
    history_tier: str
    history_bytes: int
    device_peak_bytes: int
    host_history_bytes: int
    disk_history_bytes: int
    rope_scaling: str
    reused_tokens: int = 0
    disk_read_bytes_per_token: float | None = None
    load_seconds: float = 0.0  # bringing the reused tokens back, before prefill

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Generation:
    """One run of generate: the states, the clock and the counters.

    start: layer states that hold the first tokens of `ids` already, and how many they hold. recorder: stores the history as it grows.
    disk: where the history lies, when it is neither on the device nor in host memory. segment, super_block: of programs.prefill_blocks.
    After `run`, `states` hold the K/V of the first `held` tokens of ids + the result's tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        backend: AttentionBackend,
        ids: np.ndarray,
        ctx: int,
        sampling: Sampling,
        seed: int,
        stop: Sequence[str],
        start: tuple[tuple[Any, ...], int] | None = None,
        recorder: Recorder | None = None,
        disk: DiskTier | None = None,
        segment: int | None = None,
        super_block: int = programs.SUPER_BLOCK,
    ):
        self.states, self.held = (None, 0) if start is None else start
        self.recorder, self.disk = recorder, disk
        self.portions = {"segment": segment, "super_block": super_block}
        self.model, self.backend, self.ids, self.ctx, self.sampling = model, backend, ids, ctx, sampling
        self.key = jax.random.key(seed)
        self.stop_ids = sorted({*model.config.eos_token_ids, *(model.tokenizer.eos_ids if model.tokenizer else ())})
        self.stream = TextStream(model.tokenizer, stop=stop, skip_special=True) if model.tokenizer else None
        if stop and self.stream is None:
            raise ValueError("stop strings need a tokenizer: this model has none")

    def run(
        self, max_new_tokens: int, tier: str, scaling_note: str, on_text: Callable | None, on_prefill: Callable | None
    ) -> GenerateResult:
        model, decoder = self.model, self.model.params
        reused = self.held
        if reused:
            states = self.states
        elif self.disk is not None:
            states = self.disk.new_states()
        else:
            states = programs.new_states(decoder, self.backend, self.ctx, model.kv_dtype)
        history_bytes = sum(x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(states) if purpose(path) == "history")
        begin = time.perf_counter()
        first, states, prefill_stats = self._prefill(states, on_prefill)
        prefill_seconds = time.perf_counter() - begin

        budget = min(max_new_tokens, self.ctx - len(self.ids))
        made, text, decode_stats = [], [], Stats.zero()
        stopped_by, decode_seconds, decoded = "length", 0.0, 0
        pieces = self._decode(first, states, budget)
        for tokens, stats, seconds in pieces:
            decode_stats, decode_seconds = decode_stats + stats, decode_seconds + seconds
            decoded += len(tokens) if seconds else 0
            ended = tokens[-1] in self.stop_ids
            made += tokens
            if self.stream is not None:
                piece = self.stream.feed(tokens[:-1] if ended else tokens)
                if piece and on_text is not None:
                    on_text(piece)
                text.append(piece)
                if self.stream.stopped:
                    stopped_by = "stop string"
                    break
            if ended:
                stopped_by = "end token"
                break
        pieces.close()
        if self.stream is not None and not self.stream.stopped:
            piece = self.stream.flush()
            if piece and on_text is not None:
                on_text(piece)
            text.append(piece)
        attended, fetched = fractions(prefill_stats)
        decode_attended, decode_fetched = fractions(decode_stats)
        return GenerateResult(
            model=model.name, attention=describe_attention(self.backend), prompt_tokens=len(self.ids), new_tokens=len(made),
            text="".join(text), tokens=made, stopped_by=stopped_by, prefill_seconds=prefill_seconds,
            prefill_tokens_per_second=(len(self.ids) - reused) / prefill_seconds,
            decode_tokens_per_second=decoded / decode_seconds if decode_seconds else None,
            attended_fraction=attended or 0.0, fetched_fraction=fetched or 0.0,
            decode_attended_fraction=decode_attended, decode_fetched_fraction=decode_fetched,
            unopened_mass=unopened_mass(self.backend, prefill_stats + decode_stats),
            refused_pages=float(prefill_stats.refused + decode_stats.refused),
            bank_hit_rate=bank_hit_rate(decode_stats), history_tier=tier, history_bytes=history_bytes, device_peak_bytes=peak_bytes(),
            host_history_bytes=history_bytes if tier == "host" else 0, disk_history_bytes=0, rope_scaling=scaling_note,
            reused_tokens=reused,
        )  # fmt: skip

    def _prefill(self, states: tuple, on_prefill: Callable | None) -> tuple[int, tuple, Stats]:
        total = len(self.ids)
        report = None if on_prefill is None else lambda done: on_prefill(self.held + done, total)
        stats = Stats.zero()
        settings = {} if self.recorder is None else self._recording(total)
        for block in programs.prefill_blocks(
            self.model.params,
            self.ids[self.held :],
            states,
            self.backend,
            first=self.held,
            on_layer=report,
            **self.portions,
            **settings,
        ):
            stats, states = stats + block.stats, block.states
        self.held = total
        self.states = states
        logits = programs.row_logits(self.model.params, block.x, jnp.int32(block.count - 1))
        token = int(programs.first_token(logits, self.sampling, self.key, jnp.int32(total - 1)))
        del block  # its activations, before decoding takes their room
        self.states = programs.committed_like(logits, self.backend.before_decoding(states))
        return token, self.states, stats

    def _recording(self, total: int) -> dict[str, Any]:
        """Settings of prefill that hand every layer's state to the recorder."""
        recorder = self.recorder

        def on_state(layer: int, first: int, count: int, state: Any, noted: dict[int, tuple[Any, int]]) -> None:
            recorder.prefilled(self.ids[: first + count], layer, state, noted)

        stretches, home = recorder.stretches(self.held, total), None if self.disk is None else self.disk.home
        return {"stretches": stretches, "note": recorder.note, "on_state": on_state, "home": home}

    def _decode(self, token: int, states: tuple, budget: int) -> Iterator[tuple[list[int], Stats, float]]:
        """Yields (new tokens, stats, seconds). The first piece is the token that prefill gave."""
        yield [token], Stats.zero(), 0.0
        position, made, step, history = len(self.ids), 1, 1, self.ids
        decode_tokens = programs.decode_tokens if self.disk is None else self.disk.decode_tokens
        stop_ids = jnp.asarray(self.stop_ids or [-1], jnp.int32)
        warm = False
        while made < budget and token not in self.stop_ids:
            begin = time.perf_counter()
            wanted = min(step, budget - made)
            if self.recorder is not None:
                wanted = min(wanted, self.recorder.room(position))
            out, count, states, stats = decode_tokens(
                self.model.params, jnp.int32(token), jnp.int32(position), states, jnp.int32(wanted), stop_ids, self.sampling,
                self.key, backend=self.backend, room=DISPATCH_ROOM,
            )  # fmt: skip
            tokens = np.asarray(out)[: int(count)].tolist()
            seconds = time.perf_counter() - begin
            fed = [token, *tokens[:-1]]
            token, position, made = tokens[-1], position + len(tokens), made + len(tokens)
            self.states, self.held = states, position
            history = np.append(history, np.asarray(fed, np.int32))
            if self.recorder is not None:
                self.recorder.decoded(history, states)
            yield tokens, stats, seconds if warm else 0.0  # the first dispatch may compile: it is not what a token costs
            if warm:
                step = min(DISPATCH_ROOM, max(1, int(DISPATCH_SECONDS * len(tokens) / seconds)))
            warm = True


def fractions(stats: Stats) -> tuple[float | None, float | None]:
    """(attended, fetched) fractions of accumulated stats; None where nothing was counted."""
    queries, blocks = float(stats.queries), float(stats.blocks)
    return (float(stats.attended) / queries if queries else None), (float(stats.fetched) / blocks if blocks else None)


def bank_hit_rate(stats: Stats) -> float | None:
    """The share of wanted pages that decode found in the device's bank; None where there was no bank."""
    return float(stats.bank_hits) / float(stats.bank_requests) if float(stats.bank_requests) else None


def unopened_mass(backend: AttentionBackend, stats: Stats) -> float | None:
    """The share of attention mass that the sketch policy estimates to lie in unopened pages: a mean over queries, layers and heads."""
    if not isinstance(backend, HGAAttention) or backend.config.policy != "sketch" or not float(stats.queries):
        return None
    return float(stats.unopened) / float(stats.queries)


def describe_attention(backend: AttentionBackend) -> str:
    if isinstance(backend, HGAAttention):
        config = backend.config
        return f"hga/{config.policy}" + (f" ({config.threshold})" if config.policy == "sketch" else "")
    return "dense" if isinstance(backend, DenseAttention) else type(backend).__name__


def peak_bytes() -> int:
    """Peak bytes in use on the first device: the allocator's figure, or the process's peak resident set on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
