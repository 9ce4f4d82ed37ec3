"""How the codebook learns: a k-means start, moving averages, and new places for entries that nobody uses.

It acts on the buffers of `model.quantizer.codebook`; the model itself never changes them. Every decision is made on
the joint batch of all workers, through sums over `torch.distributed`, so all workers hold the same codebook, and the
one that a single process would have made of the whole batch.

Shape letters: N latents of the joint batch, n of one worker's part, W workers, K codebook entries, D numbers in an
entry.
"""

import torch
import torch.nn.functional as F

from ..modeling_wavtokenizer import WavTokenizerQuantizer
from .settings import derived_seed


EPSILON = 1e-5  # of the Laplace smoothing of cluster sizes
TRIAL = 2.0  # a replaced entry starts with this many times the count below which it would be replaced again


class CodebookLearner:
    """Moves the entries of a codebook towards the latents that choose them."""

    def __init__(
        self, quantizer: WavTokenizerQuantizer, decay: float = 0.99, dead_code_threshold: float = 0.1, seed: int = 0
    ):
        """
        Args:
            quantizer: the model's; its codebook's buffers are changed in place.
            decay: of the moving averages of counts and sums, per step.
            dead_code_threshold: an entry is replaced by a random latent when its moving-average count falls below this share
                of an even count (all counts / K). A share, since what a count means depends on the batch.
            seed: of the latents that are drawn.
        """
        self.quantizer, self.codebook = quantizer, quantizer.codebook
        self.decay, self.dead_code_threshold, self.seed = decay, dead_code_threshold, seed
        self.usage = torch.zeros_like(self.codebook.cluster_size)  # (K,): choices since the last report
        self.num_restarts = 0  # since the last report
        self._forget()

    def _forget(self) -> None:
        self._counts = torch.zeros_like(self.codebook.cluster_size)
        self._sums = torch.zeros_like(self.codebook.embed_avg)
        self._latents: list[torch.Tensor] = []

    @torch.no_grad()
    def observe(self, latents: torch.Tensor, audio_codes: torch.Tensor) -> None:
        """Takes in one batch of this worker: latents (B, D, L) and the codes (B, 1, L) that they chose."""
        vectors = _vectors(latents)
        self._counts += torch.bincount(audio_codes.flatten(), minlength=len(self._counts))
        self._sums.index_add_(0, audio_codes.flatten(), vectors)
        self._latents.append(vectors)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Ends a step: what was observed since the last one moves the averages, and then the unused entries."""
        codebook, decay = self.codebook, self.decay
        counts, sums = all_reduce_sum(self._counts), all_reduce_sum(self._sums)
        self.usage += counts
        codebook.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        codebook.embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
        everything = codebook.cluster_size.sum()
        smoothed = (codebook.cluster_size + EPSILON) / (everything + len(counts) * EPSILON) * everything
        codebook.embed.copy_(codebook.embed_avg / smoothed[:, None])
        self._restart(step)
        self._forget()

    def _restart(self, step: int) -> None:
        # After the moving averages, which must not overwrite what is put in place here; and the averages begin anew
        # with the entry. The original does neither, so its dead entries come back in the same step.
        codebook = self.codebook
        limit = self.dead_code_threshold * codebook.cluster_size.mean()
        dead = (codebook.cluster_size < limit).nonzero()[:, 0]
        if len(dead) == 0:
            return
        latents = torch.stack(self._latents)
        fresh = _pick(latents, _draw(_joint_size(latents), len(dead), self.seed, step))
        codebook.embed[dead] = fresh
        codebook.cluster_size[dead] = TRIAL * limit
        codebook.embed_avg[dead] = fresh * TRIAL * limit
        self.num_restarts += len(dead)

    @torch.no_grad()
    def start(self, batches: list[torch.Tensor], iterations: int, latents_per_step: int, chunk: int = 8192) -> None:
        """
        Chooses the first entries by k-means (Lloyd's iterations from random latents).

        Args:
            batches: latents (n, D) of this worker, equally many in each batch and on each worker.
            iterations: of k-means; fewer if nothing changes any more.
            latents_per_step: joint latents of a training step, to which the first counts are scaled.
            chunk: latents whose distances are held in memory at a time: chunk * K numbers.
        """
        latents = torch.stack(batches).float()  # (batches, n, D)
        num_latents, codebook = _joint_size(latents), self.codebook
        entries = _pick(latents, _draw(num_latents, len(codebook.embed), self.seed, -1))
        vectors = latents.flatten(0, 1)
        for _ in range(iterations):
            counts, sums = self._assign(vectors, entries, chunk)
            moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), entries)
            settled = torch.equal(moved, entries)  # the same on all workers, since the sums are
            entries = moved
            if settled:
                break
        counts, _ = self._assign(vectors, entries, chunk)
        codebook.embed.copy_(entries)
        codebook.cluster_size.copy_(counts * (latents_per_step / num_latents))
        codebook.embed_avg.copy_(entries * codebook.cluster_size[:, None])
        codebook.inited.fill_(1)

    @staticmethod
    def _assign(vectors: torch.Tensor, entries: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint counts (K,) and sums (K, D) of the vectors (n, D) nearest to each entry."""
        counts, sums = entries.new_zeros(len(entries)), torch.zeros_like(entries)
        offset = -0.5 * entries.square().sum(dim=1)
        for part in vectors.split(chunk):
            nearest = F.linear(part, entries, offset).argmax(dim=-1)
            counts += torch.bincount(nearest, minlength=len(entries))
            sums.index_add_(0, nearest, part)
        return all_reduce_sum(counts), all_reduce_sum(sums)

    def report(self) -> dict[str, float]:
        """Figures of the steps since the last report: share of entries used, perplexity, entries replaced."""
        figures = {**usage_figures(self.usage), "restarts": float(self.num_restarts)}
        self.usage.zero_()
        self.num_restarts = 0
        return figures


def usage_figures(counts: torch.Tensor) -> dict[str, float]:
    """Choices per entry (K,) -> `utilization`, the share of entries chosen at all, and `perplexity`, the number of
    entries that would give the same entropy if all were chosen equally often (1 to K)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return {"utilization": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Workers
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
    """(B, D, L) -> (B * L, D), float32."""
    return latents.detach().float().transpose(1, 2).flatten(0, 1)


def _joint_size(latents: torch.Tensor) -> int:
    return world_size() * latents.shape[0] * latents.shape[1]


def _draw(num_latents: int, count: int, seed: int, step: int) -> torch.Tensor:
    """Places of `count` latents among all of the joint batch, on the CPU; each at most once where there are enough."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "codebook", step))
    if num_latents < count:
        return torch.randint(num_latents, (count,), generator=generator)
    return torch.randperm(num_latents, generator=generator)[:count]


def _pick(latents: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The latents (len(places), D) at these places of the joint batch, of which this worker holds (batches, n, D).

    A joint batch is the parts of all workers one after another; so a place means the same for any number of workers.
    """
    size = latents.shape[1]
    places = places.to(latents.device)
    rank = torch.distributed.get_rank() if _distributed() else 0
    batch, place = places // (size * world_size()), places % (size * world_size())
    mine = place // size == rank
    picked = latents.new_zeros(len(places), latents.shape[-1])
    picked[mine] = latents[batch[mine], place[mine] % size]
    return all_reduce_sum(picked)
