"""Feature extractor of WavTokenizer: checks audio, pads a batch, marks what is real.

This file is copied unchanged into every Hub repository that we write: it imports the standard library, numpy,
transformers and nothing else.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging
from transformers.utils.generic import PaddingStrategy, TensorType


logger = logging.get_logger(__name__)


_RENAMED = "Got peak_dbfs={}. It has the names of transformers now: normalize_audio=True and target_peak_dB_FS=-3.0."


class WavTokenizerFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Convert mono waveforms to the model's `input_values` and `padding_mask`.

    It never resamples, mixes channels or clips. Audio that does not fit is refused with a reason. Names, defaults and
    scaled samples are those of the native extractor of transformers >= 5.24, and each reads the other's folders.

    Args:
        feature_size (`int`, defaults to 1): must be 1, a waveform has one number per time step.
        sampling_rate (`int`, defaults to 24000): Hz that the model was trained on.
        padding_value (`float`, defaults to 0.0): value of the padding; the model does not look at it.
        hop_length (`int`, defaults to 600): samples per code, 600 for 40 codes/s and 320 for 75 codes/s.
        normalize_audio (`bool`, defaults to `False`): scale every clip so that its largest sample has the level
            `target_peak_dB_FS`. The reference implementation does not do it; Apertus 1.5 does.
        target_peak_dB_FS (`float`, defaults to -3.0): level in dBFS, at most 0; full scale is 1.0. Clips with a peak
            below -200 dBFS count as silence: they are scaled as if their peak were there.
        padding_side (`str`, defaults to `"right"`): `"right"` or `"left"`; codes are the same with both.
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        hop_length: int = 600,
        normalize_audio: bool = False,
        target_peak_dB_FS: float = -3.0,
        **kwargs: Any,
    ):
        if feature_size != 1:
            raise ValueError(f"Got feature_size={feature_size}; WavTokenizer is mono, so it must be 1.")
        if "peak_dbfs" in kwargs:  # transformers would keep it as an attribute that nothing reads
            raise TypeError(_RENAMED.format(kwargs["peak_dbfs"]))
        if normalize_audio:
            _check_peak(target_peak_dB_FS)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.hop_length = hop_length
        self.normalize_audio = normalize_audio
        self.target_peak_dB_FS = target_peak_dB_FS

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> "WavTokenizerFeatureExtractor":
        """Make an extractor from the fields of a preprocessor_config.json. The old field `peak_dbfs` is read too.

        Raises:
            ValueError: `peak_dbfs` and `normalize_audio` or `target_peak_dB_FS` disagree.
        """
        if "peak_dbfs" in kwargs:
            raise TypeError(_RENAMED.format(kwargs["peak_dbfs"]))
        return super().from_dict(_without_peak_dbfs(feature_extractor_dict), **kwargs)  # type: ignore[return-value]  # or a pair, with return_unused_kwargs

    def get_num_audio_codes(self, num_samples: int) -> int:
        """Return the number of codes for `num_samples` samples of audio: one per started hop."""
        return -(-num_samples // self.hop_length)

    def __call__(
        self,
        audio: ArrayLike,
        padding: bool | str | PaddingStrategy | None = None,
        truncation: bool | None = False,
        max_length: int | None = None,
        return_tensors: str | TensorType | None = None,
        sampling_rate: int | None = None,
        pad_to_multiple_of: int | None = None,
        normalize_audio: bool | None = None,
        target_peak_dB_FS: float | None = None,
    ) -> BatchFeature:
        r"""
        Check one clip or a batch of clips, and pad them to one length.

        Args:
            audio: one clip, or a list or tuple of clips. A clip is a numpy array, a torch tensor or a list of floats,
                mono, of shape `(T,)` or `(1, T)`, floating point, nominally in [-1, 1], with at least one sample.
            padding (`bool` or `str`, *optional*): `True` or `"longest"`, which is the default, `"max_length"`, or
                `False`.
            truncation (`bool`, defaults to `False`): cut clips longer than `max_length`.
            max_length (`int`, *optional*): samples, for `padding="max_length"` and `truncation`.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; default numpy.
            sampling_rate (`int`): Hz of `audio`; must equal `self.sampling_rate`. Without it there is a warning, since
                audio at another rate would give wrong codes without any other sign.
            pad_to_multiple_of (`int`, *optional*): round the padded length up to a multiple of this.
            normalize_audio, target_peak_dB_FS (*optional*): override the attributes of these names for this call.

        Returns:
            `BatchFeature` with B clips of T samples each:

            - **input_values** `(B, 1, T)`, float32
            - **padding_mask** `(B, T)`, int32, 1 for real samples and 0 for padding

            With `padding=False` and clips of different lengths: lists of B arrays, `(1, T_b)` and `(T_b,)`.

        Raises:
            ValueError: wrong sampling rate, more than one channel, integer or complex audio, an empty clip, NaN or
                infinite samples, a level above 0 dBFS or without `normalize_audio`.
        """
        self._check_sampling_rate(sampling_rate)
        normalize_audio = self.normalize_audio if normalize_audio is None else normalize_audio
        if target_peak_dB_FS is not None and not normalize_audio:
            raise ValueError(
                f"Got target_peak_dB_FS={target_peak_dB_FS} without normalize_audio, so no clip would be scaled. Pass "
                "normalize_audio=True too."
            )
        clips = _clips(audio)
        if normalize_audio:
            level = self.target_peak_dB_FS if target_peak_dB_FS is None else target_peak_dB_FS
            _check_peak(level)
            clips = [_scale_to_peak(clip, level) for clip in clips]
        input_values, padding_mask = self._pad_clips(clips, padding, truncation, max_length, pad_to_multiple_of)
        return BatchFeature({"input_values": input_values, "padding_mask": padding_mask}, tensor_type=return_tensors)

    def _pad_clips(
        self,
        clips: list[np.ndarray],
        padding: bool | str | PaddingStrategy | None,
        truncation: bool | None,
        max_length: int | None,
        multiple: int | None,
    ) -> tuple[Any, Any]:
        """Clips (T_b,) -> input_values (B, 1, T) and padding_mask (B, T), or lists of each where lengths differ.

        The inherited `pad` would do, but transformers is about to change what it takes (pull request 44394).
        """
        named: dict[Any, PaddingStrategy] = {
            True: PaddingStrategy.LONGEST,
            None: PaddingStrategy.LONGEST,
            False: PaddingStrategy.DO_NOT_PAD,
        }
        padding = PaddingStrategy(named.get(padding, padding))
        if max_length is None and (truncation or padding == PaddingStrategy.MAX_LENGTH):
            raise ValueError("Truncation and padding='max_length' need max_length, in samples. Pass max_length.")
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"Got padding_side={self.padding_side!r}, expected 'right' or 'left'.")
        multiple = multiple or 1
        if max_length is not None:
            max_length = -(-max_length // multiple) * multiple
        if truncation:
            clips = [clip[:max_length] for clip in clips]
        sizes = [len(clip) for clip in clips]
        if padding == PaddingStrategy.LONGEST:
            max_length = -(-max(sizes) // multiple) * multiple
        if padding != PaddingStrategy.DO_NOT_PAD and max_length is not None:
            sizes = [max(size, max_length) for size in sizes]
        input_values: Any
        padding_mask: Any
        if len(set(sizes)) == 1:
            input_values = np.full((len(clips), 1, sizes[0]), self.padding_value, np.float32)
            padding_mask = np.zeros((len(clips), sizes[0]), np.int32)
        else:
            input_values = [np.full((1, size), self.padding_value, np.float32) for size in sizes]
            padding_mask = [np.zeros(size, np.int32) for size in sizes]
        for clip, values, mask in zip(clips, input_values, padding_mask, strict=True):
            start = 0 if self.padding_side == "right" else len(mask) - len(clip)
            values[0, start : start + len(clip)] = clip
            mask[start : start + len(clip)] = 1
        return input_values, padding_mask

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning(
                f"No sampling_rate was given to {type(self).__name__}. Pass sampling_rate={self.sampling_rate} (if "
                "that is your audio's rate): audio at another rate gives wrong codes, and only this check could tell."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"Got {sampling_rate} Hz, this model needs {self.sampling_rate} Hz. Resample first, for example with "
                f"transformers.audio_utils.load_audio(path, sampling_rate={self.sampling_rate})."
            )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if output.get("auto_map") is not None:
            # undoes a [name, null] pair of transformers, see _plain_auto_map in configuration_wavtokenizer.py
            output["auto_map"] = {k: v if isinstance(v, str) else v[0] for k, v in output["auto_map"].items()}
        return output


def _clips(audio: ArrayLike) -> list[np.ndarray]:
    """The clips of `audio`, each checked, float32 and of shape (T,)."""
    if not isinstance(audio, (list, tuple)) or (len(audio) > 0 and np.isscalar(audio[0])):
        return [_clip(audio, "audio")]
    if len(audio) == 0:
        raise ValueError("Got an empty list of clips, expected at least one clip.")
    return [_clip(clip, f"audio[{index}]") for index, clip in enumerate(audio)]


def _clip(clip: Any, name: str) -> np.ndarray:
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
            f"{name} has shape {clip.shape}, expected one mono clip of shape (T,) or (1, T). Mix channels down first: "
            "clip.mean(axis=0) for shape (channels, T), axis=1 for (T, channels). Pass a batch as a list of clips."
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


def _check_peak(target_peak_dB_FS: float) -> None:
    if not -np.inf < target_peak_dB_FS <= 0:
        raise ValueError(
            f"Got target_peak_dB_FS={target_peak_dB_FS}, expected a level of at most 0 dBFS, for example -3."
        )


def _scale_to_peak(clip: np.ndarray, target_peak_dB_FS: float) -> np.ndarray:
    # in this order, and with this floor, the samples are those of the native extractor, bit for bit
    return clip * peak_gain(np.abs(clip).max(), target_peak_dB_FS)


def peak_gain(peak: float, target_peak_dB_FS: float) -> float:
    """
    The factor that brings a clip with this peak to a level in dBFS. A peak below -200 dBFS counts as one of -200 dBFS.
    """
    return 10.0 ** (float(target_peak_dB_FS) / 20.0) / max(float(peak), 1e-10)


def _without_peak_dbfs(fields: dict) -> dict:
    """The fields of a preprocessor_config.json, with `peak_dbfs`, an older name, put in today's names."""
    if "peak_dbfs" not in fields:
        return fields
    fields = dict(fields)
    level = fields.pop("peak_dbfs")
    meant = {"normalize_audio": level is not None}
    if level is not None:
        meant["target_peak_dB_FS"] = level
    if "normalize_audio" in fields:
        fields.setdefault("target_peak_dB_FS", -3.0)  # what such a file means without peak_dbfs
    for name, value in meant.items():
        if fields.setdefault(name, value) != value:
            raise ValueError(
                f"The preprocessor config has peak_dbfs={level} and {name}={fields[name]}, which disagree. Remove "
                "peak_dbfs, the old name, from preprocessor_config.json if the others are right."
            )
    return fields


__all__ = ["WavTokenizerFeatureExtractor"]
