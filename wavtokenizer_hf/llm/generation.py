"""Constrain `generate()` to valid spans of audio, and decode them during or after generation."""

import logging
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, Queue
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from ..long_audio import DecodeStream
from ..modeling_wavtokenizer import WavTokenizerModel
from .mapping import AudioSpan
from .tokenizer import AudioVocabulary


logger = logging.getLogger(__name__)


class AudioSpanProcessor(LogitsProcessor):
    """
    Logits processor that keeps every span of audio valid.

    Inside a span it allows codes and then the end token. Outside a span it allows text and the begin token. A row is
    inside a span if its last begin token has no end token after it. The begin token may be part of the prompt.

    Args:
        vocabulary: `AudioVocabulary` with boundary tokens.
        min_codes: Minimum number of codes in a span, at least 1.
        max_codes: Maximum number of codes in a span. None: no limit.
    """

    def __init__(self, vocabulary: AudioVocabulary, min_codes: int = 1, max_codes: int | None = None):
        _check_boundary_tokens(vocabulary)
        if min_codes < 1 or (max_codes is not None and max_codes < min_codes):
            raise ValueError(
                f"Got min_codes={min_codes} and max_codes={max_codes}, expected 1 <= min_codes <= max_codes."
            )
        self.vocabulary, self.min_codes, self.max_codes = vocabulary, min_codes, max_codes
        self._largest_id = max(vocabulary.token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Set the scores (B, V) of tokens that must not follow input_ids (B, L) to -inf."""
        vocabulary, size = self.vocabulary, scores.shape[-1]
        if size <= self._largest_id:
            raise ValueError(
                f"The model can write {size} tokens, and the ids of audio go up to {self._largest_id}. "
                "Call vocabulary.check_model(model): its error names the size that the model needs."
            )
        is_code = torch.zeros(size, dtype=torch.bool, device=scores.device)
        is_code[vocabulary.first_token_id : vocabulary.last_token_id + 1] = True
        in_span, num_codes = self._span_state(input_ids)
        allowed = torch.where(in_span[:, None], is_code, ~is_code)
        allowed[:, vocabulary.begin_token_id] = ~in_span
        allowed[:, vocabulary.end_token_id] = in_span & (num_codes >= self.min_codes)
        if self.max_codes is not None:
            full = in_span & (num_codes >= self.max_codes)
            allowed[full] = torch.arange(size, device=scores.device) == vocabulary.end_token_id
        return scores.masked_fill(~allowed, float("-inf"))

    def _span_state(self, input_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each row is inside a span, and its number of tokens since the last begin token, (B,) each."""
        length = input_ids.shape[-1]
        positions = torch.arange(1, length + 1, device=input_ids.device)  # from 1, since 0 stands for "none"
        begin, end = (
            (positions * (input_ids == boundary)).amax(-1) if length else positions.new_zeros(len(input_ids))
            for boundary in (self.vocabulary.begin_token_id, self.vocabulary.end_token_id)
        )
        return begin > end, length - begin


def span_arguments(
    vocabulary: AudioVocabulary, tokenizer: PreTrainedTokenizerBase, min_codes: int = 1, max_codes: int | None = None
) -> dict:
    """
    Return arguments for `generate()` that end each row of a batch after one span.

    ```python
    output = model.generate(**inputs, **span_arguments(vocabulary, tokenizer, max_codes=750), max_new_tokens=800)
    spans, malformed = vocabulary.find_spans(output[0])
    ```

    Pad a batch of prompts on the left, as for any generation: `tokenizer.padding_side = "left"`. Pass an
    `attention_mask`, as `inputs` does here. Without one, `generate` masks every padding token in the prompt. If
    eos_token serves as pad_token, that hides the ends of the turns of a chat.

    Args:
        vocabulary: `AudioVocabulary` with boundary tokens.
        tokenizer: Tokenizer of the language model. Its pad_token, or else its eos_token, fills rows that have ended.
        min_codes: Minimum number of codes in the span, at least 1.
        max_codes: Maximum number of codes in the span. None: no limit.

    Returns:
        Dictionary with `logits_processor`, `eos_token_id` and `pad_token_id`.

    Raises:
        ValueError: The vocabulary has no boundary tokens, or the tokenizer has no pad_token and no eos_token.
    """
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_token_id is None:
        raise ValueError(
            "The tokenizer has no pad_token and no eos_token. Set one, for example tokenizer.pad_token = '<pad>'."
        )
    return {
        "logits_processor": LogitsProcessorList([AudioSpanProcessor(vocabulary, min_codes, max_codes)]),
        "eos_token_id": vocabulary.end_token_id,
        "pad_token_id": pad_token_id,
    }


def decode_spans(
    codec: WavTokenizerModel, vocabulary: AudioVocabulary, spans: Sequence[AudioSpan], batch_size: int = 8
) -> list[torch.Tensor]:
    """
    Decode many spans in batches. Each span is decoded as if it were alone.

    Args:
        codec: The WavTokenizer of the codes.
        vocabulary: The `AudioVocabulary` that found the spans.
        spans: Spans from `vocabulary.find_spans`, of one row or many.
        batch_size: Number of spans per batch. Spans of similar length are decoded together.

    Returns:
        List of (L * hop,) float32 audio, in the order of the spans, on the CPU.

    Raises:
        ValueError: The codes belong to another codebook.
    """
    vocabulary.check_codec(codec)
    audio: list = [None] * len(spans)
    order = sorted(range(len(spans)), key=lambda index: len(spans[index].audio_codes))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [torch.from_numpy(spans[index].audio_codes) for index in indices]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)[:, None]
        lengths = torch.tensor([len(codes) for codes in batch])
        mask = (torch.arange(padded.shape[-1]) < lengths[:, None])[:, None]
        with torch.no_grad():
            values = codec.decode(padded.to(codec.device), audio_codes_mask=mask.to(codec.device)).audio_values
        for row, index in enumerate(indices):
            audio[index] = values[row, 0, : len(batch[row]) * codec.config.hop_length].cpu().clone()
    return audio


class AudioStreamer(BaseStreamer):
    """
    Iterator over the audio of `generate(streamer=...)`, which runs in another thread.

    `stream_audio` starts that thread for you. Each step of the iterator returns (m,) float32 audio on the CPU, m > 0,
    as soon as a window is complete. For each span this is the audio of `codec.decode(..., window_seconds=...,
    overlap_seconds=...)`. The thread that iterates does the decoding, so `generate` does not wait for it. Audio in the
    prompt is not decoded. A span that the prompt begins and the model continues is decoded from its first new code.

    Args:
        codec: The WavTokenizer of the codes.
        vocabulary: `AudioVocabulary` with boundary tokens.
        window_seconds: Length of a window, in seconds. The first audio needs one window of codes.
        overlap_seconds: Overlap of two windows, in seconds; at most half a window.
        timeout: Seconds to wait for the next token, since `generate` may have failed. None: no limit.

    Raises:
        ValueError: The codes belong to another codebook, the vocabulary has no boundary tokens, or the windows are
            invalid. While iterating: the tokens form no valid span. `AudioSpanProcessor` prevents that.
        TimeoutError: While iterating, no token came in time.
    """

    def __init__(
        self,
        codec: WavTokenizerModel,
        vocabulary: AudioVocabulary,
        window_seconds: float = 1.0,
        overlap_seconds: float = 0.25,
        timeout: float | None = None,
    ):
        _check_boundary_tokens(vocabulary)
        vocabulary.check_codec(codec)
        self.codec, self.vocabulary, self.timeout = codec, vocabulary, timeout
        self._window: dict[str, Any] = {"window_seconds": window_seconds, "overlap_seconds": overlap_seconds}
        DecodeStream(codec, **self._window)  # fail on invalid windows now, not while iterating
        self._queue: Queue = Queue()
        self._chunks = self._iter_chunks()

    # Called by generate()

    def put(self, value: torch.LongTensor) -> None:
        """Take the prompt, (1, L), and then each new token, (1,)."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(
                f"Got {len(value)} rows, expected one: a streamer handles one row. Use decode_spans for more."
            )
        self._queue.put(value.flatten().tolist())

    def end(self) -> None:
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """End the stream with an error, which is raised in the thread that iterates."""
        self._queue.put(error)

    # Called by the thread that iterates

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._chunks)

    def _next_ids(self) -> list[int] | None:
        try:
            item = self._queue.get(timeout=self.timeout)
        except Empty:
            raise TimeoutError(f"No token came for {self.timeout} s. Has generate() failed in its thread?") from None
        if isinstance(item, BaseException):
            raise item
        return item

    def _iter_chunks(self) -> Iterator[torch.Tensor]:
        prompt = self._next_ids()
        if prompt is None:
            return
        boundaries = [id for id in prompt if id in (self.vocabulary.begin_token_id, self.vocabulary.end_token_id)]
        stream = (
            DecodeStream(self.codec, **self._window) if boundaries[-1:] == [self.vocabulary.begin_token_id] else None
        )
        position = len(prompt)
        while (token_ids := self._next_ids()) is not None:
            for token_id in token_ids:
                audio, stream = self._decode_token(token_id, position, stream)
                position += 1
                if len(audio) > 0:
                    yield audio
        if stream is not None:
            logger.warning("generation ended inside a span of audio; max_new_tokens may have cut it off")
            audio = stream.flush()
            if len(audio) > 0:
                yield audio

    def _decode_token(
        self, token_id: int, position: int, stream: DecodeStream | None
    ) -> tuple[torch.Tensor, DecodeStream | None]:
        """
        Push one token. Return the audio that it completes, and the stream of the open span (None outside a span).
        """
        vocabulary, no_audio = self.vocabulary, torch.zeros(0)
        is_code = bool(vocabulary.is_audio(token_id))
        if stream is None:
            if token_id == vocabulary.begin_token_id:
                return no_audio, DecodeStream(self.codec, **self._window)
            if not is_code and token_id != vocabulary.end_token_id:
                return no_audio, None
        elif is_code:
            return stream.push([token_id - vocabulary.first_token_id]), stream
        elif token_id == vocabulary.end_token_id:
            return stream.flush(), None
        where = "outside" if stream is None else "inside"
        raise ValueError(
            f"The model wrote the token id {token_id} at position {position}, {where} a span of audio, where it is "
            "not allowed. Generate with AudioSpanProcessor."
        )


def stream_audio(
    model: PreTrainedModel,
    codec: WavTokenizerModel,
    vocabulary: AudioVocabulary,
    window_seconds: float = 1.0,
    overlap_seconds: float = 0.25,
    **arguments: Any,
) -> Iterator[torch.Tensor]:
    """
    Run `model.generate(**arguments)` in a thread, and yield its audio window by window.

    ```python
    arguments = span_arguments(vocabulary, tokenizer)
    for audio in stream_audio(model, codec, vocabulary, input_ids=input_ids, **arguments, max_new_tokens=800):
        play(audio)
    ```

    Generation stops when this generator is closed or garbage-collected. If you leave the loop early, call its
    `close()`. Errors of `generate` are raised here.

    Args:
        model: The language model.
        codec: The WavTokenizer of the codes.
        vocabulary: `AudioVocabulary` with boundary tokens.
        window_seconds: Length of a window, in seconds. The first audio needs one window of codes.
        overlap_seconds: Overlap of two windows, in seconds; at most half a window.
        arguments: Arguments of `generate`, for one row. Without an `attention_mask`, all `input_ids` are attended to.

    Yields:
        (m,) float32 audio at the codec's sampling rate, m > 0, on the CPU.

    Raises:
        ValueError: The codes belong to another codebook, the vocabulary has no boundary tokens, the windows are
            invalid, the model has too few rows, or the tokens form no valid span.
    """
    vocabulary.check_model(model)
    streamer = AudioStreamer(codec, vocabulary, window_seconds, overlap_seconds)
    stop = _StopRequested()
    criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or []), stop])
    if arguments.get("input_ids") is not None:  # without a mask, generate may mask ends of turns: see span_arguments
        arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))

    def generate() -> None:
        try:
            language_model: Any = model  # PreTrainedModel itself has no generate()
            language_model.generate(**arguments, streamer=streamer, stopping_criteria=criteria)
            streamer.end()  # a model's own generate() may forget it; a second end is not read
        except BaseException as error:
            streamer.fail(error)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield from streamer
    finally:
        stop.event.set()
        thread.join()


class _StopRequested(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def _check_boundary_tokens(vocabulary: AudioVocabulary) -> None:
    if not vocabulary.has_boundary_tokens:
        raise ValueError(
            "The audio vocabulary has no begin_token_id and end_token_id, which mark where a span begins and ends. "
            "Pass them, or push codes into a long_audio.DecodeStream yourself."
        )
