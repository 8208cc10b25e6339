"""The component table: time divided among what ran, and names for it."""

import pytest

from orcd_jax import load, profile
from orcd_jax.probe import Ceilings, Probe

OP = "jit(decode)/while/body/Decoder/layer_1/jit(block)/Block_0"
HLO = f"""\
HloModule jit_decode, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %add.1 = f32[4]{{0}} add(%p, %p), metadata={{op_name="{OP}/attention/attention/flash_decode/add"}}
}}

%body (arg: (f32[4], f32[8,4])) -> (f32[4], f32[8,4]) {{
  %arg = (f32[4]{{0}}, f32[8,4]{{1,0}}) parameter(0)
  %x = f32[4]{{0}} get-tuple-element(%arg), index=0
  %w = f32[8,4]{{1,0}} get-tuple-element(%arg), index=1
  %dot.1 = f32[8]{{0}} dot(%x, %w), lhs_contracting_dims={{0}}, rhs_contracting_dims={{1}}
  %loop_fusion.2 = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%fused
  %call.3 = f32[4]{{0}} custom-call(%x), custom_call_target="mosaic_gpu", metadata={{op_name="{OP}/swiglu/swiglu/y"}}
  %call.4 = f32[4]{{0}} custom-call(%x), custom_call_target="mosaic_gpu", metadata={{op_name="{OP}/head/matmul"}}
  ROOT %out = (f32[4]{{0}}, f32[8,4]{{1,0}}) tuple(%loop_fusion.2, %w)
}}

ENTRY %main (a: f32[4], b: f32[8,4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0), metadata={{op_name="state.tokens"}}
  %b = f32[8,4]{{1,0}} parameter(1), metadata={{op_name="params[\\'layer_0\\'][\\'swiglu\\'][\\'down\\']"}}
  %init = (f32[4]{{0}}, f32[8,4]{{1,0}}) tuple(%a, %b)
  %while.9 = (f32[4]{{0}}, f32[8,4]{{1,0}}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[4]{{0}} get-tuple-element(%while.9), index=0
}}
"""


@pytest.mark.parametrize(
    ("op_name", "component"),
    [
        (f"{OP}/attention/attention/qkv_rope/rms_norm/mul", "norms"),
        (f"{OP}/attention/attention/qkv_rope/dot_general", "q, k, v projection"),
        (f"{OP}/attention/attention/qkv_rope/rope/concatenate", "RoPE"),
        (f"{OP}/attention/attention/quant_matmul/dot_general", "output projection"),
        ("jit(decode)/Decoder.head/head/quant_matmul/dot_general", "head"),
        ("jit(decode)/while/body/decode_step/mpmd_map", "layers and head in one"),
        ("jit(decode)/while/body/add", "rest"),
        ("", "rest"),
    ],
)
def test_the_innermost_scope_decides(op_name, component):
    assert profile.component_of(op_name) == component


def test_time_is_divided_among_what_runs_at_each_moment():
    second = 1e9
    events = [(0.0, 4 * second, "a"), (2 * second, 4 * second, "b"), (5 * second, 6 * second, "a")]
    spans, total = profile.shares(events)
    assert spans == pytest.approx({"a": 4.0, "b": 1.0, None: 1.0})
    assert total == pytest.approx(6.0) == sum(spans.values())


def test_instructions_are_known_by_name_by_insides_and_by_weights():
    program = profile.Program(HLO)
    assert program.module == "jit_decode"
    assert program.component("loop_fusion.2") == "attention"  # its own name says nothing
    assert program.component("dot.1") == "SwiGLU"  # it multiplies `down`, through the loop's state
    assert program.component("call.4") == "head"
    assert program.component("while.9") == program.component("not there") == "rest"


def test_kernels_of_a_command_buffer_are_known_by_name_and_order():
    kernels = [("loop_fusion_2", "command_buffer_0"), ("body_mosaic_gpu_kernel", "command_buffer_0"),
               ("other_mosaic_gpu_kernel", "command_buffer_0"), ("MemcpyD2D", "copy.5")] * 2  # fmt: skip
    found = profile.Program(HLO).launched_by(kernels)
    assert found == ["loop_fusion.2", "call.3", "call.4", "MemcpyD2D"] * 2


@pytest.mark.parametrize("prompt", [None, 16])
def test_the_components_of_a_program_add_up(prompt, tiny):
    model = load(tiny("qwen2"), device="cpu")
    result = profile.profile(model, batch=2, held=16, prompt=prompt, repeat=1)
    seconds = {component.name: component.seconds for component in result.components}
    assert tuple(seconds) == profile.COMPONENTS
    assert sum(seconds.values()) == pytest.approx(result.traced_s)
    for name in ("norms", "q, k, v projection", "attention", "output projection", "SwiGLU", "head", "sampling"):
        assert seconds[name] > 0, name
    assert sum(result.unknown.values()) == pytest.approx(seconds["rest"])
    assert result.steps == (1 if prompt else profile.STEPS)
    text = profile.table("a step", result, Ceilings(1e10, 1e11))
    assert all((f"\n  {name:<20}" in text) == (seconds[name] > 0) for name in profile.COMPONENTS)


def test_the_command_line_prints_both_tables(tiny, capsys):
    assert profile.main([str(tiny("phi3")), "--prompt", "8", "--cache", "8", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "prefill of 8 tokens:" in out and "a decode step after 8 tokens, one of 16 in a program:" in out


def test_a_mistake_is_one_line(capsys):
    assert profile.main(["no-such-model"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("args", [("--batch", "0"), ("--prompt", "0"), ("--cache", "-1"), ("--batch", "two")])
def test_numbers_that_make_no_sense_are_refused(args, capsys):
    with pytest.raises(SystemExit) as refused:
        profile.main(list(args))
    assert refused.value.code == 2 and f"argument {args[0]}: " in capsys.readouterr().err


def test_programs_are_measured_from_end_to_end_of_one_another(tiny, monkeypatch):
    """A clock that only a launch moves: each run counts one, that of the next."""
    probe = Probe(load(tiny("qwen2"), device="cpu"), batch=1, held=4, steps=2)
    launched: list[int] = []
    launch = probe._launch
    monkeypatch.setattr(probe, "_launch", lambda: launched.append(1) or launch())
    monkeypatch.setattr("orcd_jax.probe.time.perf_counter", lambda: float(len(launched)))
    assert probe.measure(3, runs=2) == [1.0, 1.0, 1.0]
    assert len(launched) == 1 + 2 + 3 * 2
