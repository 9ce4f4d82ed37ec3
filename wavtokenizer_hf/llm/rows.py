"""Codes and text -> training examples of a language model: functions for `datasets.Dataset.map`."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from .tokenizer import AudioVocabulary


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

NO_LOSS = -100  # the label that torch's cross entropy, and so every model in transformers, leaves out
AUDIO = "audio"


@dataclass(frozen=True)
class Template:
    """
    Text of one training example. `{audio}` stands for the codes of a row with their boundary tokens, `{name}` for a
    column.

    ```python
    speak = Template(prompt="{text}", response="{audio}" + tokenizer.eos_token)
    transcribe = Template(prompt="{audio}", response="{text}" + tokenizer.eos_token)
    audio_only = Template(prompt="", response="{audio}" + tokenizer.eos_token)
    ```

    Nothing is added to it. Tokens such as begin and end of text belong into the template.

    Args:
        prompt: Text that the model is given.
        response: Text that the model learns to write. It carries the loss.
        loss_on_prompt: Whether the prompt carries loss too.

    Raises:
        ValueError: The response is empty, or there is no `{audio}`.
    """

    prompt: str
    response: str
    loss_on_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.response:
            raise ValueError("The response of the template is empty, and with it what the model shall learn to write.")
        if "{audio}" not in self.prompt + self.response:
            raise ValueError(f"Got a template without {{audio}}: {self.prompt!r} and {self.response!r}.")

    @classmethod
    def from_chat(
        cls, tokenizer: "PreTrainedTokenizerBase", messages: list[dict], loss_on_prompt: bool = False, **options: Any
    ) -> "Template":
        """
        Make a template from the tokenizer's chat template. The last message, of the assistant, becomes the response.

        The chat template is rendered once, with the fields in it. So its changes to contents, such as stripped blanks,
        do not apply to the rows.

        Args:
            tokenizer: Tokenizer with a chat template.
            messages: Messages for `apply_chat_template`, with fields in their contents:
                `[{"role": "user", "content": "Say: {text}"}, {"role": "assistant", "content": "{audio}"}]`.
            loss_on_prompt: Whether the prompt carries loss too.
            options: Further arguments of `apply_chat_template`.

        Raises:
            ValueError: The last message is not the assistant's, or the rendered chat does not begin with the rendered
                prompt, for example because the chat template puts a thought before the answer.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("Expected the last message to be the assistant's: it is what the model shall write.")
        render: Any = tokenizer.apply_chat_template  # text, with tokenize=False
        whole = render(messages, tokenize=False, **options)
        prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True, **options)
        if not whole.startswith(prompt):
            raise ValueError(
                f"The chat template writes the prompt {prompt[-60:]!r} (its end), and the whole {whole[-60:]!r} does "
                "not begin with it, so it cannot be told what carries loss. Give prompt and response as plain strings."
            )
        return cls(prompt, whole[len(prompt) :], loss_on_prompt)


def _pieces(text: str) -> list[tuple[str, bool]]:
    """A template's string in pieces: (text, False), or (name of a field, True)."""
    parts = re.split(r"\{(\w+)\}", text)
    return [(part, place % 2 == 1) for place, part in enumerate(parts) if part or place % 2 == 1]


class TrainingRows:
    """
    Function for `datasets.Dataset.map` that makes `input_ids` and `labels` of each row, for each template.

    ```python
    rows = TrainingRows(tokenizer, vocabulary, speak)
    dataset = dataset.map(rows, batched=True, remove_columns=dataset.column_names)
    ```

    With several templates, each row gives one example of each. Labels are the ids where there is loss and -100
    elsewhere. Models of transformers shift them themselves. Prompt and response are tokenized apart, so a prompt has
    the same ids in training and in generation.

    For rows of different lengths use `DataCollatorForSeq2Seq(tokenizer)` of transformers, which pads labels too, or
    `PackedRows`.

    Args:
        tokenizer: Tokenizer of the language model.
        vocabulary: `AudioVocabulary` of the tokenizer.
        templates: One or several `Template`.
        audio_column: Column of the codes, integers (L,) each. A column `codebook_fingerprint`, as in token folders, is
            checked.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        vocabulary: AudioVocabulary,
        templates: Template | Sequence[Template],
        audio_column: str = "audio_codes",
    ):
        self.tokenizer, self.vocabulary, self.audio_column = tokenizer, vocabulary, audio_column
        self.templates = [templates] if isinstance(templates, Template) else list(templates)
        if not self.templates:
            raise ValueError("Got no template, expected at least one.")

    def __call__(self, batch: dict[str, Sequence]) -> dict[str, list[list[int]]]:
        """
        Args:
            batch: Columns of a batch of rows, as `map(..., batched=True)` passes them: text, and codes (L,) for each
                row.

        Returns:
            `input_ids` and `labels`, a list of ids for each example. Labels are -100 where there is no loss.

        Raises:
            ValueError: a column that a template names is missing, or holds something else than text or codes; a row
                without codes; codes of another codebook; a text in which the tokenizer finds audio tokens.
        """
        names = {name for template in self.templates for name, is_field in _fields(template) if is_field}
        columns = {self.audio_column if name == AUDIO else name for name in names}
        missing = sorted(columns - set(batch))
        if missing:
            raise ValueError(
                f"There is no column {missing[0]!r}, but {', '.join(sorted(batch))}. Change the template."
            )
        if any(isinstance(batch.get(name), str) for name in (*columns, "codebook_fingerprint")):
            raise ValueError("Got one row, expected a batch. Call dataset.map(..., batched=True).")
        for fingerprint in set(batch.get("codebook_fingerprint", ())) - {None}:
            self.vocabulary.check_codebook_fingerprint(fingerprint)
        input_ids, labels = [], []
        for values in zip(*(batch[name] for name in sorted(columns)), strict=True):
            row = dict(zip(sorted(columns), values, strict=True))
            for template in self.templates:
                prompt, response = self._ids(template.prompt, row), self._ids(template.response, row)
                input_ids.append(prompt + response)
                labels.append((prompt if template.loss_on_prompt else [NO_LOSS] * len(prompt)) + response)
        return {"input_ids": input_ids, "labels": labels}

    def prompt(self, row: dict, template: Template | None = None) -> list[int]:
        """
        Return the ids to generate from: the prompt and, if the response begins with audio, the begin of a span.

        Text of the response before the audio is part of these ids. Text before a text field is left to the model,
        since in training one token may cover both.

        Args:
            row: Columns that the fields of the prompt need.
            template: One of several templates. Defaults to the first.

        Returns:
            List of token ids.
        """
        template = template or self.templates[0]
        pieces = _pieces(template.response)
        first = next((place for place, (_, is_field) in enumerate(pieces) if is_field), len(pieces))
        opening = []
        if pieces[first : first + 1] == [(AUDIO, True)]:
            opening = self._ids("".join(text for text, _ in pieces[:first]), row)
            if self.vocabulary.begin_token_id is not None:
                opening.append(self.vocabulary.begin_token_id)
        return self._ids(template.prompt, row) + opening

    def _ids(self, text: str, row: dict) -> list[int]:
        token_ids = []
        for is_audio, pieces in groupby(_pieces(text), key=lambda piece: piece == (AUDIO, True)):
            if is_audio:
                token_ids += [id for _ in pieces for id in self._audio(row[self.audio_column])]
            else:
                token_ids += self._text("".join(self._value(row, *piece) for piece in pieces))
        return token_ids

    def _value(self, row: dict, name: str, is_field: bool) -> str:
        if not is_field:
            return name
        if not isinstance(row[name], str):
            raise ValueError(
                f"Got {type(row[name]).__name__} in the column {name!r}, expected text. Filter such rows out."
            )
        return row[name]

    def _text(self, text: str) -> list[int]:
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        vocabulary = self.vocabulary
        boundaries = (vocabulary.begin_token_id, vocabulary.end_token_id) if vocabulary.has_boundary_tokens else ()
        if vocabulary.is_audio(token_ids).any() or any(id in token_ids for id in boundaries):
            raise ValueError(
                f"The tokenizer finds audio tokens in the text {text[:80]!r}. Take them out: audio has a field of "
                "its own."
            )
        return token_ids

    def _audio(self, audio_codes: Any) -> list[int]:
        if audio_codes is not None and np.ndim(audio_codes) == 0:
            raise ValueError("Got a code where a row's codes were expected. Call dataset.map(..., batched=True).")
        if audio_codes is None or len(audio_codes) == 0:
            raise ValueError(
                "Got a row without codes, as of a sound that could not be read. Filter first: "
                f"dataset.filter(lambda row: bool(row[{self.audio_column!r}]))."
            )
        return self.vocabulary.span(audio_codes)


def _fields(template: Template) -> list[tuple[str, bool]]:
    return _pieces(template.prompt) + _pieces(template.response)


class PackedRows:
    """
    Function for `datasets.Dataset.map` that packs examples into rows of one length: `input_ids`, `labels`,
    `position_ids`.

    ```python
    packed = dataset.map(PackedRows(2048, tokenizer.pad_token_id), batched=True, remove_columns=dataset.column_names)
    ```

    Examples stay whole and do not see each other. Positions restart with each, and the first label of each is -100.
    Models of transformers make an attention mask from such positions, if they get no `attention_mask` and no cache. So
    rows have no mask; use `default_data_collator`. Trainer switches the cache off; in your own loop call `model(...,
    use_cache=False)`. Padding at the end is an example of its own without loss.

    Under FlashAttention, transformers does this only for a batch of one row. Use one row per device, or
    `attn_implementation="sdpa"` or `"eager"`.

    Args:
        size: Number of ids in a row.
        pad_token_id: Id that fills a row.
        too_long: `"error"` raises ValueError for an example longer than `size`, `"drop"` leaves it out.
    """

    def __init__(self, size: int, pad_token_id: int, too_long: str = "error"):
        if too_long not in ("error", "drop"):
            raise ValueError(f"Got too_long={too_long!r}, expected 'error' or 'drop'.")
        if pad_token_id is None:
            raise ValueError("Got no pad_token_id. Any token does that the model knows, as tokenizer.eos_token_id.")
        self.size, self.pad_token_id, self.too_long = size, pad_token_id, too_long

    def __call__(self, batch: dict[str, Sequence]) -> dict[str, list[list[int]]]:
        """Raises ValueError for an example that is longer than a row, unless those are dropped."""
        rows: list[list[tuple[list[int], list[int]]]] = []
        free: list[int] = []  # places in each row
        num_dropped = 0
        examples = zip(batch["input_ids"], batch["labels"], strict=True)
        for token_ids, labels in sorted(
            examples, key=lambda example: -len(example[0])
        ):  # the best fit needs the longest first
            if len(token_ids) > self.size:
                if self.too_long == "drop":
                    num_dropped += 1
                    continue
                raise ValueError(
                    f"Got an example of {len(token_ids)} tokens, expected at most {self.size}. Raise the size, "
                    "shorten the audio, or choose too_long='drop'."
                )
            fitting = [row for row, places in enumerate(free) if places >= len(token_ids)]
            row = min(fitting, key=free.__getitem__, default=len(rows))
            if row == len(rows):
                rows.append([])
                free.append(self.size)
            rows[row].append((token_ids, labels))
            free[row] -= len(token_ids)
        if num_dropped:
            logger.warning(
                "%d of %d examples are longer than %d tokens and left out",
                num_dropped,
                len(batch["labels"]),
                self.size,
            )
        packed: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
        for parts, places in zip(rows, free, strict=True):
            parts.append(([self.pad_token_id] * places, [NO_LOSS] * places))
            packed["input_ids"].append([id for token_ids, _ in parts for id in token_ids])
            packed["labels"].append(
                [label for _, labels in parts for label in ([NO_LOSS, *labels[1:]] if labels else [])]
            )
            packed["position_ids"].append([place for token_ids, _ in parts for place in range(len(token_ids))])
        return packed
