"""Token folders with random rows, written by the same code that `tokenize` uses."""

from pathlib import Path

import numpy as np
import pyarrow

from wavtokenizer_hf.bulk.output import OutputFolder
from wavtokenizer_hf.bulk.records import NO_FILE, Settings, Tokens


FINGERPRINT = "0123456789abcdef"


def write_token_folder(
    folder: Path,
    num_rows: int,
    lengths: tuple[int, int] = (1, 60),
    rows_per_part: int = 40,
    codebook_size: int = 64,
    hop_length: int = 16,
    columns: dict[str, list] | None = None,
    fingerprint: str = FINGERPRINT,
    seed: int = 0,
) -> list[dict]:
    """Write `num_rows` clips with random codes. Return id, codes, samples and extra columns of each."""
    random = np.random.default_rng(seed)
    columns = columns or {}
    schema = pyarrow.Table.from_pydict(columns).schema if columns else pyarrow.schema([])
    settings = Settings(
        source="made up", column=None, dataset_config=None, dataset_revision=None, split=None, model="tiny",
        revision=None, codebook_fingerprint=fingerprint, encoder_fingerprint="0" * 16, codebook_size=codebook_size,
        hop_length=hop_length, sampling_rate=24_000, target_peak_dB_FS=None,
        columns={field.name: str(field.type) for field in schema},
    )  # fmt: skip
    rows = []
    with OutputFolder(folder, settings, schema).open() as output:
        for start in range(0, num_rows, rows_per_part):
            numbers = range(start, min(start + rows_per_part, num_rows))
            ids = [f"clips/{number:06d}.wav" for number in numbers]
            sizes = random.integers(*lengths, len(ids), endpoint=True)
            tokens = [
                Tokens(random.integers(0, codebook_size, size, dtype=np.uint16), int(size) * hop_length - 3, 16_000, 1)
                for size in sizes
            ]
            beside = [{name: values[number] for name, values in columns.items()} for number in numbers]
            output.write_file(ids, tokens, beside, [NO_FILE] * len(ids))
            rows += [
                {"id": id, "audio_codes": each.audio_codes, "num_samples": each.num_samples, **more}
                for id, each, more in zip(ids, tokens, beside, strict=True)
            ]
        output.summarize(row["id"] for row in rows)
    return rows
