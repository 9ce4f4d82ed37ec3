"""Audio from `generate()`: only codes inside a span, and audio while it runs."""

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
    Logits processor that allows only whole spans: inside a span codes and then its end, outside a span no audio.

    A row is inside a span if no end follows its last begin, whether the prompt or the model wrote it.

    Args:
        vocabulary: `AudioVocabulary` with boundary tokens.
        min_codes: Least number of codes in a span, at least 1.
        max_codes: Largest number of codes in a span. None: no limit.
    """

    def __init__(self, vocabulary: AudioVocabulary, min_codes: int = 1, max_codes: int | None = None):
        _check_boundary_tokens(vocabulary)
        if min_codes < 1 or (max_codes is not None and max_codes < min_codes):
            raise ValueError(
                f"Got min_codes={min_codes} and max_codes={max_codes}, expected 1 <= min_codes <= max_codes."
            )
        self.vocabulary, self.min_codes, self.max_codes = vocabulary, min_codes, max_codes
        self._largest = max(vocabulary.token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Set the scores (B, V) of tokens to -inf that must not follow input_ids (B, L)."""
        vocabulary, size = self.vocabulary, scores.shape[-1]
        if size <= self._largest:
            raise ValueError(
                f"The model can write {size} tokens, and the ids of audio go up to {self._largest}. "
                "vocabulary.check_model(model) says what to do."
            )
        codes = torch.zeros(size, dtype=torch.bool, device=scores.device)
        codes[vocabulary.first_token_id : vocabulary.last_token_id + 1] = True
        inside, num_codes = self._state(input_ids)
        allowed = torch.where(inside[:, None], codes, ~codes)
        allowed[:, vocabulary.begin_token_id] = ~inside
        allowed[:, vocabulary.end_token_id] = inside & (num_codes >= self.min_codes)
        if self.max_codes is not None:
            full = inside & (num_codes >= self.max_codes)
            allowed[full] = torch.arange(size, device=scores.device) == vocabulary.end_token_id
        return scores.masked_fill(~allowed, float("-inf"))

    def _state(self, input_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each row is inside a span, and how many tokens came since the begin of it, (B,) each."""
        length = input_ids.shape[-1]
        places = torch.arange(1, length + 1, device=input_ids.device)
        begin, end = (
            (places * (input_ids == boundary)).amax(-1) if length else places.new_zeros(len(input_ids))
            for boundary in (self.vocabulary.begin_token_id, self.vocabulary.end_token_id)
        )
        return begin > end, length - begin


def span_arguments(
    vocabulary: AudioVocabulary, tokenizer: PreTrainedTokenizerBase, min_codes: int = 1, max_codes: int | None = None
) -> dict:
    """
    Return arguments for `generate()`, with which each row of a batch gets one span and ends after it.

    ```python
    output = model.generate(**inputs, **span_arguments(vocabulary, tokenizer, max_codes=750), max_new_tokens=800)
    spans, malformed = vocabulary.find_spans(output[0])
    ```

    Pad a batch of prompts on the left, as for any generation: `tokenizer.padding_side = "left"`. Pass an
    `attention_mask`, as `inputs` has it here. Without one, `generate` takes every padding token of the prompt for
    padding. If that is the end of text, as with a tokenizer without pad_token, it does not read the ends of the turns
    of a chat.

    Args:
        vocabulary: `AudioVocabulary` with boundary tokens.
        tokenizer: Tokenizer of the language model. Its pad_token, or else its eos_token, fills rows that have ended.
        min_codes: Least number of codes in the span, at least 1.
        max_codes: Largest number of codes in the span. None: no limit.

    Returns:
        Dictionary with `logits_processor`, `eos_token_id` and `pad_token_id`.

    Raises:
        ValueError: A vocabulary without boundary tokens, or a tokenizer with neither padding nor end of text.
    """
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_token_id is None:
        raise ValueError("The tokenizer has no pad_token and no eos_token. Set one, as tokenizer.pad_token = '<pad>'.")
    return {
        "logits_processor": LogitsProcessorList([AudioSpanProcessor(vocabulary, min_codes, max_codes)]),
        "eos_token_id": vocabulary.end_token_id,
        "pad_token_id": pad_token_id,
    }


def decode_spans(
    codec: WavTokenizerModel, vocabulary: AudioVocabulary, spans: Sequence[AudioSpan], batch_size: int = 8
) -> list[torch.Tensor]:
    """
    Decode many spans in batches. Each gets the audio that it gets alone.

    Args:
        codec: The WavTokenizer of the codes.
        vocabulary: The `AudioVocabulary` that found the spans.
        spans: Spans of `vocabulary.find_spans`, of one row or many.
        batch_size: Number of spans per batch. Spans of similar length are decoded together.

    Returns:
        List of (L * hop,) float32 audio, in the order of the spans, on the CPU.

    Raises:
        ValueError: The codes belong to another codebook.
    """
    vocabulary.check_codec(codec)
    audio: list = [None] * len(spans)
    order = sorted(range(len(spans)), key=lambda place: len(spans[place].audio_codes))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [torch.from_numpy(spans[place].audio_codes) for place in places]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)[:, None]
        lengths = torch.tensor([len(span) for span in batch])
        mask = (torch.arange(padded.shape[-1]) < lengths[:, None])[:, None]
        with torch.no_grad():
            values = codec.decode(padded.to(codec.device), audio_codes_mask=mask.to(codec.device)).audio_values
        for row, place in enumerate(places):
            audio[place] = values[row, 0, : len(batch[row]) * codec.config.hop_length].cpu().clone()
    return audio


class AudioStreamer(BaseStreamer):
    """
    Iterator over audio while `generate(streamer=...)` runs in another thread. `stream_audio` starts that thread for
    you.

    Iterating gives (m,) float32 audio on the CPU, m > 0, as soon as a window is complete. For each span this is the
    audio of `codec.decode(..., window_seconds=..., overlap_seconds=...)`. Whoever iterates decodes, so `generate` does
    not wait. Audio in the prompt is not decoded, except for a span that the prompt begins and the model continues.

    Args:
        codec: The WavTokenizer of the codes.
        vocabulary: `AudioVocabulary` with boundary tokens.
        window_seconds: Length of a window, in seconds. The first audio needs one window of codes.
        overlap_seconds: Overlap of two windows, in seconds; at most half a window.
        timeout: Seconds to wait for the next token, since `generate` may have failed. None: no limit.

    Raises:
        ValueError: Codes of another codebook, a vocabulary without boundary tokens, or bad windows. While iterating:
            tokens that are no span; `AudioSpanProcessor` prevents them.
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
        DecodeStream(codec, **self._window)  # refuses bad windows here, and not in the middle of things
        self._queue: Queue = Queue()
        self._chunks = self._read()

    # What generate() calls

    def put(self, value: torch.LongTensor) -> None:
        """The prompt, (1, L), and then each new token, (1,)."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(
                f"Got {len(value)} rows, expected one: a streamer plays one row. Use decode_spans for more."
            )
        self._queue.put(value.flatten().tolist())

    def end(self) -> None:
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, which whoever iterates will get."""
        self._queue.put(error)

    # What the listener calls

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

    def _read(self) -> Iterator[torch.Tensor]:
        prompt = self._next_ids()
        if prompt is None:
            return
        boundaries = [id for id in prompt if id in (self.vocabulary.begin_token_id, self.vocabulary.end_token_id)]
        stream = (
            DecodeStream(self.codec, **self._window) if boundaries[-1:] == [self.vocabulary.begin_token_id] else None
        )
        place = len(prompt)
        while (token_ids := self._next_ids()) is not None:
            for token_id in token_ids:
                audio, stream = self._take(token_id, place, stream)
                place += 1
                if len(audio) > 0:
                    yield audio
        if stream is not None:
            logger.warning("generation ended inside a span of audio; max_new_tokens may have cut it off")
            rest = stream.flush()
            if len(rest) > 0:
                yield rest

    def _take(
        self, token_id: int, place: int, stream: DecodeStream | None
    ) -> tuple[torch.Tensor, DecodeStream | None]:
        """One token -> the audio that is complete with it, and the stream of the span that is open then."""
        vocabulary, nothing = self.vocabulary, torch.zeros(0)
        is_code = bool(vocabulary.is_audio(token_id))
        if stream is None:
            if token_id == vocabulary.begin_token_id:
                return nothing, DecodeStream(self.codec, **self._window)
            if not is_code and token_id != vocabulary.end_token_id:
                return nothing, None
        elif is_code:
            return stream.push([token_id - vocabulary.first_token_id]), stream
        elif token_id == vocabulary.end_token_id:
            return stream.flush(), None
        where = "outside" if stream is None else "inside"
        raise ValueError(
            f"The model wrote the token id {token_id} at place {place}, {where} a span of audio, where it cannot "
            "stand. Generate with AudioSpanProcessor."
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
    Run `model.generate(**arguments)` in a thread, and yield the audio as soon as it is complete.

    ```python
    arguments = span_arguments(vocabulary, tokenizer)
    for audio in stream_audio(model, codec, vocabulary, input_ids=input_ids, **arguments, max_new_tokens=800):
        play(audio)
    ```

    Generation stops when this generator is closed or garbage-collected. If you leave the loop early, call its
    `close()`. An error of `generate` is raised here.

    Args:
        model: The language model.
        codec: The WavTokenizer of the codes.
        vocabulary: An `AudioVocabulary` with boundary tokens.
        window_seconds: Length of a window, in seconds. The first audio needs one window of codes.
        overlap_seconds: Overlap of two windows, in seconds; at most half a window.
        arguments: Arguments of `generate`, for one row. All of its `input_ids` are read, unless there is an
            `attention_mask`.

    Yields:
        (m,) float32 audio at the codec's sampling rate, m > 0, on the CPU.

    Raises:
        ValueError: Codes of another codebook, a vocabulary without boundary tokens, bad windows, a model with too few
            rows, or tokens that make no span.
    """
    vocabulary.check_model(model)
    streamer = AudioStreamer(codec, vocabulary, window_seconds, overlap_seconds)
    left = _NobodyListens()
    criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or []), left])
    if arguments.get("input_ids") is not None:  # else ends of turns may be taken for padding: see span_arguments
        arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))

    def generate() -> None:
        try:
            generating: Any = model  # a PreTrainedModel with a language model's head
            generating.generate(**arguments, streamer=streamer, stopping_criteria=criteria)
            streamer.end()  # a generate() of the model's own may forget it; a second end is not read
        except BaseException as error:
            streamer.fail(error)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield from streamer
    finally:
        left.event.set()
        thread.join()


class _NobodyListens(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def _check_boundary_tokens(vocabulary: AudioVocabulary) -> None:
    if not vocabulary.has_boundary_tokens:
        raise ValueError(
            "The audio vocabulary has no begin_token_id and end_token_id, so it cannot be told where a span ends. "
            "Give them, or push codes into a long_audio.DecodeStream yourself."
        )
