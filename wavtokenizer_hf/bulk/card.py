"""The dataset card, README.md of the output folder."""

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
FROM_SOURCE = ("license", "license_name", "license_link", "language")
"""Metadata that is taken from the card of the source."""
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/part-*.parquet"}]}]

MEANINGS = {
    "id": "name of the clip in its source",
    "audio_codes": "one code per started {hop_length} samples, each in [0, {codebook_size})",
    "num_samples": "length of the clip at {sampling_rate} Hz; cut decoded audio to it",
    "duration": "length of the clip in seconds",
    "source_sampling_rate": "sample rate of the source audio in Hz, before resampling",
    "source_channels": "number of channels of the source audio, before they became one",
    "codebook_fingerprint": "fingerprint of the codebook that the codes belong to",
    "source_size": "size in bytes of the file with the clip; null without a file",
    "source_mtime_ns": "time of the last change of that file, in ns since 1970",
    "warnings": "problems of the audio: silent, cancelled (opposite channels), out-of-range",
}


def card(
    settings: Settings, schema: Any, total: Summary, complete: bool, metadata: dict[str, Any] | None = None
) -> str:
    """
    Return the text of README.md.

    Args:
        settings: Settings of the rows.
        schema: Schema of the rows (pyarrow).
        total: Totals of the folder.
        complete: Whether every clip of the source has a row or a failure.
        metadata: Further metadata, such as `license` and `language`. What is not known is left out, and the card says
            so.
    """
    metadata = metadata or {}
    facts = vars(settings)
    rows = [
        f"| `{field.name}` | {field.type} | {MEANINGS.get(field.name, 'column of the source').format(**facts)} |"
        for field in schema
    ]
    hours = total.num_samples / settings.sampling_rate / 3600
    level = settings.target_peak_dB_FS
    peak = "" if level is None else f", each clip scaled to a peak of {level:g} dBFS"
    peak += "" if settings.channel == "mean" else f", only channel `{settings.channel}`"
    revision = "" if settings.revision is None else f" at revision `{settings.revision}`"
    return f"""---
{_metadata(schema, total, metadata)}
---
{GENERATED_MARKER}

# WavTokenizer codes

{"" if complete else "**Not complete yet.** "}{total.num_clips:,} clips, {hours:,.2f} hours, {total.num_codes:,} codes of [WavTokenizer](https://arxiv.org/abs/2408.16532).
{total.num_failures:,} clips failed. `failures.jsonl` lists them with the reasons.

Source: `{settings.source}`. Model: `{settings.model}`{revision}{peak}. {settings.sampling_rate / settings.hop_length:g} codes per second, codebook
fingerprint `{settings.codebook_fingerprint}`. Only this codebook decodes the codes.
{_missing(metadata)}
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
    """Return the metadata in YAML, without `configs`: those are for the Hub alone, see `add_configs`."""
    own = {
        "size_categories": [size_category(total.num_clips)],
        "tags": ["audio", "audio-tokens", "wavtokenizer"],
        **_features(schema),
    }
    return DatasetCardData(**{**metadata, **own}).to_yaml()


def _features(schema: Any) -> dict[str, Any]:
    """Return `dataset_info` with the columns as the Hub writes them; nothing where the datasets library is missing."""
    try:
        from datasets import DatasetInfo, Features
        from datasets.info import DatasetInfosDict
    except ImportError:
        return {}
    # without splits: load_dataset compares their sizes, and rows may be written after this card
    data = DatasetCardData()
    DatasetInfosDict(default=DatasetInfo(features=Features.from_arrow_schema(schema))).to_dataset_card_data(data)
    return {"dataset_info": {"features": data.to_dict()["dataset_info"]["features"]}}


def _missing(metadata: dict[str, Any]) -> str:
    """Return a paragraph on what the user should add, or nothing."""
    missing = [name for name in ("license", "language") if not metadata.get(name)]
    if not missing:
        return ""
    options = " and ".join(f"`--{name}`" for name in missing)
    return (
        f"\n**To do:** the metadata above has no {' and no '.join(f'`{name}`' for name in missing)}. "
        f"Add them, or run `wavtokenizer tokenize` again with {options}.\n"
    )


def size_category(num_clips: int) -> str:
    """Return the Hub's name for a number of rows."""
    bounds = {"n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7, "10M<n<100M": 1e8}
    bounds |= {"100M<n<1B": 1e9, "1B<n<10B": 1e10, "10B<n<100B": 1e11, "100B<n<1T": 1e12}
    return next((name for name, bound in bounds.items() if num_clips < bound), "n>1T")


def read_metadata(path: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Return the metadata of a card; empty if there is no card or it has none.

    Args:
        path: README.md of a folder or repository.
        names: Names to read. The rest is not parsed: cards of large datasets have megabytes of features.

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
    Return licence and language from the card of a source: README.md of its folder or of its dataset on the Hub.

    Args:
        source: Source of `tokenize`.
        revision: Branch, tag or commit of a dataset on the Hub.
    """
    if not isinstance(source, (str, Path)):
        return {}
    path = Path(source, "README.md") if Path(source).exists() else _card_on_hub(str(source), revision)
    try:
        found = {} if path is None else read_metadata(path, FROM_SOURCE)
    except (OSError, ValueError):
        return {}
    return {name: found[name] for name in FROM_SOURCE if _is_text(found.get(name))}


def _card_on_hub(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, "README.md", repo_type="dataset", revision=revision))
    except (OSError, HFValidationError, HTTP_ERROR):  # no card, no network, or a glob of files
        return None


def _is_text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and 0 < len(each) <= 200 for each in values)


def add_configs(text: str) -> str:
    """
    Return a card with `configs`, for the Hub.

    A folder on this machine goes without: with them, datasets 5.2 takes what it cached for another folder of the same
    name.
    """
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None or re.search(r"^configs:", match[1], re.MULTILINE):
        return text
    configs = DatasetCardData(configs=CONFIGS).to_yaml()
    return f"---\n{configs}\n{text.removeprefix('---' + chr(10))}"
