"""Live streams: audio in pieces of any size -> the codes of the whole."""

import torch

from .modeling_wavtokenizer import EncoderState, WavTokenizerEncoderModel, WavTokenizerModel


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
        return (1 + encoder.frames_ahead + encoder.last_reach) * encoder.hop_length

    def push(self, audio) -> torch.LongTensor:
        """
        Takes the next samples, and gives the codes that are complete with them.

        Args:
            audio: float array or tensor of shape (n,), n >= 0, at the model's sampling rate, nominally in [-1, 1].

        Returns:
            `(m,)` codes, m >= 0, on the CPU.

        Raises:
            ValueError: audio of another shape or dtype or not finite, or a stream that has been flushed.
        """
        audio = torch.as_tensor(audio)
        if audio.ndim != 1 or not audio.is_floating_point():
            raise ValueError(f"Got audio of shape {tuple(audio.shape)}, {audio.dtype}; expected floats of shape (n,).")
        if not audio.isfinite().all():
            raise ValueError("Got NaN or infinite samples, expected finite numbers. Repair the audio first.")
        return self._continue(audio, final=False)

    def flush(self) -> torch.LongTensor:
        """Ends the stream: the codes of what is still inside, `(m,)`, with the right end of the audio where it is."""
        if self.state.audio is None:
            self._check_open()
            return torch.zeros(0, dtype=torch.long)
        codes = self._continue(torch.zeros(0), final=True)
        self._flushed = True
        return codes

    def _continue(self, audio: torch.Tensor, final: bool) -> torch.LongTensor:
        self._check_open()
        audio = audio.detach()[None, None].to(self.encoder_model.device, torch.float32)
        with torch.no_grad():
            _, codes, self.state = self.encoder_model.encode_piece(audio, self.state, final)
        return codes[0, 0].cpu()

    def _check_open(self) -> None:
        if self._flushed:
            raise ValueError("This stream has been flushed. Start a new EncodeStream for the next audio.")
