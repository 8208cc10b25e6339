"""The component table: `python -m orcd_jax.profile MODEL` prints where the time of a prefill and of a decode step goes.

Kernels are known by the `named_scope`s that their HLO instructions carry, found through the profiler's trace. The
profiler takes time of its own, and some versions of XLA capture no command buffers under it, which makes the gaps
between kernels longer: the time without the profiler stands beside the table's. Both are a device's time alone. A
decode step is one of 16 in one program, traced from its first kernel to its last; without the profiler programs are
measured back to back, as `generate` runs them, so that the host's start and end of a program, which
`bench.latency` shows, are in neither.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from orcd_jax import hub
from orcd_jax.arguments import Parser, at_least
from orcd_jax.config import ModelConfig, array_bytes
from orcd_jax.errors import OrcdJaxError
from orcd_jax.language_model import LanguageModel, load
from orcd_jax.probe import Ceilings, Probe, measure_ceilings, noise, settled

STEPS = 16  # of decoding in one program

# The innermost of these scopes that an instruction's name has says what it belongs to.
_SCOPES = {
    "embedding": "embedding",
    "rms_norm": "norms",
    "norm": "norms",
    "rope": "RoPE",
    "qkv_rope": "q, k, v projection",
    "qkv_rope_store": "q, k, v projection",
    "cache": "cache write",
    "flash_attention": "attention",
    "flash_decode": "attention",
    "attention": "output projection",
    "swiglu": "SwiGLU",
    "head": "head",
    "decode_step": "layers and head in one",
    "sampling": "sampling",
}
COMPONENTS = (*dict.fromkeys(_SCOPES.values()), "rest", "gaps")
# They contain other instructions, which have events of their own.
_CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")

# A matrix product on a CPU may have lost its name: then its weights say what it is.
_WEIGHTS = {
    "qkv": "q, k, v projection",
    "out": "output projection",
    "gate_up": "SwiGLU",
    "down": "SwiGLU",
    "embedding": "head",
    "head": "head",
}
_PRODUCTS = ("dot", "fusion", "custom-call")


@dataclass(frozen=True)
class Component:
    """A row of the table, per step."""

    name: str
    seconds: float
    read_bytes: int  # that it must at least read, or write for the cache; 0 where that says nothing
    flops: int


@dataclass(frozen=True)
class Profile:
    """A program's components, whose times add up to `traced_s`."""

    components: list[Component]
    traced_s: float  # a step, of those from the first kernel's beginning to the last one's end
    untraced_s: float  # a step without the profiler, among programs back to back: median, with command buffers
    spread: float  # of those measurements: their `noise`
    steps: int  # in one program
    unknown: dict[str, float]  # the rest's instructions, seconds a step


def component_of(op_name: str) -> str:
    """The component that the scopes in an instruction's `op_name` say."""
    return next((_SCOPES[part] for part in reversed(op_name.split("/")) if part in _SCOPES), "rest")


class Program:
    """The instructions of a compiled program, from its text (HLO)."""

    _instruction = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][a-z\-]*)\(([^)]*)\)(.*)$")
    _computation = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")

    def __init__(self, text: str):
        header = re.match(r"HloModule ([\w.\-]+)", text)
        self.module = header[1] if header else ""
        self._found: dict[str, tuple[str, list[str], str]] = {}  # opcode, operands, attributes
        inside: dict[str, list[str]] = {}
        computation = ""
        for line in text.splitlines():
            if header := self._computation.match(line):
                computation = header[1]
            elif match := self._instruction.match(line):
                name, opcode, operands, rest = match.groups()
                self._found[name] = (opcode, re.findall(r"%([\w.\-]+)", operands), rest)
                inside.setdefault(computation, []).append(name)
        self._inside = inside
        self._loops = {self._attribute(n, "body"): n for n, found in self._found.items() if found[0] == "while"}
        self._home = {name: computation for computation, names in inside.items() for name in names}
        self._kernels = {re.sub(r"\W", "_", name): name for name in self._found}

    def launched_by(self, kernels: list[tuple[str, str]]) -> list[str]:
        """The instruction that launched each kernel on a GPU; the kernel's name where that cannot be told.

        Args:
          kernels: name and, as the profiler gives it, instruction of each in the order of their launch. Of kernels in
            a command buffer that is the buffer. Then a fusion is known by its name, which it lends to its kernel (and
            to kernels of equal fusions), and calls by their order: a program launches its Mosaic kernels, and its
            libraries', in the same order each time.
        """
        result = []
        for kernel, instruction in kernels:
            direct = instruction in self._found and self.opcode(instruction) not in _CONTAINERS
            result.append(instruction if direct else self._kernels.get(kernel, kernel))
        waiting = [i for i, name in enumerate(result) if name not in self._found]
        for target, kernel in (("mosaic", "mosaic"), ("cublas", "nvjet|gemm|cutlass")):
            calls = [n for n, found in self._found.items() if found[0] == "custom-call" and target in found[2]]
            launched = [i for i in waiting if re.search(kernel, result[i])]
            if calls and len(launched) % len(calls) == 0:
                for turn, i in enumerate(launched):
                    result[i] = calls[turn % len(calls)]
        return result

    def opcode(self, name: str) -> str:
        """The opcode of an instruction, empty if there is none of that name."""
        return self._found[name][0] if name in self._found else ""

    def component(self, name: str) -> str:
        """What an instruction belongs to: by its own name, by those inside it if it is a fusion, or by its weights."""
        if name not in self._found:
            return "rest"
        opcode, operands, _ = self._found[name]
        own = component_of(self._op_name(name))
        if own != "rest" or opcode not in _PRODUCTS:
            return own
        weights = (re.search(r"(\w+)\\?'\]$", self._op_name(self._source(operand))) for operand in operands)
        by_weights = next((_WEIGHTS[w[1]] for w in weights if w is not None and w[1] in _WEIGHTS), "rest")
        if by_weights != "rest":
            return by_weights
        parts = Counter(
            component_of(self._op_name(part)) for part in self._inside.get(self._attribute(name, "calls"), [])
        )
        del parts["rest"]
        return parts.most_common(1)[0][0] if parts else "rest"

    def _attribute(self, name: str, key: str) -> str:
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self._found[name][2])
        return match[1] if match else ""

    def _op_name(self, name: str) -> str:
        match = re.search(r'op_name="([^"]*)"', self._found[name][2]) if name in self._found else None
        return match[1] if match else ""

    def _source(self, name: str) -> str:
        """Where a value comes from, through copies and the carried state of loops."""
        for _ in range(16):
            opcode, operands, _ = self._found.get(name, ("", [], ""))
            if opcode in ("copy", "bitcast"):
                name = operands[0]
            elif opcode == "get-tuple-element":
                source, index = operands[0], int(self._attribute(name, "index"))
                if self.opcode(source) == "parameter":
                    source = self._loops.get(self._home[source], "")
                    source = self._found[source][1][0] if source else ""
                if self.opcode(source) != "tuple":
                    break
                name = self._found[source][1][index]
            else:
                break
        return name


def profile(model: LanguageModel, batch: int, held: int, prompt: int | None, repeat: int = 5) -> Profile:
    """Trace one program and divide its time.

    Args:
      model: whose engine to look at.
      batch: rows.
      held: tokens in each row's cache before.
      prompt: tokens a row of a prefill; None: decode.
      repeat: measurements without the profiler.
    """
    steps = STEPS if prompt is None else 1
    probe = Probe(model, batch, held, prompt=prompt, steps=steps)
    measure = partial(probe.measure, repeat, 4 if model.device.platform == "gpu" else 1)
    times = [seconds / steps for seconds in settled(measure, model.device)]
    program = Program(probe.compiled.as_text() or "")
    spans, total = traced_shares(probe.run, program)
    seconds: defaultdict[str, float] = defaultdict(float)
    unknown: defaultdict[str, float] = defaultdict(float)
    for name, span in spans.items():
        component = "gaps" if name is None else program.component(name)
        seconds[component] += span / steps
        if component == "rest":
            unknown[re.sub(r"[.\d]+$", "", str(name))] += span / steps
    work = component_work(model.config, model.weights, batch, held + (steps // 2 if prompt is None else 0), prompt or 1)
    return Profile(
        components=[Component(name, seconds[name], *work.get(name, (0, 0))) for name in COMPONENTS],
        traced_s=total / steps,
        untraced_s=statistics.median(times),
        spread=noise(times),
        steps=steps,
        unknown=dict(sorted(unknown.items(), key=lambda item: -item[1])),
    )


def component_work(config: ModelConfig, weights: Any, batch: int, held: int, tokens: int) -> dict[str, tuple[int, int]]:
    """Bytes that each component must move and operations that it must do for `tokens` a row on `held` cached ones."""
    shapes, rows = config.layer_shapes(), batch * tokens

    def matrices(*names: tuple[str, str]) -> tuple[int, int]:
        found = [shapes[module][name] for module, name in names]
        return (
            config.n_layers * sum(array_bytes(shape, weights) for shape in found),
            config.n_layers * 2 * rows * sum(map(math.prod, found)),
        )

    table = (config.vocab_size, config.d_model)
    positions = rows * held + batch * tokens * (tokens + 1) // 2
    if config.sliding_window is not None:
        positions = min(positions, rows * config.sliding_window)
    work = {
        "embedding": (rows * array_bytes((1, config.d_model), weights), 0),
        "q, k, v projection": matrices(("attention", "qkv")),
        "cache write": (rows * config.cache_bytes(1, 1), 0),
        "attention": (
            config.cache_bytes(batch, held + tokens), 4 * config.n_layers * config.n_heads * config.head_dim * positions
        ),
        "output projection": matrices(("attention", "out")),
        "SwiGLU": matrices(("swiglu", "gate_up"), ("swiglu", "down")),
        "head": (array_bytes(table, weights), 2 * batch * math.prod(table)),
    }  # fmt: skip
    parts = [of for name, of in work.items() if name != "embedding"]
    return work | {"layers and head in one": (sum(read for read, _ in parts), sum(flops for _, flops in parts))}


def traced_shares(run: Callable[[], Any], program: Program) -> tuple[dict[str | None, float], float]:
    """`shares` of what a program's instructions take while `run` runs under the profiler."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would take time of the host's
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return shares(device_events(jax.profiler.ProfileData.from_file(str(file)), program))


def shares(events: Iterable[tuple[float, float, str]]) -> tuple[dict[str | None, float], float]:
    """Divide time among what ran: each moment belongs in equal parts to all that runs then, or to None.

    Args:
      events: beginning, end and name of each, in nanoseconds.

    Returns:
      Seconds by name, and from the first beginning to the last end: their sum.
    """
    edges = sorted(edge for start, end, name in events for edge in ((start, 1, name), (end, -1, name)))
    result: defaultdict[str | None, float] = defaultdict(float)
    running: Counter[str] = Counter()
    for (now, change, name), (following, _, _) in pairwise(edges):
        running[name] += change
        active = {key: count for key, count in running.items() if count > 0}
        total = sum(active.values())
        for key, count in active.items() if active else [(None, 1)]:
            result[key] += (following - now) * count / (total or 1) * 1e-9
    return dict(result), (edges[-1][0] - edges[0][0]) * 1e-9 if edges else 0.0


def device_events(data: Any, program: Program) -> list[tuple[float, float, str]]:
    """Beginning, end and HLO instruction of everything that ran for a program."""
    lines = [line for plane in data.planes if plane.name.startswith("/device:") for line in plane.lines]
    if lines:
        return _gpu_events(lines, program)
    started: list[tuple[float, float, str, int | None]] = []
    ends: dict[int | None, float] = {}
    for event in (event for plane in data.planes for line in plane.lines for event in line.events):
        stats = dict(event.stats)
        if event.name.startswith("end: "):
            ends[stats.get("_c")] = event.start_ns
        elif "hlo_op" in stats and program.opcode(stats["hlo_op"]) not in _CONTAINERS:
            span = (event.start_ns, event.start_ns + event.duration_ns)
            started.append((*span, stats["hlo_op"], stats.get("_p")))
    started.sort()
    # Other threads may still be at work when an operation has returned: until its end is reported (late, if the
    # reporting thread first goes on), but no longer than until something else begins.
    begins = [start for start, *_ in started[1:]] + [math.inf]
    return [
        (start, max(end, min(ends.get(key, end), following)), name)
        for (start, end, name, key), following in zip(started, begins, strict=True)
    ]


def _gpu_events(lines: list[Any], program: Program) -> list[tuple[float, float, str]]:
    found = []
    for event in (event for line in lines for event in line.events):
        stats = dict(event.stats)
        if stats.get("hlo_module") == program.module:
            found.append((event.start_ns, event.start_ns + event.duration_ns, event.name, str(stats.get("hlo_op"))))
    found.sort()
    names = program.launched_by([(name, instruction) for _, _, name, instruction in found])
    return [(start, end, name) for (start, end, *_), name in zip(found, names, strict=True)]


def table(title: str, result: Profile, ceilings: Ceilings) -> str:
    """The component table as text."""
    title += f", one of {result.steps} in a program" if result.steps > 1 else ""
    lines = [f"{title}: {result.traced_s * 1e3:.3f} ms traced, {result.untraced_s * 1e3:.3f} ms without the profiler "
             f"(±{result.spread:.1%})",
             f"  {'component':<20}{'time':>12}{'share':>8}{'bytes':>12}{'GB/s':>9}{'of ceiling':>12}"]  # fmt: skip
    for row in (row for row in result.components if row.seconds):
        text = f"  {row.name:<20}{row.seconds * 1e3:>9.3f} ms{row.seconds / result.traced_s:>8.1%}"
        if row.read_bytes:
            least = ceilings.seconds(row.read_bytes, row.flops)
            text += f"{row.read_bytes / 1e6:>9.2f} MB{row.read_bytes / row.seconds / 1e9:>9.1f}"
            text += f"{least / row.seconds:>12.1%}"
        lines.append(text)
    lines.append(f"  {'total':<20}{sum(row.seconds for row in result.components) * 1e3:>9.3f} ms")
    if result.unknown:
        largest = [f"{name} {seconds * 1e3:.3f} ms" for name, seconds in list(result.unknown.items())[:6]]
        lines.append(f"  the rest: {', '.join(largest)}{', ...' if len(result.unknown) > 6 else ''}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line with `argv` (default: the process's) and return its exit status."""
    parser = Parser(prog="python -m orcd_jax.profile", description=__doc__)
    parser.add_argument("model", nargs="?", default=hub.DEFAULT_MODEL, help="as for generate (%(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--prompt", type=at_least(1), default=128, help="tokens of the prefill (%(default)s)")
    parser.add_argument("--cache", type=at_least(0), default=1024, help="tokens in the cache at decode (%(default)s)")
    parser.add_argument("--weights", choices=("auto", "int8", "bf16", "f32"), default="auto")
    parser.add_argument("--kv-cache", default="full", metavar="POLICY")
    parser.add_argument("--device", choices=("cpu", "gpu"))
    args = parser.parse_args(argv)
    try:
        model = load(args.model, weights=args.weights, kv_cache=args.kv_cache, device=args.device, progress=True)
        ceilings = measure_ceilings(model.device, model.config.activation_dtype)
        print(f"{model.config.name}, weights {model.weights}, batch {args.batch}, on {model.device.device_kind}")
        print(ceilings)
        prompt, held = min(args.prompt, model.context), min(args.cache, model.context - STEPS)
        print(table(f"prefill of {prompt} tokens", profile(model, args.batch, 0, prompt), ceilings))
        print(table(f"a decode step after {held} tokens", profile(model, args.batch, held, None), ceilings))
    except OrcdJaxError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
