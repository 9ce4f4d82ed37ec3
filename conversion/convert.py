"""Turns an original WavTokenizer checkpoint into a folder that Hugging Face loads.

    python -m conversion.convert CHECKPOINT [--config YAML] [--with-discriminators] --output DIR

    checkpoint.py     opens the file, running nothing that is in it
    mapping.py        names of tensors: kept, dropped or refused
    architecture.py   shapes of tensors -> configuration, compared with the YAML file
    convert.py        weights, folder, model card, report, command line

The names and configuration fields are those of transformers' port of WavTokenizer.
"""

import argparse
import hashlib
import os
import shutil
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel, __version__
from wavtokenizer_hf.training.discriminators import Discriminators

from .architecture import INFERRED, NOT_IN_TENSORS, check_yaml, infer_config, yaml_sampling_rate
from .checkpoint import read_checkpoint, read_yaml
from .mapping import DROPPED, discriminator_names, sort_names


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WITH_DISCRIMINATORS_HELP = "keep the discriminators in a second file, so that training can go on from them"
TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"


@dataclass
class Source:
    """What a checkpoint gives: the model's weights by their names here, and an account of how they were got."""

    path: Path
    sha256: str
    config: WavTokenizerConfig
    weights: dict[str, torch.Tensor]  # float32; they lie in the file until they are used, where it allows that
    cast: Counter  # dtype that is not float32 -> number of tensors
    dropped: dict[str, list[str]]  # beginning of the name -> original names
    others: list[str]  # what lies beside the state dict
    discriminators: dict[str, torch.Tensor]  # by their names in training/; empty unless they were asked for


def convert(
    checkpoint: str | Path, output: str | Path, config: str | Path | None = None, with_discriminators: bool = False
) -> Path:
    """
    Converts a checkpoint of the original training code and prints a report of it.

    The folder holds config.json, model.safetensors, preprocessor_config.json, the three code files for
    `trust_remote_code=True`, and a model card. It appears only when it is complete and has been loaded and compared
    with the checkpoint bit for bit; if anything fails, nothing is left behind.

    Args:
        checkpoint: a Lightning `.ckpt`, or a bare state dict (`.ckpt`, `.pt`, `.bin` or `.safetensors`) with the
            original's tensor names. Pickles are opened with `weights_only=True`, so nothing in them is executed.
        output: the folder to make; it must not exist, or be empty.
        config: the YAML file that the checkpoint was trained with. It is needed only where the sampling rate is not
            24000; all else is read off the tensors, and what the file says of them is compared.
        with_discriminators: also keep the discriminators, in discriminators.safetensors, from which training goes on.

    Returns:
        The folder.

    Raises:
        ValueError: the checkpoint is no whole WavTokenizer, holds weights that are not finite, contradicts the YAML
            file, lacks the discriminators that were asked for, or is a pickle that would run code; or the output exists.
        OSError: a file cannot be read or written.
    """
    output = Path(output).resolve()
    _check_output(output)
    source = read_source(Path(checkpoint), None if config is None else Path(config), with_discriminators)
    with _folder_at_once(output) as folder:
        _write(source, folder)
        _verify(source, folder)
    print(_report(source, output))
    return output


def read_source(checkpoint: Path, config: Path | None = None, with_discriminators: bool = False) -> Source:
    """Reads and checks a checkpoint without writing anything; arguments and errors are those of `convert`."""
    values = None if config is None else read_yaml(config)
    sampling_rate = 24000 if values is None else yaml_sampling_rate(values, config)
    content, others = read_checkpoint(checkpoint)
    kept, dropped = sort_names(content)
    tensors = {name: content[original] for name, original in kept.items()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Got {type(tensor).__name__} for {kept[name]}, expected a tensor. Save it again.")
    model_config = infer_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, kept, sampling_rate)
    if values is not None:
        check_yaml(values, model_config, config)
    weights = {name: _weight(kept[name], tensor) for name, tensor in tensors.items()}
    users = Counter(weight.data_ptr() for weight in weights.values())
    for name, weight in weights.items():
        if users[weight.data_ptr()] > 1:  # one tensor under two names, which transformers would refuse to save
            weights[name] = weight.clone()
    cast = Counter(str(tensor.dtype) for tensor in tensors.values() if tensor.dtype != torch.float32)
    discriminators = _discriminators(content, model_config, checkpoint) if with_discriminators else {}
    return Source(checkpoint, _sha256(checkpoint), model_config, weights, cast, dropped, others, discriminators)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a checkpoint, YAML file or output that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert",
        description="Turn an original WavTokenizer checkpoint into a folder that Hugging Face loads.",
        epilog="Nothing in the checkpoint is executed. The folder appears only when it is complete and was compared "
        "with the checkpoint bit for bit.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="Lightning .ckpt, or state dict (.ckpt, .pt, .bin, .safetensors)")
    add("--output", metavar="DIR", required=True, help="the folder to make; must not exist, or be empty")
    add(
        "--config",
        metavar="YAML",
        help="the YAML file that the checkpoint was trained with: what it says of the shape is compared with the "
        "tensors, and its sampling rate replaces 24000 Hz (all else is read off the tensors)",
    )
    add("--with-discriminators", action="store_true", help=WITH_DISCRIMINATORS_HELP)
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.checkpoint, arguments.output, arguments.config, arguments.with_discriminators)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One tensor of the checkpoint as float32; what is float32 already stays where it is, in memory or in the file."""
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        raise ValueError(
            f"Got {name} of type {tensor.dtype} ({tensor.layout}), expected float32, float16, bfloat16 or float64. "
            "Use the checkpoint as the training code wrote it."
        )
    weight = tensor.detach().to(torch.float32).contiguous()
    if not weight.isfinite().all():
        count = int((~weight.isfinite()).sum())
        raise ValueError(
            f"Got {name} with {count} of {weight.numel()} values that are NaN, infinite or beyond float32, expected "
            "finite weights. The training diverged or the file is damaged; use another checkpoint."
        )
    return weight


def _discriminators(
    content: dict[str, torch.Tensor], config: WavTokenizerConfig, checkpoint: Path
) -> dict[str, torch.Tensor]:
    """All three discriminators as training loads them; they must be whole, and nothing else is accepted for them."""
    tensors = {
        name: _weight(original, content[original]).clone() for name, original in discriminator_names(content).items()
    }
    if not tensors:
        raise ValueError(
            f"{checkpoint} holds no discriminators. Convert it without them, or use the file of the training run."
        )
    with torch.device("meta"):
        expected = Discriminators(config.adanorm_num_embeddings)
    try:
        expected.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} holds other discriminators than the original's: {' '.join(str(error).split())[:300]}. "
            "Convert it without them."
        ) from error
    return tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Remove it, or choose another output.")


@contextmanager
def _folder_at_once(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place if all goes well and vanishes if not."""
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wavtokenizer-", suffix=".partial", dir=output.parent) as temporary:
            folder = Path(temporary, output.name)  # one level down, since a temporary folder is closed to other users
            folder.mkdir()
            yield folder
            if output.exists():  # empty, or this fails; Windows replaces no folder
                output.rmdir()
            os.replace(folder, output)
    except BaseException:
        for parent in new_parents:
            with suppress(OSError):  # not made, or another program has put something in it
                parent.rmdir()
        raise


def _write(source: Source, folder: Path) -> None:
    with torch.device("meta"):  # no memory of its own: the weights take the places of its tensors
        model = WavTokenizerModel(source.config)
    model.load_state_dict(source.weights, assign=True)
    # saving sets the fingerprint and completes auto_map in model.config, which is source.config
    extractor_class = WavTokenizerFeatureExtractor
    model.config.auto_map = {"AutoFeatureExtractor": f"{_module(extractor_class)}.{extractor_class.__name__}"}
    try:
        model.save_pretrained(folder)
        if source.discriminators:
            save_file(source.discriminators, folder / "discriminators.safetensors")
    except safetensors.SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"Cannot write the weights in {folder.parent.parent}: {error}.") from error
    # safetensors 0.8 writes a file that its owner alone can read; the others follow the user's umask
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)
    extractor = extractor_class(sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length)
    extractor.save_pretrained(folder)
    (folder / "README.md").write_text(_card(source, folder.name), encoding="utf-8")


def _module(cls: type) -> str:
    return cls.__module__.rsplit(".", 1)[-1]


def _verify(source: Source, folder: Path) -> None:
    """Loads what was written and compares it with the checkpoint; a difference is a fault of this program."""
    model, loading = WavTokenizerModel.from_pretrained(folder, output_loading_info=True)
    problems = [f"{kind}: {sorted(names)}" for kind, names in loading.items() if names]
    loaded = model.state_dict()
    for name, weight in source.weights.items():
        # compared as integers, which tell -0.0 from 0.0
        if not torch.equal(loaded[name].view(torch.int32), weight.view(torch.int32)):
            problems.append(f"{name} differs from the checkpoint")
    if model.config.codebook_fingerprint != model.codebook_fingerprint:
        problems.append("config.json has the fingerprint of another codebook")
    extractor = WavTokenizerFeatureExtractor.from_pretrained(folder)
    if (extractor.sampling_rate, extractor.hop_length) != (model.config.sampling_rate, model.config.hop_length):
        problems.append("feature extractor and model differ in sampling rate or hop")
    if problems:
        raise RuntimeError(f"The folder is not equal to {source.path}: {'; '.join(problems)}. Please report this.")


def _card(source: Source, name: str) -> str:
    config = source.config
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        name=name,
        sampling_rate=config.sampling_rate,
        frame_rate=f"{config.frame_rate:g}",
        hop_length=config.hop_length,
        codebook_size=config.codebook_size,
        weights="equal to the original's bit for bit" + (f", but for {_cast(source)}" if source.cast else ""),
        bit_rate=f"{config.bit_rate:g}",
        fingerprint=config.codebook_fingerprint,
        source_file=source.path.name,
        source_sha256=source.sha256,
        converter_version=__version__,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def _report(source: Source, output: Path) -> str:
    config = source.config
    numbers = sum(weight.numel() for weight in source.weights.values())
    lines = [
        f"Converted {source.path} (sha256 {source.sha256})",
        f"kept: {len(source.weights)} tensors, {numbers:,} numbers",
    ]
    if source.cast:
        lines.append(f"not float32 in the checkpoint: {_cast(source)}")
    if source.discriminators:
        lines.append(f"kept in discriminators.safetensors: {len(source.discriminators)} tensors")
    for prefix, names in source.dropped.items():
        if source.discriminators and prefix in ("multiperioddisc.", "multiresddisc.", "dac.", "dacdiscriminator."):
            continue
        lines.append(f"dropped: {prefix}{'*' * prefix.endswith('.')} ({len(names)}): {DROPPED[prefix]}")
    if source.others:
        lines.append(f"dropped: {', '.join(source.others)}: not weights")
    lines += [
        f"read off the tensors: {_fields(config, INFERRED)}",
        f"not in the tensors: {_fields(config, NOT_IN_TENSORS)}",
        f"rate: {config.frame_rate:g} codes/s of {config.hop_length} samples at {config.sampling_rate} Hz",
        f"codebook fingerprint: {config.codebook_fingerprint}",
        f"written to: {output}",
    ]
    return "\n".join(lines)


def _cast(source: Source) -> str:
    return (
        ", ".join(f"{count} {dtype.removeprefix('torch.')} tensors" for dtype, count in source.cast.items())
        + " converted to float32"
    )


def _fields(config: WavTokenizerConfig, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
