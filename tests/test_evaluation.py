"""Evaluation: each metric against a hand calculation, golden data or its package; the report; the command."""

import csv
import json
import multiprocessing
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import REFERENCE

from wavtokenizer_hf import WavTokenizerModel, audio
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.evaluation import DecodedFolder, Model, evaluate
from wavtokenizer_hf.evaluation.codebook import CodebookUsage
from wavtokenizer_hf.evaluation.metrics import METRICS, PRESETS, Clip, Options, score, unavailable_reason
from wavtokenizer_hf.evaluation.report import FileResult, Report, Summary, SystemResult


pytestmark = pytest.mark.usefixtures("one_thread")

SPEECH = Path(__file__).parent.parent / "examples" / "speech.flac"
QUICK = ["stoi", "si_sdr", "mel_distance"]
OPTIONS = Options(crepe="tiny")  # the full network takes half a minute per second of audio
# These packages may be absent: pesq needs a C compiler, the others contain weights.
ABSENT = {name for name in METRICS if name != "utmos" and unavailable_reason(name) is not None}
needs_pesq = pytest.mark.skipif(find_spec("pesq") is None, reason="pesq is not installed")


def needs(name: str):
    """Return a metric as a parameter that is skipped where its package is absent."""
    return pytest.param(name, marks=pytest.mark.skipif(name in ABSENT, reason=f"{name}: {unavailable_reason(name)}"))


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return audio.load(SPEECH)[: 3 * 24000]


def noisy(clean: np.ndarray, level: float) -> np.ndarray:
    return (clean + level * np.random.default_rng(0).standard_normal(len(clean))).astype(np.float32)


def value_of(name: str, reference: np.ndarray, estimate: np.ndarray) -> float:
    values, reasons = score(Clip(reference, OPTIONS), Clip(estimate, OPTIONS), [name])
    assert not reasons, reasons
    return values[name]


def reason_of(name: str, reference: np.ndarray, estimate: np.ndarray) -> str:
    values, reasons = score(Clip(reference, OPTIONS), Clip(estimate, OPTIONS), [name])
    assert values[name] is None
    return reasons[name]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def test_si_sdr_is_the_energy_ratio_for_any_gain_and_offset():
    reference = np.tile([1, -1, 1, -1], 6000).astype(np.float32)
    distortion = np.tile([1, 1, -1, -1], 6000).astype(np.float32)  # orthogonal to the reference
    estimate = 0.3 * (reference + 0.1 * distortion) + 0.05
    # energies 1 and 0.01; the tolerance is float32's rounding of the estimate
    assert value_of("si_sdr", reference, estimate) == pytest.approx(20, abs=1e-5)


def test_si_sdr_gives_a_reason_for_an_infinite_ratio(speech):
    assert "no upper end" in reason_of("si_sdr", speech, speech / 2)
    one, other = np.tile([1, -1, 1, -1], 6000), np.tile([1, 1, -1, -1], 6000)
    assert "no lower end" in reason_of("si_sdr", one.astype(np.float32), other.astype(np.float32))


def test_mel_distance_is_the_mel_loss_of_the_reference_implementation():
    from formula import waveform

    expected = json.loads((REFERENCE / "training_losses.json").read_text())["mel_loss"]
    pairs = (
        (waveform("speechlike", 0.5), waveform("noise", 0.5)),
        (waveform("chirp", 0.5), 0.4 * waveform("clipped", 0.5)),
    )
    # The reference value is the mean over a batch of two clips of equal length. The upper bands of the pure chirp hold
    # only rounding errors of the FFT. MKL's rounding depends on the processor: it differs by 6e-4 between SSE4.2,
    # which the reference value was computed with, and AVX-512.
    assert np.mean([value_of("mel_distance", *pair) for pair in pairs]) == pytest.approx(expected, rel=1e-3)


def test_mel_distance_is_the_mel_loss_that_training_minimises(speech):
    from wavtokenizer_hf.training.losses import MelLoss

    estimate = noisy(speech, 0.01)
    expected = MelLoss()(torch.from_numpy(estimate)[None], torch.from_numpy(speech)[None]).item()
    # the same float32 operations; only the filter matmul is transposed, which may change the order of sums
    assert value_of("mel_distance", speech, estimate) == pytest.approx(expected, rel=1e-5)


def test_mel_distance_equals_a_hand_calculation(speech):
    def log_mel(clip):
        clip = np.pad(clip.astype(np.float64), 512, mode="reflect")
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
        magnitudes = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(clip, 1024)[::256] * window))
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 12000 / 700), 102) / 2595) - 1)  # HTK's scale
        hertz = np.arange(513)[:, None] * 24000 / 1024
        rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
        fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
        return np.log(np.maximum(magnitudes @ np.maximum(np.minimum(rise, fall), 0), 1e-7))

    estimate = noisy(speech, 0.01)
    expected = np.abs(log_mel(speech) - log_mel(estimate)).mean()
    assert value_of("mel_distance", speech, estimate) == pytest.approx(expected, rel=1e-4)  # float32 against float64


def test_stft_distance_is_convergence_and_log_distance_at_three_sizes(speech):
    reference, estimate = speech[:24000], noisy(speech[:24000], 0.01)

    def magnitudes(clip, size, step, width):
        clip = np.pad(clip.astype(np.float64), size // 2, mode="reflect")
        window = np.zeros(size)
        window[(size - width) // 2 :][:width] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
        frames = np.lib.stride_tricks.sliding_window_view(clip, size)[::step] * window
        return np.sqrt(np.maximum(np.abs(np.fft.rfft(frames)) ** 2, 1e-8))

    parts = []
    for size, step, width in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        x, y = (magnitudes(clip, size, step, width) for clip in (estimate, reference))
        parts.append(np.linalg.norm(y - x) / np.linalg.norm(y) + np.abs(np.log(x) - np.log(y)).mean())
    # float32 against float64
    assert value_of("stft_distance", reference, estimate) == pytest.approx(np.mean(parts), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "best"),
    # P.862.2 maps the best raw score, 4.5, to 0.999 + 4 / (1 + exp(-1.3669 * 4.5 + 3.8224))
    [
        pytest.param("pesq_wb", 0.999 + 4 / (1 + np.exp(-1.3669 * 4.5 + 3.8224)), marks=needs_pesq),
        ("stoi", 1),
        ("estoi", 1),
    ],
)
def test_identity_gets_the_best_score_and_noise_lowers_it(name, best, speech):
    scores = [value_of(name, speech, noisy(speech, level)) for level in (0.0, 0.01, 0.1)]
    assert scores[0] == pytest.approx(best, abs=1e-3)
    assert scores[0] > scores[1] > scores[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "best"),
    # ViSQOL's lattice gives 4.5 for equal clips; DNSMOS rates one clip alone
    [
        (*needs("voicing_f1").values, 1),
        (*needs("speaker_similarity").values, 1),
        (*needs("visqol").values, 4.5),
        (*needs("dnsmos").values, None),
    ],
)
def test_metrics_with_weights_score_identity_best_and_fall_with_noise(name, best, speech):
    if name in ABSENT:
        pytest.skip(unavailable_reason(name))
    clip = speech[: 2 * 24000]
    scores = [value_of(name, clip, noisy(clip, level)) for level in (0.0, 0.005, 0.02, 0.1)]
    assert best is None or scores[0] == pytest.approx(best, abs=0.05)
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


@pytest.mark.slow
@pytest.mark.skipif("word_error_rate" in ABSENT, reason="pocketsphinx or jiwer is not installed")
def test_the_word_error_rate_of_identity_is_0_and_noise_raises_it(speech):
    rates = [value_of("word_error_rate", speech, noisy(speech, level)) for level in (0.0, 0.01, 0.1)]
    assert rates[0] == 0 < rates[1] <= rates[2]
    # a recognizer that adapts to earlier audio would now give another transcript
    assert value_of("word_error_rate", speech, speech) == 0


def test_mcd_equals_a_hand_calculation_and_ignores_the_level(speech):
    assert value_of("mcd", speech, 0.5 * speech) == pytest.approx(0, abs=1e-3)  # except below the floor of 1e-7
    estimate = noisy(speech, 0.01)
    bands = (np.arange(100) + 0.5) * np.pi / 100
    cosines = np.cos(np.arange(1, 14)[:, None] * bands)  # (13, 100)
    from wavtokenizer_hf.training.losses import MelLoss

    difference = np.subtract(
        *(MelLoss().log_mel(torch.from_numpy(clip)[None])[0].numpy() for clip in (speech, estimate))
    )
    cepstra = 2 / 100 * cosines @ difference  # of log magnitudes: 2 / M sum of log S cos
    expected = (10 / np.log(10) * np.sqrt(2 * (cepstra**2).sum(axis=0))).mean()
    assert value_of("mcd", speech, estimate) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mel_distance", "stft_distance", "mcd"])
def test_identity_has_distance_zero_and_noise_raises_it(name, speech):
    distances = [value_of(name, speech, noisy(speech, level)) for level in (0.0, 0.01, 0.1)]
    assert distances[0] == 0 < distances[1] < distances[2]


@needs_pesq
def test_pesq_and_stoi_equal_their_packages_at_16_and_24_khz(speech):
    from pesq import pesq
    from pystoi import stoi
    from scipy.signal import resample_poly

    estimate = noisy(speech, 0.01)
    at_16k = [soxr.resample(clip, 24000, 16000) for clip in (speech, estimate)]
    assert value_of("pesq_wb", speech, estimate) == pesq(16000, *at_16k, "wb")
    assert value_of("stoi", speech, estimate) == stoi(speech, estimate, 24000)
    # Other resamplers roll off differently near 8 kHz. A wrong rate or a swapped pair differs by more than 0.1.
    other = [resample_poly(clip, 2, 3) for clip in (speech, estimate)]
    assert value_of("pesq_wb", speech, estimate) == pytest.approx(pesq(16000, *other, "wb"), abs=0.05)


@needs_pesq
def test_pesq_of_a_long_clip_is_the_mean_of_its_segments_for_any_number_of_utterances():
    from pesq import pesq

    seconds = np.arange(57 * 24000) / 24000  # 57 utterances of 0.5 s; in one call, pesq 0.0.4 writes past its tables
    bursts = 0.2 * np.random.default_rng(1).standard_normal(len(seconds)) * (seconds % 1 < 0.5)
    reference, estimate = bursts.astype(np.float32), noisy(bursts, 0.01)
    segments = zip(*(np.split(soxr.resample(clip, 24000, 16000), 3) for clip in (reference, estimate)), strict=True)
    expected = np.mean([pesq(16000, *pair, "wb") for pair in segments])
    assert value_of("pesq_wb", reference, estimate) == expected


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """Return a voice-like sum of harmonics up to 8 kHz. With empty upper bands it would count as too soft to hear."""
    phase = 2 * np.pi * hertz * np.arange(round(seconds * 24000)) / 24000
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 35))).astype(np.float32)


needs_crepe = pytest.mark.skipif("f0_error" in ABSENT, reason="torchcrepe is not installed")


@needs_crepe
def test_f0_error_is_the_interval_between_two_tones_in_cents():
    assert value_of("f0_error", tone(200), 0.8 * tone(200)) == 0
    # 240 cents apart; each pitch is rounded to bins of 20 cents, so two may differ by 20
    assert value_of("f0_error", tone(200), tone(200 * 2 ** (240 / 1200))) == pytest.approx(240, abs=21)


@needs_crepe
def test_voicing_f1_weighs_misses_and_false_alarms_equally():
    half = tone(200)
    half[12000:] = 0
    # half of the voiced frames are missed: precision 1, recall 1/2; frames of 64 ms overlap the edge
    assert value_of("voicing_f1", tone(200), half) == pytest.approx(2 / 3, abs=0.05)
    assert value_of("voicing_f1", half, tone(200)) == pytest.approx(2 / 3, abs=0.05)


@needs_crepe
def test_a_tone_too_soft_to_be_heard_counts_as_unvoiced():
    assert "no frame is voiced in either" in reason_of("voicing_f1", 1e-5 * tone(200), 1e-5 * tone(200))


def test_silence_gets_reasons_and_no_scores(speech):
    silence = np.zeros(24000, np.float32)
    names = [name for name in (*PRESETS["quick"], "visqol", "speaker_similarity") if name not in ABSENT]
    values, reasons = score(Clip(silence), Clip(speech[:24000]), names)
    assert set(reasons) == set(names) - {"mel_distance", "mcd"}
    assert all(values[name] is None for name in reasons) and values["mel_distance"] > 0
    assert "the reconstruction is silent" in reason_of("si_sdr", speech, np.zeros_like(speech))


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        pytest.param("pesq_wb", 5000, "1/4 of a second", marks=needs_pesq),
        ("stoi", 5000, "0.4 s"),
        ("stoi", 100, "0.4 s"),
        pytest.param("f0_error", 1000, "64 ms", marks=needs_crepe),
    ],
)
def test_a_clip_too_short_for_a_metric_gets_a_reason(name, samples, message, speech):
    assert message in reason_of(name, speech[30000:][:samples], speech[30000:][:samples])


@pytest.fixture
def utmos_file(tmp_path) -> str:
    """Return a stand-in with the interface of UTMOS: a TorchScript of audio (1, N) at 16 kHz -> one number."""

    class Scorer(torch.nn.Module):
        def forward(self, audio_values):
            return audio_values.abs().mean(1) + audio_values.shape[1]

    path = str(tmp_path / "utmos.ts")
    torch.jit.script(Scorer()).save(path)
    return path


def test_utmos_is_the_score_of_the_given_weights_at_16_khz(utmos_file, speech):
    values, _ = score(Clip(speech), Clip(speech / 2, Options(utmos=utmos_file)), ["utmos"])
    expected = np.abs(soxr.resample(speech / 2, 24000, 16000)).mean() + 48000
    assert values["utmos"] == pytest.approx(expected, rel=1e-7)


def test_giving_utmos_weights_enables_utmos(utmos_file, corpus, decoded, capsys):
    _, report = run(
        capsys, "--audio", corpus, "--decoded", decoded, "--metrics", "mel_distance", "--utmos", utmos_file
    )
    metrics = report["systems"][0]["metrics"]
    assert list(metrics) == ["mel_distance", "utmos"] and metrics["utmos"]["mean"] == pytest.approx(
        64000 / 3, rel=1e-3
    )


def test_metrics_that_cannot_run_give_a_reason(monkeypatch, tmp_path):
    assert "--utmos" in unavailable_reason("utmos")
    assert "There is no file" in unavailable_reason("utmos", Options(utmos=str(tmp_path / "absent.ts")))
    (tmp_path / "bad.ts").write_bytes(b"not TorchScript")
    assert unavailable_reason("utmos", Options(utmos=str(tmp_path / "bad.ts")))
    monkeypatch.setitem(sys.modules, "pesq", None)
    assert unavailable_reason("pesq_wb") == "This needs pesq: pip install 'wavtokenizer_hf[evaluation]'"
    assert unavailable_reason("stoi") is None


def test_a_package_that_fails_to_import_is_named_and_other_metrics_run(monkeypatch, tmp_path, corpus, decoded, capsys):
    broken = tmp_path / "broken_packages"
    (broken / "visqol").mkdir(parents=True)
    (broken / "visqol" / "__init__.py").write_text("raise RuntimeError('built for another numpy')")
    monkeypatch.syspath_prepend(str(broken))
    monkeypatch.delitem(sys.modules, "visqol", raising=False)
    assert "built for another numpy" in unavailable_reason("visqol")
    references = [(corpus / "a.wav", Path("a.wav"))]
    monkeypatch.setitem(PRESETS, "quick", ("visqol", "mel_distance"))
    result = evaluate(references, [DecodedFolder(decoded)]).to_dict()["systems"][0]["metrics"]
    assert "built for another numpy" in result["visqol"]["not_run"] and result["mel_distance"]["count"] == 1


def test_torchcrepe_imports_without_torchaudio(monkeypatch):
    if find_spec("torchcrepe") is None:
        pytest.skip("torchcrepe is not installed")
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchcrepe", "torchaudio")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # its import fails
    assert unavailable_reason("f0_error") is None
    assert sys.modules.get("torchaudio") is None


def test_presets_name_existing_metrics_and_include_the_papers_table():
    assert all(name in METRICS for names in PRESETS.values() for name in names)
    assert PRESETS["paper"] == ("utmos", "pesq_wb", "stoi", "voicing_f1") and set(PRESETS["full"]) == set(METRICS)
    with pytest.raises(ValueError, match="crepe='small'"):
        Options(crepe="small")


# ---------------------------------------------------------------------------------------------------------------------
# Codebook use, means, differences
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "used", "perplexity", "bits_per_second"),
    [
        (np.arange(16), 1.0, 16, 300),
        (np.full(9, 5), 1 / 16, 1, 0),
        (np.repeat([3, 4, 5, 6], [4, 2, 1, 1]), 4 / 16, 2**1.75, 1.75 * 75),  # shares 1/2, 1/4, 1/8, 1/8: 1.75 bits
    ],
)
def test_codebook_metrics_of_known_distributions(codes, used, perplexity, bits_per_second):
    usage = CodebookUsage.of(codes, codebook_size=16, frame_rate=75)
    assert usage.metrics() == pytest.approx(
        {"codebook_utilization": used, "codebook_perplexity": perplexity, "codebook_entropy": bits_per_second}
    )


def test_codebook_usage_of_several_files_counts_all_their_codes():
    parts = [CodebookUsage.of(np.array(codes), 8, 40) for codes in ([0, 0, 1], [1, 2, 3, 3, 2])]
    together = sum(parts[1:], parts[0])
    assert together.num_codes == 8 and together.bits_per_second == 80  # four entries, two of each: 2 bits
    assert together.utilization == 0.5


def test_the_interval_is_students_t_and_missing_values_are_counted_not_averaged():
    summary = Summary.of([1.0, None, 2.0, 3.0, 4.0, None])
    assert (summary.mean, summary.count, summary.failures) == (2.5, 4, 2)
    # standard deviation sqrt(5 / 3), t(0.975, 3) = 3.182446 (printed tables)
    assert summary.high - 2.5 == pytest.approx(3.182446 * np.sqrt(5 / 3) / 2, rel=1e-6)
    assert 2.5 - summary.low == pytest.approx(summary.high - 2.5)
    assert Summary.of([7.0, None]) == Summary(7.0, None, None, 1, 1)
    assert Summary.of([None]) == Summary(None, None, None, 0, 1)


def result(name: str, values: list[float | None]) -> SystemResult:
    files = [
        FileResult(f"{index}.wav", 1.0, {"stoi": value}, {} if value is not None else {"stoi": "why"})
        for index, value in enumerate(values)
    ]
    return SystemResult(name, {"kind": "decoded files"}, files, {})


def test_differences_are_taken_per_file_where_both_have_a_value():
    report = Report([result("a", [0.1, 0.5, None, 0.9]), result("b", [0.2, 0.7, 0.3, None])], {})
    ((system, minus, summaries),) = report.differences()
    assert (system, minus) == ("b", "a")
    summary = summaries["stoi"]
    assert (summary.mean, summary.count, summary.failures) == (pytest.approx(0.15), 2, 2)
    # of the differences 0.1 and 0.2, not of two spreads: t(0.975, 1) = 12.7062
    assert summary.high - summary.mean == pytest.approx(12.7062 * np.std([0.1, 0.2], ddof=1) / np.sqrt(2), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The command, as a user runs it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, speech) -> Path:
    """Return a folder with two clips, one of them in a sub-folder, a silent clip, and a damaged file."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "a.wav", speech[:36000], 24000, subtype="FLOAT")
    soundfile.write(folder / "deep" / "b.wav", speech[36000:], 24000, subtype="FLOAT")
    soundfile.write(folder / "silence.wav", np.zeros(24000), 24000)
    (folder / "broken.flac").write_bytes(b"fLaC and then nothing")
    return folder


@pytest.fixture
def decoded(tmp_path, speech) -> Path:
    """Return a folder like the output of another codec: another format, and one clip a little longer."""
    folder = tmp_path / "decoded"
    (folder / "deep").mkdir(parents=True)
    longer = np.append(noisy(speech[:36000], 0.01), np.zeros(100, np.float32))
    soundfile.write(folder / "a.flac", longer, 24000, subtype="PCM_24")
    soundfile.write(folder / "deep" / "b.wav", noisy(speech[36000:], 0.02), 24000, subtype="FLOAT")
    soundfile.write(folder / "silence.wav", noisy(np.zeros(24000), 0.01), 24000)
    return folder


@pytest.fixture
def model_folder(tiny_model, tmp_path) -> str:
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(capsys, *arguments) -> tuple[int, dict]:
    code = main(["evaluate", "--json", "--num-workers", "0", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_damaged_and_silent_files_are_listed_and_do_not_distort_means(corpus, decoded, capsys):
    code, report = run(capsys, "--audio", corpus, "--decoded", decoded)
    assert code == 1 and report["num_files"] == 4
    pairs = [
        (audio.load(corpus / "a.wav"), audio.load(decoded / "a.flac")[:36000]),
        (audio.load(corpus / "deep/b.wav"), audio.load(decoded / "deep/b.wav")),
    ]
    metrics = report["systems"][0]["metrics"]
    for name in {"pesq_wb", "stoi", "estoi", "si_sdr", "stft_distance"} - ABSENT:
        assert metrics[name]["mean"] == pytest.approx(np.mean([value_of(name, *pair) for pair in pairs]))
        assert (metrics[name]["count"], metrics[name]["failures"]) == (2, 2)
        assert metrics[name]["low"] < metrics[name]["mean"] < metrics[name]["high"]
    assert (metrics["mel_distance"]["count"], metrics["mel_distance"]["failures"]) == (3, 1)  # silence has a spectrum
    failures = {
        (failure["file"], name): failure["reason"] for failure in report["failures"] for name in failure["metrics"]
    }
    assert (
        "Cannot read" in failures["broken.flac", "stoi"] and "Cannot read" in failures["broken.flac", "mel_distance"]
    )
    assert failures["silence.wav", "si_sdr"] == failures["silence.wav", "stoi"] == "the reference is silent"
    assert {file for file, _ in failures} == {"broken.flac", "silence.wav"}
    assert report["systems"][0]["num_files_cut"] == 1


def test_a_metric_that_cannot_run_is_null_with_a_reason_and_counts_as_failed(corpus, decoded, capsys):
    (corpus / "broken.flac").unlink()
    (corpus / "silence.wav").unlink()
    code, report = run(capsys, "--audio", corpus, "--decoded", decoded, "--preset", "paper", "--crepe", "tiny")
    assert "CREPE tiny" in report["settings"]["voicing_f1"]
    utmos = report["systems"][0]["metrics"]["utmos"]
    assert utmos["mean"] is utmos["low"] is utmos["high"] is None
    assert (utmos["count"], utmos["failures"]) == (0, 2) and "no weights given" in utmos["not_run"]
    assert code == 0 and report["failures"] == []  # it was not requested by name


def test_a_model_is_measured_on_its_decoded_audio_and_its_codes(corpus, model_folder, capsys, tmp_path):
    output = tmp_path / "report"
    arguments = ["--audio", corpus, "--model", model_folder, "--metrics", *QUICK, "--output", output]
    code, report = run(capsys, *arguments)
    assert code == 1
    model = WavTokenizerModel.from_pretrained(model_folder).eval()
    codes, scores = [], []
    for name in ("a.wav", "deep/b.wav", "silence.wav"):
        waveform = audio.load(corpus / name)
        decoded = model(torch.from_numpy(waveform)[None, None])
        codes.append(decoded.audio_codes.flatten().numpy())
        if name != "silence.wav":
            scores.append(value_of("stoi", waveform, decoded.audio_values[0, 0].detach().numpy()))
    shares = np.unique(np.concatenate(codes), return_counts=True)[1] / sum(map(len, codes))
    assert len(shares) > 3
    system = report["systems"][0]
    assert system["metrics"]["stoi"]["mean"] == pytest.approx(np.mean(scores))
    assert system["all_codes"]["num_codes"] == sum(map(len, codes))
    assert system["all_codes"]["codebook_utilization"] == len(shares) / 64
    assert system["all_codes"]["codebook_entropy"] == pytest.approx(-(shares * np.log2(shares)).sum() * 1500)
    assert system["metrics"]["codebook_entropy"]["count"] == 3
    assert system["codebook_fingerprint"] == model.codebook_fingerprint

    assert json.loads((output / "report.json").read_text()) == report
    rows = {row["file"]: row for row in csv.DictReader((output / "files.csv").open())}
    assert float(rows["a.wav"]["stoi"]) == scores[0]
    assert (
        rows["silence.wav"]["stoi"] == ""
        and "stoi, si_sdr: the reference is silent" in rows["silence.wav"]["failures"]
    )
    assert rows["broken.flac"]["seconds"] == "" and "Cannot read" in rows["broken.flac"]["failures"]
    for picture in ("metrics.png", "codebook.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    worst = (output / "worst.md").read_text().splitlines()
    assert worst[0] == "# The 2 worst clips by STOI" and len(worst) == 6
    value, file = worst[4].split(" | ")[:2]
    assert float(value.strip("| ")) == pytest.approx(min(scores), abs=1e-3)
    original, _ = soundfile.read(output / "worst" / "00_original.wav", dtype="float32")
    assert np.abs(original - audio.load(corpus / file)).max() < 1e-4  # 16 bits
    assert len(list((output / "worst").iterdir())) == 4
    assert len(list(output.iterdir())) == 6  # no partial files


def test_two_systems_are_compared_on_the_same_files(corpus, decoded, model_folder, capsys):
    (corpus / "broken.flac").unlink()
    options = ["--model", model_folder, "--decoded", decoded, "--metrics", *QUICK]
    _, report = run(capsys, "--audio", corpus, *options)
    first, second = report["systems"]
    (differences,) = report["differences"]
    assert (differences["system"], differences["minus"]) == (str(decoded), model_folder)
    found = differences["metrics"]["stoi"]
    assert found["mean"] == pytest.approx(second["metrics"]["stoi"]["mean"] - first["metrics"]["stoi"]["mean"])
    assert found["count"] == 2 and found["failures"] == 1
    assert set(differences["metrics"]) == set(QUICK)  # decoded files have no codes
    assert main(["evaluate", "--num-workers", "0", "--audio", str(corpus), *map(str, options)]) == 1
    printed = capsys.readouterr()
    assert f"{decoded} minus {model_folder}" in printed.out and "entries in use" in printed.out
    assert "silence.wav" in printed.err and "the reference is silent" in printed.err


def test_a_second_model_is_compared_file_by_file(corpus, model_folder, tiny_model, capsys, tmp_path):
    tiny_model.quantizer.codebook.embed.data.copy_(tiny_model.quantizer.codebook.embed.flip(0))
    tiny_model.save_pretrained(tmp_path / "flipped")  # the same entries under other indices: the same audio
    options = ["--model", model_folder, "--compare", tmp_path / "flipped", "--metrics", *QUICK]
    _, report = run(capsys, "--audio", corpus / "a.wav", corpus / "deep", *options)
    first, second = report["systems"]
    assert first["codebook_fingerprint"] != second["codebook_fingerprint"]
    assert report["differences"][0]["metrics"]["stoi"]["mean"] == 0
    assert report["differences"][0]["metrics"]["codebook_entropy"]["mean"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(corpus, decoded, tiny_model):
    references = [(corpus / name, Path(name)) for name in ("a.wav", "broken.flac", "deep/b.wav", "silence.wav")]
    systems = [Model("model", tiny_model), DecodedFolder(decoded)]
    metrics = ["mel_distance", "stft_distance", "si_sdr"]
    alone, together = (evaluate(references, systems, metrics, num_workers=workers) for workers in (0, 2))
    assert alone.to_dict() == together.to_dict()
    for one, other in zip(alone.systems, together.systems, strict=True):
        assert [file.values for file in one.files] == [file.values for file in other.files]
    assert sum(value is not None for value in alone.systems[0].column("stft_distance")) == 2


def test_a_killed_worker_raises_an_error_that_says_so(corpus, decoded):
    class Killer(DecodedFolder):
        def reconstruct(self, locator, waveform):
            for worker in multiprocessing.active_children():  # there is none yet at the first file
                worker.kill()
            return super().reconstruct(locator, waveform)

    references = [(corpus / name, Path(name)) for name in ("a.wav", "deep/b.wav", "silence.wav")]
    with pytest.raises(ChildProcessError, match="A worker process was killed"):
        evaluate(references, [Killer(decoded)], ["mel_distance"], num_workers=1)


def test_missing_duplicate_or_wrong_length_decoded_files_are_failures(corpus, decoded, capsys):
    (corpus / "broken.flac").unlink()
    soundfile.write(decoded / "deep" / "b.wav", np.ones(36000 + 2401), 24000)
    (decoded / "a.flac").rename(decoded / "a.ogg")
    (decoded / "a.mp3").write_bytes((decoded / "a.ogg").read_bytes())
    soundfile.write(corpus / "c.wav", np.ones(24000), 24000)
    code, report = run(capsys, "--audio", corpus, "--decoded", decoded, "--metrics", "mel_distance")
    reasons = {failure["file"]: failure["reason"] for failure in report["failures"]}
    mel_distance = report["systems"][0]["metrics"]["mel_distance"]
    assert code == 1 and (mel_distance["count"], mel_distance["failures"]) == (1, 3)
    assert "several decoded files" in reasons["a.wav"]
    assert "decoded to 38401 samples" in reasons["deep/b.wav"] and "has 36000" in reasons["deep/b.wav"]
    assert "no decoded file" in reasons["c.wav"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--audio", "corpus"], "nothing to measure"),
        (["--audio", "absent", "--decoded", "decoded"], "no file or folder absent"),
        (["--audio", "corpus", "--decoded", "empty"], "empty gave nothing to measure for any of 4 files"),
        (["--audio", "corpus", "--decoded", "absent"], "There is no folder absent"),
        (["--audio", "corpus", "--decoded", "decoded", "--metrics", "stio"], "expected some of pesq_wb, stoi"),
        (["--audio", "corpus", "--decoded", "decoded", "--metrics", "utmos"], "utmos cannot run: no weights given"),
        (["--audio", "corpus", "--decoded", "decoded", "--utmos", "absent.ts"], "There is no file absent.ts"),
        (["--audio", "corpus", "corpus/deep/../a.wav", "--decoded", "decoded"], "would both be a.wav"),
        (["--audio", "corpus", "--model", "model", "--compare", "model"], "systems of the same name"),
        (
            ["--audio", "corpus/broken.flac", "--decoded", "decoded"],
            "nothing to measure for any of 1 files. broken.flac: Cannot read",
        ),
        (["--audio", "corpus", "--decoded", "decoded", "--num-workers", "-1"], "expected 0 or more"),
        (["--audio", "corpus", "--decoded", "decoded", "--output", "corpus/a.wav"], "corpus/a.wav"),
    ],
)
def test_invalid_evaluations_give_one_line_and_exit_code_2(
    arguments, message, corpus, decoded, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "--num-workers", "0", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wavtokenizer evaluate: ")]
    assert len(lines) == 1 and message in lines[0]
