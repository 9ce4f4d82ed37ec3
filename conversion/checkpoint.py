"""Opens the files of the original: checkpoints, without running anything that is in them, and YAML, as plain data."""

import contextlib
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
import yaml


STATE_DICTS = ("state_dict", "model_state_dict")
"""Where a file keeps its tensors, if it holds more than them: Lightning's, and the decoders that OuteTTS splits off."""


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Opens a Lightning checkpoint or a bare state dict. Tensors stay in the file until they are used, if it allows that.

    Args:
        path: a file of `torch.save`, or a `.safetensors` file.

    Returns:
        The tensors by their original names, and what else lies beside them, such as "optimizer_states".

    Raises:
        ValueError: not a file, not a checkpoint, damaged, without tensors, or a pickle that would run code.
    """
    _check_is_file(path, "checkpoint")
    with path.open("rb") as file:
        start = file.read(1024)
    _check_is_no_other_file(path, start)
    content = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path, start)
    if not isinstance(content, dict):
        raise ValueError(_no_tensors(path, f"holds one {type(content).__name__}"))
    others = []
    if key := next((key for key in STATE_DICTS if key in content), None):
        others = [str(name) for name in content if name != key]
        content = content[key]
        if not isinstance(content, dict):
            raise ValueError(_no_tensors(path, f"holds a {key} of type {type(content).__name__}"))
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        names = ", ".join(repr(name) for name in list(content)[:10])
        raise ValueError(_no_tensors(path, f"holds no tensors, but {names}" if content else "holds nothing"))
    return {str(name): value for name, value in content.items()}, others


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """
    Reads a YAML file of the original (a Lightning CLI file) as data; the classes that it names are never imported.

    Args:
        path: the YAML file.

    Returns:
        The values of the model and its three parts: {"model": …, "feature_extractor": …, "backbone": …, "head": …}.

    Raises:
        ValueError: not a file, not YAML, or not the original's.
    """
    _check_is_file(path, "YAML file")
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not plain YAML: {_one_line(error)}. Give the checkpoint's YAML file.") from error
    parts = {"model": _init_args(content, "model")}
    for part in ("feature_extractor", "backbone", "head"):
        parts[part] = _init_args(parts["model"], part)
    wrong = [part for part, values in parts.items() if values is None]
    if wrong:
        what = "no mapping" if not isinstance(content, dict) else f"no {wrong[0]} with init_args"
        raise ValueError(
            f"{path} holds {what}, expected a WavTokenizer training file with model.init_args and, below it, "
            "feature_extractor, backbone and head with init_args. Give the checkpoint's own YAML file, or none."
        )
    return parts


def _init_args(content: Any, part: str) -> dict | None:
    values = content.get(part) if isinstance(content, dict) else None
    values = values.get("init_args") if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def _check_is_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a {what}. Give the path of the file in it.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}, expected a {what}. Check the path.")


def _check_is_no_other_file(path: Path, start: bytes) -> None:
    if not start:
        what = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a git LFS pointer, the note that stands for a large file in a clone (git lfs pull fetches the file)"
    elif start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        what = "is a web page, perhaps a login or error page saved under this name"
    else:
        return
    raise ValueError(f"{path} {what}, expected a checkpoint. Download the checkpoint itself.")


def _no_tensors(path: Path, what: str) -> str:
    return f"{path} {what}, expected a Lightning checkpoint or a state dict with the weights of a WavTokenizer."


def _open_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error


def _open_pickle(path: Path, start: bytes) -> Any:
    is_zip = start.startswith(b"PK\x03\x04")  # files older than torch 1.6 are not, and cannot be mapped into memory
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # there is no end to the ways in which a damaged file makes torch.load fail
        foreign = _foreign_imports(path, is_zip)
        if not foreign:
            raise ValueError(_damaged(path, error)) from error
        raise ValueError(
            f"{path} holds more than tensors and plain values: opening it in full would run code, namely "
            f"{', '.join(foreign)}. Nothing was executed. Expected a checkpoint of the original training code; get it "
            "from its publisher, and do not open this file by other means."
        ) from error


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read ({_one_line(error)}); nothing in it was executed. Expected a file of torch.save or of "
        "safetensors. It is damaged, cut short or of another kind: download it again and compare its size and sha256."
    )


def _one_line(error: Exception) -> str:
    # torch wraps the reason, a line of its own, in advice to load with less care
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-2] if lines[0].startswith("Weights only load failed") and len(lines) > 2 else " ".join(lines)


def _foreign_imports(path: Path, is_zip: bool) -> list[str]:
    """What a pickle would import besides torch's own pieces; its instructions are listed, not followed."""
    try:
        if not is_zip:
            with path.open("rb") as file:
                return _imports(file)
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                return _imports(file)
    except (StopIteration, zipfile.BadZipFile):
        return []


def _imports(file: BinaryIO) -> list[str]:
    found, strings = {}, []
    with contextlib.suppress(Exception):  # at the end of what can be read as a pickle; what came before it counts
        for _ in range(4):  # a file older than torch 1.6 is four pickles in a row, the tensors in the last
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST"):
                    found[argument.replace(" ", ".")] = None
                elif operation.name == "STACK_GLOBAL":  # takes module and name from the two strings before it
                    found[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    return [name for name in found if not name.startswith(("torch.", "collections.OrderedDict"))]
