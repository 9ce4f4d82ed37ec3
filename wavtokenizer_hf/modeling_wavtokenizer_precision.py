"""Float32 where WavTokenizer needs it: lower precision in the encoder changes most codes.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch and
nothing else.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.amp import is_autocast_available


class Float32Module(nn.Module):
    """Mixin for modules that stay in float32 whatever dtype they are moved to."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            lossless = not moved.is_floating_point() or moved.dtype == torch.float32
            return moved if lossless else tensor.to(moved.device, torch.float32)

        return super()._apply(keep_float32, *args, **kwargs)


# Switches that let torch compute float32 products in TF32 or bfloat16, by device type. "none" and "ieee" mean full
# float32.
_mkldnn: Any = (
    torch.backends.mkldnn
)  # at import torch replaces this module and the next by objects with more attributes
_cudnn: Any = torch.backends.cudnn
_PRECISION_SWITCHES: dict[str, tuple[Any, ...]] = {
    "cpu": (_mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn),
    "cuda": (torch.backends.cuda.matmul, _cudnn.conv, _cudnn.rnn),
}
_lock = threading.Lock()
_num_users: dict[str, int] = {}  # device type -> number of active `full_float32` blocks
_saved_switches: dict[str, list] = {}  # device type -> switches to restore, with their values


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable autocast and reduced-precision float32 products inside the block.

    The switches are global to the process. With several threads the first block sets them and the last one restores
    them. A compiled graph cannot set them and keeps those under which it was compiled.
    """
    with torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext():
        if torch.compiler.is_compiling():
            yield
            return
        with _lock:
            if _num_users.get(device.type, 0) == 0:
                switches = _PRECISION_SWITCHES.get(device.type, ())
                reduced = [(switch, switch.fp32_precision) for switch in switches]
                reduced = [(switch, value) for switch, value in reduced if value not in ("none", "ieee")]
                for switch, _ in reduced:
                    switch.fp32_precision = "ieee"
                _saved_switches[device.type] = reduced
            _num_users[device.type] = _num_users.get(device.type, 0) + 1
        try:
            yield
        finally:
            with _lock:
                _num_users[device.type] -= 1
                if _num_users[device.type] == 0:
                    for switch, value in _saved_switches[device.type]:
                        switch.fp32_precision = value
