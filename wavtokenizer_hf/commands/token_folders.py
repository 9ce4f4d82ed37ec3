"""Token folders of `tokenize` as an input of other commands."""

import argparse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..atomic_files import refuse_inputs
from .files import Job


if TYPE_CHECKING:
    import numpy as np

    from .. import WavTokenizerModel
    from ..evaluation.codebook import CodebookUsage
    from .transcode import Codec


class TokenClips:
    """
    Clips of a token folder for `decode`.

    Attributes:
        folder: The `TokenFolder`.
        jobs: Pairs of a name, FOLDER/ID, and the file to write; None is standard output.
    """

    def __init__(self, arguments: argparse.Namespace):
        from ..export.token_folder import MANIFEST, TokenFolder

        self.folder = TokenFolder(arguments.inputs[0])
        self._index = self.folder.index(["id"])
        row_numbers = {id: number for number, id in enumerate(self._index.columns["id"])}
        ids = list(row_numbers) if arguments.id is None else list(dict.fromkeys(arguments.id))
        if missing := [id for id in ids if id not in row_numbers]:
            raise ValueError(
                f"{self.folder.folder} has no row with the id {missing[0]!r}; the first of its {len(row_numbers)} ids "
                f"is {next(iter(row_numbers))!r}. Clips that failed are in its failures.jsonl."
            )
        self._row_numbers = {self.folder.folder / id: row_numbers[id] for id in ids}
        targets = self._targets(ids, arguments)
        refuse_inputs(filter(None, targets), [*self.folder.files, self.folder.folder / MANIFEST])
        self.jobs: list[Job] = list(zip(self._row_numbers, targets, strict=True))

    @staticmethod
    def _targets(ids: list[str], arguments: argparse.Namespace) -> list[Path | None]:
        output = Path(arguments.output)
        is_folder = output.is_dir() or arguments.output.endswith(("/", "\\"))
        if arguments.output == "-" or (arguments.id is not None and len(ids) == 1 and not is_folder):
            if len(ids) != 1:
                raise ValueError(f"Got {len(ids)} clips for standard output, expected one. Name it with --id.")
            return [None if arguments.output == "-" else output]
        targets: dict[Path, str] = {}
        for id in ids:
            relative_path = PurePosixPath(id)
            if relative_path.is_absolute() or ".." in relative_path.parts:
                raise ValueError(f"The id {id!r} leads out of the output folder. Decode it alone: --id {id!r}.")
            target = output / relative_path.with_suffix(f".{arguments.audio_format}")
            if target in targets:
                raise ValueError(
                    f"{targets[target]!r} and {id!r} would both become {target}. Decode them separately, with --id."
                )
            targets[target] = id
        return list(targets)

    def read(self, source: Path, model: "Codec") -> "tuple[Iterator[np.ndarray], int]":
        """Return the codes of a clip in chunks, and its number of samples. Raises ValueError for an invalid row."""
        import numpy as np

        columns = ["audio_codes", "num_samples", "codebook_fingerprint"]
        (row,) = self.folder.read(self._index, np.array([self._row_numbers[source]]), columns)
        codes = row["audio_codes"]
        if problem := self.folder.problem(row):
            raise ValueError(f"The row cannot be decoded: {problem}.")
        model.check_codebook_fingerprint(row["codebook_fingerprint"])
        return (codes[index : index + 1024] for index in range(0, len(codes), 1024)), row["num_samples"]


def token_clips(arguments: argparse.Namespace) -> TokenClips | None:
    """Return the clips of the token folder that is the only input, or None for other inputs."""
    from ..export.token_folder import is_token_folder

    if len(arguments.inputs) == 1 and is_token_folder(arguments.inputs[0]):
        if arguments.format is not None:
            raise ValueError(
                f"Got --format {arguments.format} for a token folder, which has its own format. Leave it out."
            )
        return TokenClips(arguments)
    if arguments.id is not None:
        raise ValueError(
            "Got --id without a token folder, expected one that `wavtokenizer tokenize` wrote as the only INPUT."
        )
    return None


class DecodedTokens:
    """Audio that a model decodes from a token folder of the references: a system for `evaluation.evaluate`."""

    gives_codes = True

    def __init__(self, path: str, model: "WavTokenizerModel"):
        from ..evaluation import Model
        from ..export.token_folder import TokenFolder

        self.folder, self.name = TokenFolder(path), path
        self._model = Model(path, model)
        self.folder.check_model(model)
        self._index = self.folder.index(["id"])
        self._row_numbers = {id: number for number, id in enumerate(self._index.columns["id"])}

    def describe(self) -> dict:
        return {**self._model.describe(), "kind": "tokens, decoded by the model"}

    def reconstruct(self, relative_path: Path, waveform: "np.ndarray") -> "tuple[np.ndarray, CodebookUsage]":
        """Return audio (T,) of the codes in the row whose id is `relative_path`, and counts of the codes."""
        import numpy as np

        id = relative_path.as_posix()
        if id not in self._row_numbers:
            raise ValueError(f"no row with the id {id!r}")
        (row,) = self.folder.read(self._index, np.array([self._row_numbers[id]]))
        if problem := self.folder.problem(row):
            raise ValueError(f"the row cannot be decoded: {problem}")
        self._model.model.check_codebook_fingerprint(row["codebook_fingerprint"])
        return self._model.decode(row["audio_codes"].astype(np.int64), row["num_samples"])
