"""A conversation stored on disk: resumed with the same logits, shared between sessions, refused or recomputed when damaged."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from session_cases import CTX, HGA, prompt, tiny_model, turn, turns

from hga_jax.attention import HGAAttention
from hga_jax.bench.session import ROOT, random_blocks
from hga_jax.cache import disk
from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
from hga_jax.loading import load_model
from hga_jax.session import StoreError, recording, reuse
from hga_jax.session.__main__ import check
from hga_jax.session.__main__ import main as command
from hga_jax.session.folder import sessions
from hga_jax.session.identity import differences
from hga_jax.session.manifest import Manifest
from hga_jax.session.state_format import StateFormat
from pallas_kernels.votes import NEVER, oldest_open


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def assert_same_states(a, b) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


VOTES = HGAConfig(**vars(HGA) | {"votes": 3, "vote_share": 0.3, "vote_stride": 2, "threshold": 0.05})


def what_matters(states) -> list:
    """States with the stamps of pages that no later query sees by them made equal."""
    return [replace(s, stamps=jnp.where(s.stamps >= oldest_open(s.length // HGA.chunk_size, VOTES.votes), s.stamps, NEVER)) for s in states]


@pytest.mark.parametrize("tokens", [113, 120, 121, 122])
def test_votes_go_on_as_if_never_closed(model, tmp_path, tokens):
    """With 120, 127, 128 and 129 tokens held: inside chunks and at their ends, before, at and behind the end of a stored block."""
    with model.session(tmp_path / "kept", ctx=CTX, hga=VOTES) as session:
        first, states = turn(session, 1, tokens, new=8), what_matters(session._states)
        second, after = turn(session, 2, 60, new=8), what_matters(session._states)
    assert any((s.stamps > NEVER).any() for s in states)  # pages have votes when the session is closed
    with model.session(tmp_path / "other" / "closed", ctx=CTX, hga=VOTES) as session:
        assert turn(session, 1, tokens, new=8) == first
    with model.session(tmp_path / "other" / "closed", ctx=CTX, hga=VOTES) as session:
        result = session.generate(prompt(2, 60), max_new_tokens=8)
        assert result.reused_tokens == tokens + 7
        assert result.tokens == second
        assert_same_states(what_matters(session._states), after)


def test_votes_at_a_reuse_point_inside_a_prompt(model, tmp_path, monkeypatch):
    """As in `test_prompt_in_long_and_short_segments`."""
    monkeypatch.setattr(recording, "on_cuda", lambda: True)
    monkeypatch.setattr(recording, "SMALL_SEGMENT", 32)
    ids = prompt(6, 250)
    other = np.concatenate([ids[:230], prompt(7, 20)])
    expected = model.generate(other, max_new_tokens=4, ctx=CTX, hga=VOTES).tokens
    with model.session(tmp_path / "a", ctx=CTX, hga=VOTES) as session:
        session.generate(ids, max_new_tokens=4)
    with model.session(tmp_path / "b", ctx=CTX, hga=VOTES) as session:
        result = session.generate(other, max_new_tokens=4)
    assert result.reused_tokens == 224
    assert result.tokens == expected


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 120, 121, 127, 128])
def test_reopened_session_goes_on_as_if_never_closed(model, tmp_path, tokens):
    """Bit for bit, in chunks, at their ends, at the ends of stored blocks: the next turn's tokens and the states it leaves."""
    with model.session(tmp_path / "kept", ctx=CTX, hga=HGA) as session:
        first = turn(session, 1, tokens, new=8)
        second = turn(session, 2, 20, new=8)
        states = session._states
    with model.session(tmp_path / "other" / "closed", ctx=CTX, hga=HGA) as session:
        assert turn(session, 1, tokens, new=8) == first
    with model.session(tmp_path / "other" / "closed", ctx=CTX, hga=HGA) as session:
        assert len(session.tokens) == tokens + 7
        result = session.generate(prompt(2, 20), max_new_tokens=8)
        assert result.reused_tokens == tokens + 7
        assert result.tokens == second
        assert_same_states(session._states, states)


@pytest.mark.model
def test_real_model_goes_on_with_the_same_logits(tmp_path, monkeypatch):
    """SmolLM2, closed and opened again with 63 and 65 tokens held: bit for bit the states of a session that stayed open."""
    monkeypatch.setattr(recording, "CPU_SEGMENT", 64)  # what is computed for a few tokens
    model = load_model()

    def talk(folder: Path, reopen: bool) -> tuple:
        with ExitStack() as stack:
            session = stack.enter_context(model.session(folder, ctx=256))
            for seed, tokens in ((1, 63), (2, 1), (3, 10)):
                if reopen and seed > 1:
                    session.close()
                    session = stack.enter_context(model.session(folder, ctx=256))
                result = session.generate(prompt(seed, tokens), max_new_tokens=1)
                assert result.reused_tokens == (0 if seed == 1 else 59 + 2 * seed)
            return result.tokens, session._states

    tokens, states = talk(tmp_path / "kept" / "a", reopen=False)
    again, restored = talk(tmp_path / "closed" / "a", reopen=True)
    assert again == tokens
    assert_same_states(restored, states)


def test_blocks_are_copied_one_or_several_at_a_time(model, tmp_path, monkeypatch):
    """A prompt of three blocks and a bit, two of them copied together: another session goes on with all three."""
    monkeypatch.setattr(recording, "SPAN", 2)
    ids = prompt(5, 390)
    expected = model.generate(ids, max_new_tokens=4, ctx=CTX, hga=HGA).tokens
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        assert session.generate(ids, max_new_tokens=4).tokens == expected
    assert command(["verify", str(tmp_path)]) == 0
    with model.session(tmp_path / "b", ctx=CTX, hga=HGA) as session:
        result = session.generate(ids, max_new_tokens=4)
    assert result.reused_tokens == 384
    assert result.tokens == expected


def test_prompt_in_long_and_short_segments(model, tmp_path, monkeypatch):
    """As on a GPU: a question that differs near the end of a prompt finds a reuse point close by, and the tokens are those of one pass."""
    monkeypatch.setattr(recording, "on_cuda", lambda: True)
    monkeypatch.setattr(recording, "SMALL_SEGMENT", 32)
    ids = prompt(6, 250)
    other = np.concatenate([ids[:230], prompt(7, 20)])
    expected = [model.generate(tokens, max_new_tokens=4, ctx=CTX, hga=HGA).tokens for tokens in (ids, other)]
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        assert session.generate(ids, max_new_tokens=4).tokens == expected[0]
    with model.session(tmp_path / "b", ctx=CTX, hga=HGA) as session:
        result = session.generate(other, max_new_tokens=4)
    assert result.reused_tokens == 224
    assert result.tokens == expected[1]


@pytest.mark.parametrize("policy", ["sketch", "paper"])
def test_history_in_host_memory_is_brought_back(model, tmp_path, policy):
    settings = HGAConfig(**vars(HGA) | {"policy": policy, "top_chunks": 4, "top_groups": 8})
    options = {"ctx": CTX, "hga": settings, "kv_store": "host"}
    with model.session(tmp_path / "kept" / "a", **options) as session:
        turn(session, 1, 121)
        expected, states = turn(session, 2), session._states
    with model.session(tmp_path / "closed" / "a", **options) as session:
        turn(session, 1, 121)
    with model.session(tmp_path / "closed" / "a", **options) as session:
        assert turn(session, 2) == expected
        assert_same_states(session._states, states)


@pytest.mark.parametrize("tier", ["device", "disk"])
@pytest.mark.parametrize("rule", [HGA, VOTES], ids=["requests", "votes"])
def test_scan_by_pairs_goes_on_as_if_never_closed(model, tmp_path, rule, tier):
    """The energies that the pairs are chosen by are stored with every reuse point; bit for bit."""
    options = {"ctx": CTX, "hga": HGAConfig(**vars(rule) | {"scan_pairs": 2})}
    options |= {"kv_store": str(tmp_path / "kv")} if tier == "disk" else {}
    with model.session(tmp_path / "kept", **options) as session:
        first, second = turn(session, 1, 121), turn(session, 2, 70)
        after = what_matters(session._states)
        assert all(np.any(state.energy) for state in after)
    options |= {"kv_store": str(tmp_path / "other_kv")} if tier == "disk" else {}
    with model.session(tmp_path / "other" / "closed", **options) as session:
        assert turn(session, 1, 121) == first
    with model.session(tmp_path / "other" / "closed", **options) as session:
        assert turn(session, 2, 70) == second
        found = what_matters(session._states)
        if tier == "disk":  # summaries of chunks that are still open are written at other times there
            after, found = ([(state.stamps, state.energy) for state in states] for states in (after, found))
        assert_same_states(found, after)
    with pytest.raises(ValueError, match=r"attention scan_pairs 2 \(now auto\)"):
        model.session(tmp_path / "kept", ctx=CTX, hga=rule)


def test_sessions_begun_before_energies_were_stored_go_by_sketches(model, tmp_path, monkeypatch):
    """With room for which prefill elsewhere chooses rotary pairs: a reopened session has all that an open one goes by."""
    monkeypatch.setattr("hga_jax.config.PAIRS_FROM", CTX - 1)
    assert model.backend("hga", HGA).config.pairs_for(CTX, 32) > 0
    with monkeypatch.context() as before:
        for place in ("identity", "state_format"):
            before.setattr(f"hga_jax.session.{place}.has_energies", lambda config: False)
        with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
            first = turn(session, 1, 121)
            assert "energies" not in session.identity["attention"]
    with model.session(tmp_path / "b", ctx=CTX, hga=HGA) as session:  # begun today
        assert turn(session, 1, 121) == first  # on a CPU by sketches in any case
        assert session._placed.config.scan_pairs == "auto"
        assert all(np.any(state.energy) for state in session._states)
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turn(session, 2)
        assert (session._placed.config.scan_pairs, session.backend.config) == (0, HGA)
        assert all(state.energy is None for state in session._states)
        monkeypatch.setattr("hga_jax.session.conversation.SKETCHES_UP_TO", CTX - 1)
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turn(session, 3)
        assert not any(np.any(state.energy) for state in session._states)


def test_settings_younger_than_a_session_are_as_it_was_begun(model, tmp_path):
    """Stored before votes and pairs were settings, with screening by length: goes on without them, unless they are asked for."""
    before = HGAConfig(**vars(HGA) | {"votes": 0, "scan_pairs": 0})
    with model.session(tmp_path / "kept", ctx=CTX, hga=before) as session:
        first, second = turn(session, 1, 121), turn(session, 2)
    with model.session(tmp_path / "other" / "closed", ctx=CTX, hga=before) as session:
        assert turn(session, 1, 121) == first
        stored = session.identity
    assert {"votes", "vote_share", "vote_stride", "scan_pairs", "pairs_threshold"}.isdisjoint(stored["attention"])
    with model.session(tmp_path / "other" / "closed", ctx=CTX, hga=HGAConfig(**vars(HGA) | {"votes": "auto"})) as session:
        assert (session.backend.config.votes, session.backend.config.scan_pairs) == (0, 0)
        assert turn(session, 2) == second
    with pytest.raises(ValueError, match=r"attention votes None \(now 3\)"):
        model.session(tmp_path / "kept", ctx=CTX, hga=HGAConfig(**vars(HGA) | {"votes": 3}))
    old = stored | {"attention": stored["attention"] | {"screening": "auto"}}
    assert differences(old, stored) == []


def test_dense_attention_is_stored_too(model, tmp_path):
    def open_session(name):
        return model.session(tmp_path / name, ctx=CTX, attention="dense")

    with open_session("a") as session:
        turn(session, 1, 100)
        expected = turn(session, 2)
    with open_session("b") as session:
        turn(session, 1, 100)
    with open_session("b") as session:
        assert turn(session, 2) == expected


def test_prefix_is_reused_whichever_session_wrote_it(model, tmp_path):
    """A question about a document that another session read: only the question is computed, the answer is the same, shared blocks stay."""
    begin, rest, question = prompt(7, 100), prompt(8, 27), prompt(9, 15)
    with model.session(tmp_path / "elsewhere" / "a", ctx=CTX, hga=HGA) as session:
        following = session.generate(begin, max_new_tokens=1).tokens
        expected = session.generate(np.concatenate([rest, question]), max_new_tokens=4).tokens
    document = np.concatenate([begin, following, rest])
    with model.session(tmp_path / "store" / "first", ctx=CTX, hga=HGA) as session:
        session.generate(document, max_new_tokens=4)
    with model.session(tmp_path / "store" / "second", ctx=CTX, hga=HGA) as session:
        result = session.generate(np.concatenate([document, question]), max_new_tokens=4)
    assert result.reused_tokens == len(document) == 128
    assert result.tokens == expected
    before = [path.name for path in (tmp_path / "store" / "blocks").glob("*/*")]
    assert command(["delete", str(tmp_path / "store" / "first")]) == 0
    after = [path.name for path in (tmp_path / "store" / "blocks").glob("*/*")]
    assert len(before) == 3
    assert len(after) == 2
    assert command(["verify", str(tmp_path / "store" / "second")]) == 0


def test_wrong_model_or_settings_are_named(model, tmp_path):
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turn(session, 1)
    with pytest.raises(ValueError, match="belongs to another model or other settings: other weights"):
        tiny_model(seed=4).session(tmp_path / "a", ctx=CTX, hga=HGA)
    with pytest.raises(ValueError, match=r"attention threshold 0\.01 \(now 0\.02\)"):
        model.session(tmp_path / "a", ctx=CTX, hga=HGAConfig(**vars(HGA) | {"threshold": 0.02}))
    with pytest.raises(ValueError, match=r"begin another session with a larger --ctx"), model.session(tmp_path / "a", hga=HGA) as session:
        session.generate(prompt(1, 10), max_new_tokens=5000)


def test_second_process_is_refused(model, tmp_path):
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA):
        program = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", program, tmp_path / "a" / "lock"], capture_output=True, text=True, check=False)
        assert "BlockingIOError" in other.stderr
        with pytest.raises(
            ValueError, match=f"is in use \\(held by process {os.getpid()}\\): end that process, or use another session name"
        ):
            model.session(tmp_path / "a", ctx=CTX, hga=HGA)
    model.session(tmp_path / "a", ctx=CTX, hga=HGA).close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_trouble_with_the_disk_does_not_end_the_generation(model, tmp_path, monkeypatch, code):
    """It goes on in memory, says so once, and what was stored before can be opened."""
    notices = []
    write = disk.BlockWriter.write
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA, on_notice=notices.append) as session:
        turns(session, 1, 200)
        allowed = iter(range(3))

        def failing(self, *arguments):
            if next(allowed, None) is None:
                raise OSError(code, os.strerror(code))
            return write(self, *arguments)

        monkeypatch.setattr(disk.BlockWriter, "write", failing)
        second, third = turns(session, 2, 200), turn(session, 3)
        assert len(notices) == 1
        assert os.strerror(code) in notices[0]
        monkeypatch.undo()
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        assert len(session.tokens) == 219
        assert turns(session, 2, 200) == second
        assert turn(session, 3) == third


def test_unwritable_place_is_said_once_and_generation_works(model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    notices = []
    with model.session(tmp_path / "sub" / "a", ctx=CTX, hga=HGA, on_notice=notices.append) as session:
        assert len(turn(session, 1)) == len(turn(session, 2)) == 10
    assert len(notices) == 1
    assert "Read-only file system" in notices[0]


def test_place_that_cannot_be_a_folder(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be made \(Not a directory\)"):
        model.session(tmp_path / "file" / "a")


def damage(path: Path, kind: str, generator: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: generator.integers(len(data))])
    else:
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(data)


def test_every_damage_is_recomputed_or_named(model, tmp_path):
    """100 flipped bits, five at a time, truncated and missing files: the next turn's tokens are right every time, or the file is named.

    What is stored after the damage is computed again, and said so; damage to the manifest itself is refused; damage to what the turn does
    not need is not noticed.
    """
    with model.session(tmp_path / "original" / "a", ctx=CTX, hga=HGA) as session:
        turns(session, 1, 250), turn(session, 2)
    with model.session(tmp_path / "other" / "a", ctx=CTX, hga=HGA) as session:
        turns(session, 1, 250), turn(session, 2)
        expected = turn(session, 3)
    chain = Manifest.read(tmp_path / "original" / "a").chain()
    files = [path for pair in chain for path in (tmp_path / "original" / "blocks" / Path(*pair)).rglob("*") if path.is_file()]
    files = sorted([*files, tmp_path / "original" / "a" / "manifest.json"])
    generator = np.random.default_rng(0)
    copy, outcomes = tmp_path / "copy", []
    for kind in ["flipped"] * 20 + ["truncated"] * 2 + ["missing"] * 2:
        shutil.copytree(tmp_path / "original", copy)
        broken = [copy / files[i].relative_to(tmp_path / "original") for i in generator.choice(len(files), 5, replace=False)]
        for path in broken:
            damage(path, kind, generator)
        outcomes.append(reopened(model, copy / "a", broken, expected))
        shutil.rmtree(copy)
    assert outcomes.count("recomputed") > 15
    assert outcomes.count("refused") > 0


def reopened(model, folder: Path, broken: list[Path], expected: list[int]) -> str:
    """Open a damaged session and take its third turn: what came of it."""
    notices: list[str] = []
    if not (folder / "manifest.json").exists():
        return "no session"
    try:
        with model.session(folder, ctx=CTX, hga=HGA, on_notice=notices.append) as session:
            tokens = turn(session, 3)
    except StoreError as error:
        named, outcome = [str(error)], "refused"
    else:
        assert tokens == expected
        named, outcome = notices, "recomputed" if notices else "exact"
    assert outcome == "exact" or any(str(path) in line or str(path.parent) in line for line in named for path in broken)
    return outcome


def test_damage_is_refused_on_demand_and_found_by_verify(model, tmp_path, capsys):
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turns(session, 1, 200)
    assert command(["verify", str(tmp_path)]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    damaged = next((tmp_path / "blocks").rglob("pages/1.*"))
    damage(damaged, "flipped", np.random.default_rng(1))
    assert command(["verify", str(tmp_path / "a")]) == 1
    assert str(damaged) in capsys.readouterr().out
    with (
        pytest.raises(StoreError, match="is damaged"),
        model.session(tmp_path / "a", ctx=CTX, hga=HGA, on_damage="refuse") as session,
    ):
        turn(session, 2)
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turn(session, 2)
    assert command(["verify", str(tmp_path)]) == 0


def test_damage_to_one_of_many_layers_ends_the_loading(tmp_path, monkeypatch):
    """Layers come back side by side, each from its own file; one that cannot be read keeps no other waiting for a place to read to."""
    monkeypatch.setattr(reuse, "READ_AHEAD", 1)  # one place at a time
    config = ModelConfig("qwen3", 96, 32, 6, 4, 2, 16, 64, 4096, RopeConfig(1e4))
    backend = HGAAttention(HGA, config.rope)
    form, store, tokens = StateFormat.of(backend, config, np.dtype("bfloat16")), disk.BlockStore(tmp_path), prompt(1, 250)
    random_blocks(form, store, tmp_path / "staging", tokens)
    stored = reuse.longest_stored(store, form, ROOT, tokens, 250)
    assert [header.first for header in stored.chain] == [0, 128]
    states = reuse.load_states(store, form, stored, backend, 300)
    for header in stored.chain:
        for layer, state in enumerate(states):
            file = store.folder(header.parent, header.id) / "pages" / f"{layer}.0.0.0.0.0"
            pages = np.frombuffer(file.read_bytes()[:-4], np.uint16).reshape(2, -1, 2, 4, 16)  # a checksum is at the end
            held = np.asarray(state.history.pages)[:, header.first // 4 :][:, : pages.shape[1]]
            np.testing.assert_array_equal(held.view(np.uint16), pages)
    folder = store.folder(stored.chain[0].parent, stored.chain[0].id) / "pages"
    for layer in (1, 2, 3):
        damage(folder / f"{layer}.0.0.0.0.0", "flipped", np.random.default_rng(1))
    with pytest.raises(reuse.DamagedBlock, match=f"{folder} is damaged.*tokens 0 to 127"):
        reuse.load_states(store, form, stored, backend, 300)


def test_another_format_is_refused_in_one_line(model, tmp_path):
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turn(session, 1)
    path = tmp_path / "a" / "manifest.json"
    data = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"} | {"version": 1}
    path.write_text(disk.sealed(data))
    with pytest.raises(StoreError, match="version 1, and this program reads version 2: delete it and begin anew") as refusal:
        model.session(tmp_path / "a", ctx=CTX, hga=HGA)
    assert "\n" not in str(refusal.value)
    assert command(["delete", str(tmp_path / "a")]) == 0


def test_list_show_delete(model, tmp_path, capsys):
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA) as session:
        turns(session, 1, 200)
        assert command(["delete", str(tmp_path / "a")]) == 2
        assert "is in use" in capsys.readouterr().err
    assert command(["list", str(tmp_path)]) == 0
    assert "219 tokens, 2 turns" in capsys.readouterr().out
    assert command(["show", str(tmp_path / "a")]) == 0
    assert "in 2 blocks" in capsys.readouterr().out
    assert command(["delete", str(tmp_path / "a")]) == 0
    assert not list((tmp_path / "blocks").iterdir())
    assert command(["show", str(tmp_path / "a")]) == 2


def test_killed_writer_leaves_the_last_completed_turn(model, tmp_path):
    """What kill -9 would leave at 50 random moments: every turn reported as done is there, whole, and goes on with the same tokens.

    The writer is stopped, its folder copied as it is at that moment, and the writer let go on; at the end it is killed.
    """
    program = [sys.executable, Path(__file__).parent / "session_cases.py", tmp_path / "live"]
    same = {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # bit for bit, as conftest.py sets it
    writer = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=os.environ | same)
    lines = [writer.stdout.readline()]  # the first turn is there
    os.set_blocking(writer.stdout.fileno(), False)
    generator, reported = np.random.default_rng(0), []
    for moment in range(50):
        time.sleep(generator.uniform(0, 0.05))
        writer.send_signal(signal.SIGSTOP)
        lines += writer.stdout.readlines()
        reported.append(lines[-1].split())
        shutil.copytree(tmp_path / "live", tmp_path / str(moment))
        writer.send_signal(signal.SIGCONT)
    writer.kill()
    writer.wait()
    assert len(lines) > 5
    turns = dict.fromkeys(range(50), 0)
    for moment, (conversation, number) in enumerate(reported):
        for folder in sessions(tmp_path / str(moment)):
            problems, _ = check(folder)
            assert not problems
        last = tmp_path / str(moment) / f"s{conversation}"
        turns[moment] = Manifest.read(last).turns
        assert turns[moment] >= int(number) + 1
    for moment in (3, 49):
        conversation = reported[moment][0]
        with model.session(tmp_path / str(moment) / f"s{conversation}", ctx=CTX, hga=HGA) as session:
            ids = np.concatenate([session.tokens, session.manifest.pending])
            seeds = [100 * int(conversation) + number for number in range(turns[moment] + 1)]
            again = turn(session, seeds[-1])
        with model.session(tmp_path / f"again{moment}" / "s", ctx=CTX, hga=HGA) as session:
            for seed in seeds[:-1]:
                turn(session, seed)
            np.testing.assert_array_equal(np.concatenate([session.tokens, session.manifest.pending]), ids)
            assert turn(session, seeds[-1]) == again


def test_manifest_reads_back(tmp_path):
    manifest = Manifest(
        "m", {"a": 1}, "00", (("11", 2),), np.arange(2, dtype=np.int32), (5,), ({"role": "user", "content": "é"},), 1, "x", "y"
    )
    manifest.write(tmp_path)
    again = Manifest.read(tmp_path)
    np.testing.assert_array_equal(again.tokens, manifest.tokens)
    assert vars(again) | {"tokens": 0} == vars(manifest) | {"tokens": 0}
    data = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(data | {"turns": 2}))
    with pytest.raises(StoreError, match="its checksum does not match"):
        Manifest.read(tmp_path)
