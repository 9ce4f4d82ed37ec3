"""
Compatibility with the native WavTokenizer that transformers has since 5.24: the same interface and the same files.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import tiny_config
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

from wavtokenizer_hf import (
    WavTokenizerConfig,
    WavTokenizerEncoderConfig,
    WavTokenizerEncoderModel,
    WavTokenizerFeatureExtractor,
    WavTokenizerModel,
)


native_modeling = pytest.importorskip(
    "transformers.models.wavtokenizer.modeling_wavtokenizer", reason="transformers < 5.24 has no WavTokenizer"
)
from transformers.models.wavtokenizer import configuration_wavtokenizer as native_configuration
from transformers.models.wavtokenizer import feature_extraction_wavtokenizer as native_extraction


RNG = np.random.default_rng(0)
CLIPS = [RNG.uniform(-0.4, 0.4, size).astype(np.float32) for size in (400, 1, 123, 800)]
LEVELS = [None, -3.0, 0.0, -12.5]


def extractor_fields(level: float | None) -> dict:
    return (
        {"hop_length": 16}
        if level is None
        else {"hop_length": 16, "normalize_audio": True, "target_peak_dB_FS": level}
    )


@pytest.fixture
def folders(tiny_model, tmp_path):
    """
    Return name -> folder with the same tiny model, saved by our classes and the native ones, whole and as an encoder.
    """
    tiny_model.save_pretrained(tmp_path / "ours")
    tiny_model.encoder_model.save_pretrained(tmp_path / "our_encoder")
    native_modeling.WavTokenizerModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "native")
    native_modeling.WavTokenizerEncoderModel.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "native_encoder"
    )
    for name in ("ours", "our_encoder"):
        WavTokenizerFeatureExtractor(**extractor_fields(-3)).save_pretrained(tmp_path / name)
    for name in ("native", "native_encoder"):
        native_extraction.WavTokenizerFeatureExtractor(**extractor_fields(-3)).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("ours", "our_encoder", "native", "native_encoder")}


# ---------------------------------------------------------------------------------------------------------------------
# The same names, defaults and meanings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("native", "ours"),
    [
        (native_modeling.WavTokenizerModel.encode, WavTokenizerModel.encode),
        (native_modeling.WavTokenizerModel.decode, WavTokenizerModel.decode),
        (native_modeling.WavTokenizerModel.forward, WavTokenizerModel.forward),
        (native_modeling.WavTokenizerEncoderModel.encode, WavTokenizerEncoderModel.encode),
        (native_modeling.WavTokenizerEncoderModel.forward, WavTokenizerEncoderModel.forward),
        (native_extraction.WavTokenizerFeatureExtractor.__init__, WavTokenizerFeatureExtractor.__init__),
        (native_extraction.WavTokenizerFeatureExtractor.__call__, WavTokenizerFeatureExtractor.__call__),
        (
            native_extraction.WavTokenizerFeatureExtractor.get_num_audio_codes,
            WavTokenizerFeatureExtractor.get_num_audio_codes,
        ),
    ],
    ids=lambda function: function.__qualname__,
)
def test_arguments_of_the_native_interface_have_the_same_position_and_default(native, ours):
    expected = [p for p in inspect.signature(native).parameters.values() if p.kind is not p.VAR_KEYWORD]
    got = list(inspect.signature(ours).parameters.values())[: len(expected)]
    assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("name", ["WavTokenizerConfig", "WavTokenizerEncoderConfig"])
def test_config_fields_have_the_same_defaults(name):
    native = getattr(native_configuration, name)().to_dict()
    ours = {"WavTokenizerConfig": WavTokenizerConfig, "WavTokenizerEncoderConfig": WavTokenizerEncoderConfig}[name]()
    assert {key: value for key, value in ours.to_dict().items() if key in native} == native


def test_the_encoder_config_has_the_fields_but_not_the_classes_of_the_whole_model(folders):
    config = AutoConfig.from_pretrained(folders["ours"])
    encoder_config = config.encoder_config
    assert type(encoder_config) is WavTokenizerEncoderConfig
    named = {"model_type", "architectures", "auto_map"}
    assert {k: v for k, v in encoder_config.to_dict().items() if k not in named} == {
        k: v for k, v in config.to_dict().items() if k not in named
    }
    assert not getattr(encoder_config, "auto_map", None)
    encoder_config.codebook_fingerprint = "changed"
    assert config.codebook_fingerprint != "changed"


@pytest.mark.parametrize("mask_dtype", [torch.int32, torch.bool, torch.float32])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_mask_of_codes_equals_the_native_one(folders, tiny_model, mask_dtype, left):
    native = native_modeling.WavTokenizerModel.from_pretrained(folders["ours"]).eval()
    audio, mask = torch.randn(3, 1, 100), torch.ones(3, 100, dtype=mask_dtype)
    for row, padding in enumerate((0, 40, 99)):
        mask[row, slice(0, padding) if left else slice(100 - padding, None)] = 0
    for model_mask in (mask, mask[:, None]):
        for method in ("encode", "forward"):
            expected = getattr(native, method)(audio, padding_mask=model_mask).audio_codes_mask
            got = getattr(tiny_model, method)(audio, padding_mask=model_mask).audio_codes_mask
            assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert tiny_model.encode(audio).audio_codes_mask is native.encode(audio).audio_codes_mask is None


def test_tuple_outputs_equal_the_native_ones(folders):
    native, ours = (
        model_class.from_pretrained(folders["ours"]).eval()
        for model_class in (native_modeling.WavTokenizerModel, WavTokenizerModel)
    )
    by_config = WavTokenizerModel.from_pretrained(folders["ours"], return_dict=False).eval()
    audio = torch.randn(1, 1, 400)
    for method, inputs in (("encode", (audio,)), ("decode", (torch.arange(8)[None, None],)), ("forward", (audio,))):
        expected, got = (getattr(model, method)(*inputs, return_dict=False) for model in (native, ours))
        for output in (got, getattr(by_config, method)(*inputs)):
            assert type(output) is type(expected) is tuple
            assert [tensor.shape for tensor in output] == [tensor.shape for tensor in expected]


@pytest.mark.parametrize("level", LEVELS)
def test_features_equal_the_native_ones_bit_for_bit(level):
    native, ours = (
        extractor_class(**extractor_fields(level))
        for extractor_class in (native_extraction.WavTokenizerFeatureExtractor, WavTokenizerFeatureExtractor)
    )
    clips = [*CLIPS, 1e-9 * CLIPS[0], 1e-12 * CLIPS[0], np.zeros(7, np.float32), 5 * CLIPS[3]]
    for arguments in (
        {},
        {"padding": "max_length", "max_length": 1000},
        {"padding": "max_length", "max_length": 200, "truncation": True},
        {"truncation": True, "max_length": 150},
    ):
        expected, got = (
            extractor(clips, sampling_rate=24000, return_tensors="np", **arguments) for extractor in (native, ours)
        )
        for name in ("input_values", "padding_mask"):
            assert got[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(got[name], expected[name])
    unpadded = [extractor(clips, sampling_rate=24000, padding=False) for extractor in (native, ours)]
    for expected, got in zip(*(features["input_values"] for features in unpadded), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_causal_conv", True),
        ("use_conv_shortcut", False),
        ("pad_mode", "constant"),
        ("norm_type", "time_group_norm"),
        ("audio_channels", 2),
    ],
)
@pytest.mark.parametrize("config_class", ["WavTokenizerConfig", "WavTokenizerEncoderConfig"])
def test_a_native_folder_with_an_unsupported_field_is_refused_by_name(tmp_path, config_class, field, value):
    fields = {name: getattr(tiny_config(), name) for name in ("num_filters", "upsampling_ratios")}
    getattr(native_configuration, config_class)(**fields, **{field: value}).save_pretrained(tmp_path)
    message = f"Got {field}={value!r}; this class builds .* transformers >= 5.24"
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(Exception, match=message) as error:
            load(tmp_path)
        assert isinstance(error.value.__cause__, ValueError)


# ---------------------------------------------------------------------------------------------------------------------
# The same files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ours", "native"])
def test_auto_classes_return_ours_for_a_whole_model(folders, name):
    folder = folders[name]
    assert type(AutoConfig.from_pretrained(folder)) is WavTokenizerConfig
    assert type(AutoModel.from_pretrained(folder)) is WavTokenizerModel
    assert type(AutoModelForAudioTokenization.from_pretrained(folder)) is WavTokenizerModel
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert type(extractor) is WavTokenizerFeatureExtractor
    assert (extractor.normalize_audio, extractor.target_peak_dB_FS, extractor.hop_length) == (True, -3.0, 16)


@pytest.mark.parametrize("name", ["our_encoder", "native_encoder"])
def test_auto_classes_return_ours_for_an_encoder(folders, name):
    folder = folders[name]
    assert type(AutoConfig.from_pretrained(folder)) is WavTokenizerEncoderConfig
    assert type(AutoModel.from_pretrained(folder)) is WavTokenizerEncoderModel
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is WavTokenizerFeatureExtractor


@pytest.mark.parametrize("name", ["ours", "native", "our_encoder", "native_encoder"])
@pytest.mark.parametrize("module", ["ours", "native"])
def test_every_folder_loads_in_either_encoder_and_gives_the_same_codes(folders, tiny_model, name, module):
    model_class = WavTokenizerEncoderModel if module == "ours" else native_modeling.WavTokenizerEncoderModel
    model, info = model_class.from_pretrained(folders[name], output_loading_info=True)
    assert not any(info.values()), info
    assert module == "native" or type(model.config) is WavTokenizerEncoderConfig
    assert model.config.codebook_fingerprint == tiny_model.codebook_fingerprint
    audio = torch.randn(1, 1, 400)
    expected = tiny_model.encode(audio).audio_codes
    assert torch.equal(model.eval().encode(audio).audio_codes, expected)
    assert len(expected.unique()) > 5


@pytest.mark.parametrize("name", ["ours", "native"])
@pytest.mark.parametrize("module", ["ours", "native"])
def test_every_folder_loads_in_either_model_and_gives_the_same_codes_and_audio(folders, tiny_model, name, module):
    model_class = WavTokenizerModel if module == "ours" else native_modeling.WavTokenizerModel
    model, info = model_class.from_pretrained(folders[name], output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.codebook_fingerprint == tiny_model.codebook_fingerprint
    audio = torch.randn(1, 1, 400)
    expected, got = tiny_model(audio), model.eval()(audio)
    assert torch.equal(got.audio_codes, expected.audio_codes)
    torch.testing.assert_close(got.audio_values, expected.audio_values, atol=1e-5, rtol=1e-4)


def test_a_whole_model_does_not_load_from_an_encoder_folder(folders):
    with pytest.raises(ValueError, match=r"holds an encoder only.* WavTokenizerEncoderModel"):
        WavTokenizerModel.from_pretrained(folders["our_encoder"])


def test_an_encoder_built_from_a_whole_config_is_saved_as_an_encoder(tmp_path):
    WavTokenizerEncoderModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "wavtokenizer_encoder"
    assert config["architectures"] == ["WavTokenizerEncoderModel"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_wavtokenizer.WavTokenizerEncoderConfig",
        "AutoModel": "modeling_wavtokenizer.WavTokenizerEncoderModel",
    }


def test_the_three_ways_to_load_a_folder_give_the_same_codes_at_every_level(tiny_model, tmp_path):
    """With the package; without it as remote code; and by transformers alone, without remote code."""
    np.savez(tmp_path / "clips.npz", *CLIPS)
    folders, expected = [], {}
    for index, level in enumerate(LEVELS):
        folder = tmp_path / f"level_{index}"
        tiny_model.save_pretrained(folder)
        WavTokenizerFeatureExtractor(**extractor_fields(level)).save_pretrained(folder)
        folders.append(str(folder))
        model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
        assert type(model) is WavTokenizerModel and type(extractor) is WavTokenizerFeatureExtractor
        for clip_index, clip in enumerate(CLIPS):
            inputs = extractor(clip, sampling_rate=24000, return_tensors="pt")
            expected[f"{index} {clip_index}"] = model.encode(**inputs).audio_codes[0, 0].tolist()
    code = """
        import sys, json
        sys.modules["wavtokenizer_hf"] = None
        import numpy as np, torch
        from transformers import AutoFeatureExtractor, AutoModel
        clips = list(np.load("clips.npz").values())
        codes = {}
        for remote, origin in ((False, "transformers.models.wavtokenizer."), (True, "transformers_modules.")):
            codes[remote] = {}
            for index, folder in enumerate(json.loads(sys.argv[1])):
                model = AutoModel.from_pretrained(folder, trust_remote_code=remote or None).eval()
                extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=remote or None)
                assert type(model).__module__.startswith(origin), type(model)
                assert type(extractor).__module__.startswith(origin), type(extractor)
                for clip_index, clip in enumerate(clips):
                    inputs = extractor(clip, sampling_rate=24000, return_tensors="pt")
                    codes[remote][f"{index} {clip_index}"] = model.encode(**inputs).audio_codes[0, 0].tolist()
        print(json.dumps([codes[False], codes[True]]))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(folders)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    by_transformers, by_remote_code = json.loads(process.stdout.splitlines()[-1])
    assert by_transformers == expected
    assert by_remote_code == expected
    assert expected["0 0"] != expected["1 0"]  # a different level changes the codes
