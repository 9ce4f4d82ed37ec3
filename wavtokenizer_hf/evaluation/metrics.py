"""How far a reconstruction is from its reference: one function per metric, and one table, `METRICS`, that names them all.

Every metric takes two `Clip`s of equal length and gives a number, or raises with the reason why there is none. Where a
well-kept package has the metric, it is used. Levels stay as they are: only what a metric's definition normalises (PESQ
and SI-SDR do) is normalised.

Shape letters: T samples at 24 kHz, N samples at 16 kHz, F frames of 10 ms.
"""

import importlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank


SAMPLING_RATE = 24000
"""Hz of the audio that the metrics take."""

PESQ_SECONDS = 19
"""The longest piece that PESQ is given. The ITU's code has tables for 50 utterances and writes past their end at the 51st
(pesq 0.0.4, pesqmod.c, id_searchwindows): a crash, or a wrong score. An utterance and the pause after it take at least
0.388 s, so 19 s hold fewer than 50."""

LOW_RATE = 16000  # Hz, what PESQ, the pitch tracker and UTMOS take
PITCH_SIZE, PITCH_STEP = 1024, 160
PITCH_RANGE = (50.0, 550.0)  # Hz
PITCH_RESOLUTION = 0.2  # semitones: 20 cents, the bins of CREPE
SILENCE_DB = -60.0  # mean A-weighted level, 20 dB of reference subtracted, below which a frame counts as unvoiced


class CannotScoreError(ValueError):
    """There is no number for this pair of clips, and the message says why."""


@dataclass
class Clip:
    """One clip and what several metrics need of it, each computed once.

    Args:
        audio: float32 of shape (T,) at 24 kHz.
    """

    audio: np.ndarray

    @cached_property
    def at_16k(self) -> np.ndarray:
        """(N,) float32 at 16 kHz, resampled by soxr as sound files are."""
        soxr = package("soxr")
        return soxr.resample(self.audio, SAMPLING_RATE, LOW_RATE, quality="HQ")

    @cached_property
    def pitch(self) -> np.ndarray:
        """(F,) fundamental frequency in Hz, NaN where unvoiced or silent; not centred, as in the original."""
        librosa = package("librosa")
        low, high = PITCH_RANGE
        audio = self.at_16k
        if len(audio) < PITCH_SIZE:
            raise CannotScoreError(f"shorter than one pitch frame of {PITCH_SIZE / LOW_RATE * 1000:.0f} ms")
        pitch, _, _ = librosa.pyin(
            audio, fmin=low, fmax=high, sr=LOW_RATE, frame_length=PITCH_SIZE, hop_length=PITCH_STEP,
            resolution=PITCH_RESOLUTION, center=False, fill_na=np.nan,
        )  # fmt: skip
        power = np.abs(librosa.stft(audio, n_fft=PITCH_SIZE, hop_length=PITCH_STEP, center=False)) ** 2
        frequencies = librosa.fft_frequencies(sr=LOW_RATE, n_fft=PITCH_SIZE)
        with np.errstate(divide="ignore"):  # A-weighting takes the logarithm of 0 Hz, and clips what comes out
            level = librosa.perceptual_weighting(power, frequencies).mean(axis=0) - 20
        return np.where(level < SILENCE_DB, np.nan, pitch)

    @property
    def is_silent(self) -> bool:
        return not self.audio.any()


def pesq_wb(reference: Clip, estimate: Clip) -> float:
    """Wide-band PESQ (ITU-T P.862.2) at 16 kHz: MOS-LQO, about 1 to 4.64. A clip over 19 s: mean of equal pieces."""
    pesq = package("pesq")
    _refuse_silence(reference, estimate)
    pieces = -(-len(reference.at_16k) // (PESQ_SECONDS * LOW_RATE))
    pairs = zip(np.array_split(reference.at_16k, pieces), np.array_split(estimate.at_16k, pieces), strict=True)
    try:
        with np.errstate(invalid="ignore"):  # a piece without a sound is divided by its level before it is refused
            return float(np.mean([pesq.pesq(LOW_RATE, one, other, "wb") for one, other in pairs]))
    except pesq.PesqError as error:  # its messages are bytes
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise CannotScoreError(reason + (f", in one of {pieces} pieces" if pieces > 1 else "")) from error


def stoi(reference: Clip, estimate: Clip) -> float:
    """Short-time objective intelligibility, given 24 kHz: at most 1."""
    pystoi = package("pystoi")
    _refuse_silence(reference)
    with warnings.catch_warnings():  # where nothing can be scored, pystoi warns and returns 1e-5
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return pystoi.stoi(reference.audio, estimate.audio, SAMPLING_RATE, extended=False)
        except (RuntimeWarning, np.exceptions.AxisError) as error:
            raise CannotScoreError("less than 0.4 s of sound, which STOI needs") from error


def si_sdr(reference: Clip, estimate: Clip) -> float:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019) in dB, means removed."""
    auraloss = package("auraloss")
    _refuse_silence(reference, estimate)
    tiny = np.finfo(np.float64).tiny  # keeps a division by zero out, and changes no value
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
    """The mel loss of the training objective: L1 of the natural logarithms of 100-band mel magnitudes."""
    return float((_log_mel(reference.audio) - _log_mel(estimate.audio)).abs().mean())


def stft_distance(reference: Clip, estimate: Clip) -> float:
    """Multi-resolution STFT distance (Yamamoto et al. 2020): spectral convergence + L1 of log magnitudes, 3 sizes."""
    auraloss = package("auraloss")
    _refuse_silence(reference)
    loss = auraloss.freq.MultiResolutionSTFTLoss()
    return float(loss(*(torch.from_numpy(clip.audio)[None, None] for clip in (estimate, reference))))


def f0_error(reference: Clip, estimate: Clip) -> float:
    """Root mean square of the difference in pitch, in cents, over the frames that are voiced in both."""
    voiced = ~np.isnan(reference.pitch) & ~np.isnan(estimate.pitch)
    if not voiced.any():
        raise CannotScoreError("no frame is voiced in both")
    cents = 1200 * np.log2(estimate.pitch[voiced] / reference.pitch[voiced])
    return float(np.sqrt(np.mean(cents**2)))


def voicing_f1(reference: Clip, estimate: Clip) -> float:
    """F1 of the decision voiced or unvoiced, frame by frame, the reference's being the truth: 0 to 1."""
    truth, found = ~np.isnan(reference.pitch), ~np.isnan(estimate.pitch)
    if not truth.any() and not found.any():
        raise CannotScoreError("no frame is voiced in either")
    return float(2 * (truth & found).sum() / (truth.sum() + found.sum()))


def utmos(estimate: Clip, weights: str | os.PathLike) -> float:
    """Predicted mean opinion score (Saeki et al. 2022) of the estimate alone, at 16 kHz: about 1 to 5."""
    with torch.inference_mode():
        score = _load_torchscript(str(weights))(torch.from_numpy(estimate.at_16k)[None])
    if not isinstance(score, torch.Tensor) or score.numel() != 1:
        raise CannotScoreError(f"{weights} gave {type(score).__name__}, expected a tensor of one number")
    return float(score)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """What a reader of a number has to know.

    Args:
        function: (reference, estimate) -> number; that of UTMOS: (estimate, weights).
        title: for tables and plots.
        unit: "" for none.
        higher_is_better: else lower.
        package: what computes it, besides this package; "" for nothing.
        settings: how.
    """

    function: Callable[..., float]
    title: str
    unit: str
    higher_is_better: bool
    package: str
    settings: str


METRICS = {
    "pesq_wb": Metric(pesq_wb, "PESQ-WB", "", True, "pesq", f"16 kHz; above {PESQ_SECONDS} s mean of equal pieces"),
    "stoi": Metric(stoi, "STOI", "", True, "pystoi", "given 24 kHz, not extended"),
    "si_sdr": Metric(si_sdr, "SI-SDR", "dB", True, "auraloss", "24 kHz, means removed"),
    "mel_distance": Metric(
        mel_distance, "mel distance", "", False, "", "24 kHz, 100 HTK bands, FFT 1024, step 256, L1 of ln(clip(mel, 1e-7))"
    ),
    "stft_distance": Metric(
        stft_distance, "STFT distance", "", False, "auraloss", "24 kHz, FFT 1024, 2048, 512; step 120, 240, 50; Hann 600, 1200, 240"
    ),
    "f0_error": Metric(
        f0_error, "F0 error", "cents", False, "librosa",
        "pYIN at 16 kHz, 50-550 Hz, frame 1024, step 160, 20 cents; frames voiced in both; the original uses CREPE",
    ),
    "voicing_f1": Metric(voicing_f1, "voicing F1", "", True, "librosa", "frames of the F0 error"),
    "utmos": Metric(utmos, "UTMOS", "", True, "", "16 kHz, TorchScript given by the user; reconstruction alone"),
}  # fmt: skip


def why_not(name: str, utmos_weights: str | os.PathLike | None) -> str | None:
    """Why this metric cannot run at all here; None if it can."""
    try:
        if METRICS[name].package:
            package(METRICS[name].package)
        if name == "utmos":
            if utmos_weights is None:
                return "no weights given: name a TorchScript file of UTMOS with --utmos"
            _load_torchscript(str(utmos_weights))
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    except Exception as error:  # a package or a file that is there but broken raises anything
        return f"{type(error).__name__}: {error}"
    return None


def score(
    reference: Clip, estimate: Clip, names: list[str], utmos_weights: str | os.PathLike | None = None
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Scores one pair by the metrics of these names: name -> number or None, and name -> reason for each None."""
    values, reasons = {}, {}
    for name in names:
        try:
            metric = METRICS[name].function
            value = metric(estimate, utmos_weights) if metric is utmos else metric(reference, estimate)
            if not math.isfinite(value):
                raise CannotScoreError(f"the result is {value}")
            values[name] = float(value)
        except CannotScoreError as error:
            values[name], reasons[name] = None, str(error)
        except Exception as error:  # other people's code on any audio at all: one number is lost, not the evaluation
            values[name], reasons[name] = None, f"{type(error).__name__}: {error}"
    return values, reasons


# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_silence(reference: Clip, estimate: Clip | None = None) -> None:
    if reference.is_silent:
        raise CannotScoreError("the reference is silent")
    if estimate is not None and estimate.is_silent:
        raise CannotScoreError("the reconstruction is silent")


def _log_mel(audio: np.ndarray) -> torch.Tensor:
    """(T,) -> (frames, 100)"""
    # training/losses.py has the same, since rooms do not import each other; a test holds the two together
    window = torch.hann_window(1024)
    magnitudes = torch.stft(torch.from_numpy(audio), 1024, 256, window=window, center=True, return_complex=True).abs()
    return (magnitudes.T @ _mel_filters()).clamp(min=1e-7).log()


@cache
def _mel_filters() -> torch.Tensor:
    """(513, 100)"""
    filters = mel_filter_bank(513, 100, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, norm=None, mel_scale="htk")
    return torch.from_numpy(filters).float()


@cache
def _load_torchscript(weights: str):
    if not Path(weights).is_file():
        raise FileNotFoundError(f"There is no file {weights}.")
    return torch.jit.load(weights, map_location="cpu").eval()


def package(name: str):
    """Imports a package of the extra `evaluation`. Raises ImportError that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"needs {name}: pip install 'wavtokenizer_hf[evaluation]'") from error
