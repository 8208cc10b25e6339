"""The checked reader: right files are read as written, wrong ones refused with a message that names the place."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    FORMATS,
    I8,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    gguf,
    key,
    scalar,
    string,
    tensor,
    text,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SPECS, TensorType, write_gguf

from orcd_jax.errors import GGUFError
from orcd_jax.gguf_reader import GGUFFile, brief


@pytest.fixture
def write(tmp_path):
    """A function from bytes to the path of a file that holds them."""

    def write(data: bytes, name: str = "file.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def refused(path: str | Path, *parts: str) -> str:
    """Opening raises one short line that names the file and holds all `parts`."""
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable() and len(message) < len(str(path)) + 400
    assert all(part in message for part in parts), message
    return message


# Right files


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value_is_read_as_written(write, version):
    numbers = {
        kind: [0, 1] if kind == BOOL else [0.5, -2.0] if kind in (F32, F64) else [7, np.iinfo(f"={letter}").max]
        for kind, letter in FORMATS.items()
    }
    keys = [key(f"scalar.{kind}", scalar(kind, items[1])) for kind, items in numbers.items()]
    keys += [key(f"array.{kind}", array(kind, items)) for kind, items in numbers.items()]
    keys += [key("text", string("né 😀")), key("no text", string("")), key("texts", array(STRING, ["a", "", "é"]))]
    keys += [key("none", array(I32)), key("no texts", array(STRING))]
    metadata = GGUFFile.open(write(gguf(keys, version=version))).metadata
    for kind, items in numbers.items():
        value = metadata[f"scalar.{kind}"]
        assert value == items[1] and type(value) is (bool if kind == BOOL else float if kind in (F32, F64) else int)
        assert (
            metadata[f"array.{kind}"].dtype == np.dtype(FORMATS[kind]) and metadata[f"array.{kind}"].tolist() == items
        )
    assert metadata["text"] == "né 😀" and metadata["no text"] == ""
    assert metadata["texts"] == ["a", "", "é"] and metadata["no texts"] == []
    assert metadata["none"].tolist() == []


@given(
    st.dictionaries(
        st.text(max_size=20),
        st.text() | st.lists(st.text(), max_size=5) | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
        max_size=8,
    )
)
def test_any_metadata_comes_back(tmp_path_factory, metadata):
    def encode(value):
        if isinstance(value, str):
            return string(value)
        if isinstance(value, list):
            return array(STRING, value)
        return scalar(I64 if isinstance(value, int) else F64, value)

    path = tmp_path_factory.mktemp("any") / "any.gguf"
    path.write_bytes(gguf([key(name, encode(value)) for name, value in metadata.items()]))
    assert GGUFFile.open(path).metadata == metadata


def test_tensors_are_views_of_the_file_slowest_axis_first(write):
    data = np.arange(6, dtype=np.float32).tobytes() + bytes(8) + bytes(range(34)) * 2
    tensors = [tensor("matrix", (2, 3)), tensor("blocks", (2, 32), GGMLQuantizationType.Q8_0, offset=32)]
    file = GGUFFile.open(write(gguf([], tensors, data)))
    matrix, blocks = file.tensors["matrix"], file.tensors["blocks"]
    assert matrix.shape == (2, 3) and matrix.size == 6 and matrix.type == GGMLQuantizationType.F32
    assert matrix.data.shape == (2, 12) and matrix.data.view("<f4").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert blocks.data.shape == (2, 34) and blocks.data.tolist() == [list(range(34))] * 2
    assert not matrix.data.flags.writeable and not matrix.data.flags.owndata


@pytest.mark.parametrize("alignment", [1, 8, 64, 1 << 20])
def test_alignment_is_the_files(write, alignment):
    keys = [key("general.alignment", scalar(U32, alignment))]
    path = write(gguf(keys, [tensor("t", (1,), offset=alignment)], bytes(alignment) + b"\1\2\3\4", alignment=alignment))
    assert GGUFFile.open(path).tensors["t"].data.tobytes() == b"\1\2\3\4"


@pytest.mark.parametrize("name", SPECS)
def test_reads_what_the_gguf_package_reads(tiny, name):
    types = {"*attn*": TensorType.Q8_0, "*": TensorType.F16} if SPECS[name].d_model % 32 == 0 else None
    path = tiny(name, tensor_types=types)
    file, reader = GGUFFile.open(path), GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for field_name, field in fields.items():
        found = file.metadata[field_name]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents()
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for expected in reader.tensors:
        found = file.tensors[expected.name]
        assert found.type == expected.tensor_type and list(found.shape) == expected.shape.tolist()[::-1]
        assert found.data.tobytes() == expected.data.tobytes()


def test_types_that_the_package_knows_have_sizes(write):
    """Every known type is either read or refused for its block, never by an accident."""
    for kind in GGMLQuantizationType:
        path = write(gguf([], [tensor("t", (1, 256), kind)], bytes(4096)))
        assert GGUFFile.open(path).tensors["t"].type == kind


# Wrong files

KEY, END, BIG = key("a.key", scalar(U32, 1)), "the file ends inside ", 1 << 63
UTF8 = "not valid UTF-8"
Q8_0, Q4_K = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K

MALFORMED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # The fixed part
    "empty": (b"", ("0 bytes", "at least 24")),
    "too short": (b"GGUF\3\0\0\0", ("8 bytes", "at least 24")),
    "another format": (gguf(magic=b"PK\3\4"), ("not a GGUF file", "PK", "expected b'GGUF'")),
    "version 1": (gguf(version=1), ("version 1", "version 2 or 3")),
    "version 4": (gguf(version=4), ("version 4", "version 2 or 3")),
    "big-endian": (gguf(version=3 << 24), ("big-endian", "little-endian")),
    "2^63 tensors": (gguf(n_tensors=BIG), (f"{BIG} tensors", "at most 16384")),
    "2^64 - 1 keys": (gguf(n_keys=2 * BIG - 1), (f"{2 * BIG - 1} metadata keys", "at most 4096")),
    "one key too few": (gguf([KEY], n_keys=2), (END, "the length of metadata key 1", "byte 45")),
    "one tensor too few": (gguf([KEY], n_tensors=1), (END, "the length of the name of tensor 0")),
    # Keys
    "a key of 2^63 bytes": (gguf([struct.pack("<Q", BIG) + bytes(4)]), ("metadata key 0", f"{BIG} bytes", "4 remain")),
    "a key of 257 bytes": (gguf([key("k" * 257, scalar(U8, 1))]), ("metadata key 0", "257 bytes", "at most 256")),
    "a key that is no UTF-8": (gguf([key(b"\xff", scalar(U8, 1))]), ("metadata key 0", UTF8)),
    "a key twice": (gguf([KEY, KEY]), ("'a.key' twice",)),
    "no type": (gguf([text("a.key")]), (END, "the type of 'a.key'")),
    "type 13": (gguf([key("a.key", struct.pack("<I", 13))]), ("'a.key'", "unknown type 13", "expected 0 to 12")),
    # Values
    "a number cut off": (gguf([KEY[:-1]]), ("'a.key'", "4 bytes", "3 bytes remain")),
    "a text of 2^63 bytes": (
        gguf([key("a.key", struct.pack("<IQ", STRING, BIG))]),
        ("the value of 'a.key'", f"{BIG} bytes", "0 remain"),
    ),
    "a text that is no UTF-8": (gguf([key("a.key", string(b"a\xc3"))]), ("the value of 'a.key'", UTF8)),
    "a surrogate": (gguf([key("a.key", string(b"\xed\xa0\x80"))]), ("the value of 'a.key'", UTF8)),
    "an array of 2^63 numbers": (gguf([key("a.key", array(I64, count=BIG))]), ("'a.key'", f"{BIG} items", "0 bytes")),
    "an array of 2^61 numbers, 2^64 bytes": (gguf([key("a.key", array(I64, count=1 << 61))]), ("'a.key'", "items")),
    "an array of 2^63 texts": (gguf([key("a.key", array(STRING, count=BIG))]), ("'a.key'", f"{BIG} strings", "0 b")),
    "an array one short": (gguf([key("a.key", array(U8, [1, 2], count=3))]), ("'a.key'", "3 items", "2 bytes remain")),
    "an array without a count": (gguf([key("a.key", array(U8)[:-8])]), (END, "'a.key'")),
    "an array of arrays": (gguf([key("a.key", array(ARRAY, count=1) + array(U8))]), ("'a.key'", "nested arrays")),
    "an array of type 13": (gguf([key("a.key", array(13, count=0))]), ("'a.key'", "unknown type 13")),
    "an item beyond the end": (
        gguf([key("a.key", array(STRING, ["ab"], count=2) + struct.pack("<QI", 5, 0))]),
        ("item 1 of the value of 'a.key'", "5 bytes", "4 remain"),
    ),
    "an item that is no UTF-8": (
        gguf([key("a.key", array(STRING, ["ab", b"\x80"]))]),
        ("item 1 of the value of 'a.key'", UTF8),
    ),
    "texts that use the length of others": (
        gguf([key("a.key", array(STRING, ["a" * 9, ""], count=3))]),
        (END, "the value of 'a.key'"),
    ),
    "too many texts": (
        gguf([key("a", array(STRING, [""] * (1 << 18))), key("b", array(STRING, [""] * (1 << 18) + [""]))]),
        ("the value of 'b'", "above 524288"),
    ),
    "too much text in one key": (
        gguf([key("a", string(b"x" * (1 << 23)))]),
        ("the value of 'a'", "8388608 bytes long", "at most 8388607"),
    ),
    "too much text in an array": (
        gguf([key("a", array(STRING, [b"x" * (1 << 22)] * 2))]),
        ("the value of 'a'", "above 8388608 bytes"),
    ),
    # Alignment
    **{
        f"alignment {what}": (gguf([key("general.alignment", value)]), ("general.alignment", shown, "a power of two"))
        for what, shown, value in (
            ("0", "is 0;", scalar(U32, 0)), ("3", "is 3;", scalar(U32, 3)),
            ("2^21", "is 2097152;", scalar(U32, 1 << 21)), ("-32", "is -32;", scalar(I32, -32)),
            ("true", "is True;", scalar(BOOL, True)),
            ("32.0", "is 32.0;", scalar(F32, 32.0)), ("a text", "is '32';", string("32")),
            ("an array", "is an array of 2;", array(U32, [32, 32])), ("2^63", f"is {BIG};", scalar(U64, BIG)),
        )
    },
    # Tensors
    "a tensor's name of 2^63 bytes": (gguf([], [struct.pack("<QQ", BIG, 0)]), ("the name of tensor 0", f"{BIG} bytes")),
    "a tensor's name of 257 bytes": (gguf([], [tensor("t" * 257, (1,))]), ("the name of tensor 0", "at most 256")),
    "a tensor's name that is no UTF-8": (gguf([], [tensor(b"\xff", (1,))]), ("the name of tensor 0", UTF8)),
    "a tensor twice": (gguf([], [tensor("t", (1,))] * 2, bytes(4)), ("tensor 't' twice",)),
    "no dimensions": (gguf([], [tensor("t", ())], bytes(4)), ("tensor 't'", "0 dimensions", "1 to 4")),
    "5 dimensions": (gguf([], [tensor("t", (1,) * 5)], bytes(4)), ("tensor 't'", "5 dimensions", "1 to 4")),
    "2^31 dimensions": (gguf([], [tensor("t", (1,), n_dims=1 << 31)], bytes(4)), ("tensor 't'", f"{1 << 31} d")),
    "dimensions cut off": (gguf([], [tensor("t", (1, 2))[:-20]]), (END, "tensor 't'")),
    "an axis of length 0": (gguf([], [tensor("t", (0, 4))], bytes(4)), ("tensor 't'", "[0, 4]", "no axis of length 0")),
    "type 999": (gguf([], [tensor("t", (1,), 999)], bytes(4)), ("tensor 't'", "type 999")),
    "type 4, withdrawn": (gguf([], [tensor("t", (32,), 4)], bytes(64)), ("tensor 't'", "type 4")),
    "half a block": (gguf([], [tensor("t", (2, 48), Q8_0)], bytes(999)), ("'t'", "rows of 48", "Q8_0's block, 32")),
    "rows too short for K-quants": (
        gguf([], [tensor("t", (8, 32), Q4_K)], bytes(999)), ("tensor 't'", "rows of 32", "Q4_K's block, 256"),
    ),
    "an offset that is not aligned": (
        gguf([], [tensor("t", (1,), offset=16)], bytes(64)), ("'t'", "offset 16", "a multiple of the alignment 32"),
    ),
    "one byte short": (gguf([], [tensor("t", (2, 4))], bytes(31)), ("'t'", "ends at byte 128", "the file at 127")),
    "no data at all": (gguf([], [tensor("t", (2, 4))]), ("tensor 't'", "incomplete or damaged")),
    "an offset of 2^64 - 32": (gguf([], [tensor("t", (8,), offset=2 * BIG - 32)], bytes(32)), ("'t'", "ends at")),
    "2^63 x 2^63 weights": (gguf([], [tensor("t", (BIG, BIG))], bytes(32)), ("tensor 't'", f"{4 * BIG**2 + 96}")),
    "2^62 weights, 2^64 bytes": (gguf([], [tensor("t", (1 << 62,))], bytes(32)), ("tensor 't'", f"{2 * BIG + 64}")),
    "overlapping tensors": (
        gguf([], [tensor("a", (16,)), tensor("b", (8,), offset=32)], bytes(64)), ("'a' and 'b' overlap",),
    ),
    "tensors in one place": (gguf([], [tensor("a", (8,)), tensor("b", (8,))], bytes(32)), ("'a' and 'b' overlap",)),
    "a tensor inside another": (
        gguf([], [tensor("c", (8,), offset=96), tensor("b", (8,), offset=32), tensor("a", (32,))], bytes(128)),
        ("'a' and 'b' overlap",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused(write, name):
    data, parts = MALFORMED[name]
    refused(write(data), *parts)


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_every_truncation_of_the_header_is_refused(tiny, write, name):
    """Not only at the boundaries: at every byte of a header with a vocabulary, in steps that hit all alignments."""
    data = tiny(name).read_bytes()
    last = max(data.find(t.encode()) for t in GGUFFile.open(tiny(name)).tensors)
    for end in [*range(0, last, 37), *range(last - 200, last)]:
        refused(write(data[:end]))


def test_brief_is_one_short_line():
    for value in ("a" * 10**7, "\n\x1b[1m" * 100, ["x"] * 10**6, np.zeros(10**6), 10**40, -1.5e-300, None, True):
        assert len(brief(value)) <= 80 and brief(value).isprintable()
    assert brief("a text") == "'a text'" and brief(3) == "3" and brief(["x"] * 3) == "an array of 3"


# What is no file


def test_a_missing_file(tmp_path):
    refused(tmp_path / "none.gguf", "no such file")


def test_a_folder(tmp_path):
    refused(tmp_path, "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(refused, tmp_path / "pipe.gguf", "not a regular file")
        try:
            opening.result(timeout=10)
        except TimeoutError:
            os.close(os.open(tmp_path / "pipe.gguf", os.O_WRONLY))  # ends the waiting
            raise


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device():
    refused("/dev/zero", "not a regular file")


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a.gguf").symlink_to(tmp_path / "b.gguf")
    (tmp_path / "b.gguf").symlink_to(tmp_path / "a.gguf")
    refused(tmp_path / "a.gguf", "cannot be read")


@pytest.mark.parametrize("name", ["a\0b.gguf", "n" * 300 + ".gguf", "file.gguf/part.gguf"])
def test_a_name_that_no_file_can_have(write, name):
    folder = write(b"").parent
    with pytest.raises(GGUFError, match="cannot be read"):
        GGUFFile.open(folder / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_file_without_permission(write):
    path = write(gguf())
    path.chmod(0)
    refused(path, "Permission denied")


# Files in parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Path]:
    first = write_gguf(tmp_path_factory.mktemp("parts") / "tiny.gguf", SPECS["llama"], parts=3)
    return sorted(first.parent.iterdir())


def copied(parts: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copy(part, folder)) for part in parts]


def change(path: Path, old: bytes, new: bytes) -> None:
    """Replace the only `old` in a file."""
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def split_key(name: str, value: int) -> bytes:
    return key(f"split.{name}", scalar(U16, value))


def test_any_part_may_be_named(tiny, parts):
    whole = GGUFFile.open(tiny("llama"))
    for part in parts:
        file = GGUFFile.open(part)
        assert file.path == part and file.metadata["general.name"] == "Tiny llama"
        assert file.tensors.keys() == whole.tensors.keys()
        for name, info in file.tensors.items():
            assert info == whole.tensors[name] and info.data.tobytes() == whole.tensors[name].data.tobytes()


def test_a_missing_part_is_named(parts, tmp_path):
    copies = copied(parts, tmp_path)
    copies[1].unlink()
    refused(copies[2], "part 2 of 3 is missing", str(copies[1]))


@pytest.mark.parametrize("index", [0, 2])
def test_parts_say_which_they_are(parts, tmp_path, index):
    copies = copied(parts, tmp_path)
    change(copies[index], split_key("no", index), split_key("no", 7))
    with pytest.raises(GGUFError, match=f"{copies[index].name}: split.no is 7; expected {index}"):
        GGUFFile.open(copies[0])


def test_parts_say_how_many_they_are(parts, tmp_path):
    copies = copied(parts, tmp_path)
    change(copies[1], split_key("count", 3), split_key("count", 4))
    with pytest.raises(GGUFError, match=f"{copies[1].name}: split.count is 4; expected 3"):
        GGUFFile.open(copies[0])


def test_a_tensor_in_two_parts(parts, tmp_path):
    copies = copied(parts, tmp_path)
    shutil.copy(copies[1], copies[2])
    change(copies[2], split_key("no", 1), split_key("no", 2))
    first = min(t.name for t in GGUFReader(parts[1]).tensors)
    with pytest.raises(GGUFError, match=f"{copies[2].name}: tensor '{first}' is in an earlier part too"):
        GGUFFile.open(copies[0])


@pytest.mark.parametrize("value", [scalar(U32, 3), string("3"), array(I32, [1, 3]), scalar(I8, 2), scalar(F32, 3.0)])
def test_a_part_under_another_name_is_refused(write, value):
    refused(write(gguf([key("split.count", value)])), "split.count is", "expected 1", "-00001-of-0000N.gguf")


@pytest.mark.parametrize("value", [string("0"), array(I32, [0, 0]), scalar(F32, 0.5), scalar(I8, -1)])
def test_the_number_of_a_part_is_a_number(write, value):
    path = write(gguf([key("split.no", value)]), "a-00001-of-00001.gguf")
    refused(path, "split.no is", "expected 0")


def test_a_file_that_is_its_only_part(write):
    keys = [key("split.no", scalar(U8, 0)), key("split.count", scalar(U8, 1))]
    assert GGUFFile.open(write(gguf(keys), "a-00001-of-00001.gguf")).metadata["split.count"] == 1
    assert GGUFFile.open(write(gguf(keys), "a.gguf")).metadata["split.count"] == 1


@pytest.mark.parametrize("name", ["a-00000-of-00000.gguf", "a-00000-of-00001.gguf", "a-00002-of-00001.gguf"])
def test_a_part_out_of_range(write, name):
    part, count = map(int, re.findall(r"\d{5}", name))
    refused(write(gguf(), name), f"part {part} of {count}")


def test_too_many_parts(write):
    refused(write(gguf(), "a-00001-of-00129.gguf"), "part 1 of 129", "at most 128 parts")


def test_a_damaged_part_is_the_one_that_is_named(parts, tmp_path):
    copies = copied(parts, tmp_path)
    change(copies[2], b"GGUF", b"GGUX")
    with pytest.raises(GGUFError, match=f"{copies[2].name}: is not a GGUF file"):
        GGUFFile.open(copies[0])


def test_the_information_is_frozen(tiny):
    file = GGUFFile.open(tiny("llama"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        file.path = Path()
