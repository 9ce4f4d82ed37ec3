"""Feature extractor of WavTokenizer: checks audio, pads a batch, marks what is real.

This file is copied unchanged into every Hub repository that we write: it imports the standard library, numpy,
transformers and nothing else.
"""

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging


logger = logging.get_logger(__name__)


class WavTokenizerFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns mono waveforms into the model's `input_values` and `padding_mask`.

    It never resamples, mixes channels, clips or rescales by itself: audio that does not fit is refused with a reason.

    Args:
        feature_size (`int`, defaults to 1): must be 1, a waveform has one number per time step.
        sampling_rate (`int`, defaults to 24000): Hz that the model was trained on.
        padding_value (`float`, defaults to 0.0): what fills shorter clips of a batch; the model never looks at it.
        hop_length (`int`, defaults to 600): samples per code, 600 for 40 codes/s and 320 for 75 codes/s.
        peak_dbfs (`float`, *optional*): if given, every clip is scaled so that its largest sample has this level in
            dBFS (at most 0; full scale is 1.0). The original's inference does not do it; Apertus 1.5 uses -3.
        padding_side (`str`, defaults to `"right"`): `"right"` or `"left"`; codes are the same with both.
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        hop_length: int = 600,
        peak_dbfs: float | None = None,
        **kwargs,
    ):
        if feature_size != 1:
            raise ValueError(f"Got feature_size={feature_size}; WavTokenizer is mono, so it must be 1.")
        _check_peak(peak_dbfs)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.hop_length = hop_length
        self.peak_dbfs = peak_dbfs

    def get_num_audio_codes(self, num_samples: int) -> int:
        """Number of codes that the model gives for `num_samples` samples of audio: one per started hop."""
        return -(-num_samples // self.hop_length)

    def __call__(
        self,
        audio,
        sampling_rate: int | None = None,
        padding=True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors=None,
        peak_dbfs: float | None = None,
    ) -> BatchFeature:
        r"""
        Checks one clip or a batch of clips and pads them to one length.

        Args:
            audio: one clip, or a list or tuple of clips. A clip is a numpy array, a torch tensor or a list of floats,
                mono, of shape `(T,)` or `(1, T)`, floating point, nominally in [-1, 1], with at least one sample.
            sampling_rate (`int`): Hz of `audio`; must equal `self.sampling_rate`. Leaving it out is allowed and warned
                about, since audio at another rate would give wrong codes without any other sign.
            padding (`bool` or `str`, defaults to `True`): `True` or `"longest"`, `"max_length"`, or `False`.
            max_length (`int`, *optional*): samples, for `padding="max_length"` and `truncation`.
            truncation (`bool`, defaults to `False`): cut clips longer than `max_length`.
            pad_to_multiple_of (`int`, *optional*): round the padded length up to a multiple of this.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; default numpy.
            peak_dbfs (`float`, *optional*): overrides the attribute of that name for this call.

        Returns:
            `BatchFeature` with B clips of T samples each:

            - **input_values** `(B, 1, T)`, float32
            - **padding_mask** `(B, T)`, int32, 1 for real samples and 0 for padding

            With `padding=False` and clips of different lengths: lists of B arrays, `(1, T_b)` and `(T_b,)`.

        Raises:
            ValueError: wrong sampling rate, more than one channel, integer or complex audio, an empty clip, NaN or
                infinite samples.
        """
        self._check_sampling_rate(sampling_rate)
        peak_dbfs = self.peak_dbfs if peak_dbfs is None else peak_dbfs
        _check_peak(peak_dbfs)
        clips = _clips(audio)
        if peak_dbfs is not None:
            clips = [_scale_to_peak(clip, peak_dbfs) for clip in clips]

        padded = self.pad(
            BatchFeature({"input_values": clips}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        input_values = [clip[None, :] for clip in padded["input_values"]]
        padding_mask = list(padded["attention_mask"])
        if len({clip.shape for clip in input_values}) == 1:
            input_values, padding_mask = np.stack(input_values), np.stack(padding_mask)
        return BatchFeature({"input_values": input_values, "padding_mask": padding_mask}, tensor_type=return_tensors)

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning(
                f"No sampling_rate was given to {type(self).__name__}. Pass sampling_rate={self.sampling_rate} (if that "
                "is your audio's rate): audio at another rate gives wrong codes, and only this check could tell."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"Got {sampling_rate} Hz, this model needs {self.sampling_rate} Hz. Resample first, for example with "
                f"wavtokenizer_hf.audio.load(path, sampling_rate={self.sampling_rate})."
            )

    def to_dict(self):
        output = super().to_dict()
        if output.get("auto_map") is not None:
            # undoes a [name, null] pair of transformers, see _plain_auto_map in configuration_wavtokenizer.py
            output["auto_map"] = {k: v if isinstance(v, str) else v[0] for k, v in output["auto_map"].items()}
        return output


def _clips(audio) -> list[np.ndarray]:
    """The clips of `audio`, each checked, float32 and of shape (T,)."""
    is_batch = isinstance(audio, (list, tuple)) and not (len(audio) > 0 and np.isscalar(audio[0]))
    if is_batch and len(audio) == 0:
        raise ValueError("Got an empty list of clips, expected at least one clip.")
    if not is_batch:
        return [_clip(audio, "audio")]
    return [_clip(clip, f"audio[{index}]") for index, clip in enumerate(audio)]


def _clip(clip, name: str) -> np.ndarray:
    if hasattr(clip, "detach"):  # a torch tensor; numpy has no bfloat16, so floats become float32 on torch's side
        clip = clip.detach().cpu()
        clip = clip.float() if clip.is_floating_point() else clip
    try:
        clip = np.asarray(clip)
    except ValueError as error:
        raise ValueError(f"{name} is not an array of samples: {error}. Pass a 1-D array of floats.") from error
    if clip.size == 0:
        raise ValueError(f"{name} is empty (shape {clip.shape}), expected at least one sample.")
    if clip.ndim == 2 and clip.shape[0] == 1:
        clip = clip[0]
    if clip.ndim != 1:
        raise ValueError(
            f"{name} has shape {clip.shape}, expected one mono clip of shape (T,) or (1, T). Mix channels down first, "
            "for example with wavtokenizer_hf.audio.load(path); pass a batch as a list of clips."
        )
    if not np.issubdtype(clip.dtype, np.floating):
        raise ValueError(
            f"{name} has dtype {clip.dtype}, expected floating point in [-1, 1]. For 16-bit integer audio use "
            "audio.astype(numpy.float32) / 32768."
        )
    clip = clip.astype(np.float32, copy=False)
    if not np.isfinite(clip).all():
        first = int(np.flatnonzero(~np.isfinite(clip))[0])
        raise ValueError(
            f"{name} holds {clip[first]} at sample {first}, expected finite numbers. Repair or drop the clip."
        )
    return clip


def _check_peak(peak_dbfs: float | None) -> None:
    if peak_dbfs is not None and not -np.inf < peak_dbfs <= 0:
        raise ValueError(f"Got peak_dbfs={peak_dbfs}, expected a level of at most 0 dBFS, for example -3.")


def _scale_to_peak(clip: np.ndarray, peak_dbfs: float) -> np.ndarray:
    peak = np.abs(clip).max()
    return clip if peak == 0 else clip / peak * np.float32(10 ** (peak_dbfs / 20))


__all__ = ["WavTokenizerFeatureExtractor"]
