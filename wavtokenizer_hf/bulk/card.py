"""The dataset card that lies beside the parts."""

from .records import Settings, Summary


GENERATED_MARKER = "<!-- written anew by `wavtokenizer tokenize` for as long as this line is here -->"

MEANINGS = {
    "id": "names the clip in its source",
    "audio_codes": "one code for each started {hop_length} samples, each in [0, {codebook_size})",
    "num_samples": "of the clip at {sampling_rate} Hz; cut decoded audio to it",
    "duration": "seconds",
    "source_sampling_rate": "Hz of the sound before it was resampled",
    "source_channels": "of the sound before they were averaged to one",
    "codebook_fingerprint": "of the codebook that the codes belong to",
    "source_size": "bytes of the file that the clip came from (null: it came from no file)",
    "source_mtime_ns": "when that file was last changed, in ns since 1970",
    "warnings": "what is strange about the sound: silent, cancelled (opposite channels), out-of-range",
}


def card(settings: Settings, schema, total: Summary, complete: bool) -> str:
    """The text of README.md."""
    facts = vars(settings)
    rows = [
        f"| `{field.name}` | {field.type} | {MEANINGS.get(field.name, 'carried along from the source').format(**facts)} |"
        for field in schema
    ]
    hours = total.num_samples / settings.sampling_rate / 3600
    level = settings.target_peak_dB_FS
    peak = "" if level is None else f", each clip scaled to a peak of {level:g} dBFS"
    peak += "" if settings.channel == "mean" else f", channel `{settings.channel}` alone"
    revision = "" if settings.revision is None else f" at revision `{settings.revision}`"
    return f"""---
tags:
- audio
- audio-tokens
- wavtokenizer
---
{GENERATED_MARKER}

# WavTokenizer tokens

{"" if complete else "**Not complete yet.** "}{total.num_clips:,} clips, {hours:,.2f} hours, {total.num_codes:,} codes of [WavTokenizer](https://arxiv.org/abs/2408.16532);
{total.num_failures:,} clips failed and are listed with their reasons in `failures.jsonl`.

Made of `{settings.source}` with the model `{settings.model}`{revision}{peak}: {settings.sampling_rate / settings.hop_length:g} codes per second, codebook
fingerprint `{settings.codebook_fingerprint}`. Codes of one model are noise to any other; the fingerprint tells them apart.

| column | type | |
|---|---|---|
{chr(10).join(rows)}

```python
from datasets import load_dataset
from wavtokenizer_hf.bulk import detokenize_dataset

tokens = load_dataset("path/or/name", split="train")
sounds = detokenize_dataset(tokens, "{settings.model}")  # refuses a model with another codebook
```
"""
