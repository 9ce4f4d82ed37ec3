"""
Reads and checks every row of an output folder, against the manifest, against its own digests, and against itself.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .output import METADATA, digest_of, read_manifest, sha256_of, summary_of
from .records import FORMAT, OWN_COLUMNS, Summary


@dataclass
class Verification:
    """What was read, and what is wrong: one line each, empty if all is well."""

    num_files: int
    total: Summary
    problems: list[str]


def verify(output: str | os.PathLike) -> Verification:
    """
    Read all Parquet files of an output folder and check them; nothing is changed.

    Checked are sizes and checksums of the manifest, page checksums, schema, settings, digests of the rows, that codes
    lie in the codebook, that their number fits the number of samples, that no clip occurs twice, and the totals.

    Args:
        output: Folder that `tokenize` has written.

    Raises:
        ValueError: There is no such folder, or its manifest is missing or damaged.
        OSError: A file cannot be read.
    """
    folder = Path(output)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} has no manifest.json, expected a folder that `wavtokenizer tokenize` has written.")
    manifest = read_manifest(folder / "manifest.json")
    settings, files = manifest["settings"], manifest["files"]
    if settings.get("format") != FORMAT:
        raise ValueError(f"{folder} has the format {settings.get('format')}, expected {FORMAT}. Make it anew.")
    problems, total, seen, failed, schema = [], Summary(), set(), set(), None
    paths = sorted((folder / "data").glob("*.parquet"))
    problems += [
        f"data/{name}: missing, and listed in manifest.json" for name in sorted(files.keys() - {p.name for p in paths})
    ]
    for path in paths:
        name = f"data/{path.name}"
        wrong: list[str] = []
        wrong += _file_problems(path, files.get(path.name))
        try:
            table, part = _read(path)
        except (require("pyarrow", "bulk").ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            problems += [
                f"{name}: {text}" for text in [*wrong, f"cannot be read: {' '.join(str(error).split())[:300]}"]
            ]
            continue
        own = table.schema.remove_metadata()
        schema = own if schema is None else schema
        if own != schema or own.names[: len(OWN_COLUMNS)] != list(OWN_COLUMNS):
            wrong.append(f"has the columns {own.names}, expected {schema.names}")
        else:
            wrong += _row_problems(table, part, settings)
            ids = table["id"].to_pylist()
            twice = [id for id in ids if id in seen]
            wrong += [f"holds {twice[0]!r}, which another row has too"] if twice or len(set(ids)) < len(ids) else []
            seen.update(ids)
            failed.update(part["failures"])
            total += summary_of(table, 0)
        if files.get(path.name, {}).get("digest") not in (None, part.get("digest")):
            wrong.append("holds other rows than manifest.json says")
        problems += [f"{name}: {text}" for text in wrong]
    total.num_failures = len(failed - seen)
    problems += _total_problems(folder, manifest, total)
    return Verification(len(paths), total, problems)


def _file_problems(path: Path, entry: dict[str, Any] | None) -> Iterator[str]:
    if entry is None:
        yield "is not in manifest.json; run tokenize again to add it"
        return
    size = path.stat().st_size
    if size != entry["size"]:
        yield f"has {size} bytes, manifest.json says {entry['size']}"
    elif sha256_of(path) != entry["sha256"]:
        yield "has another sha256 than manifest.json says"


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """All rows of a part, and its metadata."""
    parquet = require("pyarrow.parquet", "bulk")
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
        part = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"null"))
    if (
        not isinstance(part, dict)
        or not {"settings", "failures", "failure_stamps", "summary", "digest"} <= part.keys()
    ):
        raise ValueError("it has no metadata of this command")
    table.validate(full=True)
    return table, part


def _row_problems(table: Any, part: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    compute = require("pyarrow.compute", "bulk")
    if part["settings"] != settings:
        yield "was made with other settings than manifest.json says"
    if part["digest"] != digest_of(table, part):
        yield "has rows that do not fit their digest"
    if part["summary"] != asdict(summary_of(table, len(part["failures"]))):
        yield "has other totals in its metadata than its rows"
    if any(table[name].null_count for name in ("id", "audio_codes", "num_samples", "codebook_fingerprint")):
        yield "has rows without an id, codes, num_samples or fingerprint"
        return
    if len(table) == 0:
        return
    lengths = compute.list_value_length(table["audio_codes"]).to_numpy()
    num_samples = table["num_samples"].to_numpy()
    if (num_samples < 1).any() or not np.array_equal(-(-num_samples // settings["hop_length"]), lengths):
        yield "has rows whose number of codes does not fit num_samples"
    largest = compute.max(compute.list_flatten(table["audio_codes"])).as_py()
    if largest is not None and largest >= settings["codebook_size"]:
        yield f"has the code {largest}, expected codes below {settings['codebook_size']}"
    if table["codebook_fingerprint"].unique().to_pylist() != [settings["codebook_fingerprint"]]:
        yield "has rows of another codebook than manifest.json says"


def _total_problems(folder: Path, manifest: dict[str, Any], total: Summary) -> Iterator[str]:
    for name, value in asdict(total).items():
        if manifest.get(name) != value:
            yield f"manifest.json: {name} is {manifest.get(name)}, and the files have {value}"
    ids: list | None
    try:
        lines = (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
        ids = [json.loads(line)["id"] for line in lines]
    except FileNotFoundError:
        ids = None if total.num_failures else []
    except (ValueError, KeyError, TypeError, RecursionError):
        ids = None
    if ids is None or len(ids) != total.num_failures:
        yield f"failures.jsonl: cannot be read, or does not list the {total.num_failures} clips that failed"
