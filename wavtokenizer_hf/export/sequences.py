"""Turn rows of a token folder into sequences of token ids for language-model training, with templates of `llm`."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..limited_files import one_line, read_json_object
from ..llm import AudioVocabulary, PackedRows, Template, TrainingRows
from ..llm.rows import NO_LOSS
from .token_folder import Index


KINDS = ("audio", "text-to-audio", "audio-to-text", "both", "interleaved")


@dataclass
class BadRow:
    """A row that could not become a sequence, and the reason."""

    id: str
    reason: str


@dataclass
class Sequences:
    """
    Settings for turning rows into sequences.

    By default, sequences begin and end with the tokenizer's BOS and EOS, where it has them.

    Args:
        kind: `audio`: the codes of each clip. `text-to-audio`: text, then codes. `audio-to-text`: codes, then text.
            `both`: one sequence of each of these two. `interleaved`: all clips of a `source_id` in the order of
            `clip_num`, each with its text before it if there is a text column.
        vocabulary: Token ids of the codes.
        tokenizer: Tokenizer of the language model. None for `audio` without BOS and EOS.
        text_column: Name of the text column. None for sequences without text.
        template: Template that replaces the default of `kind`. Not for `interleaved`.
        max_length: Maximum number of ids in a sequence. Longer rows are bad rows, and interleaved sources are cut
            between clips.
        pack: Pack whole examples into sequences of exactly this length.
        pad_token_id: Id of the padding in packed sequences.
    """

    kind: str
    vocabulary: AudioVocabulary
    tokenizer: Any = None
    text_column: str | None = "text"
    template: Template | None = None
    max_length: int | None = None
    pack: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Got the sequences {self.kind!r}, expected one of {', '.join(KINDS)}.")
        if self.template is not None and self.kind == "interleaved":
            raise ValueError("Got a template for interleaved sequences, which have a fixed template. Leave it out.")
        has_text = any(name != "audio" for template in self.templates for name in _field_names(template))
        if self.tokenizer is None and (has_text or self.template is not None):
            raise ValueError(f"The sequences {self.kind!r} hold text. Name the tokenizer.")
        for name, length in (("max_length", self.max_length), ("pack", self.pack)):
            if length is not None and length < 1:
                raise ValueError(f"Got {name}={length}, expected at least 1.")
        if self.pack is not None and self.max_length is not None:
            raise ValueError(f"Got max_length={self.max_length} and pack={self.pack}, expected at most one of them.")
        self.packed_rows = None
        if self.pack is not None:
            if self.pad_token_id is None:
                raise ValueError("Packed sequences need a padding id. Name one, or a tokenizer that has one.")
            self.packed_rows = PackedRows(self.pack, self.pad_token_id)
        self.training_rows = TrainingRows(self.tokenizer, self.vocabulary, self.templates)
        self._constant_ids = self._ids_around_codes() if self.kind == "audio" and self.template is None else None

    def _ids_around_codes(self) -> tuple[list[int], list[int]]:
        """
        Return the ids before and after the codes of a clip.

        Without text they are the same for every clip. Reusing them is ten times as fast as row by row.
        """
        (ids,) = self.training_rows({"audio_codes": [[0]]})["input_ids"]
        position = ids.index(self.vocabulary.first_token_id)
        return ids[:position], ids[position + 1 :]

    @property
    def templates(self) -> list[Template]:
        """Templates of `kind`. For `interleaved` they lack BOS and EOS, which enclose a whole source."""
        if self.template is not None:
            return [self.template]
        begin, end = (getattr(self.tokenizer, f"{name}_token", None) or "" for name in ("bos", "eos"))
        text = f"{{{self.text_column}}}"
        to_audio = Template(begin + text, "{audio}" + end)
        from_audio = Template(begin + "{audio}", text + end)
        return {
            "audio": [Template("", begin + "{audio}" + end)],
            "text-to-audio": [to_audio],
            "audio-to-text": [from_audio],
            "both": [to_audio, from_audio],
            "interleaved": [Template("", (text if self.text_column else "") + "{audio}")],
        }[self.kind]

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the token folder to read."""
        fields = {name for template in self.templates for name in _field_names(template)} - {"audio"}
        by_source = ["source_id", "clip_num"] if self.kind == "interleaved" else []
        return ["id", "audio_codes", "codebook_fingerprint", *by_source, *sorted(fields - {"id"})]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that can occur."""
        sizes = [max(self.vocabulary.token_ids) + 1, len(self.tokenizer) if self.tokenizer is not None else 0]
        return max(*sizes, 0 if self.pad_token_id is None else self.pad_token_id + 1)

    def describe(self) -> dict:
        """Return the settings that determine the sequences, for JSON files."""
        return {
            "kind": self.kind,
            "vocabulary": asdict(self.vocabulary),
            "tokenizer": getattr(self.tokenizer, "name_or_path", None),
            "vocab_size": self.vocab_size,
            "templates": [asdict(template) for template in self.templates],
            "text_column": self.text_column,
            "max_length": self.max_length,
            "pack": self.pack,
            "pad_token_id": self.pad_token_id,
        }

    def make(self, rows: list[dict]) -> tuple[list[np.ndarray], list[np.ndarray], list[BadRow]]:
        """
        Turn rows into sequences.

        Args:
            rows: Rows of a token folder. For `interleaved`, all rows of each source.

        Returns:
            Ids of each sequence, its loss mask (bool), and the bad rows.

        Raises:
            ValueError: The rows hold codes of another codebook.
        """
        for fingerprint in {row["codebook_fingerprint"] for row in rows} - {None}:
            self.vocabulary.check_codebook_fingerprint(fingerprint)
        good, bad, ids, labels = [], [], [], []
        for row in rows:
            examples = self._row_examples(row)
            if isinstance(examples, BadRow):
                bad.append(examples)
                continue
            good.append(row)
            ids.append(examples["input_ids"])
            labels.append(examples["labels"])
        if self.kind == "interleaved":
            ids, labels = self._join_sources(good, ids, labels)
        else:
            ids = [example_ids for row_ids in ids for example_ids in row_ids]
            labels = [example_labels for row_labels in labels for example_labels in row_labels]
        if self.packed_rows is not None and ids:
            packed = self.packed_rows({"input_ids": list(map(list, ids)), "labels": list(map(list, labels))})
            ids, labels = packed["input_ids"], packed["labels"]
        masks = [np.asarray(sequence_labels) != NO_LOSS for sequence_labels in labels]
        return [np.asarray(sequence_ids) for sequence_ids in ids], masks, bad

    def _row_examples(self, row: dict) -> dict[str, list] | BadRow:
        if row["audio_codes"] is None or len(row["audio_codes"]) == 0:
            return BadRow(row["id"], "it has no codes")
        examples: dict[str, list]
        try:
            if self._constant_ids is None:
                examples = self.training_rows({name: [value] for name, value in row.items()})
            else:
                before, after = self._constant_ids
                ids = np.concatenate([before, self.vocabulary.codes_to_ids(row["audio_codes"]), after])
                examples = {"input_ids": [ids], "labels": [ids]}
        except ValueError as error:
            return BadRow(row["id"], str(error))
        limit, longest = self.pack or self.max_length, max(map(len, examples["input_ids"]))
        if limit is not None and longest + (2 if self.kind == "interleaved" else 0) > limit:
            return BadRow(row["id"], f"it makes a sequence of {longest} ids, and {limit} is the limit")
        return examples

    def _join_sources(self, rows: list[dict], ids: list, labels: list) -> tuple[list, list]:
        """
        Join the clips of each source between BOS and EOS. Cut between clips where the length limit is reached.
        """
        begin = [id for id in (getattr(self.tokenizer, "bos_token_id", None),) if id is not None]
        end = [id for id in (getattr(self.tokenizer, "eos_token_id", None),) if id is not None]
        limit = self.pack or self.max_length
        documents, source = [], None
        current: list[int] = []
        for row, (clip_ids,), (clip_labels,) in zip(rows, ids, labels, strict=True):
            full = limit is not None and len(begin) + len(current) + len(clip_ids) + len(end) > limit
            if current and (row["source_id"] != source or full):
                documents.append(begin + current + end)
                current = []
            source = row["source_id"]
            current += clip_ids
            assert NO_LOSS not in clip_labels  # the ids are returned as labels too, so every id must carry loss
        if current:
            documents.append(begin + current + end)
        return documents, documents


def _field_names(template: Template) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", template.prompt + template.response))


def load_vocabulary(path: str | os.PathLike) -> AudioVocabulary:
    """
    Load an `AudioVocabulary` from the vocabulary.json of an export, or from a JSON file of its fields only.

    Raises ValueError if the file cannot be read or holds no vocabulary.
    """
    try:
        fields = read_json_object(path)
        return AudioVocabulary(**fields.get("vocabulary", fields))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"Cannot read a vocabulary from {path}: {one_line(error)}") from error


def order_by_source(index: Index, columns: Sequence[str] = ("source_id", "clip_num")) -> np.ndarray:
    """
    Return the positions of the rows in the index, sorted by source and clip number.

    Raises ValueError if a row lacks a source or clip number, or its clip number is not a number.
    """
    sources, clips = (index.columns[name] for name in columns)
    for name, values in zip(columns, (sources, clips), strict=True):
        if any(value is None or value != value for value in values.tolist()):
            raise ValueError(
                f"A row has no value in the column {name!r}. Interleaved sequences need one in every row."
            )
    return np.lexsort((_to_numbers(clips, columns[1]), sources.astype(str)))


def _to_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Convert a column to numbers, since columns of a CSV list hold text."""
    if np.issubdtype(values.dtype, np.number):
        return values
    numbers = np.zeros(len(values))
    for position, value in enumerate(values.tolist()):
        try:
            numbers[position] = float(value)
        except ValueError as error:
            raise ValueError(f"Got {value!r} in the column {name!r}, expected a number.") from error
    return numbers
