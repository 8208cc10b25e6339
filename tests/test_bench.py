"""The benchmarks run, and say what they should; how fast is not their tests' affair."""

import importlib
import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from bench import common, full_context, report
from orcd_jax.config import ModelConfig
from orcd_jax.probe import program_memory


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a benchmark quickly with more arguments, and returns the object of its last line."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--repeat", "2", "--device", "cpu", *map(str, args)])
        importlib.import_module(f"bench.{name}").main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("latency", ("--batch", "--sampled")),
        ("throughput", ("--batch", "2")),
        ("throughput", ("--guide",)),
        ("breakdown", ()),
    ],
)
def test_a_benchmark_of_a_model_runs(name, args, run, tiny, tmp_path):
    found = run(name, "--model", tiny("qwen2"), "--json", tmp_path / "result.json", *args)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["bench"] == name and found["device"].startswith("CPU")
    table = getattr(report, name)([found])
    assert found["device"] in table and "tok/s" in table.replace("time, ms", "tok/s")


def test_memory_agrees_with_the_formulas(run, tiny):
    found = run("memory", "--model", tiny("phi3"), "--lengths", "16")
    assert found["weights_bytes"] == found["weights_formula_bytes"]
    assert all(row["cache_bytes"] == row["cache_formula_bytes"] for row in found["rows"])
    assert "loading" in found and report.memory([found])


def test_every_op_is_right_in_every_implementation_that_runs_here(run):
    found = run("kernels", "--repeat", "1")
    done = [row for row in found["rows"] if "failed" not in row]
    ran = {row["op"] for row in done if row["implementation"] == "xla"}
    assert ran >= {"flash_attention", "flash_decode", "quant_matmul", "swiglu", "qkv_rope", "rms_norm"}
    for row in done:
        assert row["same_bits_twice"] and (row.get("error") is None or row["error"] < 1e-2), row
    assert "flash_decode" in report.kernels([found])


def test_a_made_up_vocabulary_has_as_many_words_as_asked_for():
    tokenizer = common.vocabulary(1000)
    assert tokenizer.vocab_size == tokenizer.known_tokens == 1000
    assert tokenizer.decode([*range(256)]) and tokenizer.decode([999]).startswith(" ")


def test_the_guide_has_a_place_for_every_table():
    guide = report.GUIDE.read_text(encoding="utf-8")
    for name in report.TABLES:
        assert report.between(guide, name, "x") != guide
    with pytest.raises(SystemExit):
        report.between(guide, "no such table", "x")


# Whole contexts


def test_temporaries_of_a_whole_context_of_qwen_are_linear_in_it():
    """With the model's own heads, one layer and a small vocabulary: XLA's plan, compiled and not run."""
    model = full_context.tiny_model("qwen2.5-0.5b", jax.devices("cpu")[0])
    whole = ModelConfig.from_preset("qwen2.5-0.5b")
    model.config = config = replace(model.config, n_heads=whole.n_heads, n_kv_heads=whole.n_kv_heads)
    model.params = full_context.random_params(config, "f32", model.device)
    chunk, context = 512, config.context_length
    assert context == 32768
    half, full = (
        program_memory(model, 1, length, prompt=chunk).temp_size_in_bytes for length in (context // 2, context)
    )
    assert full <= 2.05 * half
    assert full <= 1.25 * config.workspace_bytes(1, chunk, context)
    decoding = program_memory(model, 1, context).temp_size_in_bytes
    assert decoding < 64 * config.n_heads * context  # a few vectors of scores, no cache


def test_a_whole_context_of_phi3_runs_to_its_end():
    model = full_context.tiny_model("phi-3-mini-4k", jax.devices("cpu")[0])
    prompt = np.random.default_rng(0).integers(0, 512, 4096 - 8).tolist()
    (done,) = model.generate([prompt], 64, ignore_eos=True)
    assert (done.finish_reason, len(done.token_ids)) == ("context", 8)
    assert done.token_ids[0] == model.logits(prompt)[-1].argmax()  # teacher-forced, in chunks of another size
    held = model.config.cache_bytes(1, 4096)
    assert held == 2 * 2 * 16 * 4 * 2047  # keys and values of two heads, for the window and no longer
