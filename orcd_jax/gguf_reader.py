"""A checked reader of GGUF files (versions 2 and 3, little-endian), split ones included.

Every count, length and offset is checked with Python integers against the real size of the file before it is used,
so that a malformed file ends in a `GGUFError` quickly and in little memory. Nothing is copied: numeric arrays and
tensor data are views into a read-only memory map.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from orcd_jax.errors import GGUFError

# Far above any real model, low enough that a file full of tiny items cannot hold the reader up.
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NAME_BYTES = 1 << 10
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 1 << 10

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
    number: np.dtype(name)
    for number, name in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_PART_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


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
        if match is None:
            metadata, tensors = _Header(path).read()
            if metadata.get("split.count", 1) not in (0, 1):
                raise GGUFError(
                    f"{path}: is one of {metadata['split.count']} parts, but is not named NAME-00001-of-"
                    f"{metadata['split.count']:05}.gguf; rename the parts so that the others can be found"
                )
            return cls(path, metadata, tensors)
        return cls._open_parts(path, match)

    @classmethod
    def _open_parts(cls, path: Path, match: re.Match[str]) -> GGUFFile:
        count = int(match[2])
        if not 1 <= count <= MAX_PARTS:
            raise GGUFError(f"{path}: the name says {count} parts; expected 1 to {MAX_PARTS}")
        stem = path.name[: match.start()]
        first: dict[str, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        for number in range(1, count + 1):
            part = path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")
            if not part.is_file():
                raise GGUFError(f"{path}: part {number} of {count} is missing; expected it at {part}")
            metadata, part_tensors = _Header(part).read()
            found = (metadata.get("split.no", number - 1), metadata.get("split.count", count))
            if found != (number - 1, count):
                raise GGUFError(f"{part}: split.no and split.count are {found}; expected {(number - 1, count)}")
            for name, info in part_tensors.items():
                if name in tensors:
                    raise GGUFError(f"{part}: tensor {name!r} is in an earlier part too")
                tensors[name] = info
            first = first or metadata
        return cls(path, first, tensors)


class _Header:
    """A cursor over one file's header; every read is checked against the bytes that remain."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.strings_left = MAX_STRINGS
        try:
            with open(path, "rb") as f:
                self.size = f.seek(0, 2)
                if self.size < 24:
                    self.fail(f"is {self.size} bytes long, too short for a GGUF file")
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise GGUFError(f"{path}: no such file") from None
        except OSError as e:
            raise GGUFError(f"{path}: cannot be read: {e.strerror}") from None

    def fail(self, what: str) -> NoReturn:
        raise GGUFError(f"{self.path}: {what}")

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
        if limit is not None and length > limit:
            self.fail(f"{what} is {length} bytes long; expected at most {limit}")
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
        result, data, size, position = [], self.map, self.size, self.position
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                start = position + 8
                position = start + length
                if position > size:
                    self.fail(f"an item of {what} claims {length} bytes, but {size - start} remain in the file")
                result.append(data[start:position].decode("utf-8"))
        except struct.error:
            self.fail(f"the file ends inside {what}, at byte {size}")
        except UnicodeDecodeError:
            self.fail(f"item {len(result)} of {what} is not valid UTF-8")
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
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}; expected a power of two up to {MAX_ALIGNMENT}")
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
                self.fail(f"{what} has the unknown type {number}")
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
