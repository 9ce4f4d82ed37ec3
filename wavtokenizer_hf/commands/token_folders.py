"""Token folders of `tokenize` as an input of other commands."""

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

from ..atomic_files import refuse_inputs


class TokenClips:
    """
    The clips of a token folder that `decode` is to decode.

    Attributes:
        folder: the `TokenFolder`.
        jobs: pairs of a name, FOLDER/ID, and the file to write; None is standard output.
    """

    def __init__(self, arguments):
        from ..export.token_folder import MANIFEST, TokenFolder

        self.folder = TokenFolder(arguments.inputs[0])
        self._index = self.folder.index(["id"])
        numbers = {id: number for number, id in enumerate(self._index.columns["id"])}
        wanted = list(numbers) if arguments.id is None else list(dict.fromkeys(arguments.id))
        if missing := [id for id in wanted if id not in numbers]:
            raise ValueError(
                f"{self.folder.folder} has no row with the id {missing[0]!r}; the first of its {len(numbers)} ids is "
                f"{next(iter(numbers))!r}. Clips that failed are in its failures.jsonl."
            )
        self._numbers = {self.folder.folder / id: numbers[id] for id in wanted}
        targets = self._targets(wanted, arguments)
        refuse_inputs(filter(None, targets), [*self.folder.files, self.folder.folder / MANIFEST])
        self.jobs = list(zip(self._numbers, targets, strict=True))

    @staticmethod
    def _targets(ids: list[str], arguments) -> list[Path | None]:
        output = Path(arguments.output)
        is_folder = output.is_dir() or arguments.output.endswith(("/", "\\"))
        if arguments.output == "-" or (arguments.id is not None and len(ids) == 1 and not is_folder):
            if len(ids) != 1:
                raise ValueError(f"Got {len(ids)} clips for standard output, expected one. Name it with --id.")
            return [None if arguments.output == "-" else output]
        targets: dict[Path, str] = {}
        for id in ids:
            place = PurePosixPath(id)
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"The id {id!r} leads out of the output folder. Decode it alone: --id {id!r}.")
            target = output / place.with_suffix(f".{arguments.audio_format}")
            if target in targets:
                raise ValueError(
                    f"{targets[target]!r} and {id!r} would both become {target}. Decode them apart, with --id."
                )
            targets[target] = id
        return list(targets)

    def read(self, source: Path, model) -> tuple:
        """Codes of a clip in pieces, and its number of samples. Raises ValueError for a row without codes."""
        import numpy as np

        columns = ["audio_codes", "num_samples", "codebook_fingerprint"]
        (row,) = self.folder.read(self._index, np.array([self._numbers[source]]), columns)
        codes = row["audio_codes"]
        if problem := self.folder.problem(row):
            raise ValueError(f"The row cannot be decoded: {problem}.")
        model.check_codebook_fingerprint(row["codebook_fingerprint"])
        return (codes[start : start + 1024] for start in range(0, len(codes), 1024)), row["num_samples"]


def token_clips(arguments) -> TokenClips | None:
    """The clips of the token folder that is the only input; None if it is something else."""
    from ..export.token_folder import is_token_folder

    if len(arguments.inputs) == 1 and is_token_folder(arguments.inputs[0]):
        if arguments.format is not None:
            raise ValueError(
                f"Got --format {arguments.format} for a token folder, which has one of its own. Leave it out."
            )
        return TokenClips(arguments)
    if arguments.id is not None:
        raise ValueError(
            "Got --id without a token folder, expected one that `wavtokenizer tokenize` wrote as the only INPUT."
        )
    return None


class DecodedTokens:
    """Tokens that were made of the references before, decoded by a model: a system of `evaluation.evaluate`."""

    gives_codes = True

    def __init__(self, path: str, model):
        from ..evaluation import Model
        from ..export.token_folder import TokenFolder

        self.folder, self.name = TokenFolder(path), path
        self._model = Model(path, model)
        self.folder.check_model(model)
        self._index = self.folder.index(["id"])
        self._numbers = {id: number for number, id in enumerate(self._index.columns["id"])}

    def describe(self) -> dict:
        return {**self._model.describe(), "kind": "tokens, decoded by the model"}

    def reconstruct(self, place: Path, waveform: "np.ndarray"):
        """(T,) -> (T,): the audio of the codes of the row whose id is `place`."""
        import numpy as np

        if place.as_posix() not in self._numbers:
            raise ValueError(f"no row with the id {place.as_posix()!r}")
        (row,) = self.folder.read(self._index, np.array([self._numbers[place.as_posix()]]))
        if problem := self.folder.problem(row):
            raise ValueError(f"the row cannot be decoded: {problem}")
        self._model.model.check_codebook_fingerprint(row["codebook_fingerprint"])
        return self._model.decode(row["audio_codes"].astype(np.int64), row["num_samples"])
