"""Read the files of a checkpoint into weights with the names of this package."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import WavTokenizerConfig
from ..training.discriminators import Discriminators
from .architecture import check_yaml, infer_config, yaml_sampling_rate
from .checkpoint import Checkpoint, read_checkpoint, read_yaml
from .mapping import discriminator_names, original_name, sort_names
from .published import PublishedCheckpoint


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EMBED = "encoder_model.quantizer.codebook.embed"
EMBED_COPY = "codebook_weights"  # name of the codebook in the separate decoder file of OuteTTS


@dataclass
class Source:
    """Content of a checkpoint: weights with the names of this package, and a record of how they were read."""

    files: dict[Path, str]  # path -> sha256
    config: WavTokenizerConfig
    weights: dict[str, torch.Tensor]  # float32; memory-mapped where the file allows it
    cast: Counter  # dtype other than float32 -> number of tensors
    dropped: dict[str, list[str]]  # prefix of the name -> original names
    others: list[str]  # entries beside the state dict
    discriminators: dict[str, torch.Tensor]  # by their names in training/; empty unless requested
    notes: list[str] = field(default_factory=list)  # how names were changed, for the report
    averaged: bool = False  # whether the weights are the mean over the files

    @property
    def name(self) -> str:
        """Return the paths of the files, for messages."""
        return ", ".join(map(str, self.files))


def read_source(
    files: Sequence[Path],
    config: Path | None = None,
    with_discriminators: bool = False,
    average: bool = False,
    published: PublishedCheckpoint | None = None,
) -> Source:
    """Read and check a checkpoint. Arguments and errors are those of `from_original.convert`."""
    if not files:
        raise ValueError("Got no checkpoint. Give the path of a file.")
    if len(set(files)) < len(files):
        raise ValueError("Got the same checkpoint twice. Give each file once.")
    if average:
        if with_discriminators:
            raise ValueError("Got several checkpoints to average, and discriminators to keep. Leave one out.")
        return _average_sources([read_source([file], config) for file in files])
    digests = {file: _sha256(file) for file in files if file.is_file()}  # reading reports the other paths
    if published is not None and len(files) == 1:  # the table has no sizes and hashes of parts
        for file, digest in digests.items():
            published.check_file(file, digest)
    values = None if config is None else read_yaml(config)
    sampling_rate = 24000 if config is None or values is None else yaml_sampling_rate(values, config)
    opened = {file: read_checkpoint(file) for file in files}
    content, others = _join_parts(opened)
    original_names, dropped = sort_names(content)
    tensors = {name: content[original] for name, original in original_names.items()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            original = original_names[name]
            raise ValueError(f"Got {type(tensor).__name__} for {original}, expected a tensor. Save it again.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model_config = infer_config(shapes, original_names, sampling_rate)
    if config is not None and values is not None:
        check_yaml(values, model_config, config)
    weights = {name: _to_float32(original_names[name], tensor) for name, tensor in tensors.items()}
    pointer_counts = Counter(weight.data_ptr() for weight in weights.values())
    for name, weight in weights.items():
        if pointer_counts[weight.data_ptr()] > 1:  # transformers refuses to save one tensor under two names
            weights[name] = weight.clone()
    cast = Counter(str(tensor.dtype) for tensor in tensors.values() if tensor.dtype != torch.float32)
    discriminators = _discriminators(content, model_config, files[0]) if with_discriminators else {}
    notes = list(dict.fromkeys(note for checkpoint in opened.values() for note in checkpoint.notes))
    return Source(digests, model_config, weights, cast, dropped, others, discriminators, notes)


def _join_parts(opened: dict[Path, Checkpoint]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Join the parts of one checkpoint. Raise ValueError if two parts have different tensors of one name."""
    content: dict[str, torch.Tensor] = {}
    others: list[str] = []
    came_from: dict[str, Path] = {}
    for file, checkpoint in opened.items():
        part = {
            original_name(EMBED) if name == EMBED_COPY else name: tensor for name, tensor in checkpoint.tensors.items()
        }
        others += [name for name in checkpoint.others if name not in others]
        for name, tensor in part.items():
            if name in content and not _same_content(content[name], tensor):
                raise ValueError(
                    f"{came_from[name]} and {file} both hold {name}, and differ in it. They are not parts of one "
                    "checkpoint. Give one of them, or average them if they are checkpoints of one training run."
                )
            content[name], came_from[name] = tensor, file
    return content, others


def _same_content(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def _average_sources(sources: list[Source]) -> Source:
    """Average checkpoints of one training run, summed in file order as in the reference implementation."""
    first, *rest = sources
    if not rest:
        raise ValueError(
            f"Got one checkpoint to average, {first.name}, expected several. Convert it without averaging."
        )
    for other in rest:
        if other.config.to_dict() != first.config.to_dict():
            raise ValueError(
                f"{first.name} and {other.name} differ in shape. Average checkpoints of one training run."
            )
        if not _from_same_run(first.weights[EMBED], other.weights[EMBED]):
            raise ValueError(
                f"Most codes have another meaning in {first.name} than in {other.name}. They are from two training "
                "runs, so their mean is useless. Average checkpoints of one run, near its end."
            )
    weights = {}
    for name, weight in first.weights.items():
        total = weight.clone()
        for other in rest:
            total += other.weights[name]
        weights[name] = total / len(sources)
    return replace(
        first,
        files={file: digest for source in sources for file, digest in source.files.items()},
        weights=weights,
        cast=sum((source.cast for source in sources), Counter()),
        averaged=True,
    )


def _from_same_run(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether most entries of one codebook (K, D) are nearest to the entry with the same index in the other."""
    return bool((torch.cdist(left, right).argmin(-1) == torch.arange(len(left))).float().mean() > 0.5)


def _to_float32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the checkpoint as float32. A float32 tensor is not copied, and may be memory-mapped."""
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
    """Return the tensors of all three discriminators by their names in training/. Raise ValueError if any is wrong."""
    tensors = {
        name: _to_float32(original, content[original]).clone()
        for name, original in discriminator_names(content).items()
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
            f"{checkpoint} holds other discriminators than expected: {' '.join(str(error).split())[:300]}. "
            "Convert it without them."
        ) from error
    return tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
