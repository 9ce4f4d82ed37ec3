"""Loads the original WavTokenizer from a checkout of its repository, to measure against it."""

import importlib
import sys
import types
from pathlib import Path

import torch


YAML = "wavtokenizer_smalldata_frame{rate}_3s_nq1_code4096_dim512_kmeans200_attn.yaml"


def load_original(checkout: str | Path, rate: int, state_dict: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The original's model for `rate` tokens/s with the given weights (original names), in eval mode."""
    model = _original(checkout).from_hparams0802(_yaml(checkout, rate))
    model.load_state_dict(state_dict)
    return model.eval()


def load_checkpoint(checkout: str | Path, rate: int, checkpoint: str | Path) -> torch.nn.Module:
    """The same from a `.ckpt` file, by the original's own code."""
    return _original(checkout).from_pretrained0802(_yaml(checkout, rate), str(checkpoint))


def _original(checkout: str | Path):
    """The class. Needs einops and scipy. torchaudio, which the original imports for two functions that no inference calls, is
    replaced by an empty module where it is absent."""
    checkout = Path(checkout)
    if not (checkout / "decoder" / "pretrained.py").is_file():
        raise SystemExit(f"{checkout} is not a checkout of jishengpeng/WavTokenizer: it has no decoder/pretrained.py.")
    sys.path.insert(0, str(checkout))
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError, RuntimeError):  # it raises the latter two beside a torch that it was not built for
        functional = types.ModuleType("torchaudio.functional.functional")
        functional._hz_to_mel = functional._mel_to_hz = None
        for name in ("torchaudio", "torchaudio.functional"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchaudio.functional.functional"] = functional
    return importlib.import_module("decoder.pretrained").WavTokenizer


def _yaml(checkout: str | Path, rate: int) -> str:
    return str(Path(checkout) / "configs" / YAML.format(rate=rate))


def encode(model: torch.nn.Module, audio: torch.Tensor) -> torch.Tensor:
    """audio (B, T) -> codes (B, L), by the original."""
    return model.encode_infer(audio, bandwidth_id=torch.tensor([0]))[1][0]


def decode(model: torch.nn.Module, codes: torch.Tensor) -> torch.Tensor:
    """codes (B, L) -> audio (B, L * hop), by the original."""
    return model.decode(model.codes_to_features(codes[None]), bandwidth_id=torch.tensor([0]))
