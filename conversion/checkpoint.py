"""Read files of the reference implementation: checkpoints, without running code in them, and YAML as plain data."""

import contextlib
import pickletools
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch

from .. import limited_files
from ..limited_files import BoundedReader, check_archive, one_line, read_safetensors_header, short_repr


STATE_DICTS = ("state_dict", "model_state_dict", "module", "model", "ema_state_dict", "ema", "model_ema")
"""Keys of a state dict inside a file, best first: Lightning, the separate decoders of OuteTTS, DeepSpeed, plain
training loops, and averages (EMA). Averages are used only if there is nothing else."""

WRAPPERS = ("module", "_orig_mod", "_forward_module")
"""Parts of names that DistributedDataParallel, torch.compile and Fabric insert."""

EMA_PREFIXES = ("ema.", "model_ema.", "ema_model.")
"""Name prefixes of an averaged copy of the weights in the same state dict."""


@dataclass
class Checkpoint:
    """Content of a checkpoint file.

    Args:
        tensors: Tensors by their original names, without wrappers.
        others: Keys of other entries in the file, such as "optimizer_states".
        notes: How names were changed, for the report, one sentence each.
    """

    tensors: dict[str, torch.Tensor]
    others: list[str]
    notes: list[str]


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Read a Lightning checkpoint or a bare state dict. Tensors are memory-mapped where the file allows it.

    Names lose the parts that module wrappers insert (`WRAPPERS`). An averaged copy beside the weights is left out.
    Plain values of numpy, paths, sets and namespaces in the file are ignored, and never built.

    Args:
        path: File of `torch.save`, or a `.safetensors` file.

    Raises:
        ValueError: The path is not a file or not a checkpoint, the file is damaged, compressed or has no tensors, or
            it is a pickle that would run code.
    """
    _check_is_file(path, "checkpoint")
    with path.open("rb") as file:
        start = file.read(1024)
    _check_file_kind(path, start)
    content = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path, start)
    if not isinstance(content, dict):
        raise ValueError(_no_tensors(path, f"holds one {type(content).__name__}"))
    others, notes = [], []
    for _ in range(3):  # state dicts may be nested, for example DeepSpeed's in a trainer's file
        key = next((key for key in STATE_DICTS if key in content and not isinstance(content[key], torch.Tensor)), None)
        if key is None:
            break
        others += [str(name) for name in content if name != key]
        content = content[key]
        if not isinstance(content, dict):
            raise ValueError(_no_tensors(path, f"holds a {key} of type {type(content).__name__}"))
        if key not in ("state_dict", "model_state_dict"):
            notes.append(f"taken from {key!r} in the file")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        names = ", ".join(short_repr(name) for name in list(content)[:10])
        raise ValueError(_no_tensors(path, f"holds no tensors, but {names}" if content else "holds nothing"))
    _check_sizes(path, content)
    tensors, more_notes = _plain_names(path, {str(name): value for name, value in content.items()})
    return Checkpoint(tensors, others, notes + more_notes)


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """
    Read a YAML file of the reference implementation (a Lightning CLI file) as data. Its classes are never imported.

    Args:
        path: Path of the YAML file.

    Returns:
        Values of the model and its three parts: {"model": …, "feature_extractor": …, "backbone": …, "head": …}.

    Raises:
        ValueError: The path is not a file, the file is not YAML or too large, or it is not a file of the reference
            implementation.
    """
    _check_is_file(path, "YAML file")
    try:
        content = limited_files.read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}. Give the checkpoint's YAML file.") from error
    parts: dict[str, Any] = {"model": _init_args(content, "model")}
    for part in ("feature_extractor", "backbone", "head"):
        parts[part] = _init_args(parts["model"], part)
    missing = [part for part, values in parts.items() if values is None]
    if missing:
        problem = "no mapping" if not isinstance(content, dict) else f"no {missing[0]} with init_args"
        raise ValueError(
            f"{path} holds {problem}, expected a WavTokenizer training file with model.init_args and, below it, "
            "feature_extractor, backbone and head with init_args. Give the checkpoint's own YAML file, or none."
        )
    return parts


def _plain_names(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return tensors by names without wrappers and without a leading `model.`, and notes on the changes."""
    plain: dict[str, torch.Tensor] = {}
    averaged: dict[str, torch.Tensor] = {}
    removed: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        plain_parts = [part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:]
        wrappers = [part for part in parts[:-1] if part in WRAPPERS]
        if plain_parts[0] == "model" and len(plain_parts) > 1:
            plain_parts, wrappers = plain_parts[1:], [*wrappers, "model"]
        plain_name, target = ".".join(plain_parts), plain
        if prefix := next((prefix for prefix in EMA_PREFIXES if plain_name.startswith(prefix)), None):
            plain_name, target = plain_name.removeprefix(prefix), averaged
        if plain_name in target and not _same_tensor(target[plain_name], tensor):
            raise ValueError(
                f"{path} holds two different tensors for {short_repr(plain_name)}. Save the weights once."
            )
        target[plain_name] = tensor
        removed.update(wrappers)
    notes = [f"removed from {count} names: {part}." for part, count in sorted(removed.items())]
    if averaged and plain:
        notes.append(f"dropped: {len(averaged)} tensors of an averaged copy (EMA) beside the weights")
    elif averaged:
        notes.append("taken from an averaged copy (EMA), the only one in the file")
    return plain or averaged, notes


def _same_tensor(left: Any, right: Any) -> bool:
    tensors = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return tensors and left.dtype == right.dtype and torch.equal(left, right)


MAX_EXPANDED_BYTES = 2**31
"""Largest memory beyond what the file stores. A tensor of stride 0 repeats a few stored values, so it expands."""


def _check_sizes(path: Path, tensors: dict[Any, Any]) -> None:
    """Raise ValueError if tensors need far more memory than the file stores. Call it before anything copies one."""
    expanded = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"{path} holds {short_repr(name)} without its values ({tensor.device}). Save it again.")
        size = tensor.numel() * tensor.element_size()
        expanded += max(0, size - tensor.untyped_storage().nbytes())
        if expanded > MAX_EXPANDED_BYTES:
            raise ValueError(
                f"{path} holds {short_repr(name)} of shape {tuple(tensor.shape)}, which needs {size} bytes, and "
                f"stores {tensor.untyped_storage().nbytes()} for it. Save contiguous tensors."
            )


def _init_args(content: Any, part: str) -> dict | None:
    values = content.get(part) if isinstance(content, dict) else None
    values = values.get("init_args") if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def _check_is_file(path: Path, expected: str) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a {expected}. Give the path of the file in it.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}, expected a {expected}. Check the path.")


def _check_file_kind(path: Path, start: bytes) -> None:
    if not start:
        problem = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        problem = "is a git LFS pointer, a placeholder for a large file in a clone (git lfs pull fetches the file)"
    elif start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        problem = "is a web page, perhaps a login or error page saved under this name"
    else:
        return
    raise ValueError(f"{path} {problem}, expected a checkpoint. Download the checkpoint itself.")


def _no_tensors(path: Path, problem: str) -> str:
    return f"{path} {problem}, expected a Lightning checkpoint or a state dict with the weights of a WavTokenizer."


def _open_safetensors(path: Path) -> dict[str, torch.Tensor]:
    read_safetensors_header(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from error


def _open_pickle(path: Path, start: bytes) -> Any:
    is_zip = start.startswith(b"PK\x03\x04")  # files older than torch 1.6 are not, and cannot be memory-mapped
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if is_zip:
                check_archive(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with BoundedReader(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails on damaged files with all kinds of exceptions
        imported_names = _foreign_imports(path, is_zip)
        if not imported_names:
            raise ValueError(_damaged(path, error)) from error
        raise ValueError(
            f"{path} holds more than tensors and plain values: loading all of it would run code, namely "
            f"{', '.join(short_repr(name)[1:-1] for name in imported_names[:10])}. Nothing was executed. Expected a "
            "checkpoint of the original training code. Get it from its publisher, and do not open this file by other "
            "means."
        ) from error


class IgnoredValue:
    """Stand-in for a harmless value beside the weights. The value's own type is neither imported nor built."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


_HARMLESS_NAMES = (
    "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *(f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(f"numpy.{name}" for name in ("bool_", "bool", "float16", "float32", "float64", "str_", "bytes_")),
    "_codecs.encode",
    *(f"pathlib{local}.{pure}{kind}Path"
      for local in ("", "._local") for pure in ("Pure", "") for kind in ("Posix", "Windows")),
    "pathlib.Path", "pathlib.PurePath",
    "argparse.Namespace",
    "collections.defaultdict", "collections.deque",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
        "set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "complex", "slice",
        "range",
    )),
    "datetime.datetime", "datetime.date", "datetime.timedelta",
)  # fmt: skip


def _empty_dict(*arguments: object) -> dict:
    return {}


def _empty_list(*arguments: object) -> list:
    return []


# torch fills only plain dictionaries and lists
_CONTAINERS = {"collections.defaultdict": _empty_dict, "collections.deque": _empty_list}

HARMLESS: list[Any] = [
    (_CONTAINERS.get(name) or type(name.rpartition(".")[2], (IgnoredValue,), {}), name) for name in _HARMLESS_NAMES
]
"""Types that a pickle may hold beside tensors: (stand-in that is built instead, name). Every other type is refused,
except those that torch allows itself."""


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read ({_reason(error)}); nothing in it was executed. Expected a file of torch.save or of "
        "safetensors. It is damaged, cut short or not a checkpoint: download it again, and compare size and sha256."
    )


def _reason(error: Exception) -> str:
    # torch puts the reason on its own line, inside advice to load the file unsafely
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return one_line(
        lines[-2] if lines[0].startswith("Weights only load failed") and len(lines) > 2 else " ".join(lines)
    )


def _foreign_imports(path: Path, is_zip: bool) -> list[str]:
    """Return the names that a pickle would import beside torch's classes. Its instructions are read, not executed."""
    try:
        if not is_zip:
            with BoundedReader(path) as file:
                return _imports(file)
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                return _imports(file)
    except (StopIteration, ValueError, OSError, zipfile.BadZipFile):
        return []


def _imports(file: IO[bytes]) -> list[str]:
    found: dict[str, None] = {}  # ordered
    strings: list[str] = []
    with contextlib.suppress(Exception):  # a damaged pickle ends the search; names found before it count
        for _ in range(4):  # a file older than torch 1.6 is four pickles in a row, with the tensors in the last
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST") and isinstance(argument, str):
                    found[argument.replace(" ", ".")] = None
                elif operation.name == "STACK_GLOBAL":  # module and name are the last two strings
                    found[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    return [
        name
        for name in found
        if not name.startswith(("torch.", "collections.OrderedDict", "collections.Counter"))
        and name not in _HARMLESS_NAMES
    ]
