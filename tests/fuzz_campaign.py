"""Damages valid tiny GGUF files in many ways and loads each: `python tests/fuzz_campaign.py --random 100000`.

A case must end in a model with finite logits or in the project's own error, within the limits of time and memory.
`test_fuzz.py` runs a short campaign. A summary is printed as JSON: cases, outcomes, faults (with what it takes to
repeat one: `--first N --cases 1`), the slowest and the largest load that failed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import faulthandler
import itertools
import json
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tiny_models import SPECS, TensorType, write_gguf

MEMORY_LIMIT = 200 << 20  # bytes above what was mapped before, and the file
TIME_LIMIT_S = 20  # a case that takes longer ends the process; far above what is asserted, for machines under load

_COUNTS = (0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)
_VARYING = re.compile(r"\S*[0-9.'\"\[]\S*")  # names, numbers and paths in a message


# Damage


class Field(NamedTuple):
    """A field of a header: where it is and what it is (count, type, offset, text or number)."""

    offset: int
    size: int
    kind: str
    what: str


class Entry(NamedTuple):
    """A metadata key or a tensor's description; `value` is where its value begins, with the type."""

    begin: int
    value: int
    end: int
    what: str


class Layout:
    """Where things are in a valid file; a second, trusting reader of the format."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 24
        self.fields = [Field(0, 4, "text", "magic"), Field(4, 4, "type", "version")]
        self.fields += [Field(8, 8, "count", "tensor count"), Field(16, 8, "count", "key count")]
        tensor_count, key_count = struct.unpack_from("<QQ", data, 8)
        self.keys = [self._key() for _ in range(key_count)]
        self.tensors = [self._tensor() for _ in range(tensor_count)]
        self.header_end = self.position
        self.start = -(-self.position // 32) * 32
        offsets = [struct.unpack_from("<Q", data, tensor.end - 8)[0] for tensor in self.tensors]
        entries = [e.begin for e in self.keys + self.tensors] + [e.value for e in self.keys]
        self.boundaries = {0, 4, 8, 16, 24, *entries, self.header_end, *(self.start + n for n in offsets), len(data)}

    def _take(self, size: int, kind: str, what: str) -> int:
        self.fields.append(Field(self.position, size, kind, what))
        self.position += size
        return int.from_bytes(self.data[self.position - size : self.position], "little")

    def _text(self, what: str) -> str:
        size = self._take(8, "count", f"length of {what}")
        self._take(size, "text", what)
        return self.data[self.position - size : self.position].decode()

    def _key(self) -> Entry:
        begin = self.position
        key = self._text("a key")
        value = self.position
        self._value(self._take(4, "type", f"type of {key}"), key)
        return Entry(begin, value, self.position, key)

    def _value(self, kind: int, what: str) -> None:
        if kind == 8:
            self._text(what)
        elif kind != 9:
            self._take({0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4), "number", what)
        else:
            item, count = self._take(4, "type", f"item type of {what}"), self._take(8, "count", f"length of {what}")
            for index in range(count):
                mark = len(self.fields)
                self._value(item, f"{what}[{index}]")
                if 0 < index < count - 1:  # the first and the last stand for all
                    del self.fields[mark:]

    def _tensor(self) -> Entry:
        begin = self.position
        name = self._text("a tensor's name")
        value = self.position
        for axis in range(self._take(4, "count", f"dimensions of {name}")):
            self._take(8, "count", f"axis {axis} of {name}")
        self._take(4, "type", f"type of {name}")
        self._take(8, "offset", f"offset of {name}")
        return Entry(begin, value, self.position, name)

    def splice(self, begin: int, end: int, new: bytes, keys: int = 0, tensors: int = 0) -> bytes:
        """The file with other bytes in its header, so many keys and tensors more, and data where they belong."""
        counts = (len(self.tensors) + tensors, len(self.keys) + keys)
        header = bytearray(self.data[:begin] + new + self.data[end : self.header_end])
        struct.pack_into("<QQ", header, 8, *counts)
        return bytes(header) + bytes(-len(header) % 32) + self.data[self.start :]


def _typed(kind: int, payload: bytes) -> bytes:
    return struct.pack("<I", kind) + payload


# Well-formed values of every type, for keys that want another.
_VALUES = {
    "false": _typed(7, b"\0"), "true": _typed(7, b"\1"), "0": _typed(4, bytes(4)), "-1": _typed(11, b"\xff" * 8),
    "2^64 - 1": _typed(10, b"\xff" * 8), "0.5": _typed(6, struct.pack("<f", 0.5)),
    "nan": _typed(12, struct.pack("<d", np.nan)), "empty text": _typed(8, bytes(8)),
    "text": _typed(8, struct.pack("<Q", 7) + b"a\n\x1b[1m{"), "no numbers": _typed(9, struct.pack("<IQ", 5, 0)),
    "no texts": _typed(9, struct.pack("<IQ", 8, 0)), "numbers": _typed(9, struct.pack("<IQ400i", 5, 400, *range(400))),
    "floats": _typed(9, struct.pack("<IQ384f", 6, 384, *[np.nan] * 384)),
    "texts": _typed(9, struct.pack("<IQ", 8, 384) + (struct.pack("<Q", 1) + b"x") * 384),
}  # fmt: skip


def systematic(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Every truncation, every entry gone, doubled and of other types, every field at what is interesting for it."""
    layout = Layout(data)
    for end in sorted({b + d for b in layout.boundaries for d in (-1, 0, 1) if 0 <= b + d < len(data)}):
        yield f"truncated at {end}", data[:end]
    for entries, count in ((layout.keys, "keys"), (layout.tensors, "tensors")):
        for entry in entries:
            yield f"{entry.what} left out", layout.splice(entry.begin, entry.end, b"", **{count: -1})
            twice = data[entry.begin : entry.end] * 2
            yield f"{entry.what} twice", layout.splice(entry.begin, entry.end, twice, **{count: 1})
    for entry in layout.keys:
        for name, value in _VALUES.items():
            yield f"{entry.what} is {name}", layout.splice(entry.value, entry.end, value)
    offsets = [data[tensor.end - 8 : tensor.end] for tensor in layout.tensors]
    for field in layout.fields:
        old = data[field.offset : field.offset + field.size]
        for new in sorted(_interesting(field, old, offsets) - {old}):
            damaged = data[: field.offset] + new + data[field.offset + len(new) :]
            yield f"{field.what}: {old[:16].hex()} -> {new[:16].hex()}", damaged


def _interesting(field: Field, old: bytes, offsets: list[bytes]) -> set[bytes]:
    if field.kind == "count":
        return {(n % (1 << 8 * field.size)).to_bytes(field.size, "little") for n in (*_COUNTS, 5)}
    if field.kind == "type":
        highest = 42 if field.what.endswith((".weight", ".bias")) else 14
        return {n.to_bytes(4, "little") for n in (*range(highest), 255, 1 << 31)}
    if field.kind == "offset":
        moved = [int.from_bytes(old, "little") + by for by in (-32, 1, 32, 1 << 20)]
        return {*offsets, *(n.to_bytes(8, "little") for n in (*moved, 1 << 63, (1 << 64) - 32) if n >= 0)}
    size = field.size
    if field.kind == "text":  # not UTF-8: a wrong byte, an unfinished character, a surrogate; and all zeros
        return {x[:size] for x in (b"\xff" + old[1:], old[:-1] + b"\xc3", b"\xed\xa0\x80" + old[3:], bytes(size))}
    values = {bytes(size), b"\1" + bytes(size - 1), b"\xff" * size, bytes(size - 1) + b"\x80"}
    if size >= 4:
        values |= {struct.pack("<f" if size == 4 else "<d", x) for x in (np.nan, np.inf, -1.0, 1e-40, 1e38)}
    return values


def random_damage(data: bytes, header: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """Flip some bytes, or, in one case of four, copy, cut or insert some. Most of it hits the header."""
    damaged = bytearray(data)

    def place() -> int:
        return int(rng.integers(header if rng.random() < 0.75 else len(data)))

    if rng.random() < 0.75:
        places = [place() for _ in range(rng.integers(1, 5))]
        for at in places:
            damaged[at] ^= int(rng.integers(1, 256))
        return f"bytes flipped at {places}", bytes(damaged)
    at, origin, size = place(), place(), int(rng.integers(1, 64))
    how = ("copied over", "inserted", "cut")[rng.integers(3)]
    if how == "cut":
        del damaged[at : at + size]
    else:
        damaged[at : at + (size if how == "copied over" else 0)] = data[origin : origin + size]
    return f"{size} bytes of {origin} {how} at {at}", bytes(damaged)


# Files


def base_files(folder: Path) -> list[tuple[str, bytes]]:
    """Valid files of every architecture, quantised and not, with both kinds of vocabulary: (weights, content)."""
    mixed = {"token_embd.*": TensorType.Q8_0, "*attn*": TensorType.Q5_1, "*": TensorType.Q4_0}
    k_quants = {"*attn*": TensorType.Q4_K, "*ffn_down*": TensorType.Q2_K, "*": TensorType.Q6_K}
    files = []
    for name, weights, types in (
        ("qwen2", "f32", None), ("phi3", "f32", None), ("llama", "f32", None), ("phi3-longrope", "bf16", None),
        ("qwen2", "int8", mixed), ("phi3", "int8", mixed), ("llama-wide", "int8", k_quants),
    ):  # fmt: skip
        spec = dataclasses.replace(SPECS[name], n_layers=1)
        path = write_gguf(folder / "base.gguf", spec, tensor_types=types)
        files.append((weights, path.read_bytes()))
    return files


class Cases:
    """All cases, by number: first the systematic ones, if they are wanted, then random ones without end."""

    def __init__(self, files: list[tuple[str, bytes]], with_systematic: bool, seed: int):
        self.files, self.with_systematic, self.seed = files, with_systematic, seed
        self.headers = [Layout(data).header_end for _, data in files]

    def __iter__(self) -> Iterator[tuple[str, str, bytes]]:
        """Endless: (weights, description, content)."""
        if self.with_systematic:
            for number, (weights, data) in enumerate(self.files):
                yield from ((weights, f"file {number}: {what}", damaged) for what, damaged in systematic(data))
        for case in itertools.count():
            rng = np.random.default_rng([self.seed, case])
            number = case % len(self.files)
            weights, data = self.files[number]
            what, damaged = random_damage(data, self.headers[number], rng)
            yield weights, f"file {number}: {what}", damaged


# Running


def _status(name: str) -> int:
    """A size of this process in bytes: VmSize, VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def _load(path: Path, weights: str) -> str:
    """Load a model and run it; the outcome in a word."""
    import jax.numpy as jnp

    import orcd_jax

    model = orcd_jax.load(path, weights=weights, device="cpu")
    ids = model.tokenizer.encode("Hello world, it is 12:30.")
    model.tokenizer.decode(ids)
    # Not compiled: a damaged config would need a program of its own, and single operations are compiled already.
    tokens = jnp.asarray([[0, 7, 99, 5]]) % model.config.vocab_size
    logits, _ = orcd_jax.forward(model.params, model.config, tokens, orcd_jax.init_cache(model.config, 1, 4))
    return "loaded" if np.isfinite(logits).all() else "loaded, logits not finite"


def run(cases: Iterator[tuple[int, tuple[str, str, bytes]]], folder: Path, where: Path) -> dict[str, Any]:
    """Run cases in this process, writing the number of each to `where` before it begins."""
    from orcd_jax.errors import OrcdJaxError

    warnings.simplefilter("ignore")  # of a vocabulary without a pre-tokeniser
    path = folder / f"case-{os.getpid()}.gguf"
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    slowest = largest = (0.0, "")
    not_finite: list[str] = []
    count = 0
    for number, (weights, what, data) in cases:
        count += 1
        path.write_bytes(data)
        where.write_text(f"{number}: {what}")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before, cpu = _status("VmRSS"), time.process_time()
        soft = _status("VmSize") + len(data) + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
        faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True)
        try:
            outcome = _load(path, weights)
            if outcome != "loaded":
                not_finite.append(f"case {number}: {what}")
        except OrcdJaxError as e:
            outcome = f"{type(e).__name__}: {_VARYING.sub('…', str(e))[:60]}"
            if str(e).count("\n") or len(str(e)) > 1000:
                faults.append(f"case {number}: {what}: the message is not one short line: {e!r:.300}")
        except BaseException as e:
            outcome = f"fault: {type(e).__name__}"
            faults.append(f"case {number}: {what}: {''.join(traceback.format_exception(e)[-3:])}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if not outcome.startswith("loaded"):
            slowest = max(slowest, (time.process_time() - cpu, f"case {number}: {what}"))
            largest = max(largest, ((_status("VmHWM") - before) / 2**20, f"case {number}: {what}"))
        outcomes[outcome] += 1
    path.unlink(missing_ok=True)
    return {
        "cases": count, "outcomes": outcomes, "faults": faults, "not_finite": not_finite,
        "slowest_s": slowest, "largest_mib": largest,
    }  # fmt: skip


def campaign(
    systematic: bool = True, random: int = 0, seed: int = 0, processes: int = 1, first: int = 0, cases: int | None = None
) -> dict[str, Any]:
    """Run a campaign in child processes; returns their summaries merged. A child that dies is a fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--random", str(random), "--seed", str(seed), "--first", str(first)]
        command += [] if systematic else ["--no-systematic"]
        command += [] if cases is None else ["--cases", str(cases)]
        environment = os.environ | {
            "ORCD_JAX_CACHE": name, "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2",  # threads reserve 64 MiB each
        }  # fmt: skip
        children = []
        for index in range(processes):
            where = folder / f"where-{index}"
            argv = [*command, "--processes", str(processes), "--child", str(index), "--folder", name]
            errors = (folder / f"stderr-{index}").open("w+")
            child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            children.append((child, where, errors))
        total: dict[str, Any] = {
            "cases": 0, "outcomes": collections.Counter(), "faults": [], "not_finite": [],
            "slowest_s": (0.0, ""), "largest_mib": (0.0, ""),
        }  # fmt: skip
        for child, where, errors in children:
            output, _ = child.communicate()
            if child.returncode:
                errors.seek(0)
                at = where.read_text() if where.exists() else "no case yet"
                total["faults"].append(f"died with {child.returncode} at {at}: {errors.read()[-2000:]}")
                continue
            summary = json.loads(output)
            for key in ("cases", "faults", "not_finite"):
                total[key] += summary[key]
            total["outcomes"].update(summary["outcomes"])
            for key in ("slowest_s", "largest_mib"):
                total[key] = max(total[key], tuple(summary[key]))
    total["outcomes"] = dict(total["outcomes"].most_common())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=100_000, help="random cases after the systematic ones")
    parser.add_argument("--no-systematic", dest="systematic", action="store_false")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="number of the first case to run")
    parser.add_argument("--cases", type=int, help="how many to run; all of them if absent")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is None:
        names = ("systematic", "random", "seed", "processes", "first", "cases")
        summary = campaign(**{name: getattr(options, name) for name in names})
    else:
        summary = run_slice(options)
    json.dump(summary, sys.stdout, indent=1, ensure_ascii=False)


def run_slice(options: argparse.Namespace) -> dict[str, Any]:
    """A child's part: every `processes`-th case."""
    folder = options.folder / str(options.child)
    folder.mkdir()
    files = base_files(folder)
    for weights, data in files:  # compile what all cases need before memory is limited
        (folder / "valid.gguf").write_bytes(data)
        outcome = _load(folder / "valid.gguf", weights)
        assert outcome == "loaded", outcome
    fixed = sum(1 for _, data in files for _ in systematic(data)) if options.systematic else 0
    end = fixed + options.random if options.cases is None else options.first + options.cases
    cases = itertools.islice(
        enumerate(Cases(files, options.systematic, options.seed)), options.first + options.child, end, options.processes
    )
    return run(cases, folder, options.folder / f"where-{options.child}")


if __name__ == "__main__":
    main()
