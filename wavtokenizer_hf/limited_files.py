"""Readers with limits for files that others wrote: JSON, YAML, npy, safetensors and zip archives of torch.save.

Each looks at declared sizes before it takes memory for them, executes nothing, and raises ValueError with a reason of
one line for every file that it cannot take.
"""

import io
import json
import math
import os
import reprlib
import stat
import struct
import tokenize
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeGuard


if TYPE_CHECKING:
    import numpy as np


MAX_CONFIG_BYTES = 2**20  # config.json and the like; real ones have a few kilobytes
MAX_YAML_BYTES = 2**16  # PyYAML reads about 100 kB a second; real ones have a few kilobytes
MAX_YAML_NODES = 20_000  # after aliases are expanded
MAX_DEPTH = 100  # of nested JSON or YAML
MAX_BRACKETS = 1_000_000  # in one JSON text; 100,000 tensors need 600,000
MAX_HEADER_BYTES = 2**24  # of a safetensors file; 100,000 tensors need about 10 MB
MAX_NPY_HEADER_BYTES = 2**12
MAX_ARCHIVE_FILES = 100_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Types of safetensors that can be read here -> bits of a number."""

FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


def read_file(path: str | os.PathLike, max_bytes: int) -> bytes:
    """
    Read a whole file, or fail before it takes memory.

    Args:
        path: File to read. A device or pipe is read until it ends, or until the limit.
        max_bytes: Largest content that is accepted.

    Raises:
        ValueError: The file is larger.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size > max_bytes:
            raise ValueError(_too_large(status.st_size, max_bytes))
        return read_stream(file, max_bytes)


def read_stream(stream: BinaryIO, max_bytes: int, start: bytes = b"") -> bytes:
    """Read a stream to its end, after `start`, which was read before. Raises ValueError beyond `max_bytes`."""
    blocks, size = [start], len(start)
    while block := stream.read(2**20):
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            raise ValueError(_too_large(size, max_bytes))
    return b"".join(blocks)


def parse_json(content: bytes) -> Any:
    """
    Parse UTF-8 JSON. NaN and infinite numbers are refused, also those that a large exponent makes.

    Raises:
        ValueError: Not JSON, nested more than `MAX_DEPTH` deep, or a number that is not finite.
    """
    if _depth(content) > MAX_DEPTH:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep") from error


def read_json_object(path: str | os.PathLike, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ValueError that names the file, or OSError."""
    try:
        content = parse_json(read_file(path, max_bytes))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def parse_yaml(content: bytes) -> Any:
    """
    Parse YAML as plain data: no tag makes anything but strings, numbers, dates, lists and dictionaries.

    Aliases count as often as they are used, so an anchor that multiplies ("billion laughs") is refused.

    Raises:
        ValueError: Not plain YAML, too large, too deep, or too many nodes.
    """
    import yaml

    if len(content) > MAX_YAML_BYTES:
        raise ValueError(_too_large(len(content), MAX_YAML_BYTES))
    if _depth(content) > MAX_DEPTH:  # PyYAML would look far ahead for the end of each bracket
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")
    try:
        _check_depth(yaml.parse(content, yaml.SafeLoader))
        loader = yaml.SafeLoader(content)  # not CSafeLoader, whose recursion can overflow the stack
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_nodes(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"not plain YAML: {one_line(error)}") from error
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        # PyYAML raises these for values such as 2001-99-99 and for bytes that are no text
        raise ValueError(one_line(error)) from error


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file as `parse_yaml` does. Raises ValueError without the file's name, or OSError."""
    return parse_yaml(read_file(path, MAX_YAML_BYTES))


def parse_npy(content: bytes) -> "np.ndarray":
    """
    Parse a .npy file of plain numbers. The header is checked before anything is made of it.

    Raises:
        ValueError: Not a .npy file, objects or structures in it, or a shape that its size does not hold.
    """
    import numpy as np  # here, since command lines read YAML without it

    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the format is not known")
        shape, fortran_order, dtype = readers[version](stream, max_header_size=MAX_NPY_HEADER_BYTES)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, EOFError, tokenize.TokenError) as error:
        raise ValueError(f"its header cannot be read: {one_line(error)}") from error
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or dtype.itemsize == 0:
        raise ValueError(f"it holds {dtype}, expected plain numbers")
    if any(type(size) is not int or size < 0 for size in shape) or len(shape) > 32:
        raise ValueError(f"its header has the shape {str(shape)[:100]}")
    data, expected = content[stream.tell() :], math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"its header promises {expected} bytes of numbers, and {len(data)} follow")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def parse_safetensors_header(start: bytes, size: int) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict]:
    """
    Parse the header of a safetensors file, and compare it with the file's size.

    Args:
        start: Beginning of the file that holds the header, or all of it.
        size: Bytes of the whole file.

    Returns:
        name -> (type, shape, first byte in the file, byte after the last), and the metadata, text by name.

    Raises:
        ValueError: The header is damaged, too large, or promises other data than the file holds.
    """
    length = safetensors_header_size(start, size)
    header = parse_json(start[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text by name")
    tensors, ends = {}, [0]
    for name, entry in header.items():
        dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in _HEADER_KEYS)
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise ValueError(f"{name[:100]} has the type {str(dtype)[:100]!r}, which is not known")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"the entry of {name[:100]} in its header is damaged")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BITS[dtype] // 8:
            raise ValueError(f"{name[:100]} of shape {shape} and type {dtype} has {offsets[1] - offsets[0]} bytes")
        tensors[name] = dtype, tuple(shape), 8 + length + offsets[0], 8 + length + offsets[1]
        ends.append(offsets[1])
    if 8 + length + max(ends) != size:
        raise ValueError(f"its header promises {8 + length + max(ends)} bytes, the file has {size}")
    return tensors, metadata


def safetensors_header_size(start: bytes, size: int) -> int:
    """
    Bytes of the header, from the first 8 bytes of a file of `size` bytes. Raises ValueError if they make no sense.
    """
    if len(start) < 8:
        raise ValueError(f"it has {size} bytes, expected a safetensors file")
    (length,) = struct.unpack("<Q", start[:8])
    if length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise ValueError(f"its first bytes promise a header of {length} bytes, expected a safetensors file")
    return length


def read_safetensors_header(path: str | os.PathLike) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict]:
    """
    Read and check the header of a file, see `parse_safetensors_header`. Raises ValueError that names it, or OSError.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            return parse_safetensors_header(start + file.read(safetensors_header_size(start, size)), size)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or cut short: {one_line(error)}. Expected a whole safetensors file: get it again."
        ) from error


class BoundedReader(io.BufferedReader):
    """A file that refuses to take memory for more bytes than it has, as a damaged pickle asks for."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > max(self._size, 2**16):  # small reads look ahead
            raise EOFError(f"it asks for {size} bytes, and the file has {self._size}")
        return super().read(size)


def check_archive(path: Path) -> None:
    """
    Check a zip archive as torch.save writes it, before torch.load takes memory for it.

    Raises:
        ValueError: Members are compressed, or promise more bytes than the file has (a zip bomb), or it is no archive.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"it is no whole zip archive ({one_line(error)})") from error
    if len(members) > MAX_ARCHIVE_FILES:
        raise ValueError(f"it holds {len(members)} members, expected at most {MAX_ARCHIVE_FILES}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename[:100]} in it is compressed, and torch.save compresses nothing")
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"its members promise more bytes than the {size} of the file")


def one_line(error: BaseException | str, most: int = 300) -> str:
    """The message of an error in one line of at most `most` characters; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def short_repr(value: Any, most: int = 100) -> str:
    """`repr` for a message, however large or deep the value is."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother = 3, most, most
    try:
        return one_line(writer.repr(value), most)
    except ValueError:  # an integer of more than 4300 digits
        return f"a huge {type(value).__name__}"


_HEADER_KEYS = ("dtype", "shape", "data_offsets")


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _too_large(size: int, max_bytes: int) -> str:
    return f"it has {size} bytes or more, expected at most {max_bytes}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds the number {name}, expected finite numbers")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:50]}, expected finite numbers")
    return number


_BRACKETS = bytes(range(256)).translate(None, b"[]{}")


def _depth(content: bytes) -> int:
    """How deep brackets are nested, those in texts included, which is never less than the true depth."""
    brackets = content.translate(None, _BRACKETS)
    if len(brackets) > MAX_BRACKETS:
        raise ValueError(f"it holds {len(brackets)} brackets, expected at most {MAX_BRACKETS}")
    depth = deepest = 0
    for byte in brackets:
        depth = depth + 1 if byte in b"[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _check_depth(events: Iterable[Any]) -> None:
    """
    Raise ValueError if YAML is nested too deep: events come without recursion, and PyYAML's time grows with the depth.
    """
    depth = 0
    for event in events:
        name = type(event).__name__
        depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _count_nodes(node: Any, counts: dict[int, int]) -> int:
    """Nodes below and with this one, each alias counted as what it stands for. Raises ValueError beyond the limit."""
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise ValueError("an anchor holds itself")
        return counts[id(node)]
    counts[id(node)] = 0  # while it is being counted
    children = node.value if isinstance(node.value, list) else []
    total = 1
    for child in children:
        for each in child if isinstance(child, tuple) else (child,):
            total += _count_nodes(each, counts)
            if total > MAX_YAML_NODES:
                raise ValueError(
                    f"it has more than {MAX_YAML_NODES} values, aliases counted as often as they are used"
                )
    counts[id(node)] = total
    return total
