"""Read untrusted files within limits: JSON, YAML, npy, safetensors, and zip archives of torch.save.

Each reader checks declared sizes before it allocates memory, and never executes code. It raises ValueError with a
one-line reason for every file that it refuses.
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


MAX_CONFIG_BYTES = 2**20  # config.json and similar files have a few kilobytes
MAX_YAML_BYTES = 2**16  # YAML configs have a few kilobytes; PyYAML reads about 100 kB per second
MAX_YAML_NODES = 20_000  # with aliases expanded
MAX_DEPTH = 100  # nesting depth of JSON or YAML
MAX_BRACKETS = 1_000_000  # per JSON text; 100,000 tensors need 600,000
MAX_HEADER_BYTES = 2**24  # per safetensors file; 100,000 tensors need about 10 MB
MAX_NPY_HEADER_BYTES = 2**12
MAX_ARCHIVE_FILES = 100_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Supported dtypes of safetensors -> bits per number."""

FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


def read_file(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Read a whole file. A file that is too large is refused before memory is allocated.

    Args:
        path: File to read. A device or pipe is read up to its end, or up to the limit.
        max_bytes: Maximum size of the content, in bytes.

    Raises:
        ValueError: The file is larger than `max_bytes`.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size > max_bytes:
            raise ValueError(_too_large(status.st_size, max_bytes))
        return read_stream(file, max_bytes)


def read_stream(stream: BinaryIO, max_bytes: int, start: bytes = b"") -> bytes:
    """Read a stream to its end, and prepend `start`, which was read before. Raises ValueError beyond `max_bytes`."""
    blocks, size = [start], len(start)
    while block := stream.read(2**20):
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            raise ValueError(_too_large(size, max_bytes))
    return b"".join(blocks)


def parse_json(content: bytes) -> Any:
    """Parse UTF-8 JSON. Refuse NaN and infinite numbers, also numbers that overflow, such as 1e999.

    Raises:
        ValueError: The content is not JSON, is nested deeper than `MAX_DEPTH`, or holds a number that is not finite.
    """
    if _nesting_depth(content) > MAX_DEPTH:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_parse_float)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep") from error


def read_json_object(path: str | os.PathLike, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises OSError, or ValueError with the path in the message."""
    try:
        content = parse_json(read_file(path, max_bytes))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def parse_yaml(content: bytes) -> Any:
    """Parse YAML as plain data: strings, numbers, dates, lists and dictionaries. Tags create no other objects.

    Every use of an alias counts towards `MAX_YAML_NODES`, so exponential expansion ("billion laughs") is refused.

    Raises:
        ValueError: The content is not plain YAML, is too large, is nested too deep, or has too many nodes.
    """
    import yaml

    if len(content) > MAX_YAML_BYTES:
        raise ValueError(_too_large(len(content), MAX_YAML_BYTES))
    if _nesting_depth(content) > MAX_DEPTH:  # PyYAML would scan far ahead for the end of each bracket
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")
    try:
        _check_depth(yaml.parse(content, yaml.SafeLoader))
        loader = yaml.SafeLoader(content)  # CSafeLoader recurses in C and can overflow the stack
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
        # PyYAML raises these for values such as 2001-99-99 and for bytes that are not text
        raise ValueError(one_line(error)) from error


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file, see `parse_yaml`. Raises OSError, or ValueError without the path in the message."""
    return parse_yaml(read_file(path, MAX_YAML_BYTES))


def parse_npy(content: bytes) -> "np.ndarray":
    """Parse a .npy file of plain numbers. The header is checked before an array is created.

    Raises:
        ValueError: The content is not a .npy file, holds objects or structures, or does not match its shape.
    """
    import numpy as np  # imported here, since commands that only read YAML start faster without it

    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the format is not supported")
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
    """Parse the header of a safetensors file, and check it against the size of the file.

    Args:
        start: Beginning of the file with at least the header.
        size: Size of the whole file, in bytes.

    Returns:
        Tensors, name -> (dtype, shape, start, end) with byte positions in the file, and metadata, name -> text.

    Raises:
        ValueError: The header is damaged, is too large, or does not match the size of the file.
    """
    length = safetensors_header_size(start, size)
    header = parse_json(start[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    tensors, ends = {}, [0]
    for name, entry in header.items():
        dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in _HEADER_KEYS)
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise ValueError(f"{name[:100]} has the type {str(dtype)[:100]!r}, which is not supported")
        if not _is_size_list(shape) or not _is_size_list(offsets) or len(offsets) != 2:
            raise ValueError(f"the entry of {name[:100]} in its header is damaged")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BITS[dtype] // 8:
            raise ValueError(f"{name[:100]} of shape {shape} and type {dtype} has {offsets[1] - offsets[0]} bytes")
        tensors[name] = dtype, tuple(shape), 8 + length + offsets[0], 8 + length + offsets[1]
        ends.append(offsets[1])
    if 8 + length + max(ends) != size:
        raise ValueError(f"its header promises {8 + length + max(ends)} bytes, the file has {size}")
    return tensors, metadata


def safetensors_header_size(start: bytes, size: int) -> int:
    """Return the size of the JSON header, from the first 8 bytes of a file of `size` bytes.

    Raises:
        ValueError: The size is invalid, so this is not a safetensors file.
    """
    if len(start) < 8:
        raise ValueError(f"it has {size} bytes, expected a safetensors file")
    (length,) = struct.unpack("<Q", start[:8])
    if length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise ValueError(f"its first bytes declare a header of {length} bytes, expected a safetensors file")
    return length


def read_safetensors_header(path: str | os.PathLike) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict]:
    """Read and check the header of a file, see `parse_safetensors_header`.

    Raises:
        ValueError: The file is damaged. The message has the path.
        OSError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            return parse_safetensors_header(start + file.read(safetensors_header_size(start, size)), size)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or truncated: {one_line(error)}. Expected a complete safetensors file: download or "
            "copy it again."
        ) from error


class BoundedReader(io.BufferedReader):
    """Binary file that refuses reads of more bytes than it has, before memory is allocated, as in a damaged pickle."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > max(self._size, 2**16):  # small reads may look ahead
            raise EOFError(f"it asks for {size} bytes, and the file has {self._size}")
        return super().read(size)


def check_archive(path: Path) -> None:
    """Check a zip archive of torch.save, before torch.load allocates memory for it.

    Raises:
        ValueError: The file is not a zip archive, or its members are compressed or larger than the file (a zip bomb).
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"it is not a complete zip archive ({one_line(error)})") from error
    if len(members) > MAX_ARCHIVE_FILES:
        raise ValueError(f"it holds {len(members)} members, expected at most {MAX_ARCHIVE_FILES}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"its member {member.filename[:100]} is compressed, and torch.save never compresses")
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"its members promise more bytes than the {size} of the file")


def one_line(error: BaseException | str, max_chars: int = 300) -> str:
    """Return the message of an error in one line of at most `max_chars` characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def short_repr(value: Any, max_chars: int = 100) -> str:
    """Return a short `repr` for a message. The value may be of any size and depth."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother = 3, max_chars, max_chars
    try:
        return one_line(writer.repr(value), max_chars)
    except ValueError:  # an integer of more than 4300 digits
        return f"a huge {type(value).__name__}"


_HEADER_KEYS = ("dtype", "shape", "data_offsets")


def _is_size_list(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _too_large(size: int, max_bytes: int) -> str:
    return f"it has {size} bytes or more, expected at most {max_bytes}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds the number {name}, expected finite numbers")


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:50]}, expected finite numbers")
    return number


_NON_BRACKETS = bytes(range(256)).translate(None, b"[]{}")


def _nesting_depth(content: bytes) -> int:
    """Return an upper bound of the nesting depth. Brackets inside strings count too."""
    brackets = content.translate(None, _NON_BRACKETS)
    if len(brackets) > MAX_BRACKETS:
        raise ValueError(f"it holds {len(brackets)} brackets, expected at most {MAX_BRACKETS}")
    depth = deepest = 0
    for byte in brackets:
        depth = depth + 1 if byte in b"[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _check_depth(events: Iterable[Any]) -> None:
    """Raise ValueError if YAML is nested too deep.

    PyYAML's time grows with the depth. Events are generated without recursion, so they can be checked first.
    """
    depth = 0
    for event in events:
        name = type(event).__name__
        depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _count_nodes(node: Any, counts: dict[int, int]) -> int:
    """Count a node and all below it, with aliases expanded. Raises ValueError beyond `MAX_YAML_NODES`."""
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise ValueError("an anchor contains itself")
        return counts[id(node)]
    counts[id(node)] = 0  # marks a node that is being counted
    children = node.value if isinstance(node.value, list) else []
    total = 1
    for child in children:
        for nested_node in child if isinstance(child, tuple) else (child,):
            total += _count_nodes(nested_node, counts)
            if total > MAX_YAML_NODES:
                raise ValueError(
                    f"it has more than {MAX_YAML_NODES} values, aliases counted as often as they are used"
                )
    counts[id(node)] = total
    return total
