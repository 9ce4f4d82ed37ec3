"""Metrics of reconstructed audio: one function per metric, and the table `METRICS` of all metrics.

Every metric takes two `Clip`s of equal length and returns a number, or raises `CannotScoreError` with a reason. A
metric uses a maintained package if there is one. Only metrics that normalize levels by definition (PESQ and SI-SDR)
normalize them.

Shape letters: T samples at 24 kHz, N samples at 16 kHz, F frames of 10 ms.
"""

import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..extras import require
from ..log_mel import LogMel


SAMPLING_RATE = 24000
"""Sampling rate in Hz of the audio that the metrics take."""

PESQ_SECONDS = 19
"""Maximum length of a PESQ segment.

pesq 0.0.4 (pesqmod.c, id_searchwindows) has tables for 50 utterances. At the 51st it writes past their end: it
crashes, or the score is wrong. An utterance and the pause after it take at least 0.388 s, so 19 s hold fewer than 50.
"""

LOW_RATE = 16000  # Hz, of PESQ, ViSQOL, CREPE, DNSMOS, speaker encoder, speech recognition and UTMOS
PITCH_SIZE, PITCH_STEP = 1024, 160  # samples at 16 kHz
PITCH_RANGE = (50.0, 550.0)  # Hz
CREPE_BATCH = 64  # frames; each takes 5 MB
UNVOICED_BELOW = 0.21  # periodicity
SILENCE_DB = -60.0  # mean A-weighted level, minus 20 dB of reference, below which a frame counts as unvoiced
NUM_CEPSTRA = 13


class CannotScoreError(ValueError):
    """A metric has no value for this pair of clips. The message gives the reason."""


@dataclass(frozen=True)
class Options:
    """Options of the metrics.

    Args:
        utmos: TorchScript file of UTMOS, which no package contains. None: UTMOS is not available.
        crepe: Size of CREPE: "full" as in the paper, or "tiny", which is about 50 times as fast.
        asr: Name or folder of a speech recognition model for transformers' pipeline. None: pocketsphinx (English).
    """

    utmos: str | None = None
    crepe: str = "full"
    asr: str | None = None

    def __post_init__(self) -> None:
        if self.crepe not in ("full", "tiny"):
            raise ValueError(f"Got crepe={self.crepe!r}, expected 'full' or 'tiny'.")


@dataclass
class Clip:
    """A clip with intermediate results that several metrics share. Each is computed once.

    Args:
        audio: float32 of shape (T,) at 24 kHz.
        options: Options of the metrics.
    """

    audio: np.ndarray
    options: Options = field(default_factory=Options)

    @cached_property
    def at_16k(self) -> np.ndarray:
        """Audio (N,) at 16 kHz, float32, resampled by soxr, as audio files are."""
        soxr = import_package("soxr")
        return soxr.resample(self.audio, SAMPLING_RATE, LOW_RATE, quality="HQ")

    @cached_property
    def pitch(self) -> np.ndarray:
        """Pitch (F,) in Hz by CREPE, NaN if unvoiced or silent. Frames are not centered, as in the paper."""
        torchcrepe = import_package("torchcrepe")
        if len(self.at_16k) < PITCH_SIZE:
            raise CannotScoreError(f"shorter than one pitch frame of {PITCH_SIZE / LOW_RATE * 1000:.0f} ms")
        audio = torch.from_numpy(self.at_16k)[None]
        with torch.inference_mode():
            frames = torchcrepe.preprocess(audio, LOW_RATE, PITCH_STEP, CREPE_BATCH, "cpu", pad=False)
            probabilities = torch.cat([torchcrepe.infer(batch, self.options.crepe, "cpu") for batch in frames])
            pitch, periodicity = torchcrepe.postprocess(
                probabilities.T[None].clone(), *PITCH_RANGE, decoder=_viterbi, return_periodicity=True
            )
            periodicity = torchcrepe.threshold.Silence(SILENCE_DB)(periodicity, audio, LOW_RATE, PITCH_STEP, pad=False)
        return torch.where(periodicity < UNVOICED_BELOW, torch.nan, pitch)[0].numpy()

    @cached_property
    def voice(self) -> np.ndarray:
        """Speaker embedding (256,) of norm 1."""
        return _speaker_encoder()(self.at_16k)

    @cached_property
    def words(self) -> str:
        """Transcript by speech recognition, in lower case."""
        recognize = _pocketsphinx() if self.options.asr is None else _asr_pipeline(self.options.asr)
        return recognize(self.at_16k).lower()

    @property
    def is_silent(self) -> bool:
        return not self.audio.any()


def pesq_wb(reference: Clip, estimate: Clip) -> float:
    """Wideband PESQ (ITU-T P.862.2) at 16 kHz: MOS-LQO, about 1 to 4.64. Over 19 s, the mean of equal segments."""
    pesq = import_package("pesq")
    _refuse_silence(reference, estimate)
    num_segments = -(-len(reference.at_16k) // (PESQ_SECONDS * LOW_RATE))
    segments = (np.array_split(clip.at_16k, num_segments) for clip in (reference, estimate))
    try:
        with np.errstate(invalid="ignore"):  # pesq divides a silent segment by its level before it raises
            return float(np.mean([pesq.pesq(LOW_RATE, *pair, "wb") for pair in zip(*segments, strict=True)]))
    except pesq.PesqError as error:  # its messages are bytes
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        suffix = f", in one of {num_segments} segments" if num_segments > 1 else ""
        raise CannotScoreError(reason + suffix) from error


def stoi(reference: Clip, estimate: Clip, extended: bool = False) -> float:
    """Short-time objective intelligibility (STOI), with 24 kHz input: at most 1."""
    pystoi = import_package("pystoi")
    _refuse_silence(reference)
    with warnings.catch_warnings():  # pystoi warns and returns 1e-5 if it cannot compute a score
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return pystoi.stoi(reference.audio, estimate.audio, SAMPLING_RATE, extended=extended)
        except (RuntimeWarning, np.exceptions.AxisError) as error:
            raise CannotScoreError("less than 0.4 s of audio that is not silent, which STOI needs") from error


def estoi(reference: Clip, estimate: Clip) -> float:
    """Extended STOI (Jensen and Taal 2016), which includes correlations between bands: at most 1."""
    return stoi(reference, estimate, extended=True)


def si_sdr(reference: Clip, estimate: Clip) -> float:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019) in dB, without the means."""
    auraloss = import_package("auraloss")
    _refuse_silence(reference, estimate)
    tiny = np.finfo(np.float64).tiny  # avoids a division by zero and changes no value
    loss = auraloss.time.SISDRLoss(zero_mean=True, eps=tiny)
    value = -float(loss(*(torch.from_numpy(clip.audio).double()[None, None] for clip in (estimate, reference))))
    if abs(value) > 150:  # dB; float32 audio holds 144
        raise CannotScoreError(
            "reference and estimate are equal up to a factor, the ratio has no upper end"
            if value > 0
            else "reference and estimate have nothing in common, the ratio has no lower end"
        )
    return value


def mel_distance(reference: Clip, estimate: Clip) -> float:
    """Mel loss of training: L1 distance of natural logarithms of 100-band mel magnitudes."""
    return float((_log_mel(reference.audio) - _log_mel(estimate.audio)).abs().mean())


def stft_distance(reference: Clip, estimate: Clip) -> float:
    """STFT distance at 3 resolutions (Yamamoto et al. 2020): spectral convergence + L1 of log magnitudes."""
    auraloss = import_package("auraloss")
    _refuse_silence(reference)
    loss = auraloss.freq.MultiResolutionSTFTLoss()
    return float(loss(*(torch.from_numpy(clip.audio)[None, None] for clip in (estimate, reference))))


def mcd(reference: Clip, estimate: Clip) -> float:
    """Mel-cepstral distortion in dB (Kubichek 1993): 13 cepstra without the level, per frame, without time warping."""
    scipy_fft = import_package("scipy.fft")
    cepstra = [scipy_fft.dct(_log_mel(clip.audio).numpy(), axis=1) / 100 for clip in (reference, estimate)]
    difference = (cepstra[0] - cepstra[1])[:, 1 : 1 + NUM_CEPSTRA]
    return float((10 / math.log(10) * np.sqrt(2 * np.square(difference).sum(axis=1))).mean())


def visqol(reference: Clip, estimate: Clip) -> float:
    """ViSQOL v3 for speech (Chinen et al. 2020) at 16 kHz: MOS-LQO, 1 to 5."""
    _refuse_silence(reference, estimate)
    return float(
        _visqol_api().measure_from_arrays(*(np.float64(c.at_16k) for c in (reference, estimate)), LOW_RATE).moslqo
    )


def dnsmos(reference: Clip, estimate: Clip) -> float:
    """DNSMOS P.835 (Reddy et al. 2022): predicted overall quality of the estimate alone, 1 to 5."""
    run = import_package("speechmos.dnsmos").run
    _refuse_silence(estimate)
    # speechmos repeats clips shorter than 9.01 s
    return float(run(np.clip(estimate.at_16k, -1, 1), LOW_RATE)["ovrl_mos"])


def speaker_similarity(reference: Clip, estimate: Clip) -> float:
    """Cosine similarity of the speaker embeddings (Wan et al. 2018) of both clips: at most 1."""
    _refuse_silence(reference, estimate)
    return float(reference.voice @ estimate.voice)


def word_error_rate(reference: Clip, estimate: Clip) -> float:
    """Word error rate in percent, between transcripts of the estimate and of the reference by speech recognition."""
    jiwer = import_package("jiwer")
    if not reference.words.strip():
        raise CannotScoreError("the recognizer understands no word of the reference")
    return 100 * float(jiwer.wer(reference.words, estimate.words))


def f0_error(reference: Clip, estimate: Clip) -> float:
    """Root mean square difference in pitch, in cents, over frames that are voiced in both clips."""
    voiced = ~np.isnan(reference.pitch) & ~np.isnan(estimate.pitch)
    if not voiced.any():
        raise CannotScoreError("no frame is voiced in both")
    cents = 1200 * np.log2(estimate.pitch[voiced] / reference.pitch[voiced])
    return float(np.sqrt(np.mean(cents**2)))


def voicing_f1(reference: Clip, estimate: Clip) -> float:
    """F1 score of the voiced/unvoiced decision per frame, with the reference as ground truth: 0 to 1."""
    expected, actual = ~np.isnan(reference.pitch), ~np.isnan(estimate.pitch)
    if not expected.any() and not actual.any():
        raise CannotScoreError("no frame is voiced in either")
    return float(2 * (expected & actual).sum() / (expected.sum() + actual.sum()))


def utmos(reference: Clip, estimate: Clip) -> float:
    """UTMOS (Saeki et al. 2022) at 16 kHz: predicted mean opinion score of the estimate alone, about 1 to 5."""
    with torch.inference_mode():
        score = _load_torchscript(str(estimate.options.utmos))(torch.from_numpy(estimate.at_16k)[None])
    if not isinstance(score, torch.Tensor) or score.numel() != 1:
        raise CannotScoreError(
            f"{estimate.options.utmos} returned {type(score).__name__}, expected a tensor of one number"
        )
    return float(score)


# ---------------------------------------------------------------------------------------------------------------------
# Table of metrics
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric, with the facts that are needed to read its values.

    Args:
        function: Function (reference, estimate) -> number.
        title: Title in tables and plots.
        unit: Unit of the values, or "".
        higher_is_better: Whether higher values are better. Else lower ones are.
        packages: Modules that the metric needs, besides this package and torch.
        settings: Description of its settings.
    """

    function: Callable[..., float]
    title: str
    unit: str
    higher_is_better: bool
    packages: tuple[str, ...]
    settings: str


METRICS = {
    "pesq_wb": Metric(pesq_wb, "PESQ-WB", "", True, ("pesq",), f"16 kHz; above {PESQ_SECONDS} s mean of equal pieces"),
    "stoi": Metric(stoi, "STOI", "", True, ("pystoi",), "given 24 kHz, not extended"),
    "estoi": Metric(estoi, "ESTOI", "", True, ("pystoi",), "given 24 kHz, extended"),
    "si_sdr": Metric(si_sdr, "SI-SDR", "dB", True, ("auraloss",), "24 kHz, means removed"),
    "mel_distance": Metric(
        mel_distance, "mel distance", "", False, (), "24 kHz, 100 HTK bands, FFT 1024, step 256, L1 of ln(clip(mel, "
        "1e-7))"
    ),
    "stft_distance": Metric(
        stft_distance, "STFT distance", "", False, ("auraloss",), "24 kHz, FFT 1024, 2048, 512; step 120, 240, 50; "
        "Hann 600, 1200, 240"
    ),
    "mcd": Metric(mcd, "MCD", "dB", False, ("scipy",), f"cepstra 1 to {NUM_CEPSTRA} of the mel distance's bands, no "
    "warping"),
    "visqol": Metric(visqol, "ViSQOL", "", True, ("visqol",), "speech mode, 16 kHz"),
    "f0_error": Metric(
        f0_error, "F0 RMSE", "cents", False, ("torchcrepe",),
        "CREPE at 16 kHz, 50-550 Hz, frame 1024, step 160, Viterbi, periodicity 0.21; frames voiced in both",
    ),
    "voicing_f1": Metric(voicing_f1, "V/UV F1", "", True, ("torchcrepe",), "frames of the F0 RMSE"),
    "dnsmos": Metric(dnsmos, "DNSMOS", "", True, ("speechmos", "onnxruntime", "librosa"), "P.835 overall, 16 kHz; "
    "reconstruction alone"),
    "speaker_similarity": Metric(
        speaker_similarity, "speaker similarity", "", True, ("resemblyzer", "librosa"), "Resemblyzer's GE2E encoder, "
        "16 kHz, no VAD"
    ),
    "word_error_rate": Metric(
        word_error_rate, "WER", "%", False, ("jiwer", "pocketsphinx"), "against the transcript of the original; "
        "English, or --asr"
    ),
    "utmos": Metric(utmos, "UTMOS", "", True, (), "16 kHz, TorchScript given by the user; reconstruction alone"),
}  # fmt: skip

PRESETS = {
    "quick": ("pesq_wb", "stoi", "estoi", "si_sdr", "mel_distance", "stft_distance", "mcd"),
    "paper": ("utmos", "pesq_wb", "stoi", "voicing_f1"),
    "full": tuple(METRICS),
}
"""Sets of metrics: fast ones, those in the table of the WavTokenizer paper, and all."""

IMPORTED_AS = {"speechmos": "speechmos.dnsmos"}
"""Package -> module that must be imported to show that the package works."""

DISTRIBUTIONS = {"visqol": "visqol-python"}
"""Module -> name of its package for pip, if it differs."""


def unavailable_reason(name: str, options: Options | None = None) -> str | None:
    """Return the reason why this metric cannot run here, or None if it can."""
    options = options or Options()
    try:
        for each in METRICS[name].packages:
            if each == "resemblyzer":
                _speaker_weights()  # its code does not import with setuptools 82 or newer, and is not needed
            elif each == "pocketsphinx" and options.asr is not None:
                _asr_pipeline(options.asr)
            else:
                import_package(IMPORTED_AS.get(each, each))
        if name == "utmos":
            if options.utmos is None:
                return "no weights given: name a TorchScript file of UTMOS with --utmos"
            _load_torchscript(str(options.utmos))
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    except Exception as error:  # a broken package or file can raise any error
        return f"{type(error).__name__}: {error}"
    return None


def score(reference: Clip, estimate: Clip, names: list[str]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Compute metrics of a pair of clips. Return name -> value or None, and name -> reason for each None."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            value = METRICS[name].function(reference, estimate)
            if not math.isfinite(value):
                raise CannotScoreError(f"the result is {value}")
            values[name] = float(value)
        except CannotScoreError as error:
            values[name], reasons[name] = None, str(error)
        except Exception as error:  # third-party code can fail on unusual audio, which must not end the evaluation
            values[name], reasons[name] = None, f"{type(error).__name__}: {error}"
    return values, reasons


# ---------------------------------------------------------------------------------------------------------------------
# Shared functions
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_silence(reference: Clip, estimate: Clip | None = None) -> None:
    if reference.is_silent:
        raise CannotScoreError("the reference is silent")
    if estimate is not None and estimate.is_silent:
        raise CannotScoreError("the reconstruction is silent")


@cache
def _mel() -> LogMel:
    return LogMel(SAMPLING_RATE)


def _log_mel(audio: np.ndarray) -> torch.Tensor:
    """Return the log-mel spectrogram (frames, 100) of audio (T,)."""
    return _mel()(torch.from_numpy(audio)).T


@cache
def _load_torchscript(weights: str) -> torch.jit.ScriptModule:
    if not Path(weights).is_file():
        raise FileNotFoundError(f"There is no file {weights}.")
    return torch.jit.load(weights, map_location="cpu").eval()


def _viterbi(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run torchcrepe's Viterbi decoder without its random dither. Return bins and their frequencies in Hz."""
    bins, _ = import_package("torchcrepe").decode.viterbi(logits)
    return bins, 10 * 2 ** ((20 * bins + 1997.3794084376191) / 1200)


@cache
def _visqol_api() -> Any:
    api = import_package("visqol").VisqolApi()
    api.create(mode="speech")
    return api


def _speaker_weights() -> Path:
    """Return the path of the weights in the package resemblyzer, without importing its code."""
    spec = importlib.util.find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise ImportError("This needs resemblyzer: pip install 'wavtokenizer_hf[evaluation]'")
    path = Path(spec.origin).with_name("pretrained.pt")
    if not path.is_file():
        raise FileNotFoundError(f"The package resemblyzer has no weights in {path}, where they are in other versions.")
    return path


@cache
def _speaker_encoder() -> Callable[[np.ndarray], np.ndarray]:
    """Return Resemblyzer's speaker encoder (GE2E): a function from audio (N,) at 16 kHz to an embedding (256,).

    Resemblyzer's code needs webrtcvad, which needs a module that setuptools removed in version 82. So the network is
    built here, without the voice activity detection that shortens pauses.
    """
    librosa = import_package("librosa")
    weights = torch.load(_speaker_weights(), map_location="cpu", weights_only=True)["model_state"]
    lstm, linear = torch.nn.LSTM(40, 256, 3, batch_first=True), torch.nn.Linear(256, 256)
    for prefix, module in (("lstm.", lstm), ("linear.", linear)):
        module.load_state_dict(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        )

    def embed(audio: np.ndarray) -> np.ndarray:
        level = np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
        audio = audio * np.float32(max(1.0, 10 ** (-30 / 20) / max(level, 1e-9)))  # amplify quiet clips to -30 dBFS
        window = 160  # frames of 10 ms; the result is the mean of window embeddings
        step = round(16000 / 1.3 / 160)  # 1.3 windows per second
        mel = librosa.feature.melspectrogram(y=audio, sr=LOW_RATE, n_fft=400, hop_length=160, n_mels=40).T
        starts = list(range(0, max(1, len(mel) - window + step + 1), step))
        if len(starts) > 1 and (len(mel) - starts[-1]) / window < 0.75:
            starts.pop()
        mel = np.pad(mel, ((0, max(0, starts[-1] + window - len(mel))), (0, 0)))
        with torch.inference_mode():
            _, (hidden, _) = lstm(
                torch.from_numpy(np.stack([mel[start : start + window] for start in starts])).float()
            )
            partial = torch.nn.functional.normalize(linear(hidden[-1]).relu(), dim=1)
            return torch.nn.functional.normalize(partial.mean(dim=0), dim=0).numpy()

    return embed


@cache
def _pocketsphinx() -> Callable[[np.ndarray], str]:
    pocketsphinx = import_package("pocketsphinx")
    decoder = pocketsphinx.Decoder(samprate=LOW_RATE, loglevel="FATAL")

    def recognize(audio: np.ndarray) -> str:
        # pocketsphinx adapts to earlier clips; reset it, so that results do not depend on their order
        decoder.reinit()
        decoder.start_utt()
        decoder.process_raw((np.clip(audio, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return "" if hypothesis is None else hypothesis.hypstr

    return recognize


@cache
def _asr_pipeline(name: str) -> Callable[[np.ndarray], str]:
    from transformers import pipeline

    recognizer: Any = pipeline("automatic-speech-recognition", model=name)
    return lambda audio: recognizer({"raw": audio, "sampling_rate": LOW_RATE})["text"]


def import_package(name: str) -> Any:
    """Import a module of the extra `evaluation`. Raises an ImportError that names the extra."""
    with _without_torchaudio() if name == "torchcrepe" else nullcontext():
        return require(name, "evaluation")


@contextmanager
def _without_torchaudio() -> Iterator[None]:
    """Let torchcrepe import without a working torchaudio, which only its file reader needs.

    torchaudio does not import with many builds of torch.
    """
    try:
        importlib.import_module("torchaudio")
        missing = False
    except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch
        missing = True
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        yield
    finally:
        if missing:
            del sys.modules["torchaudio"]
