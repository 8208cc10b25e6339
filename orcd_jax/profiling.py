"""Looking inside: profiler traces and XLA dumps."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def trace(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Record what runs inside the block as a trace for xprof, and for Perfetto (`perfetto_trace.json.gz`).

    In both, operations are named after the model's parts; Python's own calls would be nearly all of the trace, and are
    not in it. Run the same request once before, so that compilation is not in it either. Steps take longer than they do
    without the profiler, under which some versions of XLA capture no command buffers.
    """
    import jax

    Path(folder).mkdir(parents=True, exist_ok=True)
    before = _recorded(folder)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        yield
    for file, _ in _recorded(folder) - before:
        _name_scopes(file.with_name("perfetto_trace.json.gz"), scopes(file.read_bytes()))


def _recorded(folder: str | os.PathLike[str]) -> set[tuple[Path, int]]:
    """The traces in a folder and their times; two of the same second are one file."""
    return {(file, file.stat().st_mtime_ns) for file in Path(folder).rglob("*.xplane.pb")}


def _name_scopes(file: Path, programs: dict[str, list[dict[str, str]]]) -> None:
    """Name the operations in a trace for Perfetto after their scopes, which only xprof would know."""
    with gzip.open(file, "rt", encoding="utf-8") as f:
        trace = json.load(f)
    runs = defaultdict(list)
    for event in trace["traceEvents"] if isinstance(trace, dict) else trace:
        arguments = event.get("args", {})
        runs[re.sub(r"\(.*", "", str(arguments.get("hlo_module"))), arguments.get("run_id")].append(event)
    for (name, _), events in runs.items():
        # Kernels of a command buffer have that as their instruction, and a fusion's have the fusion's name.
        keys = [(str(event.get("args", {}).get("hlo_op")), str(event.get("name"))) for event in events]
        found = matching(programs.get(name, []), {key for pair in keys for key in pair})
        for event, (operation, kernel) in zip(events, keys, strict=True):
            if scope := found.get(operation) or found.get(kernel):
                event["args"]["kernel"], event["name"] = event["name"], scope
    with gzip.open(file, "wt", encoding="utf-8", compresslevel=1) as f:
        json.dump(trace, f)


def matching(programs: list[dict[str, str]], names: Collection[str]) -> dict[str, str]:
    """The scopes of instructions in those programs, of one name, that have the most of `names`.

    Several shapes may have as many: what they disagree about has no scope.
    """
    known = [sum(name in program for name in names) for program in programs]
    found: dict[str, str] = {}
    for program, count in zip(programs, known, strict=True):
        if count == max(known):
            found |= {key: scope if found.get(key, scope) == scope else "" for key, scope in program.items()}
    return found


def scopes(space: bytes) -> dict[str, list[dict[str, str]]]:
    """The scopes of each program's instructions, by their names and those of their kernels; programs by their names.

    Args:
      space: a serialised `XSpace`, the profiler's result, which holds the programs (`HloProto`) of the process.
    """
    programs = defaultdict(list)
    planes = [plane for plane in _fields(space, 1) if b"/host:metadata" in _fields(plane, 2)]
    metadata = [event for plane in planes for entry in _fields(plane, 4) for event in _fields(entry, 2)]
    protos = [proto for event in metadata for stat in _fields(event, 5) for proto in _fields(stat, 6)]
    for module in (module for proto in protos for module in _fields(proto, 1)):
        found: dict[str, str] = {}
        for instruction in (i for computation in _fields(module, 3) for i in _fields(computation, 2)):
            names = [name for about in _fields(instruction, 7) for name in _fields(about, 2)]
            name, scope = (str(text, "utf-8") for text in (_fields(instruction, 1)[0], names[0] if names else b""))
            found |= dict.fromkeys((name, re.sub(r"\W", "_", name)), scope)
        programs[str(_fields(module, 1)[0], "utf-8")].append(found)
    return dict(programs)


def _fields(message: Any, number: int) -> list[Any]:
    """The values of a protocol buffer's field of texts, bytes or messages."""
    message, at, result = memoryview(message), 0, []

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        key = integer()
        kind = key & 7
        if kind == 0:
            integer()
            continue
        size = integer() if kind == 2 else {1: 8, 5: 4}[kind]
        if kind == 2 and key >> 3 == number:
            result.append(message[at : at + size])
        at += size
    return result


def dump_xla(folder: str | os.PathLike[str]) -> None:
    """Make XLA write every program that it compiles to `folder`: HLO before and after optimisation, buffers, thunks.

    Call it before JAX is used. The compilation cache is switched off: what is found there would not be compiled.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    flags = f"--xla_dump_to={os.fspath(folder)} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
