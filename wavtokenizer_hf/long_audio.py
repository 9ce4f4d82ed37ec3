"""Streaming: encode audio block by block, and decode codes block by block, in constant memory."""

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike

from .feature_extraction_wavtokenizer import peak_gain
from .modeling_wavtokenizer import WavTokenizerEncoderModel, WavTokenizerModel
from .modeling_wavtokenizer_batching import check_latents, encode_chunk
from .modeling_wavtokenizer_encoder import EncoderState
from .modeling_wavtokenizer_windows import DecoderState, decode_chunk, window_frames


class EncodeStream:
    """Encode audio as it arrives, such as a file read in blocks, a microphone or a socket.

    The codes equal those of the whole audio, for blocks of any size. A code is returned at most `delay` samples after
    its first sample, when all audio that it depends on has arrived. Memory use does not depend on the length of the
    stream.

    ```python
    stream = EncodeStream(model)
    for block in blocks:  # arrays of any length
        send(stream.push(block))
    send(stream.flush())
    ```

    Args:
        model (`WavTokenizerModel` or `WavTokenizerEncoderModel`): Model, in eval mode. One model can serve many
            streams.
        state (`EncoderState`, *optional*): State to resume from: the attribute `state` of another stream. It is small
            and can be pickled.
    """

    def __init__(self, model: WavTokenizerModel | WavTokenizerEncoderModel, state: EncoderState | None = None):
        self.encoder_model = model.encoder_model if isinstance(model, WavTokenizerModel) else model
        self.state = EncoderState() if state is None else state
        self._flushed = False

    @property
    def delay(self) -> int:
        """Maximum number of samples from the first sample of a code to the last sample that it depends on."""
        encoder = self.encoder_model.encoder
        return (1 + encoder.right_context + encoder.output_context) * encoder.hop_length

    def push(self, audio: torch.Tensor | ArrayLike, sampling_rate: int | None = None) -> torch.Tensor:
        """Encode the next samples and return the codes that they complete.

        Args:
            audio: Float array or tensor of shape (n,), n >= 0, at the model's sampling rate, nominally in [-1, 1]. Any
                float dtype, converted to float32.
            sampling_rate: Sampling rate of `audio` in Hz, to be checked against the model's. Default: no check.

        Returns:
            `(m,)` int64 codes in [0, K), m >= 0, on the CPU.

        Raises:
            ValueError: The audio has another shape, dtype or sampling rate or is not finite, or the stream has been
                flushed.
        """
        expected = self.encoder_model.config.sampling_rate
        if sampling_rate not in (None, expected):
            raise ValueError(f"Got audio at {sampling_rate} Hz, expected {expected} Hz. Resample it first.")
        audio = audio if isinstance(audio, torch.Tensor) else torch.as_tensor(audio, device="cpu")
        if audio.ndim != 1 or not audio.is_floating_point():
            raise ValueError(f"Got audio of shape {tuple(audio.shape)}, {audio.dtype}; expected floats of shape (n,).")
        if not audio.isfinite().all():
            raise ValueError("Got NaN or infinite samples, expected finite numbers. Repair the audio first.")
        return self._continue(audio, final=False)

    def flush(self) -> torch.Tensor:
        """End the stream and return the remaining codes.

        Returns:
            `(m,)` int64 codes in [0, K), m >= 0, on the CPU. They equal the last codes of the whole audio.

        Raises:
            ValueError: The stream has been flushed before.
        """
        self._check_open()
        if self.state.audio is None:
            codes = torch.zeros(0, dtype=torch.long, device="cpu")
        else:
            codes = self._continue(torch.zeros(0, dtype=torch.float32, device="cpu"), final=True)
        self._flushed = True
        return codes

    def _continue(self, audio: torch.Tensor, final: bool) -> torch.Tensor:
        self._check_open()
        audio = audio.detach()[None, None].to(self.encoder_model.device, torch.float32)
        with torch.no_grad():
            latents, codes, state = encode_chunk(self.encoder_model, audio, self.state, final)
        check_latents(latents.sum(), audio if state.audio is None or audio.numel() > 0 else state.audio)
        self.state = state
        return codes[0, 0].cpu()

    def _check_open(self) -> None:
        if self._flushed:
            raise ValueError("This stream has been flushed. Start a new EncodeStream for the next audio.")


class DecodeStream:
    """Decode codes as they arrive, such as from a language model that is generating, a file or a socket.

    The audio equals that of `model.decode(..., window_seconds=..., overlap_seconds=...)` for all codes, for blocks of
    any size. It is returned when a window is complete, except for the overlap, which is cross-faded with the next
    window. A shorter window returns audio earlier, a longer one is closer to exact decoding. Memory use does not
    depend on the length of the stream.

    ```python
    stream = DecodeStream(model)
    for codes in generated:  # arrays of any length
        play(stream.push(codes))
    play(stream.flush())
    ```

    Args:
        model (`WavTokenizerModel`): Model, in eval mode. One model can serve many streams.
        window_seconds (`float`, defaults to 3.0): Length of a window, in seconds.
        overlap_seconds (`float`, defaults to 0.25): Overlap of two windows, in seconds, at most half a window.
        bandwidth_id (`int`, defaults to 0): Row of the adaptive norms' tables, in [0, config.adanorm_num_embeddings).
            The reference implementation always decodes with 0.
        state (`DecoderState`, *optional*): State to resume from: the attribute `state` of another stream with the same
            settings. It is small and can be pickled.

    Raises:
        ValueError: The window is shorter than a frame or than twice the overlap, or the model lacks the
            `bandwidth_id`.
    """

    def __init__(
        self,
        model: WavTokenizerModel,
        window_seconds: float = 3.0,
        overlap_seconds: float = 0.25,
        bandwidth_id: int = 0,
        state: DecoderState | None = None,
    ):
        self.model = model
        self.state = DecoderState() if state is None else state
        self._window = window_frames(model.config, window_seconds, overlap_seconds)
        model._check_bandwidth_id(bandwidth_id)
        self._bandwidth_id = bandwidth_id
        self._flushed = False

    @property
    def delay(self) -> int:
        """Number of codes that have to arrive before the first audio is returned."""
        return self._window[0]

    def push(self, audio_codes: torch.Tensor | ArrayLike) -> torch.Tensor:
        """Decode the next codes and return the audio that they complete.

        Args:
            audio_codes: Integer array, list or tensor of shape (n,), n >= 0, in [0, K).

        Returns:
            `(m,)` float32 audio at the model's sampling rate, m >= 0, on the CPU.

        Raises:
            ValueError: The codes have another shape or dtype or are outside [0, K), or the stream has been flushed.
        """
        if not isinstance(audio_codes, torch.Tensor):
            audio_codes = torch.as_tensor(audio_codes, device="cpu")
        if audio_codes.ndim != 1:
            raise ValueError(f"Got audio_codes of shape {tuple(audio_codes.shape)}, expected (n,).")
        if len(audio_codes) > 0:
            audio_codes, _ = self.model._read_codes(audio_codes[None, None], None)
        else:
            audio_codes = torch.zeros(1, 1, 0, dtype=torch.long, device="cpu")
        return self._continue(audio_codes, final=False)

    def flush(self) -> torch.Tensor:
        """End the stream and return the remaining audio.

        Returns:
            `(m,)` float32 audio at the model's sampling rate, m >= 0, on the CPU.

        Raises:
            ValueError: The stream has been flushed before.
        """
        audio_values = self._continue(torch.zeros(1, 1, 0, dtype=torch.long, device="cpu"), final=True)
        self._flushed = True
        return audio_values

    def _continue(self, audio_codes: torch.Tensor, final: bool) -> torch.Tensor:
        if self._flushed:
            raise ValueError("This stream has been flushed. Start a new DecodeStream for the next codes.")
        with torch.no_grad():
            decode = partial(self.model._decode_rows, bandwidth_id=self._bandwidth_id)
            audio_codes = audio_codes.to(self.model.device)
            audio_values, self.state = decode_chunk(decode, audio_codes, self.state, final, self._window)
        return audio_values[0, 0].cpu()


def scale_to_peak(blocks: Iterable[np.ndarray], peak_level: float | None) -> Iterator[np.ndarray]:
    """Scale blocks of audio to a peak level, as the feature extractor does.

    The peak is known only at the end, so the audio is buffered: in memory up to 64 MiB, then in a temporary file
    (4 bytes per sample).

    Args:
        blocks: Blocks of float32 audio, (n,).
        peak_level: Peak level of the whole audio, in dBFS. None: no scaling.

    Yields:
        Scaled blocks, of the same lengths.
    """
    if peak_level is None:
        yield from blocks
        return
    peak, sizes = 0.0, []
    with tempfile.SpooledTemporaryFile(2**26) as file:
        for block in blocks:
            peak = max(peak, float(np.abs(block).max(initial=0)))
            sizes.append(len(block))
            file.write(np.ascontiguousarray(block, np.float32).data)
        file.seek(0)
        for size in sizes:
            block = np.frombuffer(file.read(4 * size), np.float32)
            yield block * np.float32(peak_gain(peak, peak_level))
