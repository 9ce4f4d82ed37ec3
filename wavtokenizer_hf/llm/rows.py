"""Turn codes and text into training examples of a language model, with functions for `datasets.Dataset.map`."""

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

NO_LOSS = -100  # ignore_index of torch's cross entropy, and so of every model in transformers
AUDIO = "audio"


@dataclass(frozen=True)
class Template:
    """
    Text of one training example, with fields.

    `{audio}` stands for the codes of a row with their boundary tokens. `{name}` stands for the text in column `name`.

    ```python
    speak = Template(prompt="{text}", response="{audio}" + tokenizer.eos_token)
    transcribe = Template(prompt="{audio}", response="{text}" + tokenizer.eos_token)
    audio_only = Template(prompt="", response="{audio}" + tokenizer.eos_token)
    ```

    No special tokens are added: put tokens such as BOS and EOS into the template.

    Args:
        prompt: Text that the model is given.
        response: Text that the model learns to write. The loss is computed on it.
        loss_on_prompt: Whether the loss is computed on the prompt too.

    Raises:
        ValueError: The response is empty, or the template has no `{audio}`.
    """

    prompt: str
    response: str
    loss_on_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.response:
            raise ValueError(
                "The response of the template is empty, expected the text that the model learns to write."
            )
        if "{audio}" not in self.prompt + self.response:
            raise ValueError(f"Got a template without {{audio}}: {self.prompt!r} and {self.response!r}.")

    @classmethod
    def from_chat(
        cls, tokenizer: "PreTrainedTokenizerBase", messages: list[dict], loss_on_prompt: bool = False, **options: Any
    ) -> "Template":
        """
        Make a template from the tokenizer's chat template. The last message, of the assistant, becomes the response.

        The chat template is rendered once, before the fields are filled in. So its changes to contents, such as
        stripped whitespace, do not apply to the text of the rows.

        Args:
            tokenizer: Tokenizer with a chat template.
            messages: Messages for `apply_chat_template`, with fields in their contents:
                `[{"role": "user", "content": "Say: {text}"}, {"role": "assistant", "content": "{audio}"}]`.
            loss_on_prompt: Whether the loss is computed on the prompt too.
            options: Further arguments of `apply_chat_template`.

        Raises:
            ValueError: The last message is not the assistant's, or the rendered chat does not begin with the rendered
                prompt, for example because the chat template puts a thought before the answer.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("Expected the last message to be the assistant's: the model learns to write it.")
        render: Any = tokenizer.apply_chat_template  # returns text, with tokenize=False
        chat = render(messages, tokenize=False, **options)
        prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True, **options)
        if not chat.startswith(prompt):
            raise ValueError(
                f"The rendered chat, which ends with {chat[-60:]!r}, does not begin with the rendered prompt, which "
                f"ends with {prompt[-60:]!r}. So the start of the response is unknown. Use "
                "Template(prompt, response) with plain strings."
            )
        return cls(prompt, chat[len(prompt) :], loss_on_prompt)


def _split_template(text: str) -> list[tuple[str, bool]]:
    """Split a template's string into segments: (text, False) or (name of a field, True)."""
    segments = re.split(r"\{(\w+)\}", text)  # text and names alternate
    return [(segment, index % 2 == 1) for index, segment in enumerate(segments) if segment or index % 2 == 1]


class TrainingRows:
    """
    Function for `datasets.Dataset.map` that returns `input_ids` and `labels`: one example per row and template.

    ```python
    rows = TrainingRows(tokenizer, vocabulary, speak)
    dataset = dataset.map(rows, batched=True, remove_columns=dataset.column_names)
    ```

    Labels are the ids where the loss is computed, and -100 elsewhere. Models of transformers shift them themselves.
    Prompt and response are tokenized separately, so a prompt has the same ids in training and in generation.

    For examples of different lengths use `PackedRows`, or `DataCollatorForSeq2Seq(tokenizer)` of transformers, which
    pads labels too.

    Args:
        tokenizer: Tokenizer of the language model.
        vocabulary: `AudioVocabulary` of the tokenizer.
        templates: One `Template` or several.
        audio_column: Column of the codes, integers (L,) in each row. If there is a column `codebook_fingerprint`, as
            in token folders, it is checked.
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
            `input_ids` and `labels`, a list of ids for each example. Labels are -100 where no loss is computed.

        Raises:
            ValueError: A column of a template is missing, or holds neither text nor codes. A row has no codes, or has
                codes of another codebook. The tokenizer finds audio tokens in a text.
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
        Return the ids to generate from: the prompt, and the begin token if the first field of the response is audio.

        Text of the response before that audio is included. If the first field is text, nothing of the response is
        included, since one token may cover the end of the literal text and the start of the field.

        Args:
            row: Columns for the fields of the prompt.
            template: Template to use. Defaults to the first.

        Returns:
            List of token ids.
        """
        template = template or self.templates[0]
        segments = _split_template(template.response)
        first = next((index for index, (_, is_field) in enumerate(segments) if is_field), len(segments))
        opening = []
        if segments[first : first + 1] == [(AUDIO, True)]:
            opening = self._ids("".join(text for text, _ in segments[:first]), row)
            if self.vocabulary.begin_token_id is not None:
                opening.append(self.vocabulary.begin_token_id)
        return self._ids(template.prompt, row) + opening

    def _ids(self, text: str, row: dict) -> list[int]:
        token_ids = []
        for is_audio, segments in groupby(_split_template(text), key=lambda segment: segment == (AUDIO, True)):
            if is_audio:
                token_ids += [id for _ in segments for id in self._audio_ids(row[self.audio_column])]
            else:
                token_ids += self._text_ids("".join(self._segment_text(row, *segment) for segment in segments))
        return token_ids

    def _segment_text(self, row: dict, segment: str, is_field: bool) -> str:
        if not is_field:
            return segment
        if not isinstance(row[segment], str):
            raise ValueError(
                f"Got {type(row[segment]).__name__} in the column {segment!r}, expected text. Filter such rows out."
            )
        return row[segment]

    def _text_ids(self, text: str) -> list[int]:
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        vocabulary = self.vocabulary
        boundaries = (vocabulary.begin_token_id, vocabulary.end_token_id) if vocabulary.has_boundary_tokens else ()
        if vocabulary.is_audio(token_ids).any() or any(id in token_ids for id in boundaries):
            raise ValueError(
                f"The tokenizer finds audio tokens in the text {text[:80]!r}. Remove them: audio belongs in the field "
                "{audio}."
            )
        return token_ids

    def _audio_ids(self, audio_codes: Any) -> list[int]:
        if audio_codes is not None and np.ndim(audio_codes) == 0:
            raise ValueError("Got a single code, expected the codes of a row. Call dataset.map(..., batched=True).")
        if audio_codes is None or len(audio_codes) == 0:
            raise ValueError(
                "Got a row without codes, for example of a clip that could not be read. Filter first: "
                f"dataset.filter(lambda row: bool(row[{self.audio_column!r}]))."
            )
        return self.vocabulary.span(audio_codes)


def _fields(template: Template) -> list[tuple[str, bool]]:
    return _split_template(template.prompt) + _split_template(template.response)


class PackedRows:
    """
    Function for `datasets.Dataset.map` that packs examples into rows of one length.

    ```python
    packed = dataset.map(PackedRows(2048, tokenizer.pad_token_id), batched=True, remove_columns=dataset.column_names)
    ```

    Rows have `input_ids`, `labels` and `position_ids`. Examples stay whole and do not attend to each other: positions
    restart at 0 in each example, and its first label is -100. Padding at the end is one more example, without loss.

    Models of transformers build the attention mask from these positions if they get no `attention_mask` and no cache.
    So rows have no mask: use `default_data_collator`. Trainer switches the cache off. In your own loop call
    `model(..., use_cache=False)`.

    Under FlashAttention, transformers does this only for a batch of one row. Use one row per device, or
    `attn_implementation="sdpa"` or `"eager"`.

    Args:
        size: Number of ids in a row.
        pad_token_id: Id of the padding at the end of a row.
        too_long: `"error"` raises ValueError for an example longer than `size`, `"drop"` skips it.
    """

    def __init__(self, size: int, pad_token_id: int, too_long: str = "error"):
        if too_long not in ("error", "drop"):
            raise ValueError(f"Got too_long={too_long!r}, expected 'error' or 'drop'.")
        if pad_token_id is None:
            raise ValueError("Got no pad_token_id. Pass any known token id, for example tokenizer.eos_token_id.")
        self.size, self.pad_token_id, self.too_long = size, pad_token_id, too_long

    def __call__(self, batch: dict[str, Sequence]) -> dict[str, list[list[int]]]:
        """Pack a batch of examples. Raises ValueError for an example longer than a row, unless those are dropped."""
        rows: list[list[tuple[list[int], list[int]]]] = []
        num_free: list[int] = []  # free positions of each row
        num_dropped = 0
        examples = zip(batch["input_ids"], batch["labels"], strict=True)
        # best-fit decreasing: the longest example first, into the fullest row that it fits
        for token_ids, labels in sorted(examples, key=lambda example: -len(example[0])):
            if len(token_ids) > self.size:
                if self.too_long == "drop":
                    num_dropped += 1
                    continue
                raise ValueError(
                    f"Got an example of {len(token_ids)} tokens, expected at most {self.size}. Raise the size, "
                    "shorten the audio, or choose too_long='drop'."
                )
            fitting = [row for row, num in enumerate(num_free) if num >= len(token_ids)]
            row = min(fitting, key=num_free.__getitem__, default=len(rows))
            if row == len(rows):
                rows.append([])
                num_free.append(self.size)
            rows[row].append((token_ids, labels))
            num_free[row] -= len(token_ids)
        if num_dropped:
            logger.warning(
                "%d of %d examples are longer than %d tokens and were dropped",
                num_dropped,
                len(batch["labels"]),
                self.size,
            )
        packed: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
        for row_examples, num_padding in zip(rows, num_free, strict=True):
            row_examples.append(([self.pad_token_id] * num_padding, [NO_LOSS] * num_padding))
            packed["input_ids"].append([id for token_ids, _ in row_examples for id in token_ids])
            packed["labels"].append(
                [label for _, labels in row_examples for label in ([NO_LOSS, *labels[1:]] if labels else [])]
            )
            packed["position_ids"].append(
                [position for token_ids, _ in row_examples for position in range(len(token_ids))]
            )
        return packed
