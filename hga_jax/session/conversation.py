"""A conversation stored on disk after every turn: `Session`."""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int

from hga_jax.attention import HGAAttention
from hga_jax.backend import AttentionBackend
from hga_jax.cache.disk import BlockStore, StoreError
from hga_jax.config import HGAConfig
from hga_jax.generation import GenerateResult, Generation
from hga_jax.plan import page_cache_bytes, place_history, tier_of
from hga_jax.rope import resolve_rope
from hga_jax.sampling import Sampling
from hga_jax.session.disk_tier import DiskTier
from hga_jax.session.folder import LOCK, STAGING, Lock, collect_garbage, split
from hga_jax.session.identity import as_begun, describe, differences, root_id
from hga_jax.session.manifest import NAME, Manifest
from hga_jax.session.recording import Recorder
from hga_jax.session.reuse import DamagedBlock, Stored, load_states, longest_stored
from hga_jax.session.state_format import StateFormat
from hga_jax.text.chat import render_chat

if TYPE_CHECKING:
    from hga_jax.language_model import LanguageModel

# Tokens of room up to which prefill finds pages by sketches, unless told otherwise, in sessions begun when the energies from which rotary
# pairs are chosen were not stored: reopened, they would route their next prompts otherwise than one that was never closed.
SKETCHES_UP_TO = 65536
GROWTH = 4096  # tokens: a session without ctx makes room in steps of this, so that few programs are compiled


class Session:
    """One conversation with a model, kept in the folder DIR/NAME; DIR's other sessions share what begins alike.

    Made by `LanguageModel.session`. Every `generate` is a turn: when it returns, tokens and K/V are on disk, and a process that opens the
    folder later goes on with the same logits. Use it as a context manager, or `close` it.

    tokens: those whose K/V is held, int32 [T]. messages: the conversation as chat messages, where the model has a chat template.
    """

    def __init__(
        self,
        model: LanguageModel,
        path: str | Path,
        *,
        ctx: int | None = None,
        attention: str | AttentionBackend = "hga",
        hga: HGAConfig | None = None,
        rope_scaling: str = "auto",
        kv_store: str = "auto",
        host_memory: float | None = None,
        on_damage: str = "recompute",
        on_notice: Callable[[str], None] | None = None,
    ):
        if on_damage not in ("recompute", "refuse"):
            raise ValueError(f"{on_damage=}: choose recompute or refuse")
        self.store_path, self.name = split(Path(path))
        self.folder = self.store_path / self.name
        self.on_notice, self.on_damage, self.ctx = on_notice, on_damage, ctx
        self.kv_store, self.host_memory = kv_store, host_memory
        self._trouble: Exception | None = None  # why nothing more is stored
        self._said: set[str] = set()
        self._locks: list[Lock] = []
        self._recorder: Recorder | None = None
        self._disk: DiskTier | None = None
        self._states: tuple[Any, ...] | None = None
        self._placed: AttentionBackend | None = None  # the backend with the history in its tier
        self._capacity = 0
        self._portions: dict[str, int] = {}  # in which prefill takes tokens
        self._take_locks()
        try:
            self._open(model, attention, hga, rope_scaling)
        except BaseException:
            self._release()
            raise

    def _open(self, model: LanguageModel, attention: str | AttentionBackend, hga: HGAConfig | None, rope_scaling: str) -> None:
        stored = Manifest.read(self.folder) if (self.folder / NAME).exists() else None
        if stored is not None and rope_scaling == "auto":
            from convert.checkpoint import rope_from_json

            rope = rope_from_json(stored.identity["rope"])
            self.scaling_note = "none" if rope == model.config.rope else "as the session was begun"
        else:
            rope, self.scaling_note = resolve_rope(model.config, self.ctx or 0, rope_scaling)
        model = model if rope == model.config.rope else model.with_rope(rope)
        if stored is not None and attention == "hga":
            hga = as_begun(stored.identity, hga or HGAConfig())
        self.model, self.backend = model, model.backend(attention, hga)
        energies = stored is None or "energies" in stored.identity["attention"]
        self.identity = describe(model, self.backend, energies)
        if stored is not None and (differs := differences(stored.identity, self.identity)):
            raise ValueError(f"session {self.folder} belongs to another model or other settings: {'; '.join(differs[:6])}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        empty = np.zeros(0, np.int32)
        self.manifest = stored or Manifest(model.name, self.identity, root_id(self.identity), (), empty, (), (), 0, now, now)
        self.form = StateFormat.of(self.backend, model.config, model.kv_dtype, energies)
        self.blocks = BlockStore(self.store_path)
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)  # what a killed process left

    @property
    def tokens(self) -> Int[np.ndarray, " T"]:
        return self.manifest.tokens

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        return self.manifest.messages

    def generate(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        chat: bool | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        on_prefill: Callable[[float, int], None] | None = None,
    ) -> GenerateResult:
        """The next turn: what follows the conversation so far, answered, and stored. Options as in LanguageModel.generate.

        prompt: text (the user's next message, or with chat=False or without a chat template what follows the text so far) or token ids
        that follow. result.prompt_tokens counts the whole conversation, result.reused_tokens what of it was not computed again.
        """
        sampling = Sampling.checked(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} must be at least 1")
        ids, messages = self._continued(prompt, chat)
        wanted = len(ids) + max_new_tokens
        ctx = self.ctx or -(-wanted // GROWTH) * GROWTH
        if len(ids) >= ctx:
            raise ValueError(f"the conversation has {len(ids)} tokens and {ctx=} leaves no room for an answer: raise --ctx")
        self._check_context(min(wanted, ctx))
        begin = time.perf_counter()
        start = jax.block_until_ready(self._start(ids, ctx))
        load_seconds = time.perf_counter() - begin
        read_before = 0 if self._disk is None else self._disk.cache.counters.bytes_read
        self._states = None  # consumed: if the turn fails, the next one reads the disk
        run = Generation(
            self.model, self._placed, ids, self._capacity, sampling, seed, stop, start, self._recorder, self._disk, **self._portions
        )  # fmt: skip
        tier = tier_of(self._placed) if self._disk is None else "disk"
        try:
            result = run.run(max_new_tokens, tier, self.scaling_note, on_text, on_prefill)
        except BaseException:
            self._drop_recorder()
            raise
        held = np.concatenate([ids, np.asarray(result.tokens, np.int32)])
        self._states = run.states
        if messages is not None:
            messages = [*messages, {"role": "assistant", "content": result.text}]
        self._commit(held[: run.held], held[run.held :], messages)
        result = replace(result, disk_history_bytes=0 if self._trouble else self._recorder.bytes_stored, load_seconds=load_seconds)
        return result if self._disk is None else self._with_disk_figures(result, read_before)

    def _with_disk_figures(self, result: GenerateResult, read_before: int) -> GenerateResult:
        """The report of a turn whose history is on disk: all of it there, page cache and open block in host memory."""
        disk, form = self._disk, self.form
        history = form.layers * form.kv_heads * form.pages(len(self.tokens)) * form.page_bytes
        read = (disk.cache.counters.bytes_read - read_before) / (result.new_tokens - 1) if result.new_tokens > 1 else None
        held = disk.cache.data.nbytes + disk.tail.nbytes
        return replace(result, history_bytes=history, host_history_bytes=held, disk_read_bytes_per_token=read)

    def close(self) -> None:
        """Release the session, and blocks that no session needs any more."""
        self._drop_recorder()
        writable = self._trouble is None
        self._release()
        if writable:
            shutil.rmtree(self.folder / STAGING, ignore_errors=True)
            with contextlib.suppress(OSError, ValueError):
                collect_garbage(self.store_path)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _take_locks(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = [Lock(self.folder / LOCK)]
            self._locks.append(Lock(self.store_path / LOCK, shared=True))
        except BlockingIOError as error:
            self._release()
            raise ValueError(f"session {self.folder} is in use ({error}): end that process, or use another session name") from None
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
                raise ValueError(f"session {self.folder} cannot be made ({error.strerror})") from None
            self._give_up(error)

    def _release(self) -> None:
        for lock in self._locks:
            lock.release()
        self._locks = []

    def _continued(self, prompt: str | Sequence[int] | np.ndarray, chat: bool | None) -> tuple[np.ndarray, list[dict[str, str]] | None]:
        """Token ids of the conversation with the prompt at its end, and its messages when it is a chat."""
        model = self.model
        before = np.concatenate([self.tokens, np.asarray(self.manifest.pending, np.int32)])
        chat = isinstance(prompt, str) and chat is not False and model.tokenizer is not None and model.tokenizer.chat_template is not None
        if not chat:
            if len(before) and isinstance(prompt, str) and model.tokenizer is not None:
                return np.concatenate([before, model.tokenizer.encode(prompt)]), None
            return np.concatenate([before, model.encode_prompt(prompt, chat=False)]), None
        if not prompt.strip():
            raise ValueError("the prompt is empty: give --prompt, --prompt-file or text on standard input")
        messages = [*self.messages, {"role": "user", "content": prompt}]
        text = render_chat(model.tokenizer, messages)
        if len(before) and not self.messages:
            raise ValueError(
                f"session {self.folder} holds plain text, not a chat: pass chat=False (--no-chat), or use another session name"
            )
        if self.messages:
            # The answer as drawn, then what the template puts after it: encoding the answer's text again could give other tokens.
            said = render_chat(model.tokenizer, list(self.messages[:-1])) + self.messages[-1]["content"]
            drawn = before[:-1] if before[-1] in {*model.config.eos_token_ids, *model.tokenizer.eos_ids} else before
            if text.startswith(said) and model.tokenizer.decode(drawn.tolist()).endswith(self.messages[-1]["content"]):
                return np.concatenate([drawn, model.tokenizer.encode(text[len(said) :])]), messages
        return model.tokenizer.encode(text), messages

    def _start(self, ids: Int[np.ndarray, " T"], ctx: int) -> tuple[tuple[Any, ...], int] | None:
        """States that hold the longest stored beginning of `ids`, with room for `ctx` tokens, and a recorder that goes on from there."""
        held = len(self.tokens)
        if self._states is not None and self._capacity >= ctx and held < len(ids) and np.array_equal(self.tokens, ids[:held]):
            return self._states, held
        self._drop_recorder()
        self._states, self._capacity = None, ctx
        self._disk = None
        model = self.model
        self._placed, plan = place_history(
            model.config,
            _as_stored(self.backend, self.form, ctx),
            ctx,
            model.dtype,
            self.kv_store,
            self.host_memory,
            host_experts=model.host_experts,
        )
        plan.check()
        self._portions = plan.portions
        if plan.tier == "disk" and self._trouble is not None:
            raise ValueError(f"--kv-store {self.kv_store} cannot be written ({self._trouble}): choose another directory, or auto")
        limit, start = len(ids) - 1, None
        while True:
            stored = longest_stored(self.blocks, self.form, self.manifest.root, ids, limit)
            for problem in stored.problems:
                self._damaged(problem)
            try:
                if plan.tier == "disk":
                    cache = page_cache_bytes(self.host_memory)
                    self._disk = DiskTier(self.blocks, self.form, self._placed, ctx, model.config.heads, cache)
                if stored.length:
                    start = self._load(stored, ctx), stored.length
                if self._trouble is None:
                    self._recorder = Recorder(self.blocks, self.form, self.manifest.root, self.folder / STAGING, stored)
                    if self._disk is not None:
                        self._disk.record(self._recorder)
                break
            except DamagedBlock as error:
                self._damaged(str(error))
                self.blocks.damaged.add(error.header.id)
                limit = error.header.first
        self._check_own(ids, stored)
        return start

    def _load(self, stored: Stored, ctx: int) -> tuple[Any, ...]:
        if self._disk is not None:
            return self._disk.load(stored)
        return load_states(self.blocks, self.form, stored, self._placed, ctx)

    def _drop_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _check_context(self, tokens: int) -> None:
        native, rope = self.model.config.native_context, self.model.config.rope
        if tokens > native and rope.scaling is None:
            raise ValueError(
                f"{tokens} tokens exceed the model's native context of {native}, and session {self.folder} was begun without rope scaling: "
                "begin another session with a larger --ctx"
            )

    def _check_own(self, ids: Int[np.ndarray, " T"], stored: Stored) -> None:
        """Say so when less of the session's own history was found than its manifest promises."""
        promised = len(self.tokens)
        if promised and stored.length < promised < len(ids) and np.array_equal(self.tokens, ids[:promised]):
            self._damaged(f"session {self.folder}: of {promised} stored tokens {stored.length} can be used, the rest is computed again")

    def _damaged(self, problem: str) -> None:
        if self.on_damage == "refuse":
            raise StoreError(problem)
        if problem not in self._said and self.on_notice is not None:
            self.on_notice(problem)
        self._said.add(problem)

    def _commit(self, tokens: np.ndarray, pending: np.ndarray, messages: list[dict[str, str]] | None) -> None:
        """Data first, then the manifest: a kill at any moment leaves this turn or the one before."""
        blocks = None if self._recorder is None else self._recorder.close_turn(tokens, self._states)
        self.manifest = replace(
            self.manifest, tokens=tokens, pending=tuple(pending.tolist()), messages=tuple(messages or ()), turns=self.manifest.turns + 1,
            blocks=tuple(blocks or ()), updated=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        if self._trouble is not None:
            return
        if blocks is None:
            self._give_up(self._recorder.error)
            return
        try:
            self.manifest.write(self.folder)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Nothing more is stored; said once. What was stored before stays as it is."""
        self._trouble = error
        if self.on_notice is not None:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].split(" [")[0]
            self.on_notice(f"session {self.folder} cannot be written ({reason}): going on in memory; what was stored before stays valid")


def _as_stored(backend: AttentionBackend, form: StateFormat, ctx: int) -> AttentionBackend:
    """The backend that goes on after reopening as it would have without; in old sessions of more than SKETCHES_UP_TO tokens as it is."""
    known = form.note is None or form.note.energies
    if known or not isinstance(backend, HGAAttention) or backend.config.scan_pairs != "auto" or ctx > SKETCHES_UP_TO:
        return backend
    return replace(backend, config=replace(backend.config, scan_pairs=0))
