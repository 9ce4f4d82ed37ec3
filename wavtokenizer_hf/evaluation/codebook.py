"""Codebook usage: counts of codes, and metrics of them. K is the size of the codebook."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CodebookUsage:
    """Counts of codes, and metrics computed from them.

    Args:
        counts: Number of occurrences of each entry, integers of shape (K,).
        frame_rate: Codes per second.
    """

    counts: np.ndarray
    frame_rate: float

    @classmethod
    def of(cls, audio_codes: np.ndarray, codebook_size: int, frame_rate: float) -> "CodebookUsage":
        """Count codes of shape (L,), each in [0, codebook_size)."""
        return cls(np.bincount(audio_codes, minlength=codebook_size), frame_rate)

    def __add__(self, other: "CodebookUsage") -> "CodebookUsage":
        return CodebookUsage(self.counts + other.counts, self.frame_rate)

    @property
    def num_codes(self) -> int:
        return int(self.counts.sum())

    @property
    def num_used(self) -> int:
        """Number of entries that occur at least once."""
        return int((self.counts > 0).sum())

    @property
    def utilization(self) -> float:
        """Fraction of entries that occur at least once."""
        return self.num_used / len(self.counts)

    @property
    def bits_per_code(self) -> float:
        """Entropy of the distribution of codes in bits, without context. At most log2 K."""
        shares = self.counts[self.counts > 0] / self.num_codes
        return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0

    @property
    def perplexity(self) -> float:
        """Number of equally used entries with the same entropy: 2 to the power of the entropy."""
        return 2**self.bits_per_code

    @property
    def bits_per_second(self) -> float:
        return self.bits_per_code * self.frame_rate

    def metrics(self) -> dict[str, float]:
        """Return the three metrics that are reported for each file."""
        return {
            "codebook_utilization": self.utilization,
            "codebook_perplexity": self.perplexity,
            "codebook_entropy": self.bits_per_second,
        }
