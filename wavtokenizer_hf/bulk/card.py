"""Write the dataset card, README.md of the output folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from ..hub_errors import HTTP_ERROR
from ..limited_files import parse_yaml, read_file
from .records import Settings, Summary


GENERATED_MARKER = "<!-- written anew by `wavtokenizer tokenize` for as long as this line is here -->"
MAX_CARD_BYTES = 2**24
SOURCE_METADATA_KEYS = ("license", "license_name", "license_link", "language")
"""Metadata that is copied from the card of the source."""
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/part-*.parquet"}]}]

COLUMN_DESCRIPTIONS = {
    "id": "name of the clip in its source",
    "audio_codes": "one code per {hop_length} samples (the last may cover fewer), each in [0, {codebook_size})",
    "num_samples": "length of the clip at {sampling_rate} Hz; cut decoded audio to it",
    "duration": "length of the clip in seconds",
    "source_sampling_rate": "sampling rate of the source audio in Hz, before resampling",
    "source_channels": "number of channels of the source audio, before mixing",
    "codebook_fingerprint": "fingerprint of the codebook that the codes belong to",
    "source_size": "size in bytes of the file with the clip; null without a file",
    "source_mtime_ns": "time of the last change of that file, in ns since 1970",
    "warnings": "problems of the audio: silent, cancelled (opposite channels), out-of-range",
}


def render_card(
    settings: Settings, schema: Any, total: Summary, complete: bool, metadata: dict[str, Any] | None = None
) -> str:
    """
    Return the text of README.md.

    Args:
        settings: Settings of the rows.
        schema: Schema of the rows (pyarrow).
        total: Totals of the folder.
        complete: Whether every clip of the source has a row or a failure.
        metadata: Further metadata, such as `license` and `language`. If one of these two is missing, the card asks
            the user to add it.
    """
    metadata = metadata or {}
    values = vars(settings)
    descriptions = {name: text.format(**values) for name, text in COLUMN_DESCRIPTIONS.items()}
    rows = [
        f"| `{field.name}` | {field.type} | {descriptions.get(field.name, 'column of the source')} |"
        for field in schema
    ]
    hours = total.num_samples / settings.sampling_rate / 3600
    level = settings.target_peak_dB_FS
    processing = "" if level is None else f", each clip scaled to a peak of {level:g} dBFS"
    processing += "" if settings.channel == "mean" else f", only channel `{settings.channel}`"
    revision = "" if settings.revision is None else f" at revision `{settings.revision}`"
    summary = (
        f"{'' if complete else '**Not complete yet.** '}{total.num_clips:,} clips, {hours:,.2f} hours, "
        f"{total.num_codes:,} codes of [WavTokenizer](https://arxiv.org/abs/2408.16532)."
    )
    origin = (
        f"Source: `{settings.source}`. Model: `{settings.model}`{revision}{processing}. "
        f"{settings.sampling_rate / settings.hop_length:g} codes per second, codebook"
    )
    return f"""---
{_metadata(schema, total, metadata)}
---
{GENERATED_MARKER}

# WavTokenizer codes

{summary}
{total.num_failures:,} clips failed. `failures.jsonl` lists them with the reasons.

{origin}
fingerprint `{settings.codebook_fingerprint}`. Only this codebook decodes the codes.
{_missing_metadata(metadata)}
| column | type | content |
|---|---|---|
{chr(10).join(rows)}

```python
from datasets import load_dataset
from wavtokenizer_hf.bulk import detokenize_dataset

tokens = load_dataset("path/or/name", split="train")
audio = detokenize_dataset(tokens, "{settings.model}")  # refuses a model with another codebook
```
"""


def _metadata(schema: Any, total: Summary, metadata: dict[str, Any]) -> str:
    """Return the metadata in YAML. `add_configs` adds the `configs`, which only the Hub needs."""
    generated = {
        "size_categories": [size_category(total.num_clips)],
        "tags": ["audio", "audio-tokens", "wavtokenizer"],
        **_features(schema),
    }
    return DatasetCardData(**{**metadata, **generated}).to_yaml()


def _features(schema: Any) -> dict[str, Any]:
    """Return `dataset_info` with the columns in the Hub's format, or nothing if datasets is not installed."""
    try:
        from datasets import DatasetInfo, Features
        from datasets.info import DatasetInfosDict
    except ImportError:
        return {}
    # no splits: load_dataset compares their sizes with the data, and a later run may add rows
    data = DatasetCardData()
    DatasetInfosDict(default=DatasetInfo(features=Features.from_arrow_schema(schema))).to_dataset_card_data(data)
    return {"dataset_info": {"features": data.to_dict()["dataset_info"]["features"]}}


def _missing_metadata(metadata: dict[str, Any]) -> str:
    """Return a paragraph that asks the user to add the missing metadata, or nothing."""
    missing = [name for name in ("license", "language") if not metadata.get(name)]
    if not missing:
        return ""
    options = " and ".join(f"`--{name}`" for name in missing)
    return (
        f"\n**To do:** the metadata above has no {' and no '.join(f'`{name}`' for name in missing)}. "
        f"Add them, or run `wavtokenizer tokenize` again with {options}.\n"
    )


def size_category(num_clips: int) -> str:
    """Return the Hub's size category for a number of clips."""
    bounds = {"n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7, "10M<n<100M": 1e8}
    bounds |= {"100M<n<1B": 1e9, "1B<n<10B": 1e10, "10B<n<100B": 1e11, "100B<n<1T": 1e12}
    return next((name for name, bound in bounds.items() if num_clips < bound), "n>1T")


def read_metadata(path: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Return the metadata of a card; empty if there is no card or it has none.

    Args:
        path: README.md of a folder or repository.
        names: Names to read. The rest is not parsed, because cards of large datasets have megabytes of features.

    Raises:
        ValueError: The metadata cannot be parsed.
    """
    if not path.is_file():
        return {}
    match = re.match(rb"---\r?\n(.*?)\r?\n---\s", read_file(path, MAX_CARD_BYTES), re.DOTALL)
    content = b"" if match is None else match[1]
    if names is not None:
        key = "|".join(names).encode()
        content = b"\n".join(re.findall(rb"^(?:%s):[^\n]*(?:\n[ \t-][^\n]*)*" % key, content, re.MULTILINE))
    metadata = parse_yaml(content) or {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a mapping")
    return {name: value for name, value in metadata.items() if isinstance(name, str)}


def source_metadata(source: Any, revision: str | None) -> dict[str, Any]:
    """
    Return licence and language from the card of a source.

    The card is README.md of the source's folder, or of its dataset on the Hub.

    Args:
        source: Source of `tokenize`.
        revision: Branch, tag or commit of a dataset on the Hub.
    """
    if not isinstance(source, (str, Path)):
        return {}
    path = Path(source, "README.md") if Path(source).exists() else _card_on_hub(str(source), revision)
    try:
        metadata = {} if path is None else read_metadata(path, SOURCE_METADATA_KEYS)
    except (OSError, ValueError):
        return {}
    return {name: metadata[name] for name in SOURCE_METADATA_KEYS if _is_short_text(metadata.get(name))}


def _card_on_hub(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, "README.md", repo_type="dataset", revision=revision))
    except (OSError, HFValidationError, HTTP_ERROR):  # no card, no network, or a glob of files
        return None


def _is_short_text(value: Any) -> bool:
    """Return whether a value is a text of 1 to 200 characters, or a list of such texts that is not empty."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and 0 < len(each) <= 200 for each in values)


def add_configs(text: str) -> str:
    """
    Add `configs` to the text of a card, for the Hub.

    The card of a local folder has none. With `configs`, datasets 5.2 would load what it cached for another folder of
    the same name.
    """
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None or re.search(r"^configs:", match[1], re.MULTILINE):
        return text
    configs = DatasetCardData(configs=CONFIGS).to_yaml()
    return f"---\n{configs}\n{text.removeprefix('---' + chr(10))}"
