"""The feature extractor: shapes, padding, peak level, and refused input."""

import json
import logging

import numpy as np
import pytest
import torch

from wavtokenizer_hf import WavTokenizerFeatureExtractor


RNG = np.random.default_rng(0)
CLIP = RNG.uniform(-0.5, 0.5, 1000).astype(np.float32)
SHORT = CLIP[:300]


def extract(audio, **arguments):
    extractor_arguments = {key: arguments.pop(key) for key in ("padding_side",) if key in arguments}
    extractor = WavTokenizerFeatureExtractor(hop_length=320, **extractor_arguments)
    return extractor(audio, **{"sampling_rate": 24000, "return_tensors": "pt", **arguments})


@pytest.mark.parametrize(
    "audio",
    [CLIP, CLIP[None], torch.from_numpy(CLIP), torch.from_numpy(CLIP)[None], CLIP.tolist(), CLIP.astype(np.float64)],
    ids=["numpy", "numpy (1, T)", "torch", "torch (1, T)", "list", "float64"],
)
def test_one_clip_becomes_a_batch_of_one(audio):
    features = extract(audio)
    assert features["input_values"].dtype == torch.float32
    np.testing.assert_array_equal(features["input_values"].numpy(), CLIP[None, None])
    assert features["padding_mask"].tolist() == [[1] * 1000]


def test_torch_half_precision_is_accepted_unchanged():
    audio = torch.from_numpy(CLIP).bfloat16()
    assert torch.equal(extract(audio)["input_values"][0, 0], audio.float())


@pytest.mark.parametrize("batch", [[CLIP, SHORT], (CLIP, SHORT), [CLIP.tolist(), SHORT.tolist()]])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_clips_are_padded_on_the_chosen_side(batch, padding_side):
    features = extract(batch, padding_side=padding_side)
    assert features["input_values"].shape == (2, 1, 1000)
    span = slice(0, 300) if padding_side == "right" else slice(700, None)
    real = np.zeros(1000)
    real[span] = 1
    np.testing.assert_array_equal(features["padding_mask"].numpy(), [np.ones(1000), real])
    np.testing.assert_array_equal(features["input_values"][1, 0, span].numpy(), SHORT)
    assert features["input_values"][1, 0].numpy()[real == 0].tolist() == [0] * 700


def test_padding_to_a_length_or_multiple_and_truncation_work():
    assert extract([CLIP, SHORT], padding="max_length", max_length=1200)["input_values"].shape == (2, 1, 1200)
    assert extract([CLIP, SHORT], pad_to_multiple_of=320)["input_values"].shape == (2, 1, 1280)
    features = extract([CLIP, SHORT], truncation=True, max_length=500)
    assert features["padding_mask"].sum(1).tolist() == [500, 300]


def test_without_padding_clips_keep_their_lengths():
    features = extract([CLIP, SHORT], padding=False, return_tensors=None)
    assert [clip.shape for clip in features["input_values"]] == [(1, 1000), (1, 300)]
    assert [mask.shape for mask in features["padding_mask"]] == [(1000,), (300,)]


def test_the_callers_audio_is_never_changed():
    audio = CLIP.copy()
    extract([audio, SHORT], normalize_audio=True)
    np.testing.assert_array_equal(audio, CLIP)


@pytest.mark.parametrize("where", ["attribute", "argument"])
@pytest.mark.parametrize("level", [-3.0, -10, 0])
def test_the_peak_gets_the_requested_level(where, level):
    fields = {"normalize_audio": True, "target_peak_dB_FS": level}
    extractor = WavTokenizerFeatureExtractor(**(fields if where == "attribute" else {}))
    arguments = fields if where == "argument" else {}
    features = extractor([CLIP, SHORT], sampling_rate=24000, **arguments)
    for row, clip in enumerate((CLIP, SHORT)):
        scaled = features["input_values"][row, 0, : len(clip)]
        assert 20 * np.log10(np.abs(scaled).max()) == pytest.approx(level, abs=1e-4)
        np.testing.assert_allclose(scaled / np.abs(scaled).max(), clip / np.abs(clip).max(), atol=1e-6)


def test_an_argument_overrides_the_attribute():
    extractor = WavTokenizerFeatureExtractor(normalize_audio=True, target_peak_dB_FS=-6.0)
    peaks = [
        np.abs(extractor(CLIP, sampling_rate=24000, **arguments)["input_values"]).max()
        for arguments in ({}, {"target_peak_dB_FS": -12.0}, {"normalize_audio": False})
    ]
    assert peaks == pytest.approx([10 ** (-6 / 20), 10 ** (-12 / 20), np.abs(CLIP).max()], rel=1e-5)


def test_nearly_silent_audio_is_not_amplified_and_silence_stays_silence():
    for peak, expected in ((1e-9, 10 ** (-3 / 20)), (1e-40, 0), (0, 0)):
        features = extract(np.array([peak, 0, peak / 2], np.float32), normalize_audio=True)
        assert features["input_values"].abs().max().item() == pytest.approx(expected, rel=1e-4, abs=1e-25)


def test_levels_are_unchanged_by_default():
    np.testing.assert_array_equal(extract(3 * CLIP)["input_values"][0, 0].numpy(), 3 * CLIP)


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (319, 1), (320, 1), (321, 2), (24000, 75)])
def test_one_code_for_every_started_hop(num_samples, expected):
    assert WavTokenizerFeatureExtractor(hop_length=320).get_num_audio_codes(num_samples) == expected


def test_a_missing_sampling_rate_is_warned_about(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    WavTokenizerFeatureExtractor()(CLIP)
    assert "Pass sampling_rate=24000" in caplog.text


@pytest.mark.parametrize(
    ("audio", "arguments", "message"),
    [
        (CLIP, {"sampling_rate": 44100}, "Got 44100 Hz, this model needs 24000 Hz. Resample first"),
        (np.stack([CLIP, CLIP]), {}, r"shape \(2, 1000\), expected one mono clip"),
        (CLIP[:, None], {}, r"shape \(1000, 1\), expected one mono clip"),
        ([CLIP, np.stack([CLIP, CLIP])], {}, r"audio\[1\] has shape \(2, 1000\)"),
        (np.zeros((2, 2, 10), np.float32), {}, r"shape \(2, 2, 10\)"),
        (np.float32(0.5), {}, r"shape \(\), expected one mono clip"),
        (np.zeros(0, np.float32), {}, "audio is empty"),
        ([], {}, "empty list of clips"),
        ([CLIP, []], {}, r"audio\[1\] is empty"),
        ((CLIP * 32768).astype(np.int16), {}, r"dtype int16, expected floating point .* / 32768"),
        (torch.zeros(10, dtype=torch.int32), {}, "dtype int32"),
        ([0, 1, 0], {}, "dtype int64"),
        (CLIP.astype(np.complex64), {}, "dtype complex64"),
        ("speech.wav", {}, "expected one mono clip|dtype"),
        ([[0.1, 0.2], ["a", "b"]], {}, r"audio\[1\] has dtype"),
        (np.array([0, 0.1, np.nan], np.float32), {}, "audio holds nan at sample 2"),
        ([CLIP, np.array([0, -np.inf])], {}, r"audio\[1\] holds -inf at sample 1"),
        (np.array([0.1, 1e300]), {}, "holds inf at sample 1"),
        (
            CLIP,
            {"normalize_audio": True, "target_peak_dB_FS": 3},
            "target_peak_dB_FS=3, expected a level of at most 0",
        ),
        (CLIP, {"normalize_audio": True, "target_peak_dB_FS": -np.inf}, "target_peak_dB_FS=-inf, expected a level"),
        (CLIP, {"target_peak_dB_FS": -3}, "target_peak_dB_FS=-3 without normalize_audio"),
        ([CLIP, SHORT], {"truncation": True}, "Pass max_length"),
        ([CLIP, SHORT], {"padding": "max_length"}, "Pass max_length"),
        ([CLIP, SHORT], {"padding": "middle"}, "middle is not a valid PaddingStrategy"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_refuses(audio, arguments, message):
    with pytest.raises(ValueError, match=message):
        extract(audio, **arguments)


def test_more_than_one_feature_is_refused():
    with pytest.raises(ValueError, match="feature_size=2"):
        WavTokenizerFeatureExtractor(feature_size=2)


def folder_with(tmp_path, **fields):
    """Return a folder with an older preprocessor_config.json, without the native names, plus the given fields."""
    legacy_fields = {
        "feature_extractor_type": "WavTokenizerFeatureExtractor",
        "hop_length": 320,
        "sampling_rate": 24000,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**legacy_fields, **fields}))
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "normalize_audio", "level"),
    [
        ({"peak_dbfs": None}, False, -3.0),
        ({"peak_dbfs": -6}, True, -6),
        ({"peak_dbfs": -3, "normalize_audio": True}, True, -3.0),
        ({"peak_dbfs": -6, "normalize_audio": True, "target_peak_dB_FS": -6.0}, True, -6),
        ({"peak_dbfs": None, "normalize_audio": False, "target_peak_dB_FS": -9.0}, False, -9.0),
    ],
)
def test_the_deprecated_level_name_is_read_and_saved_under_the_new_names(tmp_path, fields, normalize_audio, level):
    extractor = WavTokenizerFeatureExtractor.from_pretrained(folder_with(tmp_path, **fields))
    assert (extractor.normalize_audio, extractor.target_peak_dB_FS) == (normalize_audio, level)
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["normalize_audio"], saved["target_peak_dB_FS"]) == (normalize_audio, level)
    assert "peak_dbfs" not in saved


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        ({"peak_dbfs": -3, "normalize_audio": False}, "normalize_audio=False"),
        ({"peak_dbfs": None, "normalize_audio": True}, "normalize_audio=True"),
        ({"peak_dbfs": -6, "normalize_audio": True, "target_peak_dB_FS": -3.0}, "target_peak_dB_FS=-3.0"),
        ({"peak_dbfs": -6, "normalize_audio": True}, "target_peak_dB_FS=-3.0"),
    ],
)
def test_deprecated_and_new_names_that_disagree_are_refused(tmp_path, fields, other):
    with pytest.raises(ValueError, match=f"peak_dbfs={fields['peak_dbfs']} and {other}, which disagree. Remove"):
        WavTokenizerFeatureExtractor.from_pretrained(folder_with(tmp_path, **fields))


def test_the_deprecated_name_as_an_argument_is_refused_with_the_new_one(tmp_path):
    for make in (
        WavTokenizerFeatureExtractor,
        lambda **a: WavTokenizerFeatureExtractor.from_pretrained(tmp_path, **a),
    ):
        folder_with(tmp_path)
        with pytest.raises(TypeError, match=r"peak_dbfs=-3.*normalize_audio=True and target_peak_dB_FS"):
            make(peak_dbfs=-3)
