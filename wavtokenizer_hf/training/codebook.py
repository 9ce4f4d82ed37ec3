"""Learn the codebook: initialization by k-means, moving averages, and replacement of unused entries.

The learner changes the buffers of `model.quantizer.codebook`; the model itself never does. It sums over all processes
with `torch.distributed`, so all processes hold the same codebook: that of a single process with the whole joint batch.

Shape letters: B batch size, L frames, n latents of a batch in one process, K codebook entries, D codebook dimension.
"""

import torch
import torch.nn.functional as F

from ..modeling_wavtokenizer import WavTokenizerQuantizer
from .settings import derived_seed


EPSILON = 1e-5  # Laplace smoothing of cluster sizes
RESTART_COUNT_FACTOR = 2.0  # initial count of a replaced entry, as a multiple of the count that triggers replacement


class CodebookLearner:
    """Move codebook entries towards the latents that are assigned to them."""

    def __init__(
        self, quantizer: WavTokenizerQuantizer, decay: float = 0.99, dead_code_threshold: float = 0.1, seed: int = 0
    ):
        """
        Args:
            quantizer: Quantizer of the model. The buffers of its codebook are changed in place.
            decay: Decay per step of the moving averages of counts and sums.
            dead_code_threshold: An entry is replaced by a random latent if its moving-average count is below this
                fraction of the mean count of all entries. It is relative, because counts depend on the batch size.
            seed: Seed of the random latents.
        """
        self.quantizer, self.codebook = quantizer, quantizer.codebook
        self.decay, self.dead_code_threshold, self.seed = decay, dead_code_threshold, seed
        self.usage = torch.zeros_like(self.codebook.cluster_size)  # (K,): assignments since the last report
        self.num_restarts = 0  # since the last report
        self._clear_observations()

    def _clear_observations(self) -> None:
        self._counts = torch.zeros_like(self.codebook.cluster_size)
        self._sums = torch.zeros_like(self.codebook.embed_avg)
        self._latents: list[torch.Tensor] = []

    @torch.no_grad()
    def observe(self, latents: torch.Tensor, audio_codes: torch.Tensor) -> None:
        """Accumulate a batch of this process: latents (B, D, L) and their codes (B, 1, L)."""
        vectors = _vectors(latents)
        self._counts += torch.bincount(audio_codes.flatten(), minlength=len(self._counts))
        self._sums.index_add_(0, audio_codes.flatten(), vectors)
        self._latents.append(vectors)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """End a step: update the moving averages with the observed batches, then replace unused entries."""
        codebook, decay = self.codebook, self.decay
        counts, sums = all_reduce_sum(self._counts), all_reduce_sum(self._sums)
        self.usage += counts
        codebook.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        codebook.embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
        total_size = codebook.cluster_size.sum()
        smoothed = (codebook.cluster_size + EPSILON) / (total_size + len(counts) * EPSILON) * total_size
        codebook.embed.copy_(codebook.embed_avg / smoothed[:, None])
        self._restart(step)
        self._clear_observations()

    def _restart(self, step: int) -> None:
        # Replace after the moving averages, which would overwrite the new entries, and restart their averages too.
        # The reference implementation does neither, so its dead entries come back in the same step.
        codebook = self.codebook
        min_count = self.dead_code_threshold * codebook.cluster_size.mean()
        dead = (codebook.cluster_size < min_count).nonzero()[:, 0]
        if len(dead) == 0:
            return
        latents = torch.stack(self._latents)
        replacements = _gather_latents(latents, _random_positions(_num_joint(latents), len(dead), self.seed, step))
        codebook.embed[dead] = replacements
        codebook.cluster_size[dead] = RESTART_COUNT_FACTOR * min_count
        codebook.embed_avg[dead] = replacements * RESTART_COUNT_FACTOR * min_count
        self.num_restarts += len(dead)

    @torch.no_grad()
    def start(self, batches: list[torch.Tensor], iterations: int, latents_per_step: int, chunk: int = 8192) -> None:
        """
        Initialize the entries by k-means (Lloyd's algorithm from random latents).

        Args:
            batches: Latents (n, D) of this process. n is the same for all batches and processes.
            iterations: Maximum number of k-means iterations. It stops earlier on convergence.
            latents_per_step: Number of latents of a training step over all processes. Counts are scaled to it.
            chunk: Number of latents whose distances are in memory at a time (chunk * K numbers).
        """
        latents = torch.stack(batches).float()  # (batches, n, D)
        num_latents, codebook = _num_joint(latents), self.codebook
        entries = _gather_latents(latents, _random_positions(num_latents, len(codebook.embed), self.seed, -1))
        vectors = latents.flatten(0, 1)
        for _ in range(iterations):
            counts, sums = self._assign(vectors, entries, chunk)
            means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), entries)
            converged = torch.equal(means, entries)  # the same in all processes, because the sums are
            entries = means
            if converged:
                break
        counts, _ = self._assign(vectors, entries, chunk)
        codebook.embed.copy_(entries)
        codebook.cluster_size.copy_(counts * (latents_per_step / num_latents))
        codebook.embed_avg.copy_(entries * codebook.cluster_size[:, None])
        codebook.inited.fill_(1)

    @staticmethod
    def _assign(vectors: torch.Tensor, entries: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return counts (K,) and sums (K, D) of the vectors nearest to each entry, over all processes."""
        counts, sums = entries.new_zeros(len(entries)), torch.zeros_like(entries)
        offset = -0.5 * entries.square().sum(dim=1)
        for vectors_chunk in vectors.split(chunk):
            nearest = F.linear(vectors_chunk, entries, offset).argmax(dim=-1)
            counts += torch.bincount(nearest, minlength=len(entries))
            sums.index_add_(0, nearest, vectors_chunk)
        return all_reduce_sum(counts), all_reduce_sum(sums)

    def report(self) -> dict[str, float]:
        """Return utilization, perplexity and number of replaced entries since the last report."""
        metrics = {**usage_metrics(self.usage), "restarts": float(self.num_restarts)}
        self.usage.zero_()
        self.num_restarts = 0
        return metrics


def usage_metrics(counts: torch.Tensor) -> dict[str, float]:
    """
    Return `utilization` and `perplexity` of a codebook.

    Utilization is the fraction of entries with a count above 0. Perplexity (1 to K) is the number of equally used
    entries with the same entropy.

    Args:
        counts: Assignments per entry, of shape (K,).
    """
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return {"utilization": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of processes that train together."""
    return torch.distributed.get_world_size() if _distributed() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes that train together; the tensor itself for a single process."""
    if _distributed():
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _vectors(latents: torch.Tensor) -> torch.Tensor:
    """Flatten latents (B, D, L) to vectors (B * L, D) in float32."""
    return latents.detach().float().transpose(1, 2).flatten(0, 1)


def _num_joint(latents: torch.Tensor) -> int:
    """Return the number of latents over all processes. `latents`: (batches, n, D) of this process."""
    return world_size() * latents.shape[0] * latents.shape[1]


def _random_positions(num_latents: int, count: int, seed: int, step: int) -> torch.Tensor:
    """Return `count` random positions in the joint latents, on the CPU. They repeat only if num_latents < count."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "codebook", step))
    if num_latents < count:
        return torch.randint(num_latents, (count,), generator=generator)
    return torch.randperm(num_latents, generator=generator)[:count]


def _gather_latents(latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the joint latents at these positions, as (len(positions), D), in every process.

    A joint batch is the batches of all processes in order of rank, so a position does not depend on their number.

    Args:
        latents: Latents of this process, of shape (batches, n, D).
        positions: Positions in the joint latents.
    """
    size = latents.shape[1]
    positions = positions.to(latents.device)
    rank = torch.distributed.get_rank() if _distributed() else 0
    batch, offset = positions // (size * world_size()), positions % (size * world_size())
    is_local = offset // size == rank
    gathered = latents.new_zeros(len(positions), latents.shape[-1])
    gathered[is_local] = latents[batch[is_local], offset[is_local] % size]
    return all_reduce_sum(gathered)
