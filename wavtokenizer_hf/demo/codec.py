"""Encode and decode for the page: a clip to tokens and back, and pasted tokens to audio."""

import ast
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import audio
from ..audio_errors import AudioError
from ..evaluation.metrics import SAMPLING_RATE, Clip, score, unavailable_reason
from ..feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from ..limited_files import parse_json
from ..loading import load_feature_extractor, load_model
from ..modeling_wavtokenizer import WavTokenizerModel
from ..token_file import TokenFile


MAX_TEXT = 2_000_000  # characters of pasted tokens
METRICS = {"stoi": "STOI", "pesq_wb": "PESQ"}


@dataclass
class Result:
    """Everything that the page shows of a clip.

    Args:
        tokens: Codes of the clip.
        reconstruction: Decoded audio (T,), float32.
        original: Audio that was encoded (T,), float32; None if tokens were pasted.
        facts: Name of each fact or metric -> its value, as text.
        warnings: Warnings about the audio, one sentence each.
    """

    tokens: TokenFile
    reconstruction: np.ndarray
    original: np.ndarray | None = None
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Codec:
    """
    Encode and decode for a page that several visitors use at once.

    Args:
        models: Names of the models that visitors may choose.
        any_model: Whether visitors may also name any other model: a folder of this machine, or a name on the Hub.
        max_seconds: Longest clip, in seconds.
        device: Device of the models. Default: a GPU if there is one.
    """

    def __init__(
        self, models: Sequence[str], any_model: bool = False, max_seconds: float = 60, device: str | None = None
    ):
        self.models, self.any_model, self.max_seconds = tuple(models), any_model, max_seconds
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[str, WavTokenizerModel, WavTokenizerFeatureExtractor] | None = None
        self._lock = threading.Lock()

    def reconstruct(self, path: str | None, model_name: str) -> Result:
        """
        Encode and decode an audio file.

        Args:
            path: Audio file; None if the visitor chose none.
            model_name: Name of the model.

        Raises:
            ValueError, OSError: There is no clip, it cannot be read or is too long, or the model cannot be loaded.
        """
        if path is None:
            raise ValueError("Got no clip. Record, upload or choose one first.")
        model, extractor = self._model(model_name)
        clip = self._read(path, model)
        inputs = extractor(clip.audio, sampling_rate=model.config.sampling_rate, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            started = time.perf_counter()
            codes = model.encode(**inputs).audio_codes
            encode_seconds = time.perf_counter() - started
        original = inputs["input_values"][0, 0].cpu().numpy()
        tokens = self._token_file(model, model_name, codes[0, 0].cpu().numpy(), len(original))
        reconstruction, decode_seconds = self._decode(model, tokens)
        seconds = len(original) / model.config.sampling_rate
        facts = self._facts(tokens, model)
        facts["encoding"] = f"{seconds / encode_seconds:.1f} x real time"
        facts["decoding"] = f"{seconds / decode_seconds:.1f} x real time"
        facts |= _metrics(original, reconstruction, model.config.sampling_rate)
        return Result(tokens, reconstruction, original, facts, list(clip.warnings.values()))

    def decode(self, text: str, model_name: str) -> Result:
        """
        Decode pasted tokens.

        Args:
            text: Tokens in a form that `parse_tokens` reads.
            model_name: Name of the model.

        Raises:
            ValueError: The text holds no tokens, too many, or tokens of another codebook; or the model cannot be
                loaded.
        """
        fields = parse_tokens(text)
        model, _ = self._model(model_name)
        codes, config = fields["audio_codes"], model.config
        if len(codes) > self.max_seconds * config.frame_rate:
            raise ValueError(
                f"Got {len(codes)} tokens, {len(codes) / config.frame_rate:.1f} s; this page takes up to "
                f"{self.max_seconds:g} s. Decode them with `wavtokenizer decode`."
            )
        if fields.get("codebook_fingerprint") is not None:
            model.check_codebook_fingerprint(fields["codebook_fingerprint"])
        tokens = self._token_file(model, model_name, codes, fields.get("num_samples"))
        reconstruction, decode_seconds = self._decode(model, tokens)
        facts = self._facts(tokens, model)
        facts["decoding"] = f"{len(reconstruction) / config.sampling_rate / decode_seconds:.1f} x real time"
        return Result(tokens, reconstruction, facts=facts)

    def _model(self, name: str | None) -> tuple[WavTokenizerModel, WavTokenizerFeatureExtractor]:
        """Return the model of that name and its feature extractor. Only the last one stays loaded."""
        name = (name or "").strip()
        if not name:
            raise ValueError("Got no model. Choose one; bundled is the small model of this package.")
        if name not in self.models and not self.any_model:
            raise ValueError(f"Got the model {name!r}, expected one of {', '.join(self.models)}.")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                model = load_model(WavTokenizerModel, name, device=self.device)
                self._loaded = name, model, load_feature_extractor(name, None, model.config)
            return self._loaded[1:]

    def _read(self, path: str, model: WavTokenizerModel) -> audio.AudioClip:
        try:
            return audio.load_clip(path, model.config.sampling_rate, max_seconds=self.max_seconds)
        except AudioError as error:
            if error.kind == "too-long":
                raise ValueError(
                    f"The clip is too long: this page takes up to {self.max_seconds:g} s. Cut it, use `wavtokenizer "
                    "reconstruct`, or start the page with a larger --max-seconds."
                ) from error
            reason = str(error).replace(str(path), os.path.basename(path))  # do not reveal the folder on the server
            raise ValueError(f"{reason} Choose another file.") from error

    @torch.inference_mode()
    def _decode(self, model: WavTokenizerModel, tokens: TokenFile) -> tuple[np.ndarray, float]:
        """Return the decoded audio (T,), and the seconds that decoding took."""
        codes = torch.from_numpy(tokens.audio_codes.astype(np.int64))[None, None].to(self.device)
        started = time.perf_counter()
        decoded = model.decode(codes).audio_values[0, 0, : tokens.num_samples].float().cpu().numpy()
        return decoded, time.perf_counter() - started

    @staticmethod
    def _token_file(model: WavTokenizerModel, name: str, codes: np.ndarray, num_samples: int | None) -> TokenFile:
        config = model.config
        return TokenFile(
            audio_codes=codes,
            model=name,
            codebook_fingerprint=model.codebook_fingerprint,
            sampling_rate=config.sampling_rate,
            hop_length=config.hop_length,
            num_samples=len(codes) * config.hop_length if num_samples is None else num_samples,
        )

    @staticmethod
    def _facts(tokens: TokenFile, model: WavTokenizerModel) -> dict[str, str]:
        config = model.config
        return {
            "duration": f"{tokens.num_samples / config.sampling_rate:.2f} s",
            "tokens": f"{len(tokens.audio_codes)} ({len(np.unique(tokens.audio_codes))} different)",
            "rate": f"{config.frame_rate:g} tokens/s, {config.bit_rate:g} bit/s",
        }


def parse_tokens(text: str) -> dict:
    """
    Read pasted tokens.

    Args:
        text: A token file in JSON; a row of the Parquet files of `tokenize`, as JSON or as Python prints it; or
            numbers separated by spaces, commas or line ends.

    Returns:
        `audio_codes`, int64 (L,), and if the text has them, `codebook_fingerprint` (str) and `num_samples` (int).

    Raises:
        ValueError: The text is none of these.
    """
    text = text.strip()
    expected = "expected a token file in JSON, a row of a Parquet file, or numbers"
    if not text:
        raise ValueError(f"Got no tokens, {expected}.")
    if len(text) > MAX_TEXT:
        raise ValueError(f"Got {len(text):,} characters, expected at most {MAX_TEXT:,}. Use `wavtokenizer decode`.")
    fields = _read_object(text, expected) if text.startswith("{") else {"audio_codes": _read_numbers(text, expected)}
    codes = fields.get("audio_codes")
    if not isinstance(codes, (list, tuple)) or not codes or not all(type(code) is int for code in codes):
        raise ValueError("Got no list of integers under audio_codes. Paste a whole token file or row.")
    if max(codes) > 65535 or min(codes) < 0:
        raise ValueError(f"Got tokens from {min(codes)} to {max(codes)}, expected numbers from 0 to 65535.")
    tokens: dict[str, Any] = {"audio_codes": np.array(codes, np.int64)}
    for name, type_ in (("codebook_fingerprint", str), ("num_samples", int)):
        if isinstance(fields.get(name), type_):
            tokens[name] = fields[name]
    return tokens


def _read_object(text: str, expected: str) -> dict:
    try:
        return parse_json(text.encode())
    except ValueError:
        pass
    # not JSON: maybe a row of datasets, pandas or pyarrow as Python prints it
    text = re.sub(r"array\(\s*(\[[\d,\s]*\])\s*(?:,\s*dtype=\w+\s*)?\)", r"\1", text)
    try:
        fields = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"Cannot read the pasted text, {expected}. Is its end missing?") from error
    return fields if isinstance(fields, dict) else {}


def _read_numbers(text: str, expected: str) -> list[int]:
    if invalid := re.search(r"[^\d\s,;\[\]()]", text):
        raise ValueError(f"Got {text[invalid.start() :][:20]!r} among the tokens, {expected}.")
    return [int(number[:20]) for number in re.findall(r"\d+", text)]


def _metrics(original: np.ndarray, reconstruction: np.ndarray, sampling_rate: int) -> dict[str, str]:
    """Return STOI and PESQ, if their packages are installed and they can be computed for the clip."""
    names = [name for name in METRICS if unavailable_reason(name) is None]
    if sampling_rate != SAMPLING_RATE or not names:
        return {}
    values, _ = score(Clip(original), Clip(reconstruction), names)
    return {METRICS[name]: f"{value:.3f}" for name, value in values.items() if value is not None}
