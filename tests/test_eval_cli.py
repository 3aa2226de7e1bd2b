"""`python -m hga_jax.eval` as a user meets it: reports, plots, and one clear line for wrong input; answers are those of greedy search."""

import json
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_checkpoint import readable_checkpoint

from hga_jax.backend import DenseAttention
from hga_jax.eval.__main__ import main
from hga_jax.eval.answering import Reader, make_readers
from hga_jax.eval.choices import parse_choices
from hga_jax.eval.haystack import Prompt, Task
from hga_jax.eval.reporting import Progress
from hga_jax.loading import load_model

SMALL = "paper:chunk_size=16,group_size=4,sink_chunks=1,local_chunks=1,top_chunks=2,top_groups=4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return readable_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("How vexingly quick daft zebras jump; and how quick the lazy dogs are to forget them. " * 5)
    return path


def run(tmp_path, *arguments) -> dict:
    out, png = tmp_path / "report.json", tmp_path / "plot.png"
    assert main([*map(str, arguments), "--json", str(out), "--plot", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert {"device", "versions", "command", "model"} <= report.keys()
    return report


def test_nll(tmp_path, checkpoint, text, capsys):
    report = run(tmp_path, "nll", "--model", checkpoint, "--text", text, "--length", 256, "--skip", 64, "--policy", SMALL)
    documented = "model length tokens_scored dense_nats hga_nats gap_nats attended_fraction fetched_fraction policies documents"
    assert set(documented.split()) <= report.keys()
    assert [row["policy"] for row in report["policies"]] == ["dense", SMALL]
    assert report["hga_nats"] - report["dense_nats"] == pytest.approx(report["gap_nats"], abs=1e-6)
    assert "fetched tokens" in capsys.readouterr().out


def test_sweep(tmp_path, checkpoint, text):
    report = run(
        tmp_path, "sweep", "--model", checkpoint, "--text", text, "--length", 400, "--skip", 64, "--budgets", "1/2", "2/8",
        "--local-chunks", 0, "--sink-chunks", 1,
    )  # fmt: skip
    fetched = [point["fetched_tokens"] for point in report["points"]]
    assert len(fetched) == 2
    assert fetched[0] < fetched[1]
    assert report["points"][0]["pareto"]


def test_mass(tmp_path, checkpoint, text):
    report = run(tmp_path, "mass", "--model", checkpoint, "--text", text, "--length", 256, "--skip", 64, "--policy", "dense", SMALL)
    (policy,) = report["policies"]
    assert np.all(np.array(policy["missed"]) <= np.array(policy["middle"]) + 1e-6)


def test_needle(tmp_path, checkpoint):
    report = run(
        tmp_path, "needle", "--model", checkpoint, "--lengths", 400, "--depths", 0, 100, "--samples", 1, "--policy", "dense", SMALL
    )
    assert [(cell["length"], cell["depth"], cell["attention"], cell["total"]) for cell in report["cells"]] == [
        (400, 0.0, "dense", 1), (400, 1.0, "dense", 1), (400, 0.0, SMALL, 1), (400, 1.0, SMALL, 1),
    ]  # fmt: skip
    assert all(cell["correct"] in (0, 1) for cell in report["cells"])
    assert "teacher" in report["scoring"]  # the checkpoint has no chat template


def test_ruler(tmp_path, checkpoint):
    families = ["niah_single", "frequent_words"]
    report = run(tmp_path, "ruler", "--model", checkpoint, "--lengths", 500, "--samples", 1, "--families", *families, "--policy", "dense")
    assert [cell["family"] for cell in report["cells"]] == families
    assert all(0 <= cell["score"] <= 1 for cell in report["cells"])
    assert report["complete"]


def prompts_of(*starts: list[int], answer: list[int] = ()) -> list[Prompt]:
    return [Prompt(Task("", "", "", ("",)), np.array(start, np.int32), np.array(answer, np.int32)) for start in starts]


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """The most likely next token, `count` times, from whole forward passes."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(np.argmax(model.logits(np.array([tokens]), attention="dense")[0, -1])))
    return tokens[-count:]


def test_answers_are_those_of_greedy_search(checkpoint):
    model = load_model(checkpoint, dtype=jnp.float32)
    draw = np.random.default_rng(0)
    shared = draw.integers(3, 96, 140).tolist()
    prompts = prompts_of([*shared, 5, 6, 7], [*shared, 8, 9])
    wanted = [greedy(model, prompt.tokens, 5) for prompt in prompts]
    assert not {2} & {*wanted[0], *wanted[1]}  # no end token on the way
    reader = Reader(model, DenseAttention(), 200)
    assert reader.generated(prompts, 5) == wanted
    assert reader.generated(prompts[:1], 5) == wanted[:1]  # by itself a prompt is read in one go
    assert reader.predicted(prompts_of(prompts[0].tokens.tolist(), answer=wanted[0])) == [True]
    assert reader.predicted(prompts_of(prompts[0].tokens.tolist(), answer=[*wanted[0][:4], wanted[0][4] ^ 1])) == [False]


@pytest.mark.parametrize("teacher", [False, True])
def test_prompts_find_their_programs_compiled(checkpoint, caplog, teacher):
    model = load_model(checkpoint, dtype=jnp.float32)
    shared = np.random.default_rng(1).integers(3, 96, 700).tolist()
    together, alone = prompts_of([*shared, 5], [*shared, *shared[:100]], answer=[7, 8]), prompts_of(shared * 2, answer=[9])
    readers = make_readers(model, parse_choices(["dense", SMALL]), {1500: [together, alone]}, teacher)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for reader in readers.values():
            for prompts in (together, alone):
                reader.predicted(prompts) if teacher else reader.generated(prompts, 3)
    compiled = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling jit(")]
    assert any("row_logits" in message or "_most_likely" in message for message in compiled)  # small ones are not made ahead
    assert not [message for message in compiled if "prefill_layer" in message or "_decode_tokens" in message]


@pytest.mark.parametrize("task", ["ruler", "needle"])
def test_a_run_that_is_cut_off_leaves_its_answers(tmp_path, checkpoint, task, monkeypatch):
    out, read = tmp_path / "report.json", Reader._read
    calls = []

    def read_twice(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(Reader, "_read", read_twice)
    how = ["--lengths", "500", "--samples", "3", "--policy", "dense"]
    how += ["--families", "niah_single"] if task == "ruler" else ["--depths", "50"]
    assert main([task, "--model", str(checkpoint), *how, "--json", str(out)]) == 130
    report = json.loads(out.read_text())
    assert [answer["sample"] for answer in report["answers"]] == [0, 1]
    assert (report["complete"], report["cells"]) == (False, [])
    assert "device" in report


def test_progress_is_said_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("hga_jax.eval.reporting.LINE_SECONDS", 0)
    with Progress(4, "work") as bar:
        bar.note("first of four")
        assert bar.inside() is None
        bar.finish(1)
    assert capsys.readouterr().err == "work: 25% in 0 s, about 0 s left, first of four\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nll", "--text", "absent.txt"], "--text absent.txt: cannot read it (No such file or directory)"),
        (["nll", "--text", "TEXT", "--length", "1000"], "--length 1000 leaves no position beyond --skip 1024"),
        (["nll", "--text", "TEXT", "--length", "600", "--skip", "64"], "text.txt has 425 tokens, fewer than --length 600"),
        (["nll", "--text", "TEXT", "--policy", "magic"], "'magic' is not known, choose dense, sketch, paper, windows"),
        (["nll", "--text", "TEXT", "--policy", "paper:top=3"], "'top=3' is no setting"),
        (["nll", "--text", "TEXT", "--policy", "paper:top_chunks=many"], "top_chunks needs a whole number, not 'many'"),
        (["nll", "--text", "TEXT", "--policy", "sketch", "--threshold", "2"], "threshold=2.0 must lie between 0 and 1"),
        (["nll", "--text", "TEXT", "--json", "/absent/out.json"], "--json /absent/out.json: cannot be written there"),
        (["nll", "--text", "TEXT", "--length", "600", "--rope-scaling", "none"], "exceed the model's native context of 512"),
        (["mass", "--text", "TEXT", "--policy", "dense"], "dense attention misses nothing, name a policy"),
        (["sweep", "--text", "TEXT"], "nothing to sweep: give --thresholds or --budgets"),
        (["sweep", "--text", "TEXT", "--budgets", "16"], "--budgets 16: write CHUNKS/GROUPS"),
        (["needle", "--lengths", "64"], "--lengths 64 is too short"),
        (["needle", "--depths", "50", "110"], "--depths 110 must lie between 0 and 100 percent"),
        (["ruler", "--families", "niah"], "--families niah is not known: choose niah_single"),
        (["ruler", "--samples", "0"], "--samples 0 must be at least 1"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, checkpoint, text, capsys):
    filled = [str(text) if argument == "TEXT" else argument for argument in arguments]
    skip = [] if arguments[0] not in ("nll", "mass") or "--skip" in arguments or message.startswith("--length") else ["--skip", "64"]
    assert main([*filled, *skip, "--model", str(checkpoint)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]


def test_plot_without_matplotlib_is_said_first(checkpoint, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["nll", "--text", str(text), "--model", str(checkpoint), "--plot", str(tmp_path / "a.png")]) == 2
    assert "--plot needs matplotlib: pip install 'hga-jax[plot]'" in capsys.readouterr().err


def test_a_file_that_is_no_text(tmp_path, checkpoint, capsys):
    path = tmp_path / "binary"
    path.write_bytes(b"good\xff\xfe")
    assert main(["nll", "--text", str(path), "--model", str(checkpoint)]) == 2
    assert "is not UTF-8 text (byte 4)" in capsys.readouterr().err
