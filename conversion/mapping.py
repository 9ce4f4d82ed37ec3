"""Map tensor names of the reference implementation to those of this package, and list the tensors that are dropped."""

import re
from collections.abc import Iterable


# Original name -> name in this package, which is also the name in transformers. {} matches any text.
KEPT_NAMES = {
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

# Prefix of names that are not needed -> reason.
DROPPED_PREFIXES = {
    "feature_extractor.encodec.decoder.": "EnCodec's own decoder, which WavTokenizer never uses",
    "head.istft.window": "a Hann window, computed when needed",
    "multiperioddisc.": "training only: multi-period discriminator",
    "multiresddisc.": "training only: multi-resolution discriminator",
    "dac.": "training only: DAC-style discriminator",
    "dacdiscriminator.": "training only: DAC-style discriminator, as stored by its loss",
    "melspec_loss.": "training only: mel filters and window of the reconstruction loss",
    "n_averaged": "training only: number of steps in the mean of torch's AveragedModel",
}

# Original prefix of the discriminators -> prefix in training/, to continue training. In the reference implementation,
# the loss holds one DAC-style discriminator and the optimizer another. The codec was trained against the one of the
# loss. So its line comes last: in a file with both, the later line wins.
DISCRIMINATORS = {
    "multiperioddisc.": "multiperioddisc.",
    "multiresddisc.": "multiresddisc.",
    "dac.": "dac.",
    "dacdiscriminator.discriminator.": "dac.",
}

# the discriminators among DROPPED_PREFIXES
DISCRIMINATOR_PREFIXES = ("multiperioddisc.", "multiresddisc.", "dac.", "dacdiscriminator.")

_LATER_QUANTIZER = re.compile(r"feature_extractor\.encodec\.quantizer\.vq\.layers\.([1-9]\d*)\.")


def sort_names(names: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """
    Sort original tensor names into kept and dropped names, by the tables above.

    Args:
        names: Every name in the checkpoint.

    Returns:
        Kept names (name in this package -> original name), and dropped names (prefix -> original names).

    Raises:
        ValueError: There is a second quantizer, or a name is in no table.
    """
    original_names, unknown = {}, []
    dropped: dict[str, list[str]] = {}
    quantizers = {0}
    for name in names:
        prefix = next((prefix for prefix in DROPPED_PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            dropped.setdefault(prefix, []).append(name)
        elif (new_name := _translate(name, KEPT_NAMES)) is not None:
            original_names[new_name] = name
        elif later := _LATER_QUANTIZER.match(name):
            quantizers.add(int(later[1]))
        else:
            unknown.append(name)
    if len(quantizers) > 1:
        raise ValueError(several_quantizers(len(quantizers)))
    if unknown:
        raise unknown_names(unknown)
    return original_names, dropped


def original_name(name: str) -> str:
    """Return the original name of a tensor of the model."""
    original = _translate(name, {translation: template for template, translation in KEPT_NAMES.items()})
    assert original is not None, f"KEPT_NAMES lacks {name}"
    return original


def check_names(original_names: dict[str, str], expected: Iterable[str]) -> None:
    """Raise ValueError unless the keys of `original_names` are exactly the `expected` names of the model."""
    expected = set(expected)
    missing = sorted(original_name(name) for name in expected - set(original_names))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(expected)} tensors that a WavTokenizer of this shape needs are missing: "
            f"{_shorten(missing)}. Expected a whole checkpoint; download or save it again."
        )
    unknown = sorted(original for name, original in original_names.items() if name not in expected)
    if unknown:
        raise unknown_names(unknown)


def discriminator_names(names: Iterable[str]) -> dict[str, str]:
    """Return the discriminator tensors among original names: name in `training/` -> original name."""
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
    return [
        original_prefix + name.removeprefix(prefix)
        for original_prefix, prefix in DISCRIMINATORS.items()
        if name.startswith(prefix)
    ]


def unknown_names(names: list[str]) -> ValueError:
    """Return the error for tensors that are in no table."""
    hint = ""
    if any(name.startswith("encoder_model.") for name in names):
        hint = " Names with encoder_model. are from a converted file: load its folder with from_pretrained."
    return ValueError(
        f"Got tensors that are not of a WavTokenizer, {len(names)} in all: {_shorten(names)}. Expected a checkpoint "
        "of the original training code; conversion drops only tensors that it knows (see conversion/mapping.py)."
        f"{hint}"
    )


def several_quantizers(count: int) -> str:
    """Return the error message for a model with several residual quantizers."""
    return (
        f"Got num_quantizers={count}, expected 1: several residual quantizers give several codes per frame. Neither "
        "this package nor any published WavTokenizer has more than one. Use another checkpoint."
    )


def _translate(name: str, table: dict[str, str]) -> str | None:
    for template, translation in table.items():
        if match := re.fullmatch(re.escape(template).replace(r"\{\}", "(.+)"), name):
            return translation.format(*match.groups())
    return None


def _shorten(names: list[str], max_names: int = 20) -> str:
    rest = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + rest
