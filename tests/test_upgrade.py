"""`upgrade` converts a native WavTokenizer, alone or within Apertus 1.5, to our class with the same tensors."""

import copy

import numpy as np
import pytest
import soundfile
import torch
from bulk_corpus import rows_of
from torch import nn
from transformers import AutoModel

from wavtokenizer_hf import (
    WavTokenizerEncoderModel,
    WavTokenizerFeatureExtractor,
    WavTokenizerModel,
    upgrade,
)
from wavtokenizer_hf.bulk import TokenizeOptions, tokenize
from wavtokenizer_hf.llm import AudioVocabulary


native = pytest.importorskip(
    "transformers.models.wavtokenizer.modeling_wavtokenizer", reason="transformers < 5.24 has no WavTokenizer"
)
OURS = {"WavTokenizerModel": WavTokenizerModel, "WavTokenizerEncoderModel": WavTokenizerEncoderModel}
AUDIO_TOKEN_OFFSET = 262344  # the level of Apertus 1.5


@pytest.fixture
def native_model(tiny_model, tmp_path):
    """Return a function: name of a native class -> the tiny model in that class."""

    def load(name: str, **arguments) -> nn.Module:
        tiny_model.save_pretrained(tmp_path / "tiny")
        return getattr(native, name).from_pretrained(tmp_path / "tiny", **arguments).eval()

    return load


@pytest.mark.parametrize("name", OURS)
def test_a_native_model_becomes_ours_with_its_own_tensors(native_model, tiny_model, name):
    model = native_model(name)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    ours = upgrade(model)
    assert type(ours) is OURS[name]
    before, after = model.state_dict(keep_vars=True), ours.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.data_ptr() == before[key].data_ptr(), key
        assert (tensor.dtype, tensor.device, tensor.requires_grad) == (
            before[key].dtype, before[key].device, before[key].requires_grad
        ), key  # fmt: skip
    assert [key for key, parameter in ours.named_parameters() if not parameter.requires_grad] == [frozen]
    assert not ours.training and upgrade(model.train()).training
    model.eval()
    assert ours.config.codebook_fingerprint == tiny_model.codebook_fingerprint

    audio, mask = torch.randn(2, 1, 400), torch.ones(2, 400, dtype=torch.long)
    mask[1, 123:] = 0
    alone = [
        model.encode(clip[None, :, : int(real.sum())]).audio_codes[0] for clip, real in zip(audio, mask, strict=True)
    ]
    together = ours.encode(audio, mask)
    for row, codes in enumerate(alone):
        assert torch.equal(together.audio_codes[row, :, : codes.shape[-1]], codes)
    if name == "WavTokenizerModel":
        expected, got = model.decode(alone[0][None]), ours.decode(alone[0][None])
        torch.testing.assert_close(got.audio_values, expected.audio_values, atol=1e-5, rtol=1e-4)


def test_an_upgraded_model_is_saved_and_loaded_as_ours(native_model, tiny_model, tmp_path):
    for name, model_class in OURS.items():
        upgrade(native_model(name)).save_pretrained(tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is model_class
        audio = torch.randn(1, 1, 400)
        assert torch.equal(loaded.eval().encode(audio).audio_codes, tiny_model.encode(audio).audio_codes)


def test_a_model_in_bfloat16_keeps_its_dtype_except_for_float32_modules(native_model, caplog):
    model = native_model("WavTokenizerModel").to(torch.bfloat16)
    expected = WavTokenizerModel(upgrade(native_model("WavTokenizerModel")).config).to(torch.bfloat16)
    ours = upgrade(model)
    assert "is in torch.bfloat16. Its weights are rounded" in caplog.text
    before, dtypes = model.state_dict(), {key: tensor.dtype for key, tensor in expected.state_dict().items()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    for key, tensor in ours.state_dict().items():
        assert tensor.dtype == dtypes[key], key
        assert torch.equal(tensor, before[key].to(tensor.dtype)), key
        assert (tensor.data_ptr() == before[key].data_ptr()) == (tensor.dtype == torch.bfloat16), key
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}  # it is unchanged
    assert ours(torch.randn(1, 1, 400)).audio_values.isfinite().all()


def test_our_own_model_is_left_unchanged(tiny_model):
    assert upgrade(tiny_model) is tiny_model
    holder = nn.ModuleDict({"codec": tiny_model})
    assert upgrade(holder) is holder and holder["codec"] is tiny_model


def test_a_codec_shared_by_two_modules_stays_shared(native_model):
    model = native_model("WavTokenizerModel")
    holder = nn.ModuleDict({"a": model, "b": nn.ModuleList([model])})
    upgrade(holder)
    assert type(holder["a"]) is WavTokenizerModel and holder["b"][0] is holder["a"]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            nn.Linear(1, 1),
            ValueError,
            r"Linear, which contains no WavTokenizer of transformers \d[^,]* Pass a WavTokenizerModel or",
        ),
        (nn.Sequential(nn.Linear(1, 1)), ValueError, "Sequential, which contains no WavTokenizer"),
        ("a/name", TypeError, "Got str, expected a model. Load it first"),
    ],
)
def test_a_model_without_a_codec_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        upgrade(model)


def test_an_unsupported_native_model_is_refused_and_left_unchanged(native_model):
    fields = {**native_model("WavTokenizerModel").config.to_dict(), "use_causal_conv": True}
    config = native.WavTokenizerConfig(**fields)
    holder = nn.ModuleDict({"good": native_model("WavTokenizerModel"), "causal": native.WavTokenizerModel(config)})
    with pytest.raises(Exception, match="use_causal_conv=True"):
        upgrade(holder)
    assert type(holder["good"]) is native.WavTokenizerModel


def test_offloaded_weights_are_refused(native_model):
    model = native_model("WavTokenizerModel")
    model.head.to("meta")
    with pytest.raises(ValueError, match=r"offloaded or spread over devices \(cpu, meta\). Load it on one device"):
        upgrade(model)


# ---------------------------------------------------------------------------------------------------------------------
# Apertus 1.5
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def apertus(native_model):
    """Return a tiny Apertus 1.5 of random weights with the native encoder of the tiny model."""
    from transformers import Apertus1p5Config, Apertus1p5ForConditionalGeneration

    encoder = native_model("WavTokenizerEncoderModel")
    fields = {key: value for key, value in encoder.config.to_dict().items() if key not in ("model_type", "auto_map")}
    config = Apertus1p5Config(
        text_config={
            "vocab_size": AUDIO_TOKEN_OFFSET + 64, "output_vocab_size": 64, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        vision_config={
            "embed_dim": 1, "latent_channels": 1, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 0,
            "attn_resolutions": [],
        },
        audio_config=native.WavTokenizerEncoderConfig(**fields),
    )  # fmt: skip
    torch.manual_seed(1)
    model = Apertus1p5ForConditionalGeneration(config).eval()
    assert config.audio_token_offset == AUDIO_TOKEN_OFFSET
    model.model.audio_tokenizer.load_state_dict(encoder.state_dict())
    return model


def test_the_audio_tokens_of_apertus_equal_ours_and_those_of_bulk_tokenization(apertus, tiny_model, tmp_path):
    """get_audio_tokens, before and after `upgrade` = our codes + 262344 = rows of bulk tokenization as token ids."""
    random = np.random.default_rng(0)
    clips = {f"{n}.wav": random.uniform(-0.3, 0.3, n).astype(np.float32) for n in (100, 1, 333, 16 * 40)}
    extractor = WavTokenizerFeatureExtractor(hop_length=16, normalize_audio=True)  # as in Apertus
    inputs = extractor(list(clips.values()), sampling_rate=24000, return_tensors="pt")
    vocabulary = AudioVocabulary(AUDIO_TOKEN_OFFSET, codebook_size=64)

    tokenizer = apertus.model.audio_tokenizer
    assert type(tokenizer) is native.WavTokenizerEncoderModel
    before = apertus.model.get_audio_tokens(**inputs)
    pointers = {key: tensor.data_ptr() for key, tensor in apertus.state_dict().items()}
    assert upgrade(apertus) is apertus
    assert type(apertus.model.audio_tokenizer) is WavTokenizerEncoderModel
    assert {key: tensor.data_ptr() for key, tensor in apertus.state_dict().items()} == pointers
    after = apertus.model.get_audio_tokens(**inputs)
    together = apertus.model.audio_tokenizer.encode(**inputs)  # all at once
    ours = tiny_model.encode(**inputs)

    tiny_model.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    (tmp_path / "clips").mkdir()
    for name, clip in clips.items():
        soundfile.write(tmp_path / "clips" / name, clip, 24000, subtype="FLOAT")
    tokenize(tmp_path / "clips", str(tmp_path / "model"), tmp_path / "out", TokenizeOptions(num_processes=1))
    rows = rows_of(tmp_path / "out")

    assert len(torch.cat(before).unique()) > 5
    for index, name in enumerate(clips):
        expected = before[index].tolist()
        assert after[index].tolist() == expected
        for encoded in (ours, together):
            codes = encoded.audio_codes[index, 0][encoded.audio_codes_mask[index, 0].bool()]
            assert vocabulary.codes_to_ids(codes).tolist() == expected
        assert list(vocabulary.codes_to_ids(rows[name]["audio_codes"])) == expected


def test_an_upgraded_apertus_computes_and_saves_as_before(apertus, tmp_path):
    clip, mask = torch.randn(1, 1, 100), torch.ones(1, 100, dtype=torch.long)
    input_ids = torch.full((1, 7), apertus.config.audio_token_id)
    arguments = {"input_ids": input_ids, "input_values": clip, "padding_mask": mask}
    with torch.no_grad():
        before = apertus(**arguments).logits
        upgraded = upgrade(copy.deepcopy(apertus))
        torch.testing.assert_close(upgraded(**arguments).logits, before, atol=0, rtol=0)
    upgraded.save_pretrained(tmp_path)
    loaded = type(apertus).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded.model.audio_tokenizer) is WavTokenizerEncoderModel  # as the package is imported
    assert loaded.model.audio_tokenizer.dtype == torch.float32 and loaded.lm_head.weight.dtype == torch.bfloat16
    tokens = [model.model.get_audio_tokens(clip, mask)[0].tolist() for model in (apertus, loaded)]
    assert tokens[0] == tokens[1]


def test_the_processor_of_apertus_accepts_our_feature_extractor(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Apertus1p5Processor, AutoFeatureExtractor, PreTrainedTokenizerFast
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.models.wavtokenizer.feature_extraction_wavtokenizer import (
        WavTokenizerFeatureExtractor as NativeExtractor,
    )

    class NoImages(ImageProcessingMixin):  # the real one needs torchvision
        pass

    special_tokens = {f"{name}_token": f"<|{name}|>" for name in (
        "image", "audio", "boi", "eoi", "image_wrapper", "eol", "boa", "eoa"
    )}  # fmt: skip
    words = ["<unk>", "<pad>", "hello", *special_tokens.values()]
    text = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=special_tokens
    )
    clips = [np.random.default_rng(n).uniform(-0.3, 0.3, n).astype(np.float32) for n in (100, 40)]
    outputs = []
    for extractor_class in (NativeExtractor, WavTokenizerFeatureExtractor):
        extractor = extractor_class(hop_length=16, normalize_audio=True)
        processor = Apertus1p5Processor(NoImages(), extractor, tokenizer)
        outputs.append(
            processor(text=["hello <|audio|>", "<|audio|> hello"], audio=clips, padding=True, return_tensors="pt")
        )
        processor.save_pretrained(tmp_path)
        loaded = AutoFeatureExtractor.from_pretrained(tmp_path)  # from its processor_config.json
        assert type(loaded) is WavTokenizerFeatureExtractor and loaded.normalize_audio
    native_output, output = outputs
    assert native_output.keys() == output.keys()
    for name, tensor in native_output.items():
        assert torch.equal(tensor, output[name]), name
    assert (output["input_ids"] == words.index("<|audio|>")).sum(1).tolist() == [7, 3]
