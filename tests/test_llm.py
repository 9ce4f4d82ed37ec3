"""Audio in a vocabulary: token ids, text, spans, and the changes to tokenizers and models."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from language_models import TOKENIZERS, byte_level, tiny_llama, word_level
from tokenizers import AddedToken
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.llm import APERTUS_1_5, AudioVocabulary


CODES = 64
many = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def given_range(tokenizer) -> AudioVocabulary:
    """
    Return a tokenizer with codes in the middle of its vocabulary and boundary tokens elsewhere, under its own names.
    """
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("[in]", "[other]", "[out]")])
    tokenizer.add_tokens([AddedToken(f"<a{code}>", normalized=False) for code in range(CODES)])
    tokenizer.add_tokens(["later"])
    begin, _, end, first = tokenizer.convert_tokens_to_ids(["[in]", "[other]", "[out]", "<a0>"])
    vocabulary = AudioVocabulary(first, CODES, begin, end, None, "<a{}>", "[in]", "[out]")
    vocabulary.attach(tokenizer)
    return vocabulary


def added(tokenizer) -> AudioVocabulary:
    return AudioVocabulary.add_to(tokenizer, CODES)


def grown_afterwards(tokenizer) -> AudioVocabulary:
    vocabulary = added(tokenizer)
    tokenizer.add_tokens([AddedToken(f"<|audio_{CODES + more}|>", normalized=False) for more in range(5)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|image|>"]})
    return vocabulary


LAYOUTS = {"added tokens": added, "a given range": given_range, "grown afterwards": grown_afterwards}


@pytest.fixture(scope="module", params=[(name, layout) for name in TOKENIZERS for layout in LAYOUTS], ids=" ".join)
def pair(request):
    """Return a tokenizer of each kind, with its audio vocabulary in each layout."""
    name, layout = request.param
    tokenizer = TOKENIZERS[name]()
    return tokenizer, LAYOUTS[layout](tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Ids and text
# ---------------------------------------------------------------------------------------------------------------------


@many
@given(codes=st.lists(st.integers(0, CODES - 1), min_size=1, max_size=30))
def test_codes_round_trip_through_ids_and_text_of_the_tokenizer(pair, codes):
    tokenizer, vocabulary = pair
    ids = vocabulary.codes_to_ids(codes)
    for text in (
        tokenizer.decode(ids),
        tokenizer.decode(ids, skip_special_tokens=True),
        vocabulary.codes_to_text(codes),
    ):
        assert tokenizer(text, add_special_tokens=False).input_ids == ids.tolist()
        assert vocabulary.text_to_codes(text).tolist() == codes
    assert vocabulary.ids_to_codes(ids).tolist() == codes


@many
@given(
    codes=st.lists(st.integers(0, CODES - 1), min_size=1, max_size=10), words=st.sampled_from(["the dog", "text", ""])
)
def test_a_span_among_words_round_trips_through_text(pair, codes, words):
    tokenizer, vocabulary = pair
    words = tokenizer(words, add_special_tokens=False).input_ids
    text = tokenizer.decode(words + vocabulary.span(codes) + words, skip_special_tokens=True)
    spans, malformed = vocabulary.find_spans(tokenizer(text, add_special_tokens=False).input_ids)
    assert [span.audio_codes.tolist() for span in spans] == [codes]
    assert malformed == []


def test_the_apertus_vocabulary_has_its_published_ids():
    assert APERTUS_1_5.last_token_id == 266439
    assert APERTUS_1_5.codes_to_ids([0, 1323, 4095]).tolist() == [262344, 263667, 266439]
    assert APERTUS_1_5.ids_to_codes([262344, 266439]).tolist() == [0, 4095]
    assert APERTUS_1_5.span([7]) == [131080, 262351, 131081]
    assert APERTUS_1_5.codes_to_text([7, 8]) == "<|audio token 7|><|audio token 8|>"
    assert APERTUS_1_5.is_audio([262343, 262344, 266439, 266440]).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int64])
def test_narrow_integers_do_not_overflow(dtype):
    """Token files hold uint16, and 65535 is less than the first id of Apertus."""
    ids = APERTUS_1_5.codes_to_ids(np.array([4095], dtype=dtype))
    assert ids.dtype == np.int64 and ids[0] == 266439
    tensor = APERTUS_1_5.codes_to_ids(torch.from_numpy(np.array([[4095]], dtype=dtype)))
    assert tensor.dtype == torch.int64 and tensor.shape == (1, 1) and tensor.item() == 266439


@pytest.mark.parametrize(
    ("function", "value", "message"),
    [
        ("codes_to_ids", [0, 4096], r"code 4096 at index 1, expected 0 to 4095"),
        ("codes_to_ids", torch.tensor([-1]), r"code -1 at index 0"),
        ("codes_to_ids", [0.5], "float64, expected integers"),
        ("codes_to_ids", torch.tensor([True]), "bool, expected integers"),
        ("ids_to_codes", [262344, 266440], r"token id 266440 at index 1, expected 262344 to 266439.*find_spans"),
        ("ids_to_codes", np.array([[262343]]), r"token id 262343"),
        ("text_to_codes", "<|audio token 4096|>", r"code 4096.*another codebook"),
        ("text_to_codes", "<|audio token 1|> and", r"'and' at character 18"),
        ("text_to_codes", "<|audio token 007|>", r"at character 0"),
        ("find_spans", [[1]], r"shape \(1, 1\), expected one row"),
        ("span", [[1]], r"shape \(1, 1\), expected one row"),
    ],
)
def test_invalid_codes_and_ids_are_refused(function, value, message):
    with pytest.raises(ValueError, match=message):
        getattr(APERTUS_1_5, function)(value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_token_id": -1}, "first_token_id=-1"),
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"begin_token_id": 5}, "or neither"),
        ({"begin_token_id": 5, "end_token_id": 5}, "two ids"),
        ({"begin_token_id": 5, "end_token_id": 163}, "outside the codes, which are 100 to 163"),
        ({"token_format": "<|audio|>"}, "one {} in it"),
    ],
)
def test_an_impossible_vocabulary_layout_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AudioVocabulary(**{"first_token_id": 100, "codebook_size": 64, **fields})


# ---------------------------------------------------------------------------------------------------------------------
# Spans
# ---------------------------------------------------------------------------------------------------------------------

SMALL = AudioVocabulary(first_token_id=10, codebook_size=4, begin_token_id=20, end_token_id=21)


@pytest.mark.parametrize(
    ("ids", "good", "bad"),
    [
        ([], [], []),
        ([1, 2], [], []),
        ([20, 10, 13, 21], [(1, 3)], []),
        ([0, 0, 1, 20, 11, 21, 2, 20, 12, 12, 21, 0], [(4, 5), (8, 10)], []),
        ([20, 10, 11], [], [(0, 3, "no end.")]),
        ([10, 11, 21], [], [(0, 2, "not between"), (2, 3, "no begin")]),
        ([20, 10, 20, 11, 21], [(3, 4)], [(0, 2, "before the next")]),
        ([20, 10, 1, 11, 21], [], [(0, 5, "token id 1 at index 2")]),
        ([20, 14, 21], [], [(0, 3, "token id 14")]),  # the first id behind a closed range
        ([20, 21], [], [(0, 2, "no codes")]),
        ([1, 12, 12, 20, 10, 21], [(4, 5)], [(1, 3, "not between")]),
        ([20, 10, 21, 13], [(1, 2)], [(3, 4, "not between")]),
    ],
)
def test_spans_are_found_and_malformed_ones_reported(ids, good, bad):
    for given_ids in (ids, np.array(ids, dtype=np.int32), torch.tensor(ids, dtype=torch.long)):
        spans, malformed = SMALL.find_spans(given_ids)
        assert [(span.start, span.stop) for span in spans] == good
        for span in spans:
            assert span.audio_codes.tolist() == [id - 10 for id in ids[span.start : span.stop]]
        assert [(each.start, each.stop) for each in malformed] == [each[:2] for each in bad]
        assert all(reason in each.reason for each, (_, _, reason) in zip(malformed, bad, strict=True))


@many
@given(ids=st.lists(st.sampled_from([1, 10, 11, 13, 14, 20, 21]), max_size=25))
def test_every_audio_id_and_boundary_token_is_in_a_span_or_reported(ids):
    spans, malformed = SMALL.find_spans(ids)
    seen = [position for each in spans for position in range(each.start - 1, each.stop + 1)]
    assert len(seen) == len(set(seen))  # no position is in two spans
    seen += [position for each in malformed for position in range(each.start, each.stop)]
    assert {position for position, id in enumerate(ids) if 10 <= id < 14 or id >= 20} <= set(seen)


def test_without_boundary_tokens_a_span_is_a_run_of_codes():
    spans, malformed = AudioVocabulary(10, 4).find_spans([1, 10, 11, 14, 12, 20])
    assert [span.audio_codes.tolist() for span in spans] == [[0, 1], [2]]
    assert malformed == []


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_remembers_its_audio(tmp_path):
    tokenizer = byte_level()
    vocabulary = AudioVocabulary.add_to(tokenizer, CODES, codebook_fingerprint="0123456789abcdef")
    tokenizer.save_pretrained(tmp_path / "one")
    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert AudioVocabulary.from_tokenizer(again) == vocabulary
    again.add_tokens(["more"])
    again.save_pretrained(tmp_path / "two")
    again = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert AudioVocabulary.from_tokenizer(again) == vocabulary
    assert again(vocabulary.codes_to_text([3, 63])).input_ids == vocabulary.codes_to_ids([3, 63]).tolist()
    saved = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())["audio_vocabulary"]
    assert saved == asdict(vocabulary)


def test_text_is_tokenized_as_before():
    before, after = byte_level(), byte_level()
    AudioVocabulary.add_to(after, CODES)
    for text in ("say hello to the world", "<|audio|> <|audio_", "naïve"):
        assert after(text).input_ids == before(text).input_ids


def refused_tokenizers():
    def twice(tokenizer):
        AudioVocabulary.add_to(tokenizer, CODES)

    def mark(tokenizer):
        tokenizer.add_tokens(["<|audio_end|>"])

    def code(tokenizer):
        tokenizer.add_tokens(["<|audio_63|>"])

    return [
        (twice, "an audio vocabulary already.*one only.*load the tokenizer again"),
        (mark, r"'<\|audio_end\|>' \(id 300\) already"),
        (code, r"'<\|audio_63\|>'"),
    ]


@pytest.mark.parametrize(("change", "message"), refused_tokenizers())
def test_a_tokenizer_that_has_such_tokens_is_refused_and_left_alone(change, message):
    tokenizer = byte_level()
    change(tokenizer)
    size = len(tokenizer)
    with pytest.raises(ValueError, match=message):
        AudioVocabulary.add_to(tokenizer, CODES)
    assert len(tokenizer) == size


def test_other_token_names_allow_a_second_codebook():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|audio_begin|>", "<|audio_end|>", "<|audio_0|>"])
    vocabulary = AudioVocabulary.add_to(
        tokenizer, CODES, token_format="<|w{}|>", begin_token="<|w|>", end_token="<|/w|>"
    )
    assert tokenizer("<|w|><|w5|><|/w|>").input_ids == vocabulary.span([5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_token_id": 304}, r"'<a1>' at id 304, expected '<a0>'"),
        ({"codebook_size": 65}, r"'later' at id 367, expected '<a64>'"),
        ({"begin_token_id": 301}, r"'\[other\]' at id 301, expected '\[in\]'"),
        ({"codebook_size": 70}, "'later' at id 367"),
    ],
)
def test_a_range_that_the_tokenizer_does_not_have_is_refused(fields, message):
    tokenizer = byte_level()
    right = given_range(tokenizer)
    assert right.first_token_id == 303
    del tokenizer.init_kwargs["audio_vocabulary"]
    with pytest.raises(ValueError, match=message):
        AudioVocabulary(**{**asdict(right), **fields}).attach(tokenizer)


def test_codes_that_the_tokenizer_would_split_are_refused():
    """
    A WordLevel vocabulary can hold such names without ever producing them: its pre-tokenizer splits at punctuation.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<unk>": 0, **{f"<|audio_{code}|>": code + 1 for code in range(CODES)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"splits '<\|audio_0\|>'"):
        AudioVocabulary(1, CODES).attach(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def test_a_tokenizer_without_a_valid_audio_record_is_refused():
    tokenizer = word_level()
    with pytest.raises(ValueError, match="remembers no audio vocabulary"):
        AudioVocabulary.from_tokenizer(tokenizer)
    vocabulary = AudioVocabulary.add_to(tokenizer, CODES, codebook_fingerprint="a" * 16)
    with pytest.raises(ValueError, match="remembers another audio vocabulary"):
        AudioVocabulary(**{**asdict(vocabulary), "codebook_fingerprint": "b" * 16}).attach(tokenizer)
    tokenizer.init_kwargs["audio_vocabulary"] = {**asdict(vocabulary), "frames": 1}
    with pytest.raises(ValueError, match="unknown field 'frames'"):
        AudioVocabulary.from_tokenizer(tokenizer)
    tokenizer.init_kwargs["audio_vocabulary"] = {"first_token_id": 1}
    with pytest.raises(ValueError, match="no field 'codebook_size'"):
        AudioVocabulary.from_tokenizer(tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Codebooks and models
# ---------------------------------------------------------------------------------------------------------------------


def test_codes_of_another_codebook_are_refused(tiny_model):
    vocabulary = AudioVocabulary(100, 64, codebook_fingerprint=tiny_model.codebook_fingerprint)
    vocabulary.check_codec(tiny_model)
    other = WavTokenizerModel(tiny_config())
    with pytest.raises(ValueError, match=f"codebook {other.codebook_fingerprint}.*{tiny_model.codebook_fingerprint}"):
        vocabulary.check_codec(other)
    with pytest.raises(ValueError, match="WavTokenizer of 64 codes, expected 65"):
        AudioVocabulary(100, 65).check_codec(tiny_model)
    AudioVocabulary(100, 64).check_codec(other)  # without a codebook fingerprint


def tiny_gptj(vocab_size: int) -> GPTJForCausalLM:
    """Return a model whose output head has a bias."""
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    model = GPTJForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {
    "untied": tiny_llama,
    "tied": lambda size: tiny_llama(size, tied=True),
    "padded": lambda size: tiny_llama(size + 20),
    "much padded": lambda size: tiny_llama(size + 200, tied=True),
    "with a bias": tiny_gptj,
}


@pytest.mark.parametrize("multiple", [None, 64])
@pytest.mark.parametrize("name", MODELS)
def test_adding_audio_keeps_the_logits_of_existing_tokens(name, multiple):
    tokenizer = byte_level()
    size = len(tokenizer)
    model = MODELS[name](size)
    num_rows = model.get_input_embeddings().num_embeddings
    input_ids = tokenizer(["the quick brown fox jumps over the lazy dog"], return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(input_ids).logits
    vocabulary = AudioVocabulary.add_to(tokenizer, CODES, model=model, pad_to_multiple_of=multiple)
    with torch.no_grad():
        after = model(input_ids).logits
    assert before[..., :size].std() > 0.1
    # the same values summed in another shape: float32 rounding
    torch.testing.assert_close(after[..., :size], before[..., :size], atol=1e-6, rtol=0)
    expected = max(num_rows, size + CODES + 2)
    expected = expected if multiple is None else -(-expected // multiple) * multiple
    assert after.shape[-1] == model.get_input_embeddings().num_embeddings == model.config.vocab_size == expected
    vocabulary.check_model(model)


@pytest.mark.parametrize("name", MODELS)
def test_new_embedding_rows_are_the_mean_of_the_existing_rows(name):
    """Rows beyond the tokenizer's ids were never trained: they do not count for the mean, and are new too."""
    tokenizer = byte_level()
    size = len(tokenizer)
    model = MODELS[name](size)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    means = [module.weight[:size].double().mean(0) for module in modules]
    vocabulary = AudioVocabulary.add_to(tokenizer, CODES, model=model)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    assert (modules[0].weight is modules[1].weight) == model.config.tie_word_embeddings
    for module, mean in zip(modules, means, strict=True):
        assert min(vocabulary.token_ids) == size
        # 1e-6: the mean is taken in float32
        torch.testing.assert_close(
            module.weight[size:].double(), mean.expand(len(module.weight) - size, -1), atol=1e-6, rtol=0
        )
        if getattr(module, "bias", None) is not None:
            assert torch.allclose(module.bias[size:], module.bias[:size].mean())


def test_a_resized_model_is_saved_and_loaded_as_it_is(tmp_path):
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), tied=True)
    AudioVocabulary.add_to(tokenizer, CODES, model=model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_model_that_is_smaller_than_its_tokenizer_is_refused_and_left_alone():
    tokenizer = byte_level()
    size = len(tokenizer)
    model = tiny_llama(size - 1)
    with pytest.raises(
        ValueError, match=rf"embeddings for {size - 1} tokens.*ids up to {size - 1}.*resize_token_embeddings"
    ):
        AudioVocabulary.add_to(tokenizer, CODES, model=model)
    assert len(tokenizer) == size and model.config.vocab_size == size - 1
    with torch.device("meta"), pytest.raises(ValueError, match="not in memory"):
        AudioVocabulary.add_to(tokenizer, CODES, model=tiny_llama(size))


def test_a_model_that_cannot_read_or_write_audio_gets_a_warning():
    vocabulary = AudioVocabulary(100, 64, 98, 99)
    vocabulary.check_model(tiny_llama(164))
    with pytest.raises(ValueError, match=r"embeddings for 163 tokens.*needs 164"):
        vocabulary.check_model(tiny_llama(163))
    reader = tiny_llama(164)
    reader.set_output_embeddings(torch.nn.Linear(32, 100, bias=False))  # like Apertus 1.5, which generates only text
    with pytest.raises(ValueError, match=r"outputs for 100 tokens.*needs 164"):
        vocabulary.check_model(reader)
    vocabulary.check_model(reader, writes=False)
    reader.resize_token_embeddings(164)  # the remedy that the error names
    vocabulary.check_model(reader)
