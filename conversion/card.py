"""Write model cards: for a converted folder, and for every published checkpoint.

python -m wavtokenizer_hf.conversion.card    # in a checkout: writes model_cards/NAME.md for every entry of
checkpoints.yaml
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
    """
    Return the card of a converted folder. It combines what its files say and what is known of the published
    checkpoint.
    """
    files = [f"`{path.name}` (sha256 `{digest}`)" for path, digest in source.files.items()]
    rows = {
        "weights": "the mean of the checkpoints named below"
        if source.averaged
        else "equal to the original's bit for bit",
        "codebook fingerprint": f"`{source.config.codebook_fingerprint}`",
        "converted from": ", ".join(files),
        "converted by": f"wavtokenizer_hf {__version__}",
    }
    if source.cast:
        rows["weights"] += f", but for {cast_text(source)}"
    unverified = None if published is None else published.unverified_reason(list(source.files))
    return _card(source.config, name, rows, "the tensors of that file, read by the converter", published, unverified)


def published_card(published: PublishedCheckpoint) -> str:
    """Return the card of a published checkpoint, without what only its file tells."""
    fingerprint = "in config.json, once converted" if published.fingerprint is None else f"`{published.fingerprint}`"
    file = "FILE " if published.repository is None else ""
    rows = {
        "codebook fingerprint": fingerprint,
        "convert": f"`wavtokenizer convert {file}--checkpoint {published.name} --output DIR`",
    }
    configs = f"[the original]({REPOSITORY_URL}/tree/main/configs)"
    source = f"the shape that all published files share, in the settings of {configs}"
    return _card(published.config, f"wavtokenizer-{published.name}", rows, source, published)


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
        pipeline_tag="audio-to-audio",  # for feature-extraction the Hub shows pipeline() code, which takes text
        tags=["wavtokenizer", "audio-codec", "audio-tokenizer", "audio"],
    )


def _description(published: PublishedCheckpoint | None, unverified: str | None) -> str:
    if published is None:
        return "Converted from a checkpoint of the original training code."
    where = "no longer on the Hub"
    if published.repository is not None:
        where = f"in [{published.repository}](https://huggingface.co/{published.repository})"
    origin = "The weights are those"
    if unverified is not None:
        origin = (
            f"{unverified[0].upper()}{unverified[1:].replace(published.name, f'`{published.name}`', 1)}. What this "
            "card says of its origin, training and limits holds only if it is that checkpoint.\n\nThen the weights "
            "are those"
        )
    return (
        f"{origin} of `{published.file}`, {where}; the settings that go with it are `{published.yaml}`.\n\n"
        f"**Trained on** {published.domain}. Corpus: {published.corpus}. {published.remarks}\n\n"
        f"Source: {', '.join(published.sources)}."
    )


def _mirror(published: PublishedCheckpoint | None) -> str:
    if published is None or published.mirror is None:
        return ""
    url = f"https://huggingface.co/{published.mirror}"
    return f". That project's own conversion is [{published.mirror}]({url}), which the package loads too"


def _limits(published: PublishedCheckpoint | None) -> str:
    unknown = "- Languages: those of the corpus, which its authors do not list. Try yours before you build on it."
    if published is None:
        return "- What it was trained on is not known here: try it on sound of your kind before you build on it."
    if published.corpus == "LibriTTS":
        paper = "[its paper](https://arxiv.org/abs/1904.02882)"
        unknown = f"- Languages: LibriTTS is read English ({paper}); others were not in training."
    if published.domain == "speech":
        return f"{unknown}\n- Music and other sounds were not in training."
    if "no speech" in published.domain:
        return "- Speech was not in training; take another checkpoint for it."
    return unknown


def _measured(published: PublishedCheckpoint | None) -> str:
    lines = []
    for answer in () if published is None else published.known_answers:
        codes = ", ".join(map(str, answer.first_codes))
        lines.append(
            f"A sine of {answer.hertz:g} Hz, amplitude {answer.amplitude:g}, {answer.seconds:g} s, gives "
            f"{answer.num_codes} codes, which begin {codes}. Conversion by name checks that.\n\nSource: "
            f"{answer.source}."
        )
    lines.append(
        "No quality figure of these weights was measured for this card. `wavtokenizer evaluate --model PATH --audio "
        "CLIPS` measures them on your sound; the figures of WavTokenizer's authors are in "
        "[their paper](https://arxiv.org/abs/2408.16532)."
    )
    return "\n\n".join(lines)


if __name__ == "__main__":
    for name, published in table().items():
        write_text(CARDS / f"{name}.md", published_card(published))
        print(CARDS / f"{name}.md")
