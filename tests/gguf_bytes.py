"""GGUF files out of their fields, right or wrong: what no well-meant writer would write.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def text(content: str | bytes) -> bytes:
    """A length and that many bytes."""
    data = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: float) -> bytes:
    """A value with its type in front."""
    return struct.pack(f"<I{FORMATS[kind]}", kind, value)


def string(content: str | bytes) -> bytes:
    """A text with its type in front."""
    return struct.pack("<I", STRING) + text(content)


def array(kind: int, items: Sequence | np.ndarray = (), count: int | None = None) -> bytes:
    """An array of scalars or texts with its type in front; `count`: the length that it claims."""
    head = struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count)
    if kind == STRING:
        return head + b"".join(map(text, items))
    return head + np.asarray(items, f"<{FORMATS.get(kind, 'B')}").tobytes()


def key(name: str | bytes, value: bytes) -> bytes:
    """A metadata entry; `value` begins with its type."""
    return text(name) + value


def tensor(name: str | bytes, shape: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    """A tensor's entry; `shape` has the slowest axis first, as in NumPy."""
    head = text(name) + struct.pack("<I", len(shape) if n_dims is None else n_dims)
    return head + struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `n_keys` and `n_tensors`: the counts that it claims."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])
    return header + (bytes(-len(header) % alignment) if data else b"") + data
