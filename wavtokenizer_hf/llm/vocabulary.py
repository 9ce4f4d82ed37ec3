"""Which ids of a language model's vocabulary are audio codes, and what follows from it."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase


KEY = "audio_vocabulary"  # in tokenizer_config.json


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
class AudioVocabulary:
    """
    Range of a language model's vocabulary that holds the codes of one codebook: code c is token id `first_token_id` + c.

    Tokens that are added to the tokenizer later are no audio. `add_to` makes a vocabulary by adding tokens to a tokenizer;
    `from_tokenizer` reads the one that a tokenizer was saved with.

    Args:
        first_token_id: Token id of code 0.
        codebook_size: Number of codes, K.
        begin_token_id, end_token_id: Ids of the boundary tokens around a span of audio. None for a model without them.
        codebook_fingerprint: Fingerprint of the codebook of the codes. None: not checked.
        token_format: Text of a code, with `{}` for its number.
        begin_token, end_token: Text of the boundary tokens.

    Raises:
        ValueError: A range that starts below 0 or is empty; one boundary token alone, the same twice, or one inside the range; a
            `token_format` without `{}`.
    """

    first_token_id: int
    codebook_size: int
    begin_token_id: int | None = None
    end_token_id: int | None = None
    codebook_fingerprint: str | None = None
    token_format: str = "<|audio_{}|>"
    begin_token: str = "<|audio_begin|>"
    end_token: str = "<|audio_end|>"

    def __post_init__(self):
        if self.first_token_id < 0 or self.codebook_size < 1:
            raise ValueError(
                f"Got first_token_id={self.first_token_id} and codebook_size={self.codebook_size}, expected at least 0 "
                "and 1."
            )
        marks = [mark for mark in (self.begin_token_id, self.end_token_id) if mark is not None]
        if len(marks) == 1 or len(set(marks)) < len(marks):
            raise ValueError(
                f"Got begin_token_id={self.begin_token_id} and end_token_id={self.end_token_id}, expected two ids, or "
                "neither for a model without marks."
            )
        if any(mark < 0 or self.first_token_id <= mark <= self.last_token_id for mark in marks):
            raise ValueError(
                f"Got begin_token_id={self.begin_token_id} and end_token_id={self.end_token_id}, expected ids outside the "
                f"codes, which are {self.first_token_id} to {self.last_token_id}."
            )
        if self.token_format.count("{}") != 1:
            raise ValueError(f"Got token_format={self.token_format!r}, expected one {{}} in it, as '<|audio_{{}}|>'.")

    @property
    def last_token_id(self) -> int:
        """Id of code K - 1."""
        return self.first_token_id + self.codebook_size - 1

    @property
    def has_marks(self) -> bool:
        return self.begin_token_id is not None

    @property
    def token_ids(self) -> list[int]:
        """Ids of all codes and of the boundary tokens."""
        marks = [self.begin_token_id, self.end_token_id] if self.has_marks else []
        return [*range(self.first_token_id, self.last_token_id + 1), *marks]

    # -----------------------------------------------------------------------------------------------------------------
    # Codes <-> ids <-> text
    # -----------------------------------------------------------------------------------------------------------------

    def is_audio(self, token_ids):
        """Return which ids are codes: bool, in the shape and the library (numpy or torch) of `token_ids`."""
        token_ids = _integers(token_ids, "token_ids")
        return (token_ids >= self.first_token_id) & (token_ids <= self.last_token_id)

    def codes_to_ids(self, audio_codes):
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

    def ids_to_codes(self, token_ids):
        """
        Return the codes of token ids, the inverse of `codes_to_ids`.

        Args:
            token_ids: Ids that are all codes, of any integer type and shape: numpy array, torch tensor or list.

        Returns:
            int64 codes in [0, K) of the same shape; a torch tensor on the same device for a tensor, else a numpy array.

        Raises:
            ValueError: No integers, or an id that is no code.
        """
        token_ids = _integers(token_ids, "token_ids")
        hint = "find_spans finds the audio among other ids."
        _check_range(token_ids, self.first_token_id, self.last_token_id, "token id", hint)
        return token_ids - self.first_token_id

    def codes_to_text(self, audio_codes) -> str:
        """Return the text of codes (L,), `<|audio_17|><|audio_4|>…`, which the tokenizer reads as their token ids."""
        token_ids = self.codes_to_ids(_one_row(audio_codes, "audio_codes"))
        return "".join(self.token_format.format(id - self.first_token_id) for id in token_ids.tolist())

    def text_to_codes(self, text: str) -> np.ndarray:
        """
        Return the codes of a text, the inverse of `codes_to_text`: int64 (L,). Blanks between the codes, as some tokenizers write them, are skipped.

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

    def span(self, audio_codes) -> list[int]:
        """Return the token ids of codes (L,), with the boundary tokens around them. Raises ValueError for a code outside [0, K)."""
        token_ids = self.codes_to_ids(_one_row(audio_codes, "audio_codes")).tolist()
        return [self.begin_token_id, *token_ids, self.end_token_id] if self.has_marks else token_ids

    def find_spans(self, token_ids) -> tuple[list[AudioSpan], list[MalformedSpan]]:
        """
        Find the spans of audio in the output of a language model, prompt and padding included.

        Malformed are: a span without an end, an end without a begin, codes outside a span, other tokens inside a span, and a span
        without codes. Without boundary tokens a span is a run of codes, and nothing is malformed.

        Args:
            token_ids: ids of one row, (L,).

        Returns:
            Spans with their codes, and malformed spans with a reason, both in the order of the row.

        Raises:
            ValueError: ids of another shape, or no integers.
        """
        token_ids = _one_row(token_ids, "token_ids")
        token_ids = token_ids.cpu().numpy() if isinstance(token_ids, torch.Tensor) else token_ids
        audio = self.is_audio(token_ids)
        runs = _runs(audio)
        if not self.has_marks:
            return [AudioSpan(start, stop, self.ids_to_codes(token_ids[start:stop])) for start, stop in runs], []
        spans, malformed, begin, covered = [], [], None, []
        for place in np.flatnonzero((token_ids == self.begin_token_id) | (token_ids == self.end_token_id)).tolist():
            if token_ids[place] == self.begin_token_id:
                if begin is not None:
                    malformed.append(MalformedSpan(begin, place, "It has no end before the next one begins."))
                    covered.append((begin, place))
                begin = place
            elif begin is None:
                malformed.append(MalformedSpan(place, place + 1, "It has an end and no begin."))
            else:
                reason = self._reason(token_ids[begin + 1 : place], begin + 1)
                if reason is None:
                    spans.append(AudioSpan(begin + 1, place, self.ids_to_codes(token_ids[begin + 1 : place])))
                else:
                    malformed.append(MalformedSpan(begin, place + 1, reason))
                covered.append((begin, place))
                begin = None
        if begin is not None:
            malformed.append(MalformedSpan(begin, len(token_ids), "It has no end."))
            covered.append((begin, len(token_ids)))
        for start, stop in runs:
            if not any(first <= start < last for first, last in covered):
                malformed.append(MalformedSpan(start, stop, "Its codes are not between a begin and an end."))
        return spans, sorted(malformed, key=lambda each: each.start)

    def _reason(self, inside: np.ndarray, start: int) -> str | None:
        """Why the ids between two marks are no span; None if they are one."""
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
                f"{self.codebook_fingerprint}: to each other they are noise. Take the WavTokenizer that made the codes which the "
                "language model learned."
            )

    def check_codec(self, codec) -> None:
        """Raise ValueError if this vocabulary is for the codes of another WavTokenizer than `codec`."""
        if codec.config.codebook_size != self.codebook_size:
            raise ValueError(
                f"Got a WavTokenizer of {codec.config.codebook_size} codes, expected {self.codebook_size}. Take the one "
                "that made the codes which the language model learned."
            )
        self.check_codebook_fingerprint(codec.codebook_fingerprint)

    def check_model(self, model: PreTrainedModel, writes: bool = True) -> None:
        """
        Raise ValueError if the language model has too few embeddings for the audio or, if it `writes` audio, too few outputs.

        A model may read more tokens than it writes: Apertus 1.5 has outputs for text only.
        """
        largest = max(self.token_ids)
        parts = [("embeddings", model.get_input_embeddings())]
        if writes:
            parts.append(("outputs", model.get_output_embeddings()))
        for name, module in parts:
            if module is not None and _num_rows(module) <= largest:
                raise ValueError(
                    f"The model has {name} for {_num_rows(module)} tokens, and the audio vocabulary needs {largest + 1}. "
                    f"model.resize_token_embeddings({largest + 1}) makes them, to be trained."
                )

    # -----------------------------------------------------------------------------------------------------------------
    # Tokenizers
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def add_to(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        codebook_size: int,
        codebook_fingerprint: str | None = None,
        model: PreTrainedModel | None = None,
        pad_to_multiple_of: int | None = None,
        token_format: str = token_format,
        begin_token: str = begin_token,
        end_token: str = end_token,
    ) -> "AudioVocabulary":
        """
        Add the codes and two boundary tokens to a tokenizer, and rows for them to a model. Both are changed in place.

        The tokens are never split. They are no special tokens, which `decode(..., skip_special_tokens=True)` would drop.

        New rows of the embeddings and of the output layer are the mean of the old rows, so the model's earlier output stays about
        as likely. Old rows do not change. Rows beyond the tokenizer's ids are used first, and a matrix never shrinks. With
        DeepSpeed ZeRO-3, call this before the model is partitioned.

        Args:
            tokenizer: Tokenizer of transformers. Save it afterwards: it stores the vocabulary.
            codebook_size: Number of codes, `codec.config.codebook_size`.
            codebook_fingerprint: Fingerprint of the codebook, `codec.codebook_fingerprint`. None: not checked.
            model: Language model with this tokenizer. None if it will be made later, with `len(tokenizer)` tokens.
            pad_to_multiple_of: Round the number of rows up to a multiple of this, which GPUs compute faster with.
            token_format: Text of a code, with `{}` for its number.
            begin_token, end_token: Text of the two boundary tokens.

        Returns:
            The new `AudioVocabulary`, which the tokenizer stores too.

        Raises:
            ValueError: the tokenizer has an audio vocabulary or such tokens already, or does not give them consecutive
                ids; the model has fewer rows than its tokenizer has ids, or its weights are not here.
        """
        if KEY in tokenizer.init_kwargs:
            raise ValueError(
                "The tokenizer has an audio vocabulary already, and can have one only. Take it with "
                "AudioVocabulary.from_tokenizer, or load the tokenizer anew, as it was without audio."
            )
        tokens = [token_format.format(code) for code in range(codebook_size)]
        vocabulary = tokenizer.get_vocab()
        known = [token for token in (*tokens, begin_token, end_token) if token in vocabulary]
        if known:
            raise ValueError(
                f"The tokenizer has the token {known[0]!r} (id {vocabulary[known[0]]}) already. If these are the codes, describe "
                "them: AudioVocabulary(first_token_id=..., codebook_size=...).attach(tokenizer). If not, choose another "
                "token_format, begin_token or end_token."
            )
        num_old = max(vocabulary.values(), default=-1) + 1
        if model is not None:
            _check_rows(model, num_old)
        every = [*tokens, begin_token, end_token]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in every])
        first, *_, begin, end = ids = tokenizer.convert_tokens_to_ids(every)
        if ids != list(range(num_old, num_old + len(every))):
            raise ValueError(
                f"The tokenizer gave the new tokens ids from {min(ids)} to {max(ids)}, expected {len(every)} consecutive ids "
                f"from {num_old}. Load it anew, for it is changed now, and describe a range that is free."
            )
        new = cls(
            first, codebook_size, begin, end, codebook_fingerprint, token_format, begin_token, end_token
        )  # fmt: skip
        new.attach(tokenizer)
        if model is not None:
            _grow(model, num_old, num_old + len(every), pad_to_multiple_of)
        return new

    def attach(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Store this vocabulary in a tokenizer. `save_pretrained` writes it to tokenizer_config.json.

        Raises:
            ValueError: The tokenizer has other tokens at these ids, splits them, or stores another vocabulary.
        """
        before = tokenizer.init_kwargs.get(KEY, asdict(self))
        if before != asdict(self):
            raise ValueError(f"The tokenizer remembers another audio vocabulary: {before}. Load it anew without it.")
        expected = [self.token_format.format(code) for code in range(self.codebook_size)]
        if self.has_marks:
            expected += [self.begin_token, self.end_token]
        got = tokenizer.convert_ids_to_tokens(self.token_ids)
        for token_id, token, name in zip(self.token_ids, got, expected, strict=True):
            if token != name:
                raise ValueError(
                    f"The tokenizer has the token {token!r} at id {token_id}, expected {name!r}. Correct first_token_id, the "
                    "marks' ids, token_format or the marks, or take the tokenizer of that model."
                )
        ends = [0, self.codebook_size - 1]
        if (
            tokenizer(self.codes_to_text(ends), add_special_tokens=False)["input_ids"]
            != self.codes_to_ids(ends).tolist()
        ):
            raise ValueError(
                f"The tokenizer splits {expected[0]!r}, expected one id, as of an added token. Add the tokens with "
                "AudioVocabulary.add_to."
            )
        tokenizer.init_kwargs[KEY] = asdict(self)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "AudioVocabulary":
        """Return the vocabulary that a tokenizer stores. Raises ValueError if it stores none, or one that is damaged."""
        content: Any = tokenizer.init_kwargs.get(KEY)
        if content is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} remembers no audio vocabulary. Make one with "
                "AudioVocabulary.add_to, or describe what it has: AudioVocabulary(first_token_id=..., codebook_size=...)."
            )
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"The tokenizer's audio vocabulary has the unknown field {min(unknown)!r}. Update wavtokenizer_hf."
            )
        missing = {field.name for field in fields(cls) if field.default is MISSING} - set(content)
        if missing:
            raise ValueError(
                f"The tokenizer's audio vocabulary has no field {min(missing)!r}. Load the tokenizer anew from where it was "
                "saved, or make its tokenizer_config.json whole again."
            )
        return cls(**content)


APERTUS_1_5 = AudioVocabulary(
    first_token_id=262344,
    codebook_size=4096,
    begin_token_id=131080,
    end_token_id=131081,
    token_format="<|audio token {}|>",
    begin_token="<|audio_start|>",
    end_token="<|audio_end|>",
)
"""The layout of Apertus 1.5, as tokenizer_config.json in github.com/swiss-ai/apertus-omni-tokenizer has it."""


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def _integers(values, name: str):
    """As an int64 tensor or array: sums in a narrower type, such as the uint16 of token files, would overflow."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"Got {name} of type {values.dtype}, expected integers.")
        return values.long()
    values = np.asarray(values)
    if values.size > 0 and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"Got {name} of type {values.dtype}, expected integers.")
    return values.astype(np.int64)


def _one_row(values, name: str):
    values = _integers(values, name)
    if values.ndim != 1:
        raise ValueError(f"Got {name} of shape {tuple(values.shape)}, expected one row, (L,).")
    return values


def _check_range(values, low: int, high: int, name: str, hint: str) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a model
# ---------------------------------------------------------------------------------------------------------------------


def _num_rows(module: torch.nn.Module) -> int:
    """Tokens of an embedding or an output head. By its attributes, since a quantized weight has another shape."""
    return getattr(module, "num_embeddings", None) or getattr(module, "out_features", None) or len(module.weight)


def _check_rows(model: PreTrainedModel, num_tokens: int) -> None:
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta" or embeddings.weight.numel() == 0:  # offloaded, or DeepSpeed's ZeRO-3
        raise ValueError(
            "The model's embeddings are not in memory here. Add the tokens before it is moved or partitioned."
        )
    if _num_rows(embeddings) < num_tokens:
        raise ValueError(
            f"The model has embeddings for {_num_rows(embeddings)} tokens, and the tokenizer has ids up to "
            f"{num_tokens - 1}. Load the tokenizer that belongs to the model, or call "
            f"model.resize_token_embeddings({num_tokens}) first."
        )


@torch.no_grad()
def _grow(model: PreTrainedModel, first_new: int, num_tokens: int, pad_to_multiple_of: int | None) -> None:
    """Rows for ids up to `num_tokens`; those from `first_new` on are the mean of those before.

    transformers' own mean_resizing takes the rows for new that lie beyond the old matrix, and all others into the mean. A
    matrix may be larger than its tokenizer, and then has rows in it that nobody ever trained.
    """
    old = [_num_rows(module) for module in _modules(model)]
    model.resize_token_embeddings(max(old[0], num_tokens), pad_to_multiple_of, mean_resizing=False)
    for module, num_old in zip(_modules(model), old, strict=True):
        first = min(first_new, num_old)  # an output head may be smaller than the embeddings
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter[first:] = parameter[:first].float().mean(dim=0).to(parameter.dtype)


def _modules(model: PreTrainedModel) -> Sequence[torch.nn.Module]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in modules if module is not None]
