"""
Codes <-> token ids <-> text, and spans of codes among other ids. Needs numpy alone, so that exports start at once.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np


if TYPE_CHECKING:
    import torch

    from ..modeling_wavtokenizer import WavTokenizerModel


@dataclass(frozen=True)
class AudioSpan:
    """Consecutive codes: `ids[start:stop]` are their token ids, without the boundary tokens around them."""

    start: int
    stop: int
    audio_codes: np.ndarray  # (stop - start,) int64


@dataclass(frozen=True)
class MalformedSpan:
    """`ids[start:stop]` hold audio ids or boundary tokens that are no span; `reason` says why."""

    start: int
    stop: int
    reason: str


@dataclass(frozen=True)
class CodeMapping:
    """
    Codes of one codebook as consecutive token ids: code c is token id `first_token_id` + c.

    `AudioVocabulary` adds what needs a tokenizer or a language model, and explains the fields.
    """

    first_token_id: int
    codebook_size: int
    begin_token_id: int | None = None
    end_token_id: int | None = None
    codebook_fingerprint: str | None = None
    token_format: str = "<|audio_{}|>"
    begin_token: str = "<|audio_begin|>"
    end_token: str = "<|audio_end|>"

    def __post_init__(self) -> None:
        if self.first_token_id < 0 or self.codebook_size < 1:
            raise ValueError(
                f"Got first_token_id={self.first_token_id} and codebook_size={self.codebook_size}, expected at least "
                "0 and 1."
            )
        boundaries = [id for id in (self.begin_token_id, self.end_token_id) if id is not None]
        if len(boundaries) == 1 or len(set(boundaries)) < len(boundaries):
            raise ValueError(
                f"Got begin_token_id={self.begin_token_id} and end_token_id={self.end_token_id}, expected two ids, or "
                "neither for a model without boundary tokens."
            )
        if any(id < 0 or self.first_token_id <= id <= self.last_token_id for id in boundaries):
            raise ValueError(
                f"Got begin_token_id={self.begin_token_id} and end_token_id={self.end_token_id}, expected ids "
                f"outside the codes, which are {self.first_token_id} to {self.last_token_id}."
            )
        if self.token_format.count("{}") != 1:
            raise ValueError(f"Got token_format={self.token_format!r}, expected one {{}} in it, as '<|audio_{{}}|>'.")

    @property
    def last_token_id(self) -> int:
        """Id of code K - 1."""
        return self.first_token_id + self.codebook_size - 1

    @property
    def has_boundary_tokens(self) -> bool:
        """Whether spans of audio stand between two boundary tokens."""
        return self.begin_token_id is not None

    @property
    def token_ids(self) -> list[int]:
        """Ids of all codes and of the boundary tokens."""
        boundaries = [self.begin_token_id, self.end_token_id] if self.has_boundary_tokens else []
        return [*range(self.first_token_id, self.last_token_id + 1), *boundaries]

    # -----------------------------------------------------------------------------------------------------------------
    # Codes <-> ids <-> text
    # -----------------------------------------------------------------------------------------------------------------

    def is_audio(self, token_ids: Any) -> Any:
        """Return which ids are codes: bool, in the shape and the library (numpy or torch) of `token_ids`."""
        token_ids = _integers(token_ids, "token_ids")
        return (token_ids >= self.first_token_id) & (token_ids <= self.last_token_id)

    @overload
    def codes_to_ids(self, audio_codes: "torch.Tensor") -> "torch.Tensor": ...
    @overload
    def codes_to_ids(self, audio_codes: np.ndarray | Sequence) -> np.ndarray: ...
    def codes_to_ids(self, audio_codes: Any) -> Any:
        """
        Return the token ids of codes: code + `first_token_id`.

        Args:
            audio_codes: codes in [0, K), of any integer type and shape: numpy array, torch tensor or list.

        Returns:
            int64 ids of the same shape; a torch tensor on the same device for a tensor, else a numpy array.

        Raises:
            ValueError: no integers, or a code outside [0, K).
        """
        audio_codes = _integers(audio_codes, "audio_codes")
        _check_range(audio_codes, 0, self.codebook_size - 1, "code", "Are they ids already, or padding?")
        return audio_codes + self.first_token_id

    @overload
    def ids_to_codes(self, token_ids: "torch.Tensor") -> "torch.Tensor": ...
    @overload
    def ids_to_codes(self, token_ids: np.ndarray | Sequence) -> np.ndarray: ...
    def ids_to_codes(self, token_ids: Any) -> Any:
        """
        Return the codes of token ids, the inverse of `codes_to_ids`.

        Args:
            token_ids: Ids that are all codes, of any integer type and shape: numpy array, torch tensor or list.

        Returns:
            int64 codes in [0, K) of the same shape; a torch tensor on the same device for a tensor, else a numpy
            array.

        Raises:
            ValueError: No integers, or an id that is no code.
        """
        token_ids = _integers(token_ids, "token_ids")
        hint = "find_spans finds the audio among other ids."
        _check_range(token_ids, self.first_token_id, self.last_token_id, "token id", hint)
        return token_ids - self.first_token_id

    def codes_to_text(self, audio_codes: "torch.Tensor | np.ndarray | Sequence[int]") -> str:
        """Return the text of codes (L,), `<|audio_17|><|audio_4|>…`, which the tokenizer reads as their token ids."""
        token_ids = self.codes_to_ids(_one_row(audio_codes, "audio_codes"))
        return "".join(self.token_format.format(id - self.first_token_id) for id in token_ids.tolist())

    def text_to_codes(self, text: str) -> np.ndarray:
        """
        Return the codes of a text, the inverse of `codes_to_text`: int64 (L,). Blanks between the codes, as some
        tokenizers write them, are skipped.

        Raises:
            ValueError: there is something else in the text, or a code outside [0, K).
        """
        before, after = (re.escape(part) for part in self.token_format.split("{}"))
        one = re.compile(rf"\s*{before}(0|[1-9][0-9]*){after}\s*")
        audio_codes, place = [], 0
        while place < len(text):
            found = one.match(text, place)
            if found is None:
                raise ValueError(
                    f"Got {text[place : place + 30]!r} at character {place}, expected codes only, as "
                    f"{self.token_format.format(17)!r}. Take the tokenizer and find_spans for a text with more in it."
                )
            audio_codes.append(int(found[1]))
            place = found.end()
        _check_range(np.array(audio_codes), 0, self.codebook_size - 1, "code", "Are they of another codebook?")
        return np.array(audio_codes, dtype=np.int64)

    # -----------------------------------------------------------------------------------------------------------------
    # Spans
    # -----------------------------------------------------------------------------------------------------------------

    def span(self, audio_codes: "torch.Tensor | np.ndarray | Sequence[int]") -> list[int]:
        """
        Return the token ids of codes (L,), with the boundary tokens around them. Raises ValueError for a code outside
        [0, K).
        """
        token_ids = self.codes_to_ids(_one_row(audio_codes, "audio_codes")).tolist()
        if self.begin_token_id is None or self.end_token_id is None:
            return token_ids
        return [self.begin_token_id, *token_ids, self.end_token_id]

    def find_spans(
        self, token_ids: "torch.Tensor | np.ndarray | Sequence[int]"
    ) -> tuple[list[AudioSpan], list[MalformedSpan]]:
        """
        Find the spans of audio in the output of a language model, prompt and padding included.

        Malformed are: a span without an end, an end without a begin, codes outside a span, other tokens inside a span,
        and a span without codes. Without boundary tokens a span is a run of codes, and nothing is malformed.

        Args:
            token_ids: ids of one row, (L,).

        Returns:
            Spans with their codes, and malformed spans with a reason, both in the order of the row.

        Raises:
            ValueError: ids of another shape, or no integers.
        """
        row = _one_row(token_ids, "token_ids")
        ids: np.ndarray = row.cpu().numpy() if _is_tensor(row) else row
        audio = self.is_audio(ids)
        runs = _runs(audio)
        if not self.has_boundary_tokens:
            return [AudioSpan(start, stop, self.ids_to_codes(ids[start:stop])) for start, stop in runs], []
        spans, malformed, begin, covered = [], [], None, []
        for place in np.flatnonzero((ids == self.begin_token_id) | (ids == self.end_token_id)).tolist():
            if ids[place] == self.begin_token_id:
                if begin is not None:
                    malformed.append(MalformedSpan(begin, place, "It has no end before the next one begins."))
                    covered.append((begin, place))
                begin = place
            elif begin is None:
                malformed.append(MalformedSpan(place, place + 1, "It has an end and no begin."))
            else:
                reason = self._reason(ids[begin + 1 : place], begin + 1)
                if reason is None:
                    spans.append(AudioSpan(begin + 1, place, self.ids_to_codes(ids[begin + 1 : place])))
                else:
                    malformed.append(MalformedSpan(begin, place + 1, reason))
                covered.append((begin, place))
                begin = None
        if begin is not None:
            malformed.append(MalformedSpan(begin, len(ids), "It has no end."))
            covered.append((begin, len(ids)))
        for start, stop in runs:
            if not any(first <= start < last for first, last in covered):
                malformed.append(MalformedSpan(start, stop, "Its codes are not between a begin and an end."))
        return spans, sorted(malformed, key=lambda each: each.start)

    def _reason(self, inside: np.ndarray, start: int) -> str | None:
        """Why the ids between two boundary tokens are no span; None if they are one."""
        if len(inside) == 0:
            return "It has no codes."
        others = np.flatnonzero(~self.is_audio(inside))
        if len(others) == 0:
            return None
        return f"The token id {inside[others[0]]} at place {start + others[0]} inside it is not audio."

    # -----------------------------------------------------------------------------------------------------------------
    # What it has to fit
    # -----------------------------------------------------------------------------------------------------------------

    def check_codebook_fingerprint(self, fingerprint: str | None) -> None:
        """Raise ValueError if this vocabulary is for the codes of another codebook than that of `fingerprint`."""
        if self.codebook_fingerprint is not None and fingerprint != self.codebook_fingerprint:
            raise ValueError(
                f"Got codes of the codebook {fingerprint}, and this vocabulary is for those of "
                f"{self.codebook_fingerprint}: to each other they are noise. Take the WavTokenizer that made the "
                "codes which the language model learned."
            )

    def check_codec(self, codec: "WavTokenizerModel") -> None:
        """Raise ValueError if this vocabulary is for the codes of another WavTokenizer than `codec`."""
        if codec.config.codebook_size != self.codebook_size:
            raise ValueError(
                f"Got a WavTokenizer of {codec.config.codebook_size} codes, expected {self.codebook_size}. Take the "
                "one that made the codes which the language model learned."
            )
        self.check_codebook_fingerprint(codec.codebook_fingerprint)


def _integers(values: Any, name: str) -> Any:
    """As an int64 tensor or array: sums in a narrower type, such as the uint16 of token files, would overflow."""
    if _is_tensor(values):
        if values.is_floating_point() or values.is_complex() or str(values.dtype) == "torch.bool":
            raise ValueError(f"Got {name} of type {values.dtype}, expected integers.")
        return values.long()
    values = np.asarray(values)
    if values.size > 0 and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"Got {name} of type {values.dtype}, expected integers.")
    return values.astype(np.int64)


def _one_row(values: Any, name: str) -> Any:
    values = _integers(values, name)
    if values.ndim != 1:
        raise ValueError(f"Got {name} of shape {tuple(values.shape)}, expected one row, (L,).")
    return values


def _check_range(values: Any, low: int, high: int, name: str, hint: str) -> None:
    outside = (values < low) | (values > high)
    if outside.any():
        place = int(outside.reshape(-1).nonzero()[0][0])
        raise ValueError(
            f"Got the {name} {int(values.reshape(-1)[place])} at place {place}, expected {low} to {high}. {hint}"
        )


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of True in (L,)."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _is_tensor(values: object) -> bool:
    torch = sys.modules.get("torch")  # without it there are no tensors
    return torch is not None and isinstance(values, torch.Tensor)
