"""Traces: what a user finds in them."""

import gzip
import json

from orcd_jax import load, profiling


def test_operations_in_a_trace_have_their_scopes_as_names(tiny, tmp_path):
    model = load(tiny("qwen2"), device="cpu")

    def request():
        model.generate([[1, 2, 3]], 4, ignore_eos=True)

    request()
    for _ in range(2):  # the second beside the first
        with profiling.trace(tmp_path):
            request()
    files = sorted(tmp_path.rglob("perfetto_trace.json.gz"))
    for file in files:
        trace = json.loads(gzip.decompress(file.read_bytes()))
        events = trace["traceEvents"] if isinstance(trace, dict) else trace
        names = {event["name"] for event in events if "kernel" in event.get("args", {})}
        for program, part in (
            ("prefill", "layer_1/"),
            ("prefill", "attention/qkv_rope"),
            ("decode", "swiglu/rms_norm"),
        ):
            assert any(name.startswith(f"jit({program})/") and part in name for name in names), (program, part)
        assert not any(event.get("name", "").startswith("$") for event in events)  # Python's calls
    found = profiling.scopes(next(files[0].parent.glob("*.xplane.pb")).read_bytes())
    assert any("swiglu/rms_norm" in scope for program in found["jit_prefill"] for scope in program.values())


def test_a_program_is_known_by_its_instructions():
    def field(number: int, *content: bytes) -> bytes:
        message = b"".join(content)
        size = len(message)  # as a varint
        head = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        return bytes([number << 3 | 2]) + head + message

    def program(**scopes: str) -> bytes:
        instructions = (
            field(2, field(1, name.encode()), b"\x18\x05", field(7, field(2, scope.encode())))  # and a number
            for name, scope in scopes.items()
        )
        proto = field(1, field(1, b"jit_f"), field(3, *instructions))
        return field(4, field(2, field(5, field(6, proto))))

    scopes = [{"same": "f/a", "other": "f/b"}, {"same": "f/a", "other": "f/c"}, {"same": "f/e", "third": "f/d"}]
    programs = (program(**each) for each in scopes)
    space = field(1, field(2, b"/host:CPU"), program(none="f/d")) + field(1, field(2, b"/host:metadata"), *programs)
    assert profiling.scopes(space) == {"jit_f": scopes}
    assert profiling.matching(scopes, {"same", "third", "unknown"}) == scopes[2]
    assert profiling.matching(scopes, {"same", "other"}) == {"same": "f/a", "other": ""}  # they disagree
    assert profiling.matching([], {"same"}) == {}
