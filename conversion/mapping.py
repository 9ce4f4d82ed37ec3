"""
Tables of tensor names: which tensors of an original checkpoint are kept under a new name, and which are dropped and
why.
"""

import re
from collections.abc import Iterable


# The original's name -> the name here, which is also the one of transformers' port. {} stands for anything.
KEPT = {
    "feature_extractor.encodec.encoder.model.{}.conv.conv.weight_g": (
        "encoder_model.encoder.layers.{}.conv.parametrizations.weight.original0"
    ),
    "feature_extractor.encodec.encoder.model.{}.conv.conv.weight_v": (
        "encoder_model.encoder.layers.{}.conv.parametrizations.weight.original1"
    ),
    "feature_extractor.encodec.encoder.model.{}.conv.conv.bias": "encoder_model.encoder.layers.{}.conv.bias",
    "feature_extractor.encodec.encoder.model.{}.lstm.{}": "encoder_model.encoder.layers.{}.lstm.{}",
    "feature_extractor.encodec.quantizer.vq.layers.0._codebook.{}": "encoder_model.quantizer.codebook.{}",
    "backbone.{}": "backbone.{}",
    "head.out.{}": "head.linear.{}",
}

# Names that begin so are not needed, and why.
DROPPED = {
    "feature_extractor.encodec.decoder.": "EnCodec's own decoder, which WavTokenizer never uses",
    "head.istft.window": "a Hann window, computed when it is needed",
    "multiperioddisc.": "training only: multi-period discriminator",
    "multiresddisc.": "training only: multi-resolution discriminator",
    "dac.": "training only: DAC-style discriminator",
    "dacdiscriminator.": "training only: DAC-style discriminator, as its loss held it",
    "melspec_loss.": "training only: mel filters and window of the reconstruction loss",
    "n_averaged": "training only: of how many steps torch's AveragedModel is the mean",
}

# Where the discriminators lie, for those who want to train on. The original's loss holds one DAC-style discriminator
# and its optimizer another; the codec was trained against the former, so where a file has both, the later line here
# wins.
DISCRIMINATORS = {
    "multiperioddisc.": "multiperioddisc.",
    "multiresddisc.": "multiresddisc.",
    "dac.": "dac.",
    "dacdiscriminator.discriminator.": "dac.",
}

DISCRIMINATOR_PREFIXES = ("multiperioddisc.", "multiresddisc.", "dac.", "dacdiscriminator.")  # of those in DROPPED

_LATER_QUANTIZER = re.compile(r"feature_extractor\.encodec\.quantizer\.vq\.layers\.([1-9]\d*)\.")


def sort_names(names: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """
    Sort the original tensor names by the tables above.

    Args:
        names: Every name in the checkpoint.

    Returns:
        What is kept (new name -> original name), and what is dropped (prefix of the name -> original names).

    Raises:
        ValueError: A second quantizer, or a name that is in no table.
    """
    kept, unknown = {}, []
    dropped: dict[str, list[str]] = {}
    quantizers = {0}
    for name in names:
        prefix = next((prefix for prefix in DROPPED if name.startswith(prefix)), None)
        if prefix is not None:
            dropped.setdefault(prefix, []).append(name)
        elif (new_name := _translate(name, KEPT)) is not None:
            kept[new_name] = name
        elif later := _LATER_QUANTIZER.match(name):
            quantizers.add(int(later[1]))
        else:
            unknown.append(name)
    if len(quantizers) > 1:
        raise ValueError(several_quantizers(len(quantizers)))
    if unknown:
        raise unknown_names(unknown)
    return kept, dropped


def original_name(name: str) -> str:
    """Return the original name of a tensor of the model."""
    original = _translate(name, {new: old for old, new in KEPT.items()})
    assert original is not None, f"KEPT lacks {name}"
    return original


def check_names(kept: dict[str, str], expected: Iterable[str]) -> None:
    """Raise ValueError unless `kept` (new name -> original name) holds exactly the `expected` names of the model."""
    expected = set(expected)
    missing = sorted(original_name(name) for name in expected - set(kept))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(expected)} tensors that a WavTokenizer of this shape needs are missing: "
            f"{_some(missing)}. Expected a whole checkpoint; download or save it again."
        )
    unknown = sorted(original for name, original in kept.items() if name not in expected)
    if unknown:
        raise unknown_names(unknown)


def discriminator_names(names: Iterable[str]) -> dict[str, str]:
    """Return the discriminators among the original tensors: name in `training/` -> original name."""
    found = {}
    for prefix, new_prefix in DISCRIMINATORS.items():
        for name in names:
            if name.startswith(prefix):
                new_name = new_prefix + name.removeprefix(prefix)
                new_name = new_name.replace(".weight_g", ".parametrizations.weight.original0")
                found[new_name.replace(".weight_v", ".parametrizations.weight.original1")] = name
    return found


def original_discriminator_names(name: str) -> list[str]:
    """Return the original names of a discriminator tensor. The DAC-style discriminator is stored twice."""
    name = name.replace(".parametrizations.weight.original0", ".weight_g")
    name = name.replace(".parametrizations.weight.original1", ".weight_v")
    return [old + name.removeprefix(new) for old, new in DISCRIMINATORS.items() if name.startswith(new)]


def unknown_names(names: list[str]) -> ValueError:
    hint = ""
    if any(name.startswith("encoder_model.") for name in names):
        hint = " Names that begin with encoder_model. are of a converted file: load its folder with from_pretrained."
    return ValueError(
        f"Got tensors that are not of a WavTokenizer, {len(names)} in all: {_some(names)}. Expected a checkpoint of "
        f"the original training code; nothing is left out without a known reason (see conversion/mapping.py).{hint}"
    )


def several_quantizers(count: int) -> str:
    return (
        f"Got num_quantizers={count}, expected 1: a model with several residual quantizers gives several codes per "
        "frame, and neither this package nor any published WavTokenizer has more than one. Use another checkpoint."
    )


def _translate(name: str, table: dict[str, str]) -> str | None:
    for template, translation in table.items():
        if match := re.fullmatch(re.escape(template).replace(r"\{\}", "(.+)"), name):
            return translation.format(*match.groups())
    return None


def _some(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
