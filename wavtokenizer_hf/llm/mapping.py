"""Map codes <-> token ids <-> text, and find spans of codes among other ids.

This module imports numpy only, so exports start fast.
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
    """Consecutive codes. `ids[start:stop]` are their token ids, without the boundary tokens around them."""

    start: int
    stop: int
    audio_codes: np.ndarray  # (stop - start,) int64


@dataclass(frozen=True)
class MalformedSpan:
    """Audio ids or boundary tokens `ids[start:stop]` that form no valid span, with the `reason`."""

    start: int
    stop: int
    reason: str


@dataclass(frozen=True)
class CodeMapping:
    """
    Map the codes of one codebook to consecutive token ids: code c is token id `first_token_id` + c.

    The subclass `AudioVocabulary` documents the fields, and adds methods that need a tokenizer or a language model.
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
            raise ValueError(
                f"Got token_format={self.token_format!r}, expected one {{}} in it, for example '<|audio_{{}}|>'."
            )

    @property
    def last_token_id(self) -> int:
        """Token id of the last code, K - 1."""
        return self.first_token_id + self.codebook_size - 1

    @property
    def has_boundary_tokens(self) -> bool:
        """Whether two boundary tokens enclose each span of audio."""
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
            audio_codes: Codes in [0, K), of any integer type and shape: numpy array, torch tensor or list.

        Returns:
            int64 ids of the same shape; a torch tensor on the same device for a tensor, else a numpy array.

        Raises:
            ValueError: The values are not integers, or a code is outside [0, K).
        """
        audio_codes = _integers(audio_codes, "audio_codes")
        _check_range(audio_codes, 0, self.codebook_size - 1, "code", "Are these token ids already, or padding?")
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
            ValueError: The values are not integers, or an id is not a code.
        """
        token_ids = _integers(token_ids, "token_ids")
        hint = "find_spans finds the audio among other ids."
        _check_range(token_ids, self.first_token_id, self.last_token_id, "token id", hint)
        return token_ids - self.first_token_id

    def codes_to_text(self, audio_codes: "torch.Tensor | np.ndarray | Sequence[int]") -> str:
        """Return the text of codes (L,), `<|audio_17|><|audio_4|>…`, which the tokenizer maps to their token ids."""
        token_ids = self.codes_to_ids(_one_row(audio_codes, "audio_codes"))
        return "".join(self.token_format.format(id - self.first_token_id) for id in token_ids.tolist())

    def text_to_codes(self, text: str) -> np.ndarray:
        """
        Return the codes of a text, the inverse of `codes_to_text`: int64 (L,).

        Whitespace between the codes is skipped, since some tokenizers add it.

        Raises:
            ValueError: The text contains something other than codes, or a code is outside [0, K).
        """
        before, after = (re.escape(part) for part in self.token_format.split("{}"))
        code_pattern = re.compile(rf"\s*{before}(0|[1-9][0-9]*){after}\s*")
        audio_codes, position = [], 0
        while position < len(text):
            match = code_pattern.match(text, position)
            if match is None:
                raise ValueError(
                    f"Got {text[position : position + 30]!r} at character {position}, expected only codes such as "
                    f"{self.token_format.format(17)!r}. For mixed text, use the tokenizer and find_spans."
                )
            audio_codes.append(int(match[1]))
            position = match.end()
        _check_range(np.array(audio_codes), 0, self.codebook_size - 1, "code", "Are they of another codebook?")
        return np.array(audio_codes, dtype=np.int64)

    # -----------------------------------------------------------------------------------------------------------------
    # Spans
    # -----------------------------------------------------------------------------------------------------------------

    def span(self, audio_codes: "torch.Tensor | np.ndarray | Sequence[int]") -> list[int]:
        """
        Return the token ids of codes (L,), enclosed by the boundary tokens if there are any.

        Raises ValueError for a code outside [0, K).
        """
        token_ids = self.codes_to_ids(_one_row(audio_codes, "audio_codes")).tolist()
        if self.begin_token_id is None or self.end_token_id is None:
            return token_ids
        return [self.begin_token_id, *token_ids, self.end_token_id]

    def find_spans(
        self, token_ids: "torch.Tensor | np.ndarray | Sequence[int]"
    ) -> tuple[list[AudioSpan], list[MalformedSpan]]:
        """
        Find the spans of audio in the output of a language model, which may include prompt and padding.

        These are malformed: a span without an end token, an end token without a begin token, codes outside a span,
        other tokens inside a span, and a span without codes. Without boundary tokens each run of codes is a span, and
        nothing is malformed.

        Args:
            token_ids: Token ids of one row, (L,).

        Returns:
            Spans with their codes, and malformed spans with a reason, both in the order of the row.

        Raises:
            ValueError: The ids have another shape, or are not integers.
        """
        row = _one_row(token_ids, "token_ids")
        ids: np.ndarray = row.cpu().numpy() if _is_tensor(row) else row
        runs = _runs(self.is_audio(ids))
        if not self.has_boundary_tokens:
            return [AudioSpan(start, stop, self.ids_to_codes(ids[start:stop])) for start, stop in runs], []
        spans, malformed, begin, covered = [], [], None, []
        for index in np.flatnonzero((ids == self.begin_token_id) | (ids == self.end_token_id)).tolist():
            if ids[index] == self.begin_token_id:
                if begin is not None:
                    malformed.append(MalformedSpan(begin, index, "It has no end before the next one begins."))
                    covered.append((begin, index))
                begin = index
            elif begin is None:
                malformed.append(MalformedSpan(index, index + 1, "It has an end and no begin."))
            else:
                reason = self._malformed_reason(ids[begin + 1 : index], begin + 1)
                if reason is None:
                    spans.append(AudioSpan(begin + 1, index, self.ids_to_codes(ids[begin + 1 : index])))
                else:
                    malformed.append(MalformedSpan(begin, index + 1, reason))
                covered.append((begin, index))
                begin = None
        if begin is not None:
            malformed.append(MalformedSpan(begin, len(ids), "It has no end."))
            covered.append((begin, len(ids)))
        for start, stop in runs:
            if not any(first <= start < last for first, last in covered):
                malformed.append(MalformedSpan(start, stop, "Its codes are not between a begin and an end."))
        return spans, sorted(malformed, key=lambda span: span.start)

    def _malformed_reason(self, span_ids: np.ndarray, start: int) -> str | None:
        """Return why the ids between two boundary tokens form no valid span, or None if they do."""
        if len(span_ids) == 0:
            return "It has no codes."
        others = np.flatnonzero(~self.is_audio(span_ids))
        if len(others) == 0:
            return None
        return f"The token id {span_ids[others[0]]} at index {start + others[0]} inside it is not audio."

    # -----------------------------------------------------------------------------------------------------------------
    # Checks against a codec
    # -----------------------------------------------------------------------------------------------------------------

    def check_codebook_fingerprint(self, fingerprint: str | None) -> None:
        """Raise ValueError if this vocabulary is for another codebook than that of `fingerprint`."""
        if self.codebook_fingerprint is not None and fingerprint != self.codebook_fingerprint:
            raise ValueError(
                f"Got codes of the codebook {fingerprint}, expected codes of the codebook "
                f"{self.codebook_fingerprint}, which this vocabulary is for. Codes of one codebook are noise to the "
                "other. Use the WavTokenizer whose codes the language model was trained on."
            )

    def check_codec(self, codec: "WavTokenizerModel") -> None:
        """Raise ValueError if this vocabulary is for another codebook than that of `codec`."""
        if codec.config.codebook_size != self.codebook_size:
            raise ValueError(
                f"Got a WavTokenizer of {codec.config.codebook_size} codes, expected {self.codebook_size}. Use the "
                "one whose codes the language model was trained on."
            )
        self.check_codebook_fingerprint(codec.codebook_fingerprint)


def _integers(values: Any, name: str) -> Any:
    """Return an int64 tensor or array. Sums in a narrower type, such as the uint16 of token files, would overflow."""
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
        index = int(outside.reshape(-1).nonzero()[0][0])
        raise ValueError(
            f"Got the {name} {int(values.reshape(-1)[index])} at index {index}, expected {low} to {high}. {hint}"
        )


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return start and stop of each run of True in (L,)."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _is_tensor(values: object) -> bool:
    torch = sys.modules.get("torch")  # if it was never imported, there are no tensors
    return torch is not None and isinstance(values, torch.Tensor)
