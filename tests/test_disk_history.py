"""A history on disk of which only part fits in memory: the same tokens as with all of it there."""

import numpy as np
import pytest
from session_cases import CTX, HGA, prompt, tiny_model, turn, turns

from hga_jax.cache.disk import StoreError
from hga_jax.cache.page_cache import PageCache
from hga_jax.config import HGAConfig

HISTORY_BYTES = CTX * 2 * 2 * 2 * 16 * 4  # layers, K and V, kv heads, head dim, float32
GIB = 2**30


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def in_memory(model, tmp_path_factory):
    """Tokens of four turns with the history in memory."""
    with model.session(tmp_path_factory.mktemp("memory") / "a", ctx=CTX, hga=HGA) as session:
        return [turns(session, 1, 250, new=12), turn(session, 2, 20, new=30), turn(session, 3, 20, new=12)]


@pytest.mark.parametrize("share", [0, 0.25, 2])
def test_same_tokens_as_in_memory(model, in_memory, tmp_path, share):
    """With no page cache, one for a quarter of the history, and one for all of it; across chunk and block ends, and after reopening."""
    options = {"ctx": CTX, "hga": HGA, "kv_store": str(tmp_path), "host_memory": share * HISTORY_BYTES / GIB}
    with model.session(tmp_path / "a", **options) as session:
        assert turns(session, 1, 250, new=12) == in_memory[0]
        assert turn(session, 2, 20, new=30) == in_memory[1]
        cache = session._disk.cache
        assert cache.data.nbytes <= share * HISTORY_BYTES
        assert cache.counters.wanted > 100
        assert (cache.counters.bytes_read > 0) == (cache.counters.found < cache.counters.wanted)
        if share == 2:
            assert cache.counters.bytes_read <= HISTORY_BYTES
    with model.session(tmp_path / "a", **options) as session:
        result = session.generate(prompt(3, 20), max_new_tokens=12)
    assert result.tokens == in_memory[2]
    assert result.reused_tokens == 250 + 20 + 12 + 12 + 30 - 1
    assert result.history_tier == "disk"
    assert 0 <= result.bank_hit_rate <= 1
    assert (result.disk_read_bytes_per_token > 0) == (result.bank_hit_rate < 1)
    assert 2**20 > result.history_bytes > 0


def test_votes_keep_the_same_pages_open(model, tmp_path):
    """Decoding from disk across chunk ends, and from where the session was closed, as with the history in memory."""
    hga, found = HGAConfig(**vars(HGA) | {"votes": 3, "vote_share": 0.3, "vote_stride": 2, "threshold": 0.05}), []
    for options in ({}, {"kv_store": str(tmp_path), "host_memory": 0.0}):
        folder, options = tmp_path / f"a{len(found)}", {"ctx": CTX, "hga": hga} | options
        with model.session(folder, **options) as session:
            first = turn(session, 1, 121, new=30)
        with model.session(folder, **options) as session:
            found.append((first, turn(session, 2, 20, new=30)))
    assert found[0] == found[1]


def test_run_without_a_session_leaves_nothing_behind(model, in_memory, tmp_path):
    result = model.generate(prompt(1001, 128), max_new_tokens=12, ctx=CTX, hga=HGA, kv_store=str(tmp_path), host_memory=0.001)
    assert result.tokens == in_memory[0][:12]
    assert result.disk_history_bytes > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_damage_to_a_single_page_is_named_when_it_is_read(model, in_memory, tmp_path):
    """Pages read by byte ranges, past the file's own checksum: a flipped bit is found, and only by who reads its chunk."""
    with model.session(tmp_path / "a", ctx=CTX, hga=HGA, kv_store=str(tmp_path), host_memory=0.0) as session:
        assert turns(session, 1, 250, new=12) == in_memory[0]
        cache, first = session._disk.cache, session._disk.chain[0]
        damaged = tmp_path / "blocks" / first.parent / first.id / "pages" / "1.0.0.0.0.0"
        heads, pages = np.array([0, 1, 1]), np.array([3, 4, 6])
        before = cache.pages(1, heads, pages)
        stored = np.frombuffer(damaged.read_bytes()[:-4], np.float32).reshape(2, 32, 2, 4, 16)  # its own checksum is at the end
        np.testing.assert_array_equal(before, stored[heads, pages])
        data = bytearray(damaged.read_bytes())
        data[5 * 2 * 4 * 16 * 4 + 100] ^= 4  # page 5 of head 0
        damaged.write_bytes(data)
        np.testing.assert_array_equal(cache.pages(1, heads, pages), before)
        with pytest.raises(StoreError, match=f"{damaged} is damaged: a checksum does not match"):
            cache.pages(1, np.array([0]), np.array([4]))
        with pytest.raises(StoreError, match=r"pages is damaged"):
            turn(session, 2, 20)


def test_dense_attention_cannot_live_on_disk(model, tmp_path):
    with pytest.raises(ValueError, match="needs attention hga"):
        model.generate(prompt(1, 20), max_new_tokens=2, attention="dense", kv_store=str(tmp_path))


def test_page_cache_against_direct_reads():
    """Random wants with prefetch: always the right pages, never more slots than allowed, everything counted."""
    generator = np.random.default_rng(0)
    pages = generator.standard_normal((2, 3, 40, 2, 4, 8)).astype(np.float32)  # layers, kv heads, pages (ten chunks), ...
    reads = []

    def read(layer, heads, chunks):
        reads.append(len(heads))
        data = pages[layer].reshape(3, 10, 4, 2, 4, 8)[heads, chunks]
        return lambda: data

    cache = PageCache(2, 3, 10, (4, 2, 4, 8), np.float32, 7 * 4 * 2 * 4 * 8 * 4 + 5, read)
    assert len(cache.data) == 7
    for step in range(200):
        layer, count = step % 2, generator.integers(0, 12)
        heads, wanted = generator.integers(0, 3, count), generator.integers(0, 40, count)
        if generator.random() < 0.5:
            cache.prefetch(layer)
        np.testing.assert_array_equal(cache.pages(layer, heads, wanted), pages[layer][heads, wanted])
        held = cache.slot_of[cache.slot_of >= 0]
        assert len(np.unique(held)) == len(held) <= 7
        assert (cache.slot_of.reshape(-1)[cache.owner[held]] == held).all()
    assert cache.counters.bytes_read == sum(reads) * cache.piece_bytes
    assert 0 < cache.counters.found < cache.counters.wanted
