"""Write model cards for converted folders and published checkpoints.

    python -m wavtokenizer_hf.conversion.card

In a checkout, this writes model_cards/NAME.md for every entry of checkpoints.yaml.
"""

import string
from pathlib import Path

from huggingface_hub import ModelCardData

from .. import WavTokenizerConfig, __version__
from ..atomic_files import write_text
from .published import PublishedCheckpoint, table
from .source import Source


CARDS = Path(__file__).parent.parent / "model_cards"
REPOSITORY_URL = "https://github.com/jishengpeng/WavTokenizer"
NEXT_TO_APERTUS = """
Apertus 1.5 scales each clip to a peak of -3 dBFS (`normalize_audio=True`) and gives code c the id 262344 + c.

Source: [Apertus 1.5 in transformers](https://github.com/huggingface/transformers/tree/main/src/transformers/models/apertus1p5).
"""


def converted_card(source: Source, name: str, published: PublishedCheckpoint | None) -> str:
    """Return the card of a converted folder, from its files and the facts of the published checkpoint."""
    files = [f"`{path.name}` (sha256 `{digest}`)" for path, digest in source.files.items()]
    rows = {
        "weights": "the mean of the checkpoints named below"
        if source.averaged
        else "bit-identical to those of the checkpoint",
        "codebook fingerprint": f"`{source.config.codebook_fingerprint}`",
        "converted from": ", ".join(files),
        "converted by": f"wavtokenizer_hf {__version__}",
    }
    if source.cast:
        rows["weights"] += f", except {cast_text(source)}"
    unverified = None if published is None else published.unverified_reason(list(source.files))
    facts_source = "the tensors of that file, read by the converter"
    return _card(source.config, name, rows, facts_source, published, unverified)


def published_card(published: PublishedCheckpoint) -> str:
    """Return the card of a published checkpoint, without the facts that only its file shows."""
    fingerprint = "in config.json, after conversion" if published.fingerprint is None else f"`{published.fingerprint}`"
    file = "FILE " if published.repository is None else ""
    rows = {
        "codebook fingerprint": fingerprint,
        "convert": f"`wavtokenizer convert {file}--checkpoint {published.name} --output DIR`",
    }
    configs = f"[the reference implementation]({REPOSITORY_URL}/tree/main/configs)"
    facts_source = f"the shape that all published files share, in the settings of {configs}"
    return _card(published.config, f"wavtokenizer-{published.name}", rows, facts_source, published)


def cast_text(source: Source) -> str:
    """Describe the tensors that were not float32 in the checkpoint."""
    return (
        ", ".join(f"{count} {dtype.removeprefix('torch.')} tensors" for dtype, count in source.cast.items())
        + " converted to float32"
    )


def _card(
    config: WavTokenizerConfig,
    path: str,
    rows: dict[str, str],
    facts_source: str,
    published: PublishedCheckpoint | None,
    unverified: str | None = None,
) -> str:
    shape = {
        "audio": f"mono, {config.sampling_rate} Hz",
        "codes": f"{config.frame_rate:g} per second, one for every {config.hop_length} samples",
        "codebook": f"{config.codebook_size} entries",
        "bit rate": f"{config.bit_rate:g} bit/s",
    }
    lines = [f"| {name} | {value} |" for name, value in {**shape, **rows}.items()]
    facts = "\n".join(["| | |", "|---|---|", *lines, "", f"Source: {facts_source}."])
    text = string.Template((CARDS / "template.md").read_text(encoding="utf-8")).substitute(
        title=path,
        path=path,
        description=_description(published, unverified),
        facts=facts,
        mirror=_mirror(published),
        sampling_rate=config.sampling_rate,
        codebook_size=config.codebook_size,
        language_models=NEXT_TO_APERTUS if published is not None and published.name == "large-unify-40" else "",
        limits=_limits(published),
        measured=_measured(published),
    )
    return f"---\n{_metadata(published).to_yaml()}\n---\n{text}"


def _metadata(published: PublishedCheckpoint | None) -> ModelCardData:
    return ModelCardData(
        language="en" if published is not None and published.corpus == "LibriTTS" else None,
        license="mit",
        library_name="transformers",
        pipeline_tag="audio-to-audio",  # for feature-extraction, the Hub would show pipeline() code for text
        tags=["wavtokenizer", "audio-codec", "audio-tokenizer", "audio"],
    )


def _description(published: PublishedCheckpoint | None, unverified: str | None) -> str:
    if published is None:
        return "Converted from a checkpoint of the reference implementation."
    where = "no longer on the Hub"
    if published.repository is not None:
        where = f"in [{published.repository}](https://huggingface.co/{published.repository})"
    origin = "The weights are those"
    if unverified is not None:
        origin = (
            f"{unverified[0].upper()}{unverified[1:].replace(published.name, f'`{published.name}`', 1)}. The origin, "
            "training data and limits in this card hold only if it is that checkpoint.\n\nThen the weights are those"
        )
    return (
        f"{origin} of `{published.file}`, {where}. Its settings are in `{published.yaml}`.\n\n"
        f"**Trained on** {published.domain}. Corpus: {published.corpus}. {published.remarks}\n\n"
        f"Source: {', '.join(published.sources)}."
    )


def _mirror(published: PublishedCheckpoint | None) -> str:
    if published is None or published.mirror is None:
        return ""
    url = f"https://huggingface.co/{published.mirror}"
    return f". The conversion for transformers is [{published.mirror}]({url}), which wavtokenizer_hf also loads"


def _limits(published: PublishedCheckpoint | None) -> str:
    languages = "- Languages: those of the corpus, which its authors do not list. Test yours before you use the model."
    if published is None:
        return "- Its training data is not known here. Test it on your kind of audio before you use it."
    if published.corpus == "LibriTTS":
        paper = "[its paper](https://arxiv.org/abs/1904.02882)"
        languages = f"- Languages: LibriTTS is read English ({paper}). Other languages were not in training."
    if published.domain == "speech":
        return f"{languages}\n- Music and other sounds were not in training."
    if "no speech" in published.domain:
        return "- Speech was not in training. Use another checkpoint for it."
    return languages


def _measured(published: PublishedCheckpoint | None) -> str:
    lines = []
    for answer in () if published is None else published.known_answers:
        codes = ", ".join(map(str, answer.first_codes))
        lines.append(
            f"A sine of {answer.hertz:g} Hz, amplitude {answer.amplitude:g}, {answer.seconds:g} s, gives "
            f"{answer.num_codes} codes. The first are {codes}. Conversion by name checks this.\n\nSource: "
            f"{answer.source}."
        )
    lines.append(
        "The quality of these weights was not measured for this card. `wavtokenizer evaluate --model PATH --audio "
        "CLIPS` measures it on your audio. The authors' results are in "
        "[their paper](https://arxiv.org/abs/2408.16532)."
    )
    return "\n\n".join(lines)


if __name__ == "__main__":
    for name, published in table().items():
        write_text(CARDS / f"{name}.md", published_card(published))
        print(CARDS / f"{name}.md")
