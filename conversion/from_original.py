"""Convert a checkpoint of the reference implementation: to a model in memory, or to a folder for transformers."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from .. import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel
from ..atomic_files import atomic_folder
from .architecture import INFERRED, NOT_IN_TENSORS
from .card import cast_text, converted_card
from .mapping import DISCRIMINATOR_PREFIXES, DROPPED_PREFIXES
from .published import PublishedCheckpoint, find
from .source import Source, read_source


def convert(
    checkpoint: str | Path | Sequence[str | Path],
    output: str | Path,
    config: str | Path | None = None,
    with_discriminators: bool = False,
    average: bool = False,
    published: PublishedCheckpoint | None = None,
    keep_existing: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """
    Convert a checkpoint of the reference implementation to a folder, and print a report.

    The folder holds config.json, model.safetensors, preprocessor_config.json, the code for `trust_remote_code=True`,
    and a model card. It appears only after it was loaded and compared with the checkpoint bit for bit. If anything
    fails, nothing is left behind.

    Args:
        checkpoint: Lightning `.ckpt`, or bare state dict (`.ckpt`, `.pt`, `.bin` or `.safetensors`) with the original
            tensor names, or a list of files that are the parts of one checkpoint. Pickles are opened with
            `weights_only=True`, so nothing in them is executed.
        output: Folder to write. It must not exist, or it must be empty.
        config: YAML file that the checkpoint was trained with. Needed only if the sampling rate is not 24000 Hz. All
            other settings are read from the tensors and compared with it.
        with_discriminators: Also write discriminators.safetensors, to continue training.
        average: Average the files. They must be checkpoints of one training run.
        published: Entry of the published checkpoint, from `published.find`. The file must agree with all known facts.
            Report and card say if no known fact identifies the checkpoint.
        keep_existing: Also accept a folder that already holds the result of this conversion, and leave it unchanged.
        on_progress: Called with the number of finished steps and of all steps. The steps are read, write, compare.

    Returns:
        Path of the folder.

    Raises:
        ValueError: The checkpoint is not one whole WavTokenizer, has weights that are not finite, contradicts the YAML
            file, lacks the discriminators, is not the published one, or is a pickle that would run code. The files
            belong to different checkpoints. The output exists.
        OSError: A file cannot be read or written.
    """
    if not os.fspath(output):
        raise ValueError("Got an empty output. Name the folder to write.")
    output = Path(output).resolve()
    exists = keep_existing and (output / "config.json").is_file()
    if not exists:
        check_new_folder(output)
    files = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
    on_progress(0, 3)
    source = read_source(
        [Path(file) for file in files],
        None if config is None else Path(config),
        with_discriminators,
        average,
        published,
    )
    on_progress(1, 3)
    if exists:
        if problems := _folder_differences(source, output, published):
            raise ValueError(
                f"{output} exists and is not the conversion of {source.name}: {'; '.join(problems)[:300]}. Remove it, "
                "or choose another output."
            )
        source.config.codebook_fingerprint = WavTokenizerConfig.from_pretrained(output).codebook_fingerprint
    else:
        with new_folder(output) as folder:
            _write(source, folder, output, published)
            on_progress(2, 3)
            if problems := _folder_differences(source, folder, published):  # a bug in this package
                raise RuntimeError(
                    f"The folder is not equal to {source.name}: {'; '.join(problems)}. Please report this."
                )
    print(_report(source, output, exists, published))
    return output


def load(
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> WavTokenizerModel:
    """Load an original checkpoint without a folder. Arguments are those of `conversion.load_original`."""
    path, published = Path(name_or_path), None
    if not path.exists():
        from .download import download

        published = find(str(name_or_path))
        path = download(published, revision, token, cache_dir)
    elif revision is not None:
        raise ValueError(f"Got revision {revision!r} for {path}, a file on this machine. Leave it out.")
    source = read_source([path], published=published)
    # cloned, since a memory-mapped weight would change with the file
    weights = {name: weight.clone() for name, weight in source.weights.items()}
    model = WavTokenizerModel.from_pretrained(None, config=source.config, state_dict=weights)
    model.config.codebook_fingerprint = model.codebook_fingerprint
    if published is not None:
        published.check_model(model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def check_new_folder(output: Path) -> None:
    """Raise ValueError if `output` is a file, or a folder that is not empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Remove it, or choose another output.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Return `atomic_folder(output)`. Raise ValueError if `output` is a file, or a folder that is not empty."""
    check_new_folder(output)
    with atomic_folder(output) as folder:
        yield folder


def _write(source: Source, folder: Path, output: Path, published: PublishedCheckpoint | None) -> None:
    with torch.device("meta"):  # allocates nothing: `assign` below puts the weights into the model
        model = WavTokenizerModel(source.config)
    model.load_state_dict(source.weights, assign=True)
    # save_pretrained sets the fingerprint and completes auto_map in model.config, which is source.config
    extractor_class = WavTokenizerFeatureExtractor
    model.config.auto_map = {"AutoFeatureExtractor": f"{_module_name(extractor_class)}.{extractor_class.__name__}"}
    try:
        model.save_pretrained(folder)
        if source.discriminators:
            save_file(source.discriminators, folder / "discriminators.safetensors")
    except safetensors.SafetensorError as error:  # for example a full disk
        raise OSError(f"Cannot write the weights in {output.parent}: {error}.") from error
    # safetensors 0.8 writes files that only their owner can read; the other files follow the user's umask
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)
    extractor = extractor_class(sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length)
    extractor.save_pretrained(folder)
    card = converted_card(source, output.name, published)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _module_name(cls: type) -> str:
    return cls.__module__.rsplit(".", 1)[-1]


def _folder_differences(source: Source, folder: Path, published: PublishedCheckpoint | None) -> list[str]:
    """Load a written folder. Return its differences from the checkpoint and from the published facts, as sentences."""
    try:
        pair: Any = WavTokenizerModel.from_pretrained(folder, output_loading_info=True)
        model, loading = pair
    except safetensors.SafetensorError as error:
        return [f"its weights cannot be read ({error})"]
    problems = [f"{kind}: {sorted(names)}" for kind, names in loading.items() if names]
    problems += tensor_differences(source.weights, model.state_dict())
    if model.config.codebook_fingerprint != model.codebook_fingerprint:
        problems.append("config.json has the fingerprint of another codebook")
    extractor = WavTokenizerFeatureExtractor.from_pretrained(folder)
    if (extractor.sampling_rate, extractor.hop_length) != (model.config.sampling_rate, model.config.hop_length):
        problems.append("feature extractor and model differ in sampling rate or hop")
    problems += _discriminator_differences(source, folder / "discriminators.safetensors")
    if published is not None and not problems:
        published.check_model(model)
    return problems


def _discriminator_differences(source: Source, file: Path) -> list[str]:
    if not source.discriminators:
        return ["it has discriminators, which were not requested"] if file.exists() else []
    if not file.is_file():
        return ["it has no discriminators"]
    try:
        loaded = load_file(file)
    except safetensors.SafetensorError as error:
        return [f"its discriminators cannot be read ({error})"]
    problems = [f"unexpected: {name}" for name in sorted(loaded.keys() - source.discriminators.keys())]
    return [f"{file.name}: {problem}" for problem in problems + tensor_differences(source.discriminators, loaded)]


def tensor_differences(expected: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> list[str]:
    """Return a sentence for each tensor of `expected` that is not bit-identical in `loaded`."""
    problems = []
    for name, weight in expected.items():
        # compared as integers, to distinguish -0.0 from 0.0
        same_shape = name in loaded and loaded[name].shape == weight.shape and loaded[name].dtype == weight.dtype
        if not same_shape or not torch.equal(loaded[name].view(torch.int32), weight.view(torch.int32)):
            problems.append(f"{name} differs from the checkpoint")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def _report(source: Source, output: Path, existed: bool, published: PublishedCheckpoint | None) -> str:
    config = source.config
    num_values = sum(weight.numel() for weight in source.weights.values())
    lines = [
        f"Converted {path} ({path.stat().st_size} bytes, sha256 {digest})" for path, digest in source.files.items()
    ]
    if published is not None and (unverified := published.unverified_reason(list(source.files))):
        lines.append(unverified)
    if source.averaged:
        lines.append(f"averaged: {len(source.files)} checkpoints")
    lines.append(f"kept: {len(source.weights)} tensors, {num_values:,} numbers")
    if source.cast:
        lines.append(f"not float32 in the checkpoint: {cast_text(source)}")
    if source.discriminators:
        lines.append(f"kept in discriminators.safetensors: {len(source.discriminators)} tensors")
    for prefix, names in source.dropped.items():
        if source.discriminators and prefix in DISCRIMINATOR_PREFIXES:
            continue
        lines.append(f"dropped: {prefix}{'*' * prefix.endswith('.')} ({len(names)}): {DROPPED_PREFIXES[prefix]}")
    lines += source.notes
    if source.others:
        lines.append(f"dropped: {', '.join(source.others)}: not weights")
    lines += [
        f"inferred from the tensors: {_fields(config, INFERRED)}",
        f"not in the tensors: {_fields(config, NOT_IN_TENSORS)}",
        f"rate: {config.frame_rate:g} codes/s of {config.hop_length} samples at {config.sampling_rate} Hz",
        f"codebook fingerprint: {config.codebook_fingerprint}",
        f"{'exists and is equal' if existed else 'written to'}: {output}",
    ]
    return "\n".join(lines)


def _fields(config: WavTokenizerConfig, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)
