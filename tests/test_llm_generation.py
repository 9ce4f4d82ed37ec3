"""Audio from generate(): complete spans, and audio streamed during generation."""

import threading

import numpy as np
import pytest
import torch
from language_models import byte_level, tiny_llama
from transformers import StoppingCriteria, StoppingCriteriaList

from wavtokenizer_hf.llm import (
    AudioSpan,
    AudioSpanProcessor,
    AudioStreamer,
    AudioVocabulary,
    decode_spans,
    span_arguments,
    stream_audio,
)


FRAME = 16 / 24000  # seconds of one code of the tiny WavTokenizer
WINDOW = {"window_seconds": 8 * FRAME, "overlap_seconds": 2 * FRAME}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level()
    tokenizer.padding_side = "left"
    AudioVocabulary.add_to(tokenizer, 64)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return AudioVocabulary.from_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    """
    Return a model with random weights and diverse tokens. Like many models, it has more rows than its tokenizer has
    ids.
    """
    return tiny_llama(len(tokenizer) + 7)


def prompts(tokenizer, *texts, opened=True):
    mark = "<|audio_begin|>" if opened else ""
    return tokenizer([text + mark for text in texts], padding=True, return_tensors="pt")


# ---------------------------------------------------------------------------------------------------------------------
# The processor
# ---------------------------------------------------------------------------------------------------------------------


def allowed(processor, *ids, size=20) -> list[int]:
    scores = processor(torch.tensor([list(ids)], dtype=torch.long), torch.zeros(1, size))
    return (scores[0] == 0).nonzero().flatten().tolist()


def test_allowed_next_tokens_match_a_hand_calculation():
    """The vocabulary has 10 text tokens, codes 10 to 13, boundary tokens 14 and 15, and 4 more rows."""
    processor = AudioSpanProcessor(AudioVocabulary(10, 4, 14, 15), min_codes=2, max_codes=3)
    text = [*range(10), 14, 16, 17, 18, 19]
    assert allowed(processor) == text
    assert allowed(processor, 3) == text
    assert allowed(processor, 3, 14) == [10, 11, 12, 13]
    assert allowed(processor, 14, 10) == [10, 11, 12, 13]
    assert allowed(processor, 14, 10, 13) == [10, 11, 12, 13, 15]
    assert allowed(processor, 14, 10, 13, 13) == [15]
    assert allowed(processor, 14, 10, 13, 15) == text
    assert allowed(processor, 14, 10, 15, 1, 14) == [10, 11, 12, 13]


def test_each_row_has_its_own_state():
    processor = AudioSpanProcessor(AudioVocabulary(10, 4, 14, 15))
    scores = processor(torch.tensor([[0, 0, 14, 10], [14, 10, 15, 1]]), torch.zeros(2, 16))
    assert (scores[0] == 0).nonzero().flatten().tolist() == [10, 11, 12, 13, 15]
    assert (scores[1] == 0).nonzero().flatten().tolist() == [*range(10), 14]


@pytest.mark.parametrize(
    "sampling",
    [{"do_sample": False}, {"do_sample": True, "top_k": 1}, {"do_sample": True, "top_p": 0.05}, {"num_beams": 3}],
)
def test_a_padded_batch_gets_one_whole_span_in_each_row(model, tokenizer, vocabulary, sampling):
    """Also where top-k or top-p, applied first, would have left only text."""
    torch.manual_seed(0)
    inputs = prompts(tokenizer, "say hello to the world", "a", "the lazy dog")
    arguments = span_arguments(vocabulary, tokenizer, min_codes=3, max_codes=30)
    output = model.generate(**inputs, **arguments, **sampling, max_new_tokens=40)
    for row in output:
        spans, malformed = vocabulary.find_spans(row)
        assert malformed == [] and len(spans) == 1
        assert 3 <= len(spans[0].audio_codes) <= 30
        rest = row[spans[0].stop + 1 :]
        assert (rest == tokenizer.pad_token_id).all()


def test_a_padded_batch_gets_what_each_row_gets_alone(model, tokenizer, vocabulary):
    arguments = span_arguments(vocabulary, tokenizer, max_codes=20)
    texts = ("say hello to the world", "a", "the lazy dog")
    together = model.generate(**prompts(tokenizer, *texts), **arguments, do_sample=False, max_new_tokens=25)
    spans = [vocabulary.find_spans(row)[0][0].audio_codes.tolist() for row in together]
    for text, codes in zip(texts, spans, strict=True):
        alone = model.generate(**prompts(tokenizer, text), **arguments, do_sample=False, max_new_tokens=25)
        assert vocabulary.find_spans(alone[0])[0][0].audio_codes.tolist() == codes
    assert len({tuple(codes) for codes in spans}) > 1


def test_text_and_several_spans_can_mix(model, tokenizer, vocabulary):
    """The processor alone, without the arguments for one span."""
    torch.manual_seed(0)
    processor = AudioSpanProcessor(vocabulary, max_codes=4)
    bias = {(vocabulary.begin_token_id,): 5.0}  # otherwise this model would rarely begin one
    output = model.generate(
        **prompts(tokenizer, "say", opened=False), logits_processor=[processor], sequence_bias=bias, do_sample=True,
        max_new_tokens=120, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    spans, malformed = vocabulary.find_spans(output[0])
    assert len(spans) > 2 and all(len(span.audio_codes) <= 4 for span in spans)
    assert all(each.reason == "It has no end." and each.stop == len(output[0]) for each in malformed)


def test_bad_limits_models_and_tokenizers_are_refused(tokenizer, vocabulary):
    with pytest.raises(ValueError, match="min_codes=0"):
        AudioSpanProcessor(vocabulary, min_codes=0)
    with pytest.raises(ValueError, match="max_codes=1"):
        AudioSpanProcessor(vocabulary, min_codes=2, max_codes=1)
    with pytest.raises(ValueError, match="no begin_token_id"):
        AudioSpanProcessor(AudioVocabulary(10, 4))
    with pytest.raises(ValueError, match=r"can write 300 tokens, and the ids of audio go up to 365"):
        AudioSpanProcessor(vocabulary)(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 300))
    bare = byte_level()
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="no pad_token and no eos_token"):
        span_arguments(vocabulary, bare)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding many spans
# ---------------------------------------------------------------------------------------------------------------------


def test_many_spans_are_decoded_as_each_alone_and_in_order(tiny_model, vocabulary):
    generator = np.random.default_rng(0)
    spans = [AudioSpan(0, length, generator.integers(0, 64, length)) for length in (30, 1, 12, 30, 7)]
    decoded = decode_spans(tiny_model, vocabulary, spans, batch_size=2)
    for span, audio in zip(spans, decoded, strict=True):
        with torch.no_grad():
            alone = tiny_model.decode(torch.from_numpy(span.audio_codes)[None, None]).audio_values[0, 0]
        assert audio.shape == (len(span.audio_codes) * 16,)
        torch.testing.assert_close(audio, alone, atol=1e-5, rtol=0)  # the codec's guarantee for batches
        assert alone.std() > 0
    with pytest.raises(ValueError, match="WavTokenizer of 64 codes, expected 63"):
        decode_spans(tiny_model, AudioVocabulary(0, 63), spans)
    assert decode_spans(tiny_model, vocabulary, []) == []


def test_decoded_spans_own_their_memory_and_can_be_modified(tiny_model, vocabulary):
    """Decoded spans are not views of a padded batch, which each would keep in memory, and not inference tensors."""
    spans = [AudioSpan(0, length, np.arange(length)) for length in (30, 1)]
    for audio in decode_spans(tiny_model, vocabulary, spans):
        assert audio.untyped_storage().nbytes() == 4 * len(audio)
        assert not audio.is_inference() and not audio.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Streaming
# ---------------------------------------------------------------------------------------------------------------------


def windowed(codec, codes) -> torch.Tensor:
    with torch.no_grad():
        return codec.decode(torch.tensor(codes)[None, None], **WINDOW).audio_values[0, 0]


def feed(streamer, prompt, *tokens):
    streamer.put(torch.tensor([prompt], dtype=torch.long))
    for token in tokens:
        streamer.put(torch.tensor(token if isinstance(token, list) else [token]))
    streamer.end()


@pytest.mark.parametrize("num_codes", [1, 5, 8, 9, 50])
def test_joined_chunks_are_the_windowed_decode_of_what_was_generated(
    model, tiny_model, tokenizer, vocabulary, num_codes
):
    arguments = span_arguments(vocabulary, tokenizer, min_codes=num_codes, max_codes=num_codes)
    arguments |= {**prompts(tokenizer, "say hello"), "do_sample": False, "max_new_tokens": 60}
    (span,), _ = vocabulary.find_spans(model.generate(**arguments)[0])
    chunks = list(stream_audio(model, tiny_model, vocabulary, **WINDOW, **arguments))
    assert torch.equal(torch.cat(chunks), windowed(tiny_model, span.audio_codes))
    assert len(span.audio_codes) == num_codes and all(len(chunk) > 0 for chunk in chunks)


class _WaitForSound(StoppingCriteria):
    """Pause generation at a length until the consumer received some audio."""

    def __init__(self, length: int):
        self.length, self.heard, self.reached = length, threading.Event(), 0

    def __call__(self, input_ids, scores, **kwargs):
        self.reached = input_ids.shape[-1]
        assert input_ids.shape[-1] < self.length or self.heard.wait(timeout=30), "no sound came while it generated"
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_audio_starts_before_generation_ends(model, tiny_model, tokenizer, vocabulary):
    inputs = prompts(tokenizer, "say hello")
    wait = _WaitForSound(inputs.input_ids.shape[1] + 12)  # one window, and the tokens that generate() holds back
    arguments = span_arguments(vocabulary, tokenizer, min_codes=40, max_codes=40)
    chunks = []
    stream = stream_audio(
        model, tiny_model, vocabulary, **WINDOW, **inputs, **arguments, max_new_tokens=50, do_sample=False,
        stopping_criteria=StoppingCriteriaList([wait]),
    )  # fmt: skip
    for chunk in stream:
        chunks.append(chunk)
        wait.heard.set()
    assert len(chunks) > 3 and sum(len(chunk) for chunk in chunks) == 40 * 16


def test_several_spans_and_tokens_at_once_are_streamed_without_the_prompt(tiny_model, vocabulary):
    begin, end, first = vocabulary.begin_token_id, vocabulary.end_token_id, vocabulary.first_token_id
    streamer = AudioStreamer(tiny_model, vocabulary, **WINDOW)
    feed(streamer, [1, begin, first + 9, end, 2], 4, begin, [first + 1, first + 2, end, 5], [begin, first + 3], end, 6)
    expected = torch.cat([windowed(tiny_model, [1, 2]), windowed(tiny_model, [3])])
    assert torch.equal(torch.cat(list(streamer)), expected)


def test_a_span_begun_by_the_prompt_is_streamed(tiny_model, vocabulary):
    begin, end, first = vocabulary.begin_token_id, vocabulary.end_token_id, vocabulary.first_token_id
    streamer = AudioStreamer(tiny_model, vocabulary, **WINDOW)
    feed(streamer, [1, begin, first + 9], first + 1, first + 2, end)
    assert torch.equal(torch.cat(list(streamer)), windowed(tiny_model, [1, 2]))


def test_a_truncated_span_is_streamed_with_a_warning(tiny_model, vocabulary, caplog):
    streamer = AudioStreamer(tiny_model, vocabulary, **WINDOW)
    feed(streamer, [vocabulary.begin_token_id], vocabulary.first_token_id + 1)
    assert torch.equal(torch.cat(list(streamer)), windowed(tiny_model, [1]))
    assert "inside a span of audio" in caplog.text


def test_invalid_tokens_in_a_stream_are_refused_with_their_position(tiny_model, vocabulary):
    begin, end, first = vocabulary.begin_token_id, vocabulary.end_token_id, vocabulary.first_token_id
    bad = [([1], first), ([1], end), ([begin, first], 5), ([begin, first], begin), ([begin, first], first + 64)]
    for prompt, token in bad:
        if token == first + 64:  # the id after the closed range: here a boundary token, elsewhere any token
            assert token == begin
        streamer = AudioStreamer(tiny_model, vocabulary, **WINDOW)
        feed(streamer, prompt, token)
        where = "inside" if begin in prompt else "outside"
        with pytest.raises(ValueError, match=f"token id {token} at position {len(prompt)}, {where} a span"):
            list(streamer)


def test_a_batch_another_codebook_and_silence_are_refused(tiny_model, vocabulary):
    streamer = AudioStreamer(tiny_model, vocabulary, **WINDOW, timeout=0.01)
    with pytest.raises(ValueError, match="Got 2 rows"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(TimeoutError, match=r"No token came for 0\.01 s"):
        next(streamer)
    with pytest.raises(ValueError, match="codebook"):
        AudioStreamer(tiny_model, AudioVocabulary(10, 64, 1, 2, codebook_fingerprint="0" * 16))
    with pytest.raises(ValueError, match="no begin_token_id"):
        AudioStreamer(tiny_model, AudioVocabulary(10, 64))
    with pytest.raises(ValueError, match="window_seconds"):
        AudioStreamer(tiny_model, vocabulary, window_seconds=0)


def test_an_error_of_generate_reaches_the_consumer(model, tiny_model, tokenizer, vocabulary):
    def fail(input_ids, scores):
        raise RuntimeError("the model broke")

    arguments = {**prompts(tokenizer, "say"), "logits_processor": [fail], "max_new_tokens": 5}
    with pytest.raises(RuntimeError, match="the model broke"):
        list(stream_audio(model, tiny_model, vocabulary, **WINDOW, **arguments))
    with pytest.raises(ValueError, match="embeddings for 100 tokens"):
        list(stream_audio(tiny_llama(100), tiny_model, vocabulary, **arguments))


def test_closing_the_stream_stops_the_generation(model, tiny_model, tokenizer, vocabulary):
    threads = threading.active_count()
    inputs = prompts(tokenizer, "say hello")
    wait = _WaitForSound(inputs.input_ids.shape[1] + 12)  # otherwise it might finish before the consumer stops
    stream = stream_audio(
        model, tiny_model, vocabulary, **WINDOW, **inputs, **span_arguments(vocabulary, tokenizer, min_codes=400),
        max_new_tokens=410, stopping_criteria=[wait],
    )  # fmt: skip
    assert len(next(stream)) > 0
    wait.heard.set()
    stream.close()
    assert threading.active_count() == threads
    assert wait.reached < 200  # of 400


def test_end_of_text_in_a_prompt_is_attended_even_if_it_is_the_padding_token(model, tiny_model, vocabulary):
    """In chats, end of text closes every turn."""
    bare = byte_level()
    bare.pad_token = None
    prompt = torch.tensor([[5, bare.eos_token_id, 7, vocabulary.begin_token_id]])
    arguments = {"input_ids": prompt, **span_arguments(vocabulary, bare, 20, 20), "do_sample": False}
    arguments["max_new_tokens"] = 21
    seen = model.generate(**arguments, attention_mask=torch.ones_like(prompt))
    hidden = model.generate(**arguments, attention_mask=(prompt != bare.eos_token_id).long())
    assert not torch.equal(seen, hidden)
    (span,), _ = vocabulary.find_spans(seen[0])
    streamed = torch.cat(list(stream_audio(model, tiny_model, vocabulary, **WINDOW, **arguments)))
    assert torch.equal(streamed, windowed(tiny_model, span.audio_codes))


def test_a_generate_without_streamer_end_still_ends_the_audio(tiny_model, vocabulary):
    begin, end, first = vocabulary.begin_token_id, vocabulary.end_token_id, vocabulary.first_token_id

    class Forgetful:
        def get_input_embeddings(self):
            return torch.nn.Embedding(end + 1, 1)

        get_output_embeddings = get_input_embeddings

        def generate(self, input_ids, attention_mask, streamer, stopping_criteria):
            for ids in (input_ids, torch.tensor([first + 1]), torch.tensor([end])):
                streamer.put(ids)

    heard = []
    prompt = torch.tensor([[begin]])
    stream = stream_audio(Forgetful(), tiny_model, vocabulary, **WINDOW, input_ids=prompt, stopping_criteria=None)
    listener = threading.Thread(target=lambda: heard.extend(stream), daemon=True)
    listener.start()
    listener.join(timeout=20)
    assert torch.equal(torch.cat(heard), windowed(tiny_model, [1]))
    assert not listener.is_alive()
