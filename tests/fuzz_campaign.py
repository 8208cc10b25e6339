"""Damages valid tiny GGUF files in many ways and loads each: `python tests/fuzz_campaign.py --random 100000`.

A case must end in a model with finite logits or in the project's own error, within the limits of time and memory.
`test_fuzz.py` runs a short campaign. A summary is printed as JSON: cases, outcomes, faults (case N runs again with the
same seed and `--first N --cases 1 --processes 1`), the slowest and the largest of the loads that were refused.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import faulthandler
import functools
import itertools
import json
import math
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

import jax.numpy as jnp
import numpy as np
from gguf_bytes import BOOL, F32, F64, I32, I64, STRING, U32, U64, array, gguf, key, scalar, string, tensor
from tiny_models import SPECS, TensorType, write_gguf

import orcd_jax
from orcd_jax.gguf_reader import MAX_STRINGS

MEMORY_LIMIT = 200 << 20  # bytes above what was mapped before, and the file
TIME_LIMIT_S = 60  # ends the process; far above the 2 s of CPU time that are allowed, for machines under load

_TOKENS = [0, 7, 99, 5]
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


# Well-formed values of every type, for keys that want another.
_VALUES = {
    "false": scalar(BOOL, False), "true": scalar(BOOL, True), "0": scalar(U32, 0), "-1": scalar(I64, -1),
    "2^64 - 1": scalar(U64, 2**64 - 1), "0.5": scalar(F32, 0.5), "nan": scalar(F64, np.nan), "no text": string(""),
    "a text": string("a\n\x1b[1m{"), "no numbers": array(I32), "no texts": array(STRING),
    "numbers": array(I32, range(400)), "nans": array(F32, [np.nan] * 384), "texts": array(STRING, ["x"] * 384),
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


def random_damage(layout: Layout, rng: np.random.Generator) -> tuple[str, bytes]:
    """Flip some bytes, or, in one case of four, copy, cut or insert some."""
    data = layout.data
    damaged = bytearray(data)

    def place() -> int:
        """Half of the time in some field, whatever its size; else anywhere in the header or in the file."""
        choice = rng.random()
        if choice < 0.5:
            field = layout.fields[rng.integers(len(layout.fields))]
            return field.offset + int(rng.integers(max(1, field.size)))
        return int(rng.integers(layout.header_end if choice < 0.75 else len(data)))

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


def crafted() -> Iterator[tuple[str, bytes]]:
    """Files made to take as much time or memory as they can before they are found out."""
    many, most = MAX_STRINGS // 2, MAX_STRINGS
    wide = [f"{n:05x}😀" for n in range(many)]  # each character takes four bytes in Python
    bad = key("bad", string(b"\xff"))
    yield "49 bytes that claim an array of 2^63 numbers", gguf([key("a", array(I64, count=1 << 63))])
    yield "4 million empty texts", gguf([key("a", array(STRING, [b""] * (4 << 20)))])
    yield "half a million empty texts, then no UTF-8", gguf([key("a", array(STRING, [b""] * most)), bad])
    yield "half a million texts of wide characters, then no UTF-8", gguf([key("a", array(STRING, 2 * wide)), bad])
    yield "a text of 8 MB of wide characters, then no UTF-8", gguf([key("a", string("😀" + "a" * (7 << 20))), bad])
    yield "a text of 100 MB", gguf([key("a", string(b"a" * (100 << 20)))])
    yield "100 MB of numbers, then no UTF-8", gguf([key("a", array(I32, np.zeros(25 << 20))), bad])
    yield "4,096 keys, the last twice", gguf([key(f"{n % 4095:0250}", array(U32)) for n in range(4096)])
    tensors = [tensor(f"{n:0250}", (1, 1, 1, 1), 0, 32 * min(n, (1 << 14) - 2)) for n in range(1 << 14)]
    yield "16,384 tensors, the last two in one place", gguf([], tensors, bytes(32 << 14))
    yield "a tensor of 2^63 x 2^63 x 2^63", gguf([], [tensor("a", [1 << 63] * 3)], bytes(32))

    def model(rows: int, keys: dict[str, bytes]) -> bytes:
        metadata = {
            "general.architecture": string("llama"), "llama.embedding_length": scalar(U32, 2),
            "llama.attention.head_count": scalar(U32, 1), "llama.context_length": scalar(U32, 64),
            "llama.block_count": scalar(U32, 1), "llama.feed_forward_length": scalar(U32, 2),
            "llama.attention.layer_norm_rms_epsilon": scalar(F32, 1e-5), **keys,
        }  # fmt: skip
        shapes = {"token_embd.weight": (rows, 2), "output_norm.weight": (2,)}
        shapes |= {f"blk.0.{name}_norm.weight": (2,) for name in ("attn", "ffn")}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.0.{name}.weight"] = (2, 2)
        entries, data = [], b""
        for name, shape in shapes.items():
            entries.append(tensor(name, shape, offset=len(data)))
            data += bytes(-(-4 * math.prod(shape) // 32) * 32)
        return gguf([key(name, value) for name, value in metadata.items()], entries, data)

    def vocabulary(kind: str, tokens: list[str], **keys: bytes) -> dict[str, bytes]:
        keys = {"model": string(kind), "pre": string("gpt-2"), "tokens": array(STRING, tokens), **keys}
        return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}

    hexadecimal = [f"{n:0{digits}x}" for digits in range(1, 6) for n in range(16**digits)][:many]
    merges = [f"{text[0]} {text[1:]}" for text in hexadecimal if len(text) > 1]
    normal, control = array(I32, np.ones(many)), array(I32, np.full(many, 3))
    scores = array(F32, range(many))
    few = vocabulary("gpt2", hexadecimal[:384], merges=array(STRING, merges[:9]))
    files = {
        "256 layers that are not there": model(384, few | {"llama.block_count": scalar(U32, 256)}),
        "half a million tokens for 384 rows": model(384, vocabulary("gpt2", 2 * hexadecimal)),
        "a quarter million tokens and merges, the last one wrong": model(
            many, vocabulary("gpt2", hexadecimal, merges=array(STRING, [*merges, "not there"]), token_type=normal)
        ),
        "a quarter million tokens and merges, then no flag": model(
            many, vocabulary("gpt2", hexadecimal, merges=array(STRING, merges), add_bos_token=string("yes"))
        ),
        "a quarter million scored tokens, the last score no number": model(
            many, vocabulary("llama", wide, scores=array(F32, [*range(many - 1), np.nan]), token_type=normal)
        ),
        "a quarter million scored tokens, then no flag": model(
            many, vocabulary("llama", hexadecimal, scores=scores, token_type=normal, add_bos_token=string("yes"))
        ),
        "a quarter million control tokens": model(many, vocabulary("llama", wide, scores=scores, token_type=control)),
    }
    yield from files.items()


def base_files(folder: Path) -> list[tuple[str, bytes]]:
    """Valid files of every architecture, quantised and not, with both kinds of vocabulary: (weights, content)."""
    mixed = {"token_embd.*": TensorType.Q8_0, "*attn*": TensorType.Q5_1, "*": TensorType.Q4_0}
    k_quants = {"*attn*": TensorType.Q4_K, "*ffn_down*": TensorType.Q2_K, "*": TensorType.Q6_K}
    files = []
    for name, weights, types in (
        ("qwen2", "int8", mixed), ("phi3", "f32", None), ("llama-wide", "int8", k_quants), ("qwen2", "f32", None),
        ("phi3", "int8", mixed), ("llama", "f32", None), ("phi3-longrope", "bf16", None),
    ):  # fmt: skip
        shapes = {} if name == "llama-wide" else {"d_model": 64, "n_kv_heads": 2, "head_dim": 16, "d_ff": 96}
        spec = dataclasses.replace(SPECS[name], n_layers=1, **shapes)  # like shapes share compiled operations
        path = write_gguf(folder / "base.gguf", spec, tensor_types=types)
        files.append((weights, path.read_bytes()))
    return files


def all_cases(
    files: list[tuple[str, bytes]], thorough: int, random: int, seed: int
) -> Iterator[tuple[str, str, bytes]]:
    """All cases in order: (weights, what it is, content)."""
    yield from (("int8", what, data) for what, data in crafted())
    for number, (weights, data) in enumerate(files[:thorough]):
        yield from ((weights, f"file {number}, {what}", damaged) for what, damaged in systematic(data))
    layouts = [Layout(data) for _, data in files]
    for case in range(random):
        number = case % len(files)
        what, damaged = random_damage(layouts[number], np.random.default_rng([seed, case]))
        yield files[number][0], f"file {number}, {what}", damaged


# Running


def _status(name: str) -> int:
    """A size of this process in bytes: VmSize, VmRSS or VmHWM."""
    return 1024 * int(os.pread(_status_file(), 8192, 0).decode().split(f"{name}:")[1].split()[0])


@functools.cache
def _status_file() -> int:
    return os.open("/proc/self/status", os.O_RDONLY)


def _load(path: Path, weights: Any) -> np.ndarray:
    """Load a model and run it; the logits [T, V] after each of `_TOKENS`, of the tokens that may be sampled."""
    model = orcd_jax.load(path, weights=weights, device="cpu")
    model.tokenizer.decode(model.tokenizer.encode("Hello world, it is 12:30."))
    # Not compiled: a damaged config would need a program of its own, while single operations are compiled already.
    cache = orcd_jax.init_cache(model.config, 1, len(_TOKENS))
    logits, _ = orcd_jax.forward(model.params, model.config, jnp.asarray([_TOKENS]), cache)
    return np.asarray(logits)[0, :, : model.config.known_tokens]


def run(cases: Iterator[tuple[int, tuple[str, str, bytes]]], folder: Path, progress: Path) -> dict[str, Any]:
    """Run cases in this process; `progress` always holds the one that is running."""
    warnings.simplefilter("ignore")  # of a vocabulary without a pre-tokeniser
    path = folder / "case.gguf"
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    slowest, largest = (0.0, ""), (0.0, "")
    for number, (weights, what, data) in cases:
        case = f"case {number}: {what}"
        path.write_bytes(data)
        progress.write_text(case)
        if len(data) > 1 << 20:  # what the case before has freed must not hide what this one takes
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM begin again
        resident, cpu = _status("VmRSS"), time.process_time()
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + len(data) + MEMORY_LIMIT, resource.RLIM_INFINITY))
        faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True)
        refused = False
        try:
            logits = _load(path, weights)
            outcome = "loaded" if np.isfinite(logits).all() else "loaded, logits not finite"
        except orcd_jax.OrcdJaxError as reason:
            refused = True
            message = str(reason)
            outcome = f"{type(reason).__name__}: {_VARYING.sub('…', message)[:60]}"
            if len(message.splitlines()) != 1 or len(message) > 1000 or not message.isprintable():
                faults.append(f"{case}: the message is not one short line: {message[:500]!r}")
        except BaseException as reason:  # a panic of the tokenizers library is no Exception
            outcome = f"fault: {type(reason).__name__}"
            faults.append(f"{case}: {''.join(traceback.format_exception(reason)[-3:])}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if refused:
            slowest = max(slowest, (time.process_time() - cpu, case))
            largest = max(largest, ((_status("VmHWM") - resident) / 2**20, case))
        # Generation sees the last token's logits, and can go on if some are minus infinity. Compiling takes time.
        unusable = outcome.endswith("not finite") and not np.isfinite(logits[-1].max())
        if unusable and outcomes[outcome] < 3 and not _says_not_finite(path, weights):
            faults.append(f"{case}: logits are not finite, and generate does not say so")
        outcomes[outcome] += 1
    return {"outcomes": outcomes, "faults": faults, "slowest_s": slowest, "largest_mib": largest}


def _says_not_finite(path: Path, weights: Any) -> bool:
    try:
        orcd_jax.load(path, weights=weights, device="cpu").generate([_TOKENS], max_new_tokens=1)
    except orcd_jax.NonFiniteError:
        return True
    return False


def run_slice(options: argparse.Namespace) -> dict[str, Any]:
    """A child's part: every `processes`-th case."""
    folder = options.folder / str(options.child)
    folder.mkdir()
    files = base_files(folder)
    for weights, data in files:  # compile what all cases need before memory is limited
        (folder / "case.gguf").write_bytes(data)
        assert np.isfinite(_load(folder / "case.gguf", weights)).all(), "a valid file"
    cases = enumerate(all_cases(files, options.thorough, options.random, options.seed))
    end = None if options.cases is None else options.first + options.cases
    mine = itertools.islice(cases, options.first + options.child, end, options.processes)
    return run(mine, folder, folder / "progress")


def campaign(*arguments: str, processes: int) -> dict[str, Any]:
    """Run a campaign in child processes; returns their summaries merged. A child that dies is a fault."""
    total: dict[str, Any] = {"cases": 0, "faults": [], "slowest_s": (0.0, ""), "largest_mib": (0.0, "")}
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {
            "ORCD_JAX_CACHE": name,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_ARENA_MAX": "2",  # every thread would reserve address space
        }
        children = []
        for index in range(processes):
            command = [sys.executable, __file__, *arguments, "--processes", str(processes), "--child", str(index)]
            with (folder / f"stdout-{index}").open("w") as out, (folder / f"stderr-{index}").open("w") as err:
                children.append(subprocess.Popen([*command, "--folder", name], stdout=out, stderr=err, env=environment))
        for index, child in enumerate(children):
            if child.wait():
                progress = folder / str(index) / "progress"
                case = progress.read_text() if progress.exists() else "before the first case"
                error = (folder / f"stderr-{index}").read_text()[-3000:]
                total["faults"].append(f"{case}: the process ended with {child.returncode}: {error}")
                continue
            part = json.loads((folder / f"stdout-{index}").read_text())
            outcomes.update(part["outcomes"])
            total["faults"] += part["faults"]
            for key in ("slowest_s", "largest_mib"):
                total[key] = max(total[key], tuple(part[key]))
    return total | {"cases": outcomes.total(), "outcomes": dict(outcomes.most_common())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thorough", type=int, default=7, help="files of which every field is damaged, 0 to 7")
    parser.add_argument("--random", type=int, default=100_000, help="random cases after the thorough ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case to run")
    parser.add_argument("--cases", type=int, help="how many to run; all of them if absent")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    summary = campaign(*sys.argv[1:], processes=options.processes) if options.child is None else run_slice(options)
    json.dump(summary, sys.stdout, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main()
