"""Padding of WavTokenizer: where the audio of each row of a batch lies, and how convolutions continue it at its ends.

Shape letters: B rows of a batch, C channels, N time steps (samples or frames).

This file is copied unchanged into every Hub repository that we write. It imports torch and nothing else.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class PaddedBatch:
    """Row b of a padded batch (B, C, size) is valid from step `starts[b]` to `starts[b] + lengths[b]`.

    Inside the model each row is aligned to the left, whatever side it was padded on. So left and right padding are one
    case, and a forward LSTM sees nothing before the first frame of a row.
    """

    lengths: torch.Tensor  # (B,) int64, at least 1
    starts: torch.Tensor  # (B,) int64
    size: int

    @classmethod
    def from_mask(
        cls, mask: torch.Tensor | None, name: str, expected_shape: tuple[int, ...], device: torch.device
    ) -> "PaddedBatch | None":
        """Read a mask (B, size) or (B, 1, size) of 1 for valid steps and 0 for padding.

        Returns None if nothing is padded.

        Raises ValueError: a mask of another shape or on another device, values other than 0 and 1, a row without a
        valid step, or a row whose valid steps are not one run that starts or ends the row.
        """
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != expected_shape:
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"Got {name} of shape {got}, expected a tensor of shape {expected_shape}, 1 for valid steps and 0 "
                "for padding."
            )
        if mask.device != device:
            raise ValueError(f"Got {name} on {mask.device}, the batch is on {device}. Move both to one device.")
        size = expected_shape[-1]
        mask = mask.reshape(-1, size)
        valid = mask.bool()
        batch = cls(lengths=valid.sum(-1), starts=valid.int().argmax(-1), size=size)
        if torch.compiler.is_compiling():  # a compiled graph cannot look at values
            return batch
        if not (mask == valid.to(mask.dtype)).all():
            raise ValueError(f"{name} holds values other than 0 and 1. Pass 1 for valid steps and 0 for padding.")
        one_sided = (batch.starts == 0) | (batch.starts + batch.lengths == size)
        good = (batch.lengths > 0) & one_sided & (batch.mask()[:, 0] == valid).all(-1)
        if not good.all():
            row = int(good.int().argmin())
            reason = (
                "no valid step; drop the row"
                if batch.lengths[row] == 0
                else "gaps or padding on both sides; valid steps must be one run that starts or ends the row"
            )
            raise ValueError(f"Row {row} of {name} has {reason}.")
        return None if (batch.lengths == size).all() else batch

    def mask(self) -> torch.Tensor:
        """Return a bool mask (B, 1, size) of the valid steps as the caller padded them."""
        steps = torch.arange(self.size, device=self.lengths.device)
        return ((steps >= self.starts[:, None]) & (steps < (self.starts + self.lengths)[:, None]))[:, None]

    def left_aligned_mask(self) -> torch.Tensor:
        """Return a bool mask (B, 1, size) of the valid steps after `left_align`."""
        return valid_mask(self.lengths, self.size)

    def left_align(self, values: torch.Tensor) -> torch.Tensor:
        """Move each row of (B, C, size) to the left and set its padding to 0."""
        steps = torch.arange(self.size, device=values.device) + self.starts[:, None]
        values = values.gather(-1, (steps % self.size)[:, None].expand_as(values))
        return values.masked_fill(~self.left_aligned_mask(), 0)

    def restore_padding(self, values: torch.Tensor) -> torch.Tensor:
        """Undo `left_align`: move each row of (B, C, size) to where the caller had it, with 0 as padding."""
        steps = torch.arange(self.size, device=values.device) - self.starts[:, None]
        values = values.gather(-1, (steps % self.size)[:, None].expand_as(values))
        return values.masked_fill(~self.mask(), 0)

    def frames(self, hop_length: int) -> "PaddedBatch":
        """Return the batch of frames that this batch of samples gives, padded on the same side."""
        lengths, size = -(-self.lengths // hop_length), -(-self.size // hop_length)
        return PaddedBatch(lengths, torch.where(self.starts > 0, size - lengths, 0), size)

    def samples(self, hop_length: int) -> "PaddedBatch":
        """Return the batch of samples that this batch of frames decodes to."""
        return PaddedBatch(self.lengths * hop_length, self.starts * hop_length, self.size * hop_length)


def valid_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Return a bool mask (B, 1, size), True for the first `lengths[b]` steps of row b."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]


def reflect_pad(
    values: torch.Tensor, lengths: torch.Tensor | None, left: int, right: int, stride: int = 1
) -> torch.Tensor:
    """Pad (B, C, N) for a convolution by reflecting each row at its own ends, with a full last window.

    Args:
        values: (B, C, N), rows aligned to the left.
        lengths: (B,) valid steps of each row. None if all N are valid.
        left, right: Steps that the convolution needs around the signal, without those that fill its last window.
        stride: Stride of the convolution. The padded row holds ceil(length / stride) windows.
    """
    if left + right == 0 and stride == 1:
        return values
    if lengths is None:
        return _reflect(values, left, right + -values.shape[-1] % stride)
    return _reflect_rows(values, lengths, left, right, stride)


def _reflect(values: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Reflect (B, C, N) at both ends. A signal too short for that is first extended by zeros on the right."""
    missing = max(left, right) + 1 - values.shape[-1]
    if missing <= 0:
        return F.pad(values, (left, right), mode="reflect")
    return F.pad(F.pad(values, (0, missing)), (left, right), mode="reflect")[..., :-missing]


def _reflect_rows(values: torch.Tensor, lengths: torch.Tensor, left: int, right: int, stride: int) -> torch.Tensor:
    """`_reflect` for each row (C, lengths[b]) of (B, C, N), padded to one length."""
    max_right = right + stride - 1
    own_right = right + (-lengths) % stride
    extended = torch.maximum(lengths, own_right.clamp(min=left) + 1)[:, None]  # the rule for short signals, per row
    lengths = lengths[:, None]
    before = torch.arange(-left, 0, device=values.device).expand(len(values), -1)
    after = lengths + torch.arange(max_right, device=values.device)
    positions = torch.cat([before, after], dim=1)  # (B, left + max_right): the steps around each row
    sources = positions.abs()
    sources = torch.where(sources < extended, sources, 2 * (extended - 1) - sources)
    valid = (sources >= 0) & (sources < lengths)
    index = sources.clamp(0, values.shape[-1] - 1)[:, None].expand(-1, values.shape[1], -1)
    around = values.gather(-1, index).masked_fill(~valid[:, None], 0)
    positions = (positions + left)[:, None].expand_as(around)
    return F.pad(values, (left, max_right)).scatter_(-1, positions, around)
