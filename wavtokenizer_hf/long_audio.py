"""Live streams: audio in pieces of any size -> the codes of the whole, and codes in pieces -> audio."""

from functools import partial

import torch

from .modeling_wavtokenizer import WavTokenizerEncoderModel, WavTokenizerModel
from .modeling_wavtokenizer_batching import check_latents, encode_chunk
from .modeling_wavtokenizer_encoder import EncoderState
from .modeling_wavtokenizer_windows import DecoderState, decode_chunk, window_frames


class EncodeStream:
    """
    Encodes audio as it comes, from a file read block by block, a microphone or a socket.

    The codes are those of the whole audio, however it is cut. A code comes out as soon as all that it reaches to has come
    in: `delay` samples after its own first sample. Memory does not grow with the length of the stream.

    ```python
    stream = EncodeStream(model)
    for block in blocks:  # arrays of any length
        send(stream.push(block))
    send(stream.flush())
    ```

    Args:
        model (`WavTokenizerModel` or `WavTokenizerEncoderModel`): may serve many streams.
        state (`EncoderState`, *optional*): that of another stream, as its `state`, to go on where it stood. It is small, and
            can be pickled.
    """

    def __init__(self, model: WavTokenizerModel | WavTokenizerEncoderModel, state: EncoderState | None = None):
        self.encoder_model = getattr(model, "encoder_model", model)
        self.state = EncoderState() if state is None else state
        self._flushed = False

    @property
    def delay(self) -> int:
        """Samples from the first sample of a code to the last one that it depends on, at most."""
        encoder = self.encoder_model.encoder
        return (1 + encoder.right_context + encoder.output_context) * encoder.hop_length

    def push(self, audio, sampling_rate: int | None = None) -> torch.LongTensor:
        """
        Takes the next samples, and gives the codes that are complete with them.

        Args:
            audio: float array or tensor of shape (n,), n >= 0, at the model's sampling rate, nominally in [-1, 1]; any float
                dtype, computed in float32.
            sampling_rate: Hz of `audio`, to have it compared with the model's.

        Returns:
            `(m,)` codes, m >= 0, on the CPU.

        Raises:
            ValueError: audio of another shape or dtype, at another rate or not finite, or a stream that has been flushed.
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

    def flush(self) -> torch.LongTensor:
        """End the stream and return the codes that are left.

        Returns:
            `(m,)` codes, m >= 0, on the CPU. The audio ends here, so these codes are those of the whole clip's end.

        Raises:
            ValueError: The stream was flushed before.
        """
        self._check_open()
        if self.state.audio is None:
            codes = torch.zeros(0, dtype=torch.long, device="cpu")
        else:
            codes = self._continue(torch.zeros(0, dtype=torch.float32, device="cpu"), final=True)
        self._flushed = True
        return codes

    def _continue(self, audio: torch.Tensor, final: bool) -> torch.LongTensor:
        self._check_open()
        audio = audio.detach()[None, None].to(self.encoder_model.device, torch.float32)
        with torch.no_grad():
            latents, codes, state = encode_chunk(self.encoder_model, audio, self.state, final)
        check_latents(latents.sum(), state.audio if audio.numel() == 0 else audio)
        self.state = state
        return codes[0, 0].cpu()

    def _check_open(self) -> None:
        if self._flushed:
            raise ValueError("This stream has been flushed. Start a new EncodeStream for the next audio.")


class DecodeStream:
    """
    Decodes codes as they come, from a language model that is still generating, a file or a socket.

    What comes out, joined, is what `model.decode(..., window_seconds=..., overlap_seconds=...)` gives for all codes, however
    they are cut: audio comes out as soon as a window is full, less the overlap, which waits to be faded into the next. A
    shorter window gives sound earlier, a longer one comes closer to the exact audio, at the same cost per second. Memory does
    not grow with the length of the stream.

    ```python
    stream = DecodeStream(model)
    for codes in generated:  # any number at a time
        play(stream.push(codes))
    play(stream.flush())
    ```

    Args:
        model (`WavTokenizerModel`): may serve many streams.
        window_seconds (`float`): length of a window.
        overlap_seconds (`float`): what a window has in common with the next; at most half of it.
        bandwidth_id (`int`): row of the adaptive norms' tables, in [0, config.adanorm_num_embeddings). The reference
            implementation always decodes with 0.
        state (`DecoderState`, *optional*): that of another stream with the same settings, as its `state`, to go on where it
            stood. It is small, and can be pickled.

    Raises:
        ValueError: a window shorter than a frame or than twice the overlap, or a `bandwidth_id` that the model lacks.
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
        """Codes that have to come before the first audio comes out."""
        return self._window[0]

    def push(self, audio_codes) -> torch.FloatTensor:
        """
        Takes the next codes, and gives the audio that is complete with them.

        Args:
            audio_codes: integer array, list or tensor of shape (n,), n >= 0, in [0, K).

        Returns:
            `(m,)` float32 audio at the model's sampling rate, m >= 0, on the CPU.

        Raises:
            ValueError: codes of another shape or dtype or outside [0, K), or a stream that has been flushed.
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

    def flush(self) -> torch.FloatTensor:
        """End the stream and return the audio that is left.

        Returns:
            `(m,)` float32 audio at the model's sampling rate, m >= 0, on the CPU.

        Raises:
            ValueError: The stream was flushed before.
        """
        audio_values = self._continue(torch.zeros(1, 1, 0, dtype=torch.long, device="cpu"), final=True)
        self._flushed = True
        return audio_values

    def _continue(self, audio_codes: torch.Tensor, final: bool) -> torch.FloatTensor:
        if self._flushed:
            raise ValueError("This stream has been flushed. Start a new DecodeStream for the next codes.")
        with torch.no_grad():
            decode = partial(self.model._decode_rows, bandwidth_id=self._bandwidth_id)
            audio_codes = audio_codes.to(self.model.device)
            audio_values, self.state = decode_chunk(decode, audio_codes, self.state, final, self._window)
        return audio_values[0, 0].cpu()
