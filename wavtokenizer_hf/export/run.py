"""Token folder -> training files, in chunks: by several processes, resumable, with the same bytes however often it was
interrupted.

OUTPUT/
  the files of the format
  export.json     what the files were made of and how; written last, so its presence says that all is complete
  skipped.jsonl   rows that became no sequence, with the reason (on_error="skip")
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
MAX_SUMMARY_BYTES = 2**28  # of a chunk, whose skipped rows it lists
_IGNORED = (".lock", PARTS, EXPORT)  # of this command, beside the files of a format


@dataclass
class ExportResult:
    """
    What an export holds.

    Args:
        num_clips: rows that were written.
        num_samples: samples of audio of these rows.
        num_codes: codes of these rows.
        num_sequences: sequences, or clips for formats without sequences.
        num_ids: token ids of all sequences, padding included; codes for formats without sequences.
        num_skipped: rows that were skipped.
        num_bytes: size of the files.
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
    """What a worker has to know."""

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

    Runs are resumable: after a crash run the same again. The bytes do not depend on the number of processes.

    Args:
        tokens: Folder that `tokenize` wrote.
        output: Folder for the files, created if missing; new, empty, or of an interrupted run of the same export.
        format: `MegatronFormat`, `WebDatasetFormat`, `JsonlFormat` or `LhotseFormat`.
        num_processes: Number of worker processes. A script with several needs `if __name__ == "__main__":`.
        on_error: `"fail"` stops at the first row that cannot be exported, `"skip"` lists it in skipped.jsonl.
        on_progress: called with the number of chunks that are done and of all.

    Returns:
        `ExportResult`: totals of the whole export.

    Raises:
        ValueError: no token folder; a row without codes, of another codebook, or longer than a sequence; an output
            that holds something else.
        OSError: another run works on the output, or a file cannot be written.
        ImportError: a package of an extra is missing.
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
    _check_output(output, format)
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise OSError(f"Another process is exporting to {output}. Wait for it, or end it.") from error
    try:
        if (done := _complete(output, settings)) is not None:
            shutil.rmtree(output / PARTS, ignore_errors=True)
            return done
        _begin(output, settings)
        to_do = [number for number in range(len(chunks)) if not _summary_path(output, number).exists()]
        on_progress(len(chunks) - len(to_do), len(chunks))
        num_done = itertools.count(len(chunks) - len(to_do) + 1)
        _run(job, index, chunks, to_do, num_processes, lambda number: on_progress(next(num_done), len(chunks)))
        return _finish(job, settings, len(chunks))
    finally:
        lock.release()
        with suppress(OSError):
            (output / ".lock").unlink()


def _settings(folder: TokenFolder, index: Index, format: Format, on_error: str) -> dict:
    """What the bytes depend on."""
    return {
        "format": format.describe(),
        "tokens": {
            "rows": len(index),
            "files": [path.name for path in folder.files],
            "codebook_fingerprint": folder.codebook_fingerprint,
        },
        "on_error": on_error,
    }


def _check_output(output: Path, format: Format) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, expected the name of a folder.")
    if not output.is_dir() or (output / EXPORT).exists() or (output / PARTS / EXPORT).exists():
        return
    strange = sorted(path.name for path in output.iterdir() if path.name not in _IGNORED)
    if strange:
        raise ValueError(
            f"The folder {output} holds {strange[0]}, which is not of this command. Name a new or an empty one."
        )


def _complete(output: Path, settings: dict) -> ExportResult | None:
    """The totals if the export is complete. Raises ValueError if it, or what was begun, is another one."""
    for path in (output / EXPORT, output / PARTS / EXPORT):
        if not path.exists():
            continue
        try:
            before = read_json_object(path)
            before_settings, result = before["settings"], before.get("totals")
            result = None if result is None else ExportResult(**result)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {one_line(error)}. Name another folder.") from error
        plain = json.loads(json.dumps(settings))
        if before_settings != plain:
            names = [
                f"{group}.{name}"
                for group in ("format", "tokens")
                for name in plain[group]
                if before_settings.get(group, {}).get(name) != plain[group][name]
            ] or ["on_error"]
            raise ValueError(
                f"The folder {output} holds an export with other settings ({', '.join(names)}). Run it as before, or "
                "name another folder."
            )
        if result is not None:
            return result
    return None


def _begin(output: Path, settings: dict) -> None:
    (output / PARTS).mkdir(exist_ok=True)
    for leftover in (*output.glob(".*.partial"), *(output / PARTS).glob(".*.partial")):  # of a run that was killed
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


def _run(
    job: Job,
    index: Index,
    chunks: list[np.ndarray],
    to_do: list[int],
    num_processes: int,
    on_done: Callable[[int], None],
) -> None:
    """Make the chunks, and call `on_done` with the number of each that is done."""
    if num_processes == 1 or len(to_do) < 2:
        for number in to_do:
            _make_chunk(job, index, chunks[number], number)
            on_done(number)
        return
    rows = ((Index(index.files[chunks[number]], index.rows[chunks[number]], {}), number) for number in to_do)
    run_workers(partial(_start, job), rows, on_done, min(num_processes, len(to_do)), f"{__package__}.worker")


def _start(job: Job, rank: int) -> Work:
    def make(chunk: tuple[Index, int], report: Callable[[int], None]) -> None:
        rows, number = chunk
        _make_chunk(job, rows, np.arange(len(rows)), number)
        report(number)

    return make


def _make_chunk(job: Job, index: Index, numbers: np.ndarray, number: int) -> int:
    """Writes one chunk, and then its summary, which says that it is complete."""
    rows = job.folder.read(index, numbers, job.format.columns(job.folder))
    other = {row["codebook_fingerprint"] for row in rows} - {job.folder.codebook_fingerprint, None}
    if other:
        raise ValueError(
            f"{job.folder.folder} has rows of the codebook {sorted(other)[0]}, and its manifest.json says "
            f"{job.folder.codebook_fingerprint}. Make it anew."
        )
    problems = [job.folder.problem(row) for row in rows]
    bad = [BadRow(row["id"], problem) for row, problem in zip(rows, problems, strict=True) if problem is not None]
    rows = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
    summary = job.format.write_chunk(job.folder, rows, job.output, PARTS, number, bad)
    if bad and job.on_error == "fail":
        for path in job.format.chunk_files(job.output, PARTS, number):
            path.unlink(missing_ok=True)
        raise ValueError(
            f"The row {bad[0].id!r} cannot be exported: {bad[0].reason}. Mend or remove it, or skip such rows "
            "(--on-error skip)."
        )
    skipped = {row.id for row in bad}
    there = [row for row in rows if row["id"] not in skipped]
    result = ExportResult(
        num_clips=len(there),
        num_samples=sum(row["num_samples"] for row in there),
        num_codes=sum(len(row["audio_codes"]) for row in there),
        num_skipped=len(bad),
        **summary,
    )
    _write_json(_summary_path(job.output, number), {"totals": asdict(result), "skipped": [asdict(row) for row in bad]})
    return number


def _finish(job: Job, settings: dict, num_chunks: int) -> ExportResult:
    """Puts the chunks together, and says that all is complete."""
    totals, skipped = ExportResult(), []
    for number in range(num_chunks):
        summary = read_json_object(_summary_path(job.output, number), MAX_SUMMARY_BYTES)
        totals += ExportResult(**summary["totals"])
        skipped += summary["skipped"]
    if totals.num_sequences == 0:
        raise ValueError(f"No row of {job.folder.folder} can be exported; the first: {skipped[0]['reason']}.")
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
    What an export would hold, and about how many seconds one process would take: its first chunk is made and thrown
    away.
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
        _make_chunk(job, index, chunks[0], 0)
        seconds = time.monotonic() - started
        first = ExportResult(**json.loads(_summary_path(Path(temporary), 0).read_text(encoding="utf-8"))["totals"])
        size = sum(path.stat().st_size for path in format.chunk_files(Path(temporary), PARTS, 0))
    share = len(index) / len(chunks[0])
    total.num_sequences = round(first.num_sequences * share)
    total.num_ids, total.num_bytes = round(first.num_ids * share), round(size * share)
    total.num_skipped = round(first.num_skipped * share)
    return total, seconds * share
