"""Published checkpoints: read their table, checkpoints.yaml, and check files and models against it."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:  # importing torch takes seconds, and the table does not need it
    import torch

    from .. import WavTokenizerConfig, WavTokenizerModel


TABLE = Path(__file__).parent / "checkpoints.yaml"
SAMPLING_RATE = 24000  # Hz, of every published checkpoint
RATIOS = {40: [6, 5, 5, 4], 75: [8, 5, 4, 2]}  # codes per second -> upsampling_ratios


@dataclass(frozen=True)
class KnownAnswer:
    """Codes that another implementation computed for a sine."""

    hertz: float
    amplitude: float
    seconds: float
    num_codes: int
    first_codes: list[int]
    source: str

    def audio(self) -> "torch.Tensor":
        """Return the sine: float32, (1, 1, samples)."""
        import torch

        time = torch.arange(int(self.seconds * SAMPLING_RATE)) / SAMPLING_RATE
        return (self.amplitude * torch.sin(2 * torch.pi * self.hertz * time))[None, None]


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Entry of the table. checkpoints.yaml explains the fields."""

    name: str
    repository: str | None
    file: str
    yaml: str
    frame_rate: int
    domain: str
    corpus: str
    remarks: str
    sources: list[str]
    size: int | None
    sha256: str | None
    fingerprint: str | None
    mirror: str | None
    known_answers: list[KnownAnswer]

    @property
    def config(self) -> "WavTokenizerConfig":
        """Return the configuration that all published checkpoints of this rate share."""
        from .. import WavTokenizerConfig

        return WavTokenizerConfig(
            sampling_rate=SAMPLING_RATE,
            upsampling_ratios=RATIOS[self.frame_rate],
            codebook_fingerprint=self.fingerprint,
        )

    def check_file(self, path: Path, sha256: str) -> None:
        """
        Compare a file with the table, and with the hash that the Hub's cache stores it under.

        Raises:
            ValueError: The file has another size or hash.
        """
        advice = "It is damaged or another file: delete it and download it again."
        if self.size is not None and path.stat().st_size != self.size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {self.size} for {self.name}. {advice}")
        # huggingface_hub stores a large file under its sha256, and links the file's name to it
        stored_name = path.resolve().name
        expected = self.sha256 or (stored_name if re.fullmatch("[0-9a-f]{64}", stored_name) else None)
        if expected is not None and sha256 != expected:
            raise ValueError(f"{path} has the sha256 {sha256}, expected {expected} for {self.name}. {advice}")

    def unverified_reason(self, files: Sequence[Path]) -> str | None:
        """
        Return a sentence if no known fact identifies this checkpoint among those of its rate, else None.

        Args:
            files: Files that the user gave as this checkpoint.
        """
        known: list[Any] = [self.fingerprint, *self.known_answers]
        if len(files) == 1:
            known += [self.size, self.sha256, self._is_in_hub_cache(files[0]) or None]
        if any(fact is not None for fact in known):
            return None
        return (
            f"given as {self.name}, and not verified beyond its rate: no fact is known that identifies this checkpoint"
        )

    def _is_in_hub_cache(self, path: Path) -> bool:
        if self.repository is None or path.name != self.file:
            return False
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=self.repository, repo_type="model")
        return [parent.name for parent in path.absolute().parents][1:3] == ["snapshots", folder]

    def check_model(self, model: "WavTokenizerModel") -> None:
        """
        Compare a model with the table: rate, codebook, and known codes of a sine.

        Raises:
            ValueError: The model is another checkpoint, or this machine computes other codes.
        """
        import torch

        config = model.config
        if config.frame_rate != self.frame_rate:
            raise ValueError(
                f"Got a checkpoint of {config.frame_rate:g} codes/s, expected {self.frame_rate} for {self.name}. "
                "It is another checkpoint: give its own name, or none."
            )
        if self.fingerprint not in (None, model.codebook_fingerprint):
            raise ValueError(
                f"Got the codebook {model.codebook_fingerprint}, expected {self.fingerprint} for {self.name}. "
                "It is another checkpoint: give its own name, or none."
            )
        for answer in self.known_answers:
            with torch.no_grad():
                codes = model.encode(answer.audio()).audio_codes[0, 0].tolist()
            if len(codes) != answer.num_codes or codes[: len(answer.first_codes)] != answer.first_codes:
                raise ValueError(
                    f"A sine of {answer.hertz:g} Hz gave {len(codes)} codes, {codes[: len(answer.first_codes)]}, "
                    f"expected {answer.num_codes}, {answer.first_codes}, for {self.name} ({answer.source}). It is "
                    "another checkpoint, or this machine computes wrongly: give its own name, or none, and run the "
                    "tests."
                )


@cache
def table() -> dict[str, PublishedCheckpoint]:
    """Return all published checkpoints by name."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast; only in some builds of PyYAML
    content = yaml.load(TABLE.read_text(encoding="utf-8"), loader)
    return {name: _published(name, **fields) for name, fields in content.items()}


def _published(name: str, known_answers: list[dict], **fields: Any) -> PublishedCheckpoint:
    return PublishedCheckpoint(name=name, known_answers=[KnownAnswer(**answer) for answer in known_answers], **fields)


def find(name: str) -> PublishedCheckpoint:
    """Return the checkpoint of that name. Raise ValueError with the nearest names if there is none."""
    found = table().get(name)
    if found is None:
        nearest = difflib.get_close_matches(name, table(), n=3, cutoff=0.4) or list(table())
        raise ValueError(
            f"Got {name!r}, which is not a published checkpoint. Nearest: {', '.join(nearest)}. `wavtokenizer "
            "checkpoints` lists all. For a file on this machine, give its path."
        )
    return found
