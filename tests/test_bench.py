"""The benchmarks run, and say what they should; how fast is not their tests' affair."""

import importlib
import json
import sys
from argparse import Namespace
from dataclasses import replace

import jax
import numpy as np
import pytest

from bench import common, full_context, random_gguf, report
from orcd_jax import load
from orcd_jax.config import ModelConfig
from orcd_jax.probe import noise, program_memory, settled


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


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_calls_that_compile_keep_their_order(platform):
    called = []
    calls = [lambda i=i: called.append(i) or i * i for i in range(5)]
    results = common.compiled_together(Namespace(platform=platform), calls)
    assert next(results) == 0 and (len(called) == 1) == (platform == "cpu")
    assert list(results) == [1, 4, 9, 16] and sorted(called) == [*range(5)]


def test_requests_of_one_kind_are_measured_once(run, tiny):
    model = tiny("qwen2")
    found = run("latency", "--model", model, "--prompts", "full", "--batch", "--sampled", "--cache", 100000)
    assert [row["prompt_tokens"] for row in found["requests"]] == [256 - 16]  # all of the context but the new tokens
    assert [row["cache_tokens"] for row in found["steps"]] == [256 - 4]


def test_a_text_beyond_the_context_is_cut(run, tiny):
    found = run("cache_policies", "--model", tiny("qwen2"))
    assert found["tokens"] == 256 and report.cache_policies([found])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("latency", ("--model", "no-such-model")),
        ("breakdown", ("--preset", "no-such-preset")),
        ("memory", ("--json", "no/such/folder/result.json", "--preset", "no-such-preset")),
        ("startup", ("--preset", "qwen2.5-0.5b")),
        ("full_context", ()),
        ("kernels", ("--only", "no-such-op")),
        ("throughput", ("--batch", "0")),
        ("breakdown", ("--quick", "--batch", "1000000000")),
        ("latency", ("--new-tokens", "1000000")),
        ("cache_policies", ("--file", "SHORT")),
        ("cache_policies", ("--file", "NO-TEXT")),
        ("report", ("--results", "no-such-folder")),
        ("throughput", ("--guide", "--plot", "plot.png")),
        ("report", ("--run", "no-such-bench")),
        ("report", ("--preset", "qwen2.5-0.5b")),
    ],
)
def test_a_mistake_is_told_and_not_traced(name, args, monkeypatch, capsys, tiny, tmp_path):
    (tmp_path / "SHORT").write_text("x")
    (tmp_path / "NO-TEXT").write_bytes(b"\xff\xfe")
    args = [str(tmp_path / arg) if (tmp_path / arg).is_file() else arg for arg in args]
    needs_model = not {"--model", "--preset"} & {*args} and name in ("breakdown", "latency", "cache_policies")
    monkeypatch.setattr(sys, "argv", [name, *args, *(["--model", str(tiny("qwen2"))] if needs_model else [])])
    with pytest.raises(SystemExit) as refused:
        common.run(importlib.import_module(f"bench.{name}").main)
    (line,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2 and "error: " in line


def test_a_result_that_cannot_be_written_is_printed_still(capsys):
    with pytest.raises(SystemExit):
        common.run(lambda: common.emit({"bench": "x"}, Namespace(json="no/such/folder/result.json", note="y")))
    assert json.loads(capsys.readouterr().out) == {"bench": "x", "note": "y"}


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


@pytest.mark.parametrize(("preset", "file"), [("phi-3-mini-4k", "phi-3"), ("qwen2.5-0.5b", "qwen2")])
def test_a_random_file_is_of_the_presets_shapes(preset, file, model_file, tmp_path):
    config = replace(ModelConfig.from_preset(preset), n_layers=1, d_ff=64, d_model=64, head_dim=32, n_heads=2)
    config = replace(config, n_kv_heads=config.n_heads // (2 if config.architecture == "qwen2" else 1))
    random_gguf.write(tmp_path / "random.gguf", config, model_file(f"vocab-{file}.gguf"))
    model = load(tmp_path / "random.gguf", device="cpu", weights="int8", context=64)
    assert model.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)  # float32 in the file
    known = dict(rms_norm_eps=config.rms_norm_eps, known_tokens=config.known_tokens, stop_ids=())
    assert replace(model.config, **known) == config
    assert model.generate("Hello.", 4, ignore_eos=True)[0].token_ids


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


def test_noisy_measurements_are_taken_again_on_a_gpu():
    gpu, cpu = Namespace(platform="gpu"), Namespace(platform="cpu")
    quiet, noisy = [1.0, 1.001, 0.999, 1.0, 2.0], [1.0, 1.2, 0.8, 1.0, 1.1]
    assert noise(quiet) < 0.01 < noise(noisy) and noise([3.0]) == 0  # one late start does not count
    assert settled(lambda: list(quiet), gpu) == quiet
    assert settled(lambda: list(noisy), cpu) == noisy
    assert settled(lambda: list(noisy), gpu) == noisy * 4
    rounds = iter([[(1.0,), (1.5,)], [(1.0,)] * 30])
    assert len(settled(lambda: next(rounds), gpu, lambda pair: pair[0])) == 32
