"""A checked reader of GGUF files (versions 2 and 3, little-endian), split ones included.

Every count, length and offset is checked with Python integers against the real size of the file before it is used,
so that a malformed file ends in a `GGUFError` quickly and in little memory. Nothing is copied: numeric arrays and
tensor data are views into a read-only memory map. What a memory map cannot survive is that another process makes the
file shorter meanwhile.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from orcd_jax.errors import GGUFError

# Above any model of the supported families, low enough that a header full of tiny items takes neither long nor much
# memory: a string of n bytes can need 76 + 4 n in Python.
MAX_KEYS = 1 << 12
MAX_TENSORS = 1 << 14
MAX_STRINGS = 1 << 19
MAX_STRING_BYTES = 1 << 23
MAX_NAME_BYTES = 1 << 8
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 1 << 7

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
    number: np.dtype(name)
    for number, name in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_PART_NAME = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.gguf$")


def brief(value: object) -> str:
    """A metadata value, whatever a file holds, as one short line for a message."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its name, row-major shape (slowest axis first), GGML type and bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: np.ndarray = field(repr=False, compare=False)  # uint8 [rows, bytes a row], mapped

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and tensors of a GGUF file, or of all parts of a split one.

    `metadata` maps keys to Python scalars, strings, lists of strings, or NumPy arrays.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read and check the header of `path`; of a split file any part may be named.

        Raises:
          GGUFError: naming the file, the key or tensor, what was found and what was expected.
        """
        path = Path(path)
        match = _PART_NAME.search(path.name)
        if match is not None:
            return cls._open_parts(path, match)
        metadata, tensors = _Header(path).read()
        parts = metadata.get("split.count", 1)
        if not isinstance(parts, int) or parts > 1:
            raise GGUFError(
                f"{path}: split.count is {brief(parts)}; expected 1, or the names NAME-00001-of-0000N.gguf, … by which "
                "all parts can be found"
            )
        return cls(path, metadata, tensors)

    @classmethod
    def _open_parts(cls, path: Path, match: re.Match[str]) -> GGUFFile:
        named, count = int(match[1]), int(match[2])
        if not 1 <= named <= count <= MAX_PARTS:
            raise GGUFError(f"{path}: the name says part {named} of {count}; expected at most {MAX_PARTS} parts")
        stem = path.name[: match.start()]
        paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
        for number, part in enumerate(paths, 1):
            if not os.path.exists(part):
                raise GGUFError(f"{path}: part {number} of {count} is missing; expected it at {part}")
        first: dict[str, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        for index, part in enumerate(paths):
            metadata, part_tensors = _Header(part).read()
            for key, expected in (("split.no", index), ("split.count", count)):
                found = metadata.get(key, expected)
                if not isinstance(found, int) or found != expected:
                    raise GGUFError(f"{part}: {key} is {brief(found)}; expected {expected}")
            twice = tensors.keys() & part_tensors.keys()
            if twice:
                raise GGUFError(f"{part}: tensor {min(twice)!r} is in an earlier part too; expected it in one")
            tensors |= part_tensors
            if len(tensors) > MAX_TENSORS:
                raise GGUFError(f"{part}: brings the tensors above {MAX_TENSORS}")
            if index == 0:
                first = metadata
        return cls(path, first, tensors)


class _Header:
    """A cursor over one file's header; every read is checked against the bytes that remain."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.strings_left = MAX_STRINGS
        self.string_bytes_left = MAX_STRING_BYTES
        try:
            # Asked before opening, which at a pipe would wait for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                self.fail("is not a regular file")
            with open(path, "rb") as f:
                self.size = f.seek(0, 2)
                if self.size < 24:
                    self.fail(f"is {self.size} bytes long, too short for a GGUF file; expected at least 24")
                self.map = mmap.mmap(f.fileno(), self.size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise GGUFError(f"{path}: no such file") from None
        except (OSError, ValueError) as e:  # ValueError: a name that no file can have, or the file has just shrunk
            self.fail(f"cannot be read: {getattr(e, 'strerror', None) or e}")

    def fail(self, what: str) -> NoReturn:
        raise GGUFError(f"{self.path}: {what}") from None

    def unpack(self, layout: str, what: str) -> int:
        size = struct.calcsize(layout)
        if self.size - self.position < size:
            self.fail(f"the file ends inside {what}, at byte {self.size}")
        (value,) = struct.unpack_from(layout, self.map, self.position)
        self.position += size
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.unpack("<Q", f"the length of {what}")
        left = self.size - self.position
        if length > left:
            self.fail(f"{what} claims {length} bytes, but {left} remain in the file")
        limit = self.string_bytes_left if limit is None else min(limit, self.string_bytes_left)
        if length > limit:
            self.fail(f"{what} is {length} bytes long; expected at most {limit}")
        self.string_bytes_left -= length
        data = self.map[self.position : self.position + length]
        self.position += length
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings: the hot loop of opening a file with a vocabulary."""
        self.strings_left -= count
        if self.strings_left < 0:
            self.fail(f"{what} brings the strings of the file above {MAX_STRINGS}")
        result: list[str] = []
        data, size, position = self.map, self.size, self.position
        limit = position + 8 * count + self.string_bytes_left
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                start = position + 8
                position = start + length
                if position > size:
                    self.fail(f"item {len(result)} of {what} claims {length} bytes, but {size - start} remain")
                if position > limit:
                    self.fail(f"{what} brings the text of the file above {MAX_STRING_BYTES} bytes")
                result.append(data[start:position].decode("utf-8"))
        except struct.error:
            self.fail(f"the file ends inside {what}, at byte {size}")
        except UnicodeDecodeError:
            self.fail(f"item {len(result)} of {what} is not valid UTF-8")
        self.string_bytes_left -= position - self.position - 8 * count
        self.position = position
        return result

    def numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        left = self.size - self.position
        if count * dtype.itemsize > left:
            self.fail(f"{what} claims {count} items of {dtype.itemsize} bytes, but {left} bytes remain in the file")
        array = np.frombuffer(self.map, dtype, count, self.position)
        self.position += count * dtype.itemsize
        return array

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], 1, what)[0].item()
        if kind != _ARRAY:
            self.fail(f"{what} has the unknown type {kind}; expected 0 to 12")
        item = self.unpack("<I", what)
        count = self.unpack("<Q", what)
        if item == _STRING:
            if count * 8 > self.size - self.position:
                self.fail(f"{what} claims {count} strings, but {self.size - self.position} bytes remain in the file")
            return self.strings(count, what)
        if item not in _SCALARS:
            nested = "nested arrays" if item == _ARRAY else f"items of the unknown type {item}"
            self.fail(f"{what} has {nested}; expected an array of numbers or strings")
        return self.numbers(_SCALARS[item], count, what)

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self.map[:4] != b"GGUF":
            self.fail(f"is not a GGUF file: it begins with {self.map[:4]!r}, expected b'GGUF'")
        self.position = 4
        version = self.unpack("<I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = "a big-endian file" if swapped in (2, 3) else f"version {version}"
            self.fail(f"is {hint}; expected a little-endian GGUF file of version 2 or 3")
        tensor_count = self.unpack("<Q", "the tensor count")
        key_count = self.unpack("<Q", "the key count")
        if tensor_count > MAX_TENSORS:
            self.fail(f"claims {tensor_count} tensors; expected at most {MAX_TENSORS}")
        if key_count > MAX_KEYS:
            self.fail(f"claims {key_count} metadata keys; expected at most {MAX_KEYS}")

        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = self.string(f"metadata key {index}", MAX_NAME_BYTES)
            if key in metadata:
                self.fail(f"has the metadata key {key!r} twice")
            metadata[key] = self.value(self.unpack("<I", f"the type of {key!r}"), f"the value of {key!r}")
        return metadata, self.tensors(tensor_count, metadata)

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"general.alignment is {brief(alignment)}; expected a power of two up to {MAX_ALIGNMENT}")
        entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for index in range(count):
            name = self.string(f"the name of tensor {index}", MAX_NAME_BYTES)
            what = f"tensor {name!r}"
            if name in entries:
                self.fail(f"has {what} twice")
            n_dims = self.unpack("<I", what)
            if not 1 <= n_dims <= 4:
                self.fail(f"{what} has {n_dims} dimensions; expected 1 to 4")
            shape = tuple(self.unpack("<Q", what) for _ in range(n_dims))[::-1]  # the file has the fastest axis first
            number = self.unpack("<I", what)
            offset = self.unpack("<Q", what)
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                self.fail(f"{what} has the type {number}; expected one that the GGUF format knows")
            if 0 in shape:
                self.fail(f"{what} has the shape {list(shape)}; expected no axis of length 0")
            if offset % alignment:
                self.fail(f"{what} begins at offset {offset}; expected a multiple of the alignment {alignment}")
            entries[name] = (shape, kind, offset)

        start = -(-self.position // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int, str]] = []
        for name, (shape, kind, offset) in entries.items():
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                self.fail(
                    f"tensor {name!r} has rows of {shape[-1]}; expected a multiple of {kind.name}'s block, {block}"
                )
            rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
            begin = start + offset
            end = begin + rows * row_bytes
            if end > self.size:
                self.fail(f"tensor {name!r} ends at byte {end}, but the file at {self.size}: incomplete or damaged")
            spans.append((begin, end, name))
            data = np.frombuffer(self.map, np.uint8, rows * row_bytes, begin).reshape(rows, row_bytes)
            infos[name] = TensorInfo(name, shape, kind, data)
        spans.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
            if begin < end:
                self.fail(f"tensors {name!r} and {other!r} overlap")
        return infos
