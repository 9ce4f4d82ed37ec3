"""Write training files from a token folder, in chunks and by several processes.

Runs are resumable, and the bytes of the files do not depend on interruptions.

OUTPUT/
  the files of the format
  export.json     settings and totals; written last, so the export is complete if it exists
  skipped.jsonl   rows that could not be exported, with the reason (on_error="skip")
  .parts/         finished chunks, until the export is complete
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .. import __version__
from ..extras import require
from ..limited_files import one_line, read_json_object
from ..worker_processes import Work, run_workers, stop_in_unguarded_script
from .files import open_atomic
from .formats import Format
from .sequences import BadRow
from .token_folder import Index, TokenFolder


EXPORT = "export.json"
PARTS = ".parts"
MAX_SUMMARY_BYTES = 2**28  # size limit of a chunk's summary, which lists the skipped rows
_OWN_NAMES = (".lock", PARTS, EXPORT)  # written by this module, not by a format


@dataclass
class ExportResult:
    """
    Totals of an export.

    Args:
        num_clips: Number of rows that were written.
        num_samples: Number of audio samples of these rows.
        num_codes: Number of codes of these rows.
        num_sequences: Number of sequences, or of clips for formats without sequences.
        num_ids: Number of token ids of all sequences, including padding; of codes for formats without sequences.
        num_skipped: Number of rows that were skipped.
        num_bytes: Size of the files, in bytes.
    """

    num_clips: int = 0
    num_samples: int = 0
    num_codes: int = 0
    num_sequences: int = 0
    num_ids: int = 0
    num_skipped: int = 0
    num_bytes: int = 0

    def __add__(self, other: "ExportResult") -> "ExportResult":
        return ExportResult(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Job:
    """Arguments of an export that every worker needs."""

    folder: TokenFolder
    format: Format
    output: Path
    on_error: str


def export_tokens(
    tokens: str | os.PathLike,
    output: str | os.PathLike,
    format: Format,
    num_processes: int = 1,
    on_error: str = "fail",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """
    Write the rows of a token folder as training files. Needs no model.

    Runs are resumable: after a crash, make the same call again. The bytes do not depend on the number of processes.

    Args:
        tokens: Token folder that `tokenize` wrote.
        output: Folder for the files, created if missing. It must be empty, or hold an earlier run of the same export.
        format: `MegatronFormat`, `WebDatasetFormat`, `JsonlFormat` or `LhotseFormat`.
        num_processes: Number of worker processes. A script with several needs `if __name__ == "__main__":`.
        on_error: `"fail"` stops at the first row that cannot be exported, `"skip"` lists such rows in skipped.jsonl.
        on_progress: Called with the number of finished chunks and the number of all chunks.

    Returns:
        `ExportResult`: totals of the whole export.

    Raises:
        ValueError: `tokens` is not a token folder. A row has no codes, codes of another codebook, or more ids than a
            sequence may have. `output` holds other files, or another export.
        OSError: Another run writes to the output, or a file cannot be written.
        ImportError: A package of an extra is missing.
    """
    if num_processes > 1:
        stop_in_unguarded_script()
    if on_error not in ("fail", "skip"):
        raise ValueError(f"Got on_error={on_error!r}, expected 'fail' or 'skip'.")
    if num_processes < 1:
        raise ValueError(f"Got num_processes={num_processes}, expected at least 1.")
    folder, output = TokenFolder(tokens), Path(output)
    format.check(folder)
    index = folder.index(format.index_columns)
    chunks = format.plan(folder, index)
    settings = _settings(folder, index, format, on_error)
    job = Job(folder, format, output, on_error)
    filelock = require("filelock", "bulk")
    _check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise OSError(f"Another process is exporting to {output}. Wait for it, or end it.") from error
    try:
        if (result := _completed_result(output, settings)) is not None:
            shutil.rmtree(output / PARTS, ignore_errors=True)
            return result
        _prepare_parts(output, settings)
        pending = [number for number in range(len(chunks)) if not _summary_path(output, number).exists()]
        on_progress(len(chunks) - len(pending), len(chunks))
        num_done = itertools.count(len(chunks) - len(pending) + 1)
        _write_chunks(job, index, chunks, pending, num_processes, lambda _: on_progress(next(num_done), len(chunks)))
        return _finish(job, settings, len(chunks))
    finally:
        lock.release()
        with suppress(OSError):
            (output / ".lock").unlink()


def _settings(folder: TokenFolder, index: Index, format: Format, on_error: str) -> dict:
    """Return the settings that determine the bytes of the files, for JSON."""
    return {
        "format": format.describe(),
        "tokens": {
            "rows": len(index),
            "files": [path.name for path in folder.files],
            "codebook_fingerprint": folder.codebook_fingerprint,
        },
        "on_error": on_error,
    }


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, expected the name of a folder.")
    if not output.is_dir() or (output / EXPORT).exists() or (output / PARTS / EXPORT).exists():
        return
    foreign = sorted(path.name for path in output.iterdir() if path.name not in _OWN_NAMES)
    if foreign:
        raise ValueError(
            f"The folder {output} holds {foreign[0]}, which is not of this command. Name a new or an empty one."
        )


def _completed_result(output: Path, settings: dict) -> ExportResult | None:
    """Return the totals if the export is complete. Raises ValueError if the folder holds another export."""
    for path in (output / EXPORT, output / PARTS / EXPORT):
        if not path.exists():
            continue
        try:
            content = read_json_object(path)
            found_settings, totals = content["settings"], content.get("totals")
            result = None if totals is None else ExportResult(**totals)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {one_line(error)}. Name another folder.") from error
        expected = json.loads(json.dumps(settings))  # in the form that the file has
        if found_settings != expected:
            names = [
                f"{group}.{name}"
                for group in ("format", "tokens")
                for name in expected[group]
                if found_settings.get(group, {}).get(name) != expected[group][name]
            ] or ["on_error"]
            raise ValueError(
                f"The folder {output} holds an export with other settings ({', '.join(names)}). Use the same "
                "settings, or name another folder."
            )
        if result is not None:
            return result
    return None


def _prepare_parts(output: Path, settings: dict) -> None:
    (output / PARTS).mkdir(exist_ok=True)
    for leftover in (*output.glob(".*.partial"), *(output / PARTS).glob(".*.partial")):  # from a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not (output / PARTS / EXPORT).exists():
        _write_json(output / PARTS / EXPORT, {"settings": settings})


def _write_json(path: Path, content: dict) -> None:
    with open_atomic(path, "w") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _summary_path(output: Path, number: int) -> Path:
    return output / PARTS / f"{number:06d}.json"


# ---------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------


def _write_chunks(
    job: Job,
    index: Index,
    chunks: list[np.ndarray],
    pending: list[int],
    num_processes: int,
    on_done: Callable[[int], None],
) -> None:
    """Write the pending chunks, and call `on_done` with the number of each finished chunk."""
    if num_processes == 1 or len(pending) < 2:
        for number in pending:
            _write_chunk(job, index, chunks[number], number)
            on_done(number)
        return
    # workers get the index of their chunk only, since the whole index may be large
    rows = ((Index(index.files[chunks[number]], index.rows[chunks[number]], {}), number) for number in pending)
    run_workers(partial(_start_worker, job), rows, on_done, min(num_processes, len(pending)), f"{__package__}.worker")


def _start_worker(job: Job, rank: int) -> Work:
    def write(chunk: tuple[Index, int], report: Callable[[int], None]) -> None:
        rows, number = chunk
        _write_chunk(job, rows, np.arange(len(rows)), number)
        report(number)

    return write


def _write_chunk(job: Job, index: Index, positions: np.ndarray, number: int) -> None:
    """Write the files of a chunk, then its summary. A chunk with a summary is complete."""
    rows = job.folder.read(index, positions, job.format.columns(job.folder))
    other = {row["codebook_fingerprint"] for row in rows} - {job.folder.codebook_fingerprint, None}
    if other:
        raise ValueError(
            f"{job.folder.folder} has rows of the codebook {sorted(other)[0]}, and its manifest.json names "
            f"{job.folder.codebook_fingerprint}. Tokenize the clips again, into a new folder."
        )
    problems = [job.folder.problem(row) for row in rows]
    bad = [BadRow(row["id"], problem) for row, problem in zip(rows, problems, strict=True) if problem is not None]
    rows = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
    summary = job.format.write_chunk(job.folder, rows, job.output, PARTS, number, bad)
    if bad and job.on_error == "fail":
        for path in job.format.chunk_files(job.output, PARTS, number):
            path.unlink(missing_ok=True)
        raise ValueError(
            f"The row {bad[0].id!r} cannot be exported: {bad[0].reason}. Repair or remove it, or skip such rows "
            "(--on-error skip)."
        )
    bad_ids = {row.id for row in bad}
    exported = [row for row in rows if row["id"] not in bad_ids]
    result = ExportResult(
        num_clips=len(exported),
        num_samples=sum(row["num_samples"] for row in exported),
        num_codes=sum(len(row["audio_codes"]) for row in exported),
        num_skipped=len(bad),
        **summary,
    )
    _write_json(_summary_path(job.output, number), {"totals": asdict(result), "skipped": [asdict(row) for row in bad]})


def _finish(job: Job, settings: dict, num_chunks: int) -> ExportResult:
    """Merge the chunks, and write export.json, which marks the export as complete."""
    totals, skipped = ExportResult(), []
    for number in range(num_chunks):
        summary = read_json_object(_summary_path(job.output, number), MAX_SUMMARY_BYTES)
        totals += ExportResult(**summary["totals"])
        skipped += summary["skipped"]
    if totals.num_sequences == 0:
        raise ValueError(
            f"No row of {job.folder.folder} can be exported. Reason of the first: {skipped[0]['reason']}."
        )
    totals.num_bytes += job.format.finish(job.folder, job.output, PARTS, num_chunks)
    if skipped:
        with open_atomic(job.output / "skipped.jsonl", "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped)
    content = {
        "settings": settings,
        "totals": asdict(totals),
        "hours": totals.num_samples / job.folder.sampling_rate / 3600,
        "written_by": f"wavtokenizer_hf {__version__}",
    }
    _write_json(job.output / EXPORT, content)
    shutil.rmtree(job.output / PARTS, ignore_errors=True)
    return totals


def estimate(tokens: str | os.PathLike, format: Format) -> tuple[ExportResult, float]:
    """
    Estimate the totals of an export, and how many seconds one process would take.

    Exports the first chunk to a temporary folder, and extrapolates from it.
    """
    import tempfile

    folder = TokenFolder(tokens)
    format.check(folder)
    index = folder.index([*dict.fromkeys([*format.index_columns, "num_samples"])])
    chunks = format.plan(folder, index)
    num_samples = index.columns["num_samples"]
    total = ExportResult(
        num_clips=len(index),
        num_samples=int(num_samples.sum()),
        num_codes=int(-(-num_samples // folder.hop_length).sum()),
    )
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / PARTS).mkdir()
        started = time.monotonic()
        job = Job(folder, format, Path(temporary), "skip")
        _write_chunk(job, index, chunks[0], 0)
        seconds = time.monotonic() - started
        first = ExportResult(**json.loads(_summary_path(Path(temporary), 0).read_text(encoding="utf-8"))["totals"])
        size = sum(path.stat().st_size for path in format.chunk_files(Path(temporary), PARTS, 0))
    ratio = len(index) / len(chunks[0])  # of all rows to those of the first chunk
    total.num_sequences = round(first.num_sequences * ratio)
    total.num_ids, total.num_bytes = round(first.num_ids * ratio), round(size * ratio)
    total.num_skipped = round(first.num_skipped * ratio)
    return total, seconds * ratio
