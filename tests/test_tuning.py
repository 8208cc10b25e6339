"""Configurations: where they come from, and what the tuner asks the kernels."""

from dataclasses import dataclass

import jax
import pytest

from pallas_kernels import tune, tuning
from pallas_kernels.implementation import on_hopper
from pallas_kernels.mosaic_gpu.quant_matmul import Kernel
from pallas_kernels.tuning import choose, deciding


@dataclass(frozen=True)
class Config:
    warps: int
    depth: int = 1


def space():
    return Config(4), Config(8)


needs_kernels = pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11, 2), reason="needs jax 0.11.2 or newer, for which the kernels are written"
)


def test_an_entry_replaces_fields_of_the_heuristic_s(monkeypatch):
    monkeypatch.setattr(tuning, "entries", lambda slug: {"op": {"M=8": {"depth": 3}}})
    assert choose("op", "M=8", Config(4), space) == Config(4, 3)
    assert choose("op", "M=16", Config(4), space) == Config(4)
    assert choose("other", "M=8", Config(4), space) == Config(4)


def test_whoever_decides_is_asked_inside_the_block_alone():
    asked = []

    def decide(choice):
        asked.append((choice.op, choice.key, choice.heuristic, list(choice.space())))
        return Config(16)

    with deciding(decide):
        assert choose("op", "key", Config(4), space) == Config(16)
    assert choose("op", "key", Config(4), space) == Config(4)
    assert asked == [("op", "key", Config(4), [Config(4), Config(8)])]


def test_every_device_s_entries_are_of_ops_and_fields_that_exist():
    names = {"kernel", "quant_matmul", "gate_up", "qkv_rope", "quant_matmul_small", "gate_up_small", "qkv_rope_small",
             "quant_matmul_large", "gate_up_large", "flash_decode", "flash_attention",
             "quant_matmul_argmax"}  # fmt: skip
    for file in tune.TUNED.glob("*.json"):
        assert set(tuning.entries(file.stem)) <= names


@needs_kernels
@pytest.mark.parametrize("rows", [1, 16, 512])
def test_the_tuner_learns_each_choice_and_its_space(rows):
    found = set()
    for problem in tune.problems([rows]):
        inputs = jax.eval_shape(problem.inputs)
        for choice in tune._choices(problem, inputs, {}):
            found.add(choice.op)
            assert {type(config) for config in choice.space()} == {type(choice.heuristic)}
    expected = {
        1: {"kernel", "qkv_rope", "quant_matmul", "gate_up", "flash_decode"},
        16: {
            "kernel",
            "qkv_rope_small",
            "quant_matmul_small",
            "gate_up_small",
            "quant_matmul_large",
            "gate_up_large",
            "quant_matmul_argmax",
            "flash_decode",
        },
        512: {"quant_matmul_large", "gate_up_large"},
    }
    assert found == expected[rows]


@needs_kernels
def test_what_is_decided_is_not_asked_again_and_changes_what_follows():
    (problem,) = (p for p in tune.problems([16]) if p.name == "quant_matmul out Qwen2.5-0.5B M=16")
    inputs = jax.eval_shape(problem.inputs)
    first = tune._choices(problem, inputs, {})
    assert [choice.op for choice in first] == ["kernel", "quant_matmul_small"]
    decided = {(first[0].op, first[0].key): Kernel("large")}
    assert [choice.op for choice in tune._choices(problem, inputs, decided)] == ["quant_matmul_large"]


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    if on_hopper():
        pytest.skip("needs a device that is not a Hopper GPU")
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "needs an NVIDIA Hopper GPU" in capsys.readouterr().err
