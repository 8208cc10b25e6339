"""How fast is each op, in each of its implementations, at the shapes of our models, and is it right?

Times are those of the kernels themselves, from the profiler, with inputs taken in turn from so many copies that a
cache cannot hold them; chains of layers are timed whole, as one program. Errors are against the pure-JAX reference in
float32. Ceilings, measured in the same run: read bandwidth, the bf16 matrix product of the same shape, and cuDNN's
attention where there is one.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels
from bench import common
from orcd_jax.config import ModelConfig, array_bytes
from orcd_jax.device import select_device
from orcd_jax.errors import RequestError
from orcd_jax.probe import Ceilings, measure, measure_ceilings, settled
from orcd_jax.profile import Program, traced_shares
from pallas_kernels.qkv_rope import rotate
from pallas_kernels.tune import random_weight

PRESETS = {"Qwen": "qwen2.5-0.5b", "Phi-3": "phi-3-mini-4k"}
_EPS = 1e-6
_ROTATED = 1 << 28  # bytes of inputs taken in turn


@dataclass(frozen=True)
class Case:
    """An op at a named shape."""

    op: str
    name: str
    inputs: Callable[[jax.Array], tuple[Any, ...]]  # from a random key
    options: dict[str, Any] = field(default_factory=dict)
    read_bytes: int = 0  # that must move
    flops: int = 0
    target: str = ""  # what is to be reached at least, and aimed at
    baseline: str = ""  # what a result is compared with, beside the ceiling
    baseline_call: Callable[..., Any] | None = None
    baseline_inputs: Callable[[jax.Array], tuple[Any, ...]] | None = None  # None: as the op's own
    part: Callable[..., tuple[Any, ...]] | None = None  # inputs whose result is a part of the whole's, to check with
    part_of: Callable[[Any], Any] = lambda result: result


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", default="", help="ops whose name has this in it")
    args = parser.parse_args()
    cases = [case for case in all_cases(args.quick) if args.only in case.op]
    if not cases:
        raise RequestError(f"no op has {args.only!r} in its name")
    device = select_device(args.device)
    ceilings = measure_ceilings(device, jnp.dtype(jnp.bfloat16))
    where = common.environment(device)
    print(f"on {where['device']}, jax {where['jax']}; {ceilings}", flush=True)
    print(f"{'op':<17}{'shape':<32}{'':<12}{'error':>9}{'time':>12}{'spread':>8}{'GB/s':>7}{'TFLOP/s':>9}"
          f"{'ceiling':>9}{'baseline':>10}  target")  # fmt: skip
    rows = [row for case in cases if common.in_time(args) for row in measured(case, ceilings, args.repeat)]
    if not args.quick and args.only in "swiglu" and common.in_time(args):
        rows += list(chains(ceilings, args.repeat))
    common.emit({"bench": "kernels", **where, "read_bytes_s": ceilings.read_bytes_s,
                 "matmul_flops_s": ceilings.matmul_flops_s, "rows": rows}, args)  # fmt: skip


def measured(case: Case, ceilings: Ceilings, repeat: int) -> Iterator[dict[str, Any]]:
    """A row for a case's baseline, and one for each implementation of its op."""
    module: Any = importlib.import_module(f"pallas_kernels.{case.op}")
    operation = getattr(pallas_kernels, case.op)
    registered = hasattr(module, "IMPLEMENTATIONS")
    functions = {case.baseline: case.baseline_call} if case.baseline_call is not None else {}
    for name in module.IMPLEMENTATIONS if registered else ("xla",):
        functions[name] = partial(operation, **case.options, **({"implementation": name} if registered else {}))
    keys = jax.random.split(jax.random.key(0), min(16, max(2, -(-_ROTATED // case.read_bytes))))
    against: float | None = None
    for name, function in functions.items():
        is_baseline = name == case.baseline
        make = case.baseline_inputs if is_baseline and case.baseline_inputs is not None else case.inputs
        inputs = [make(key) for key in keys]
        row: dict[str, Any] = {"op": case.op, "shape": case.name, "implementation": name}
        text = f"{case.op:<17}{case.name:<32}{name:<12}"
        try:
            times, first, second = timed(function, inputs, repeat)
            row["error"] = None if is_baseline else error(case, inputs[0], first)
        except Exception as reason:  # what one implementation cannot do must not hide what the others can
            row["failed"] = f"{type(reason).__name__}: {reason}"[:200]
            print(f"{text} {row['failed'][:90]!r}", flush=True)
            yield row
            continue
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        row["same_bits_twice"] = all(bool((a == b).all()) for a, b in pairs)
        row["seconds"] = common.spread(times)
        seconds = row["seconds"]["median"]
        against = seconds if is_baseline else against
        row |= {
            "bytes_s": case.read_bytes / seconds, "flops_s": case.flops / seconds,
            "of_ceiling": ceilings.seconds(case.read_bytes, case.flops) / seconds,
            "of_baseline": None if against is None or is_baseline else against / seconds, "baseline": case.baseline,
            "target": "" if is_baseline else case.target,
        }  # fmt: skip
        wrong = "" if is_baseline else f"{row['error']:.1e}"
        ratio = "" if row["of_baseline"] is None else f"{row['of_baseline']:.2f}"
        print(f"{text}{wrong:>9}{seconds * 1e6:>9.1f} us{common.per_cent(times):>8}{row['bytes_s'] / 1e9:>7.0f}"
              f"{row['flops_s'] / 1e12:>9.2f}{row['of_ceiling']:>9.1%}{ratio:>10}"
              f"  {row['target']}{'' if row['same_bits_twice'] else '  DIFFERS WHEN REPEATED'}",
              flush=True)  # fmt: skip
        yield row


def timed(function: Callable[..., Any], inputs: list[tuple[Any, ...]], repeat: int) -> tuple[list[float], Any, Any]:
    """Seconds of a call's kernels, one number a trace, see `settled`; and the first input's result, twice."""
    compiled = jax.jit(function).lower(*inputs[0]).compile()
    program = Program(compiled.as_text())
    first, second = compiled(*inputs[0]), compiled(*inputs[0])
    jax.block_until_ready(second)

    def run() -> None:
        for arguments in inputs:
            result = compiled(*arguments)
        jax.block_until_ready(result)

    def trace() -> float:
        spans, total = traced_shares(run, program)
        return (total - spans.get(None, 0.0)) / len(inputs)

    return settled(lambda: [trace() for _ in range(repeat)], jax.devices()[0]), first, second


def error(case: Case, inputs: tuple[Any, ...], result: Any) -> float:
    """Largest difference from the reference in float32, over the reference's largest magnitude."""
    module: Any = importlib.import_module(f"pallas_kernels.{case.op}")
    reference = getattr(module, "reference", None) or getattr(module, case.op)
    arguments = case.part(*inputs) if case.part is not None else inputs

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    options = {key: value for key, value in case.options.items() if key != "out_dtype"}
    expected = jax.jit(partial(reference, **options))(*jax.tree.map(wide, arguments))
    found = case.part_of(result)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst


# The shapes


def all_cases(quick: bool) -> list[Case]:
    """Those of issue 6's table and the rest of a layer, for both models; tiny ones for a quick look."""
    if quick:
        return [
            attention(1, 64, 4, 2, 64), decode("tiny", 2, 256, 4, 2, 64), matmul(8, 128, 64), swiglu("tiny", 8, 64, 96),
            qkv_rope("tiny", 8, 64, 4, 2, 16), rms_norm(8, 64), top_k(2, 512),
        ]  # fmt: skip
    cases = [attention(4, 4096, *heads) for heads in ((14, 2, 64), (32, 32, 96), (32, 8, 128))]
    cases += [decode("Qwen", 64, 4096, 14, 2, 64), decode("Phi-3", 64, 4096, 32, 32, 96)]
    cases += [decode("Qwen", 1, 32768, 14, 2, 64, "50 %, aim 70 %")]
    cases += [matmul(m, *shape) for shape in ((16384, 3072), (3072, 8192)) for m in (1, 8)]
    cases += [matmul(64, 16384, 3072), matmul(2048, 16384, 3072)]
    for model, preset in PRESETS.items():
        config = ModelConfig.from_preset(preset)
        for m in (1, 16, 64, 2048):
            cases.append(swiglu(model, m, config.d_model, config.d_ff))
            cases.append(qkv_rope(model, m, config.d_model, config.n_heads, config.n_kv_heads, config.head_dim))
            cases.append(rms_norm(m, config.d_model))
            if m <= 64:
                cases.append(top_k(m, config.vocab_size))
    return cases


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def attention(batch: int, length: int, heads: int, kv_heads: int, width: int) -> Case:
    """Causal attention of whole sequences, against cuDNN."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        q, k, v = jax.random.split(key, 3)
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        kv = (batch, kv_heads, length, width)
        return _normal(q, batch, length, heads, width), _normal(k, *kv), _normal(v, *kv), positions, positions[:1]

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> jax.Array:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    last = min(64, length)
    return Case(
        "flash_attention", f"B{batch} T{length} N{heads} K{kv_heads} H{width}", inputs,
        read_bytes=2 * batch * length * width * (2 * heads + 2 * kv_heads),
        flops=2 * batch * heads * width * length * length,  # half the square
        target="0.85, aim 1.1 x cuDNN", baseline="cuDNN", baseline_call=cudnn,
        part=lambda q, k, v, positions, keys: (q[:1, -last:], k[:1], v[:1], positions[:1, -last:], keys),
        part_of=lambda result: result[:1, -last:],
    )  # fmt: skip


def decode(
    model: str, batch: int, length: int, heads: int, kv_heads: int, width: int, target: str = "70 %, aim 85 %"
) -> Case:
    """One query a row against a full cache."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        q, k, v = jax.random.split(key, 3)
        kv = (batch, kv_heads, length, width)
        positions = jnp.full((batch, 1), length - 1, jnp.int32)
        keys = jnp.arange(length, dtype=jnp.int32)[None]
        return _normal(q, batch, 1, heads, width), _normal(k, *kv), _normal(v, *kv), positions, keys

    return Case(
        "flash_decode", f"{model} B{batch} S{length}", inputs, read_bytes=4 * batch * kv_heads * length * width,
        flops=4 * batch * heads * length * width, target=target,
        part=lambda q, k, v, positions, keys: (q[:2], k[:2], v[:2], positions[:2], keys),
        part_of=lambda result: result[:2],
    )  # fmt: skip


def matmul(m: int, rows: int, width: int) -> Case:
    """x [m, width] times int8 blocks [rows, width], against the product with bf16 weights."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        x, w = jax.random.split(key)
        return _normal(x, m, width), random_weight(w, rows, width)

    def in_bf16(key: jax.Array) -> tuple[Any, ...]:
        x, w = jax.random.split(key)
        return _normal(x, m, width), _normal(w, rows, width)

    targets = {64: "1.0, aim 1.67 x bf16", 2048: "0.9, aim 1.0 x bf16"}
    return Case(
        "quant_matmul", f"M{m} [{rows} x {width}]", inputs, read_bytes=array_bytes((rows, width), "int8"),
        flops=2 * m * rows * width, target=targets.get(m, "75 %, aim 88 %"), baseline="bf16",
        baseline_call=lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))), baseline_inputs=in_bf16,
    )  # fmt: skip


def swiglu(model: str, m: int, width: int, d_ff: int) -> Case:
    """A block's feed-forward half."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        x, gate_up, down = jax.random.split(key, 3)
        return (
            _normal(x, 1, m, width), jnp.ones(width), random_weight(gate_up, 2 * d_ff, width),
            random_weight(down, width, d_ff),
        )  # fmt: skip

    def separate(x: jax.Array, norm: jax.Array, gate_up: Any, down: Any) -> jax.Array:
        both = pallas_kernels.quant_matmul(pallas_kernels.rms_norm(x, norm, _EPS), gate_up)
        gate, up = jnp.split(both, 2, axis=-1)
        return pallas_kernels.quant_matmul(jax.nn.silu(gate) * up, down, None, x)

    return Case(
        "swiglu", f"{model} M{m}", inputs, {"eps": _EPS},
        read_bytes=array_bytes((3 * d_ff, width), "int8"), flops=6 * m * d_ff * width,
        target="1.0 x separate" + (", aim 80 %" if m == 1 else ""), baseline="separate", baseline_call=separate,
    )  # fmt: skip


def qkv_rope(model: str, m: int, width: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    """A block's norm, projection and rotation."""
    rows = (heads + 2 * kv_heads) * head_dim

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        x, w, angle = jax.random.split(key, 3)
        angles = jax.random.uniform(angle, (1, m, head_dim // 2), maxval=2 * np.pi)
        return (
            _normal(x, 1, m, width),
            jnp.ones(width),
            random_weight(w, rows, width),
            None,
            jnp.cos(angles),
            jnp.sin(angles),
        )

    def separate(x: jax.Array, norm: jax.Array, w: Any, bias: None, cos: jax.Array, sin: jax.Array) -> Any:
        joined = pallas_kernels.quant_matmul(pallas_kernels.rms_norm(x, norm, _EPS), w, bias)
        q, k, v = jnp.split(joined.reshape(1, m, -1, head_dim), [heads, heads + kv_heads], axis=2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    return Case(
        "qkv_rope", f"{model} M{m}", inputs, {"n_heads": heads, "n_kv_heads": kv_heads, "eps": _EPS},
        read_bytes=array_bytes((rows, width), "int8"), flops=2 * m * rows * width,
        target="1.0 x separate" + (", aim 80 %" if m == 1 else ""), baseline="separate", baseline_call=separate,
    )  # fmt: skip


def rms_norm(m: int, width: int) -> Case:
    """A norm alone."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        return _normal(key, 1, m, width), jnp.ones(width)

    return Case(
        "rms_norm", f"M{m} D{width}", inputs, {"eps": _EPS}, read_bytes=4 * m * width, flops=4 * m * width
    )  # fmt: skip


def top_k(m: int, vocab: int) -> Case:
    """The sampler's candidates, against XLA's sort."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        return (jax.random.normal(key, (m, vocab)),)

    return Case(
        "top_k", f"M{m} V{vocab}", inputs, {"k": 64}, read_bytes=4 * m * vocab, flops=m * vocab,
        baseline="lax.top_k", baseline_call=lambda x: jax.lax.top_k(x, 64),
    )  # fmt: skip


def chains(ceilings: Ceilings, repeat: int) -> Iterator[dict[str, Any]]:
    """The feed-forward halves of Qwen's 24 layers, one after the other in one program: [9728 x 896] with RMSNorm and
    SwiGLU, then [896 x 4864] with the residual. Timed as a whole without the profiler, in so many rounds that a call's
    start and end do not count; bytes are both weights'.
    """
    config = ModelConfig.from_preset(PRESETS["Qwen"])
    d, f = config.d_model, config.d_ff
    layers = [
        (jnp.ones(d), random_weight(a, 2 * f, d), random_weight(b, d, f))
        for a, b in jax.random.split(jax.random.key(1), (config.n_layers, 2))
    ]  # fmt: skip
    rounds, size = 32, config.n_layers * (array_bytes((2 * f, d), "int8") + array_bytes((d, f), "int8"))
    module: Any = importlib.import_module("pallas_kernels.swiglu")
    for m, name in itertools.product((1, 8), module.IMPLEMENTATIONS):
        half = partial(pallas_kernels.swiglu, eps=_EPS, implementation=name)

        @jax.jit
        def run(x: jax.Array, layers: Any, half: Callable[..., Any] = half) -> jax.Array:
            def once(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                for layer in layers:
                    x = half(x, *layer)
                return x * jnp.bfloat16(0.01), None

            return lax.scan(once, x, None, length=rounds)[0]

        x = _normal(jax.random.key(2), m, d)
        row: dict[str, Any] = {"op": "swiglu", "shape": f"M{m} of Qwen's layers in turn", "implementation": name}
        call = partial(measure, partial(_finish, run, x, layers), repeat)
        try:
            times = [s / rounds for s in settled(call, jax.devices()[0])]
        except Exception as reason:
            yield row | {"failed": f"{type(reason).__name__}: {reason}"[:200]}
            continue
        seconds = common.spread(times)
        share, target = size / ceilings.read_bytes_s / seconds["median"], "45 %, aim 65 %"
        rate = size / seconds["median"] / 1e9
        print(f"{row['op']:<17}{row['shape']:<32}{name:<12}{'':>9}{seconds['median'] * 1e6:>9.1f} us"
              f"{common.per_cent(times):>8}{rate:>7.0f}{'':>9}{share:>9.1%}{'':>10}  {target}",
              flush=True)  # fmt: skip
        yield row | {"seconds": seconds, "of_ceiling": share, "target": target}


def _finish(run: Callable[..., Any], *args: Any) -> None:
    jax.block_until_ready(run(*args))


if __name__ == "__main__":
    common.run(main)
