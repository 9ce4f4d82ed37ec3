"""Read and check every row of an output folder."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .output import METADATA_KEY, digest_of, read_manifest, sha256_of, summary_of
from .records import FORMAT, OWN_COLUMNS, Summary


@dataclass
class Verification:
    """
    Result of `verify`.

    Args:
        num_files: Number of Parquet files.
        total: Counts of the rows that were read, and of failures.
        problems: Problems that were found, one line each. Empty if there are none.
    """

    num_files: int
    total: Summary
    problems: list[str]


def verify(output: str | os.PathLike) -> Verification:
    """
    Read and check all Parquet files of an output folder. Nothing is changed.

    The checks: sizes and checksums of the manifest, page checksums, schema, settings, digests of the rows, range and
    number of the codes, ids without duplicates, and totals.

    Args:
        output: Folder that `tokenize` wrote.

    Returns:
        `Verification`: what was read, and a line for each problem.

    Raises:
        ValueError: There is no such folder, or its manifest is missing or damaged.
        OSError: A file cannot be read.
    """
    folder = Path(output)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} has no manifest.json, expected a folder that `wavtokenizer tokenize` wrote.")
    manifest = read_manifest(folder / "manifest.json")
    settings, files = manifest["settings"], manifest["files"]
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has the format {settings.get('format')}, expected {FORMAT}. Write it again to a new folder."
        )
    problems: list[str] = []
    total, schema = Summary(), None
    seen: set[str] = set()
    failed: set[str] = set()
    paths = sorted((folder / "data").glob("*.parquet"))
    problems += [
        f"data/{name}: missing, and listed in manifest.json" for name in sorted(files.keys() - {p.name for p in paths})
    ]
    for path in paths:
        name = f"data/{path.name}"
        file_problems = list(_file_problems(path, files.get(path.name)))
        try:
            table, metadata = _read(path)
        except (require("pyarrow", "bulk").ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            file_problems.append(f"cannot be read: {' '.join(str(error).split())[:300]}")
            problems += [f"{name}: {problem}" for problem in file_problems]
            continue
        file_schema = table.schema.remove_metadata()
        schema = file_schema if schema is None else schema
        if file_schema != schema or file_schema.names[: len(OWN_COLUMNS)] != list(OWN_COLUMNS):
            file_problems.append(f"has the columns {file_schema.names}, expected {schema.names}")
        else:
            file_problems += _row_problems(table, metadata, settings)
            ids = table["id"].to_pylist()
            counts = Counter(ids)
            duplicates = [id for id, count in counts.items() if count > 1 or id in seen]
            if duplicates:
                file_problems.append(f"holds {duplicates[0]!r}, which another row has too")
            seen.update(counts)
            failed.update(metadata["failures"])
            total += summary_of(table, 0)
        if files.get(path.name, {}).get("digest") not in (None, metadata.get("digest")):
            file_problems.append("holds other rows than manifest.json says")
        problems += [f"{name}: {problem}" for problem in file_problems]
    total.num_failures = len(failed - seen)
    problems += _total_problems(folder, manifest, total)
    return Verification(len(paths), total, problems)


def _file_problems(path: Path, entry: dict[str, Any] | None) -> Iterator[str]:
    """Compare a file with its entry in the manifest."""
    if entry is None:
        yield "is not in manifest.json; run tokenize again to add it"
        return
    size = path.stat().st_size
    if size != entry["size"]:
        yield f"has {size} bytes, manifest.json says {entry['size']}"
    elif sha256_of(path) != entry["sha256"]:
        yield "has another sha256 than manifest.json says"


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read the rows and the metadata of a Parquet file."""
    parquet = require("pyarrow.parquet", "bulk")
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
        metadata = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"null"))
    keys = {"settings", "failures", "failure_stamps", "summary", "digest"}
    if not isinstance(metadata, dict) or not keys <= metadata.keys():
        raise ValueError("it has no metadata of this command")
    table.validate(full=True)
    return table, metadata


def _row_problems(table: Any, metadata: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """Compare the rows of a file with its metadata and with the settings of the folder."""
    compute = require("pyarrow.compute", "bulk")
    if metadata["settings"] != settings:
        yield "was made with other settings than manifest.json says"
    if metadata["digest"] != digest_of(table, metadata):
        yield "has rows that do not fit their digest"
    if metadata["summary"] != asdict(summary_of(table, len(metadata["failures"]))):
        yield "has totals in its metadata that do not fit its rows"
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
    """Compare the totals in manifest.json and the lines of failures.jsonl with the rows."""
    for name, value in asdict(total).items():
        if manifest.get(name) != value:
            yield f"manifest.json: {name} is {manifest.get(name)}, but the files have {value}"
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
