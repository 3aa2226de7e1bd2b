"""`python -m hga_jax.generate` as a user meets it: the demonstration, the report, and one clear line for wrong input."""

import io
import json
import sys

import pytest
from eval_checkpoint import readable_checkpoint

from hga_jax import demo
from hga_jax.generate import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_piped_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())


def fails(capsys, *arguments: str) -> str:
    """The one line printed for wrong input; exit code 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.model
def test_demonstration_finds_the_planted_fact(capsys, tmp_path):
    out = tmp_path / "result.json"
    assert main(["--ctx", "4096", "--max-new-tokens", "32", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert demo.ANSWER in result["text"]
    assert result["stopped_by"] == "end token"
    assert 2000 < result["prompt_tokens"] < 4096
    assert 0 < result["attended_fraction"] < 1
    assert 0 < result["fetched_fraction"] <= 1
    printed = capsys.readouterr()
    assert result["text"] in printed.out
    assert "tokens/s" in printed.err


def test_json_has_the_documented_fields(tmp_path):
    out, model = tmp_path / "result.json", readable_checkpoint(tmp_path)
    assert main(["--model", str(model), "--ctx", "64", "--prompt", "The sky is", "--max-new-tokens", "4", "--json", str(out)]) == 0
    documented = (
        "model attention prompt_tokens new_tokens text prefill_seconds decode_tokens_per_second prefill_tokens_per_second "
        "device_peak_bytes host_history_bytes disk_history_bytes history_tier attended_fraction fetched_fraction bank_hit_rate"
    )
    assert set(documented.split()) <= json.loads(out.read_text()).keys()


def test_quality_levels_open_more_or_less(tmp_path):
    """Each level attends to more than the one below it, and leaves less of the estimated attention mass unopened."""
    results, model, prompt = [], readable_checkpoint(tmp_path), "To be, or not to be, that is the question. " * 40
    for level in ("fast", "balanced", "best"):
        out = tmp_path / f"{level}.json"
        options = ["--ctx", "2048", "--max-new-tokens", "1", "--quality", level, "--json", str(out)]
        assert main(["--model", str(model), "--prompt", prompt, *options]) == 0
        results.append(json.loads(out.read_text()))
    attended = [result["attended_fraction"] for result in results]
    unopened = [result["unopened_mass"] for result in results]
    assert attended == sorted(set(attended))
    assert unopened == sorted(set(unopened), reverse=True)
    assert results[0]["refused_pages"] == 0


@pytest.mark.model
def test_piped_prompt_is_read(capsys, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO(b"What is the capital of France?"))
    monkeypatch.setattr(sys, "stdin", piped)
    assert main(["--ctx", "256", "--max-new-tokens", "16"]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.model
def test_prompt_longer_than_ctx(capsys):
    assert "leaves no room for an answer: raise --ctx or shorten the prompt" in fails(capsys, "--ctx", "100", "--prompt", "word " * 500)


@pytest.mark.model
def test_beyond_native_context_without_scaling(capsys):
    line = fails(capsys, "--ctx", "16384", "--rope-scaling", "none", "--prompt", "word " * 9000)
    assert "exceed the model's native context of 8192" in line
    assert "--rope-scaling auto" in line


@pytest.mark.model
def test_plan_that_cannot_fit_is_refused_before_weights_are_read(capsys, monkeypatch):
    monkeypatch.setattr("convert.load_decoder", lambda *a, **k: pytest.fail("weights were read"), raising=True)
    line = fails(capsys, "--ctx", "1000000000", "--prompt", "x")
    assert "GiB more than" in line
    assert "--ctx" in line
    assert "history" in line


@pytest.mark.model
def test_plan_prints_the_byte_table(capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert main(["--ctx", "65536", "--plan", "--json", str(out)]) == 0
    table = capsys.readouterr().out
    for row in ("weights", "summaries", "windows", "bank", "history", "total"):
        assert row in table
    plan = json.loads(out.read_text())["plan"]
    assert plan["history"] == 30 * 65536 * 2 * 3 * 64 * 4  # layers, tokens, K and V, kv heads, head dim, float32


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ctx", "1"], "--ctx 1 must be at least 2"),
        (["--prompt-file", "no/such/file.txt"], "cannot read no/such/file.txt: No such file or directory"),
        (["--prompt", "x", "--json", "no/such/dir/out.json"], "cannot be written there"),
        (["--prompt", "x", "--model", "./nowhere"], "neither a file or directory here nor a hub id"),
        (["--prompt", "x", "--kv-store", "hots"], "--kv-store hots: choose auto, device, host or a directory (./hots for a new one)"),
        (["--prompt", "x", "--quality", "superb"], "threshold 'superb': choose fast, balanced, best or a number between 0 and 1"),
        (["--prompt", "x", "--quality", "1.5"], "threshold=1.5 must lie between 0 and 1"),
        (["--prompt", "x", "--quality", "best", "--policy", "paper"], "--quality best belongs to the sketch policy"),
        (["--prompt", "x", "--device", "gpu"], "JAX sees no GPU here"),
    ],
)
def test_wrong_options_get_one_line(capsys, arguments, expected):
    line = fails(capsys, *arguments)
    assert expected in line
    assert line.count("\n") == 1


def test_prompt_file_must_be_utf8(capsys, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    assert "is not UTF-8 text (byte 2)" in fails(capsys, "--prompt-file", str(path))
