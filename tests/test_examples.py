"""The examples do what their first lines say, in small."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
from eval_checkpoint import readable_checkpoint

from hga_jax.demo import build_prompt

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(capsys, monkeypatch):
    """Run an example as a command; returns what it printed."""

    def as_command(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return as_command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random checkpoint, for what a real one would make slow."""
    return str(readable_checkpoint(tmp_path_factory.mktemp("tiny")))


def test_finetune_lowers_the_loss(run):
    printed = run("finetune.py", "--length", "192", "--steps", "11")
    steps = [float(loss) for loss in re.findall(r"step +\d+: loss ([\d.]+)", printed)]
    before, after = (float(loss) for loss in re.findall(r"routed ([\d.]+)", printed))
    assert steps[-1] < steps[0] - 1
    assert after < before - 1


def test_picture_is_the_one_in_the_readme(run, tmp_path):
    run("how_it_works.py", str(tmp_path / "made.svg"))
    assert (tmp_path / "made.svg").read_text() == (EXAMPLES / "how_it_works.svg").read_text()


def test_perplexity(run, tiny, tmp_path):
    text = tmp_path / "log.txt"
    text.write_text(build_prompt(entries=10))
    printed = run("perplexity.py", str(text), "--length", "1000", "--model", tiny)
    dense, routed = (float(loss) for loss in re.findall(r"([\d.]+) nats a token over 1 windows", printed))
    assert dense == pytest.approx(routed, abs=0.05)


def test_needle(run, tiny):
    printed = run("needle.py", "--days", "3", "--depths", "0.5", "--model", tiny)
    assert len(re.findall(r"depth  50% of \d+ tokens, (?:dense|hga  ): lost , \d+% attended", printed)) == 2  # nobody trained it


def test_ask_file(run, tiny, tmp_path):
    text = tmp_path / "log.txt"
    text.write_text(build_prompt(entries=2).split("\n\nUsing")[0])
    printed = run("ask_file.py", str(text), "What is the secret password of the old lighthouse?", "--model", tiny, "--max-new-tokens", "5")
    assert re.search(r"\n\d+ tokens read in [\d.]+ s, \d+% of the keys attended to, [\d.]+ tokens/s\n", printed)


def test_ask_many(run, tiny, tmp_path):
    text = tmp_path / "log.txt"
    text.write_text(build_prompt(entries=3).split("\n\nUsing")[0])
    questions = ("Who was there?", "What is the password?")
    printed = run("ask_many.py", str(text), str(tmp_path / "store"), *questions, "--model", tiny, "--max-new-tokens", "2")
    (first, of), (second, _) = ((int(n) for n in found) for found in re.findall(r"(\d+) of (\d+) tokens read anew", printed))
    assert first == of
    assert second < of / 2


@pytest.mark.model
def test_notebook(capsys):
    """Its code cells run one after the other; a shorter log keeps it quick."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "routing.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "entries = 100" in code
    names = {"__name__": "__main__"}
    exec(compile(code.replace("entries = 100", "entries = 45"), "routing.ipynb", "exec"), names)
    assert "'purple" in capsys.readouterr().out
    assert names["votes"][names["fact_pages"]].max() > names["votes"][8:-45].mean()


@pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="needs google-tunix (pip install google-tunix)")
def test_tunix_qwen3(run):
    printed = run("tunix_qwen3.py", "--length", "1500")
    assert printed.count("\n+    qkv = hga_attention(") == 1
    assert max(float(number) for number in re.findall(r"(?:installed|model) +([\d.e-]+)\n", printed)) < 1e-4
    theirs, ours = (float(number) for number in re.search(r"tunix ([\d.]+) nats a token, ours ([\d.]+)", printed).groups())
    assert abs(theirs - ours) < 1e-3
