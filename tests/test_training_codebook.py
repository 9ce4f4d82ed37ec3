"""
Codebook learning against the reference implementation and hand calculations, and the faults that it must not have.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, tiny_config

from wavtokenizer_hf.modeling_wavtokenizer import WavTokenizerQuantizer
from wavtokenizer_hf.training.codebook import CodebookLearner, usage_metrics


pytestmark = pytest.mark.usefixtures("one_thread")

EXPECTED = json.loads((REFERENCE / "training_losses.json").read_text())


def quantizer(entries: torch.Tensor, counts: torch.Tensor | float = 1.0) -> WavTokenizerQuantizer:
    """Return a quantizer with these entries (K, D), each chosen `counts` times."""
    quantizer = WavTokenizerQuantizer(
        tiny_config(codebook_size=len(entries), codebook_dim=entries.shape[1], hidden_size=entries.shape[1])
    )
    quantizer.codebook.embed.copy_(entries)
    quantizer.codebook.cluster_size.copy_(torch.as_tensor(counts).expand(len(entries)))
    quantizer.codebook.embed_avg.copy_(entries * quantizer.codebook.cluster_size[:, None])
    quantizer.codebook.inited.fill_(1)
    return quantizer


def test_moving_averages_equal_the_reference_implementation():
    import formula

    entries = torch.from_numpy(formula.fill("ema.embed.weight_v", (64, 512)))
    counts = 5 + torch.from_numpy(formula.fill("ema.size.weight_v", (64,))).abs()
    latents = torch.from_numpy(formula.fill("ema.input.weight_v", (2, 512, 50)))
    trained = quantizer(entries, counts)
    audio_codes = trained.encode(latents)
    assert audio_codes[:, 0].tolist() == EXPECTED["ema/codes"]
    commitment = F.mse_loss(latents, trained.decode(audio_codes))
    assert commitment.item() == pytest.approx(EXPECTED["ema/commitment_loss"], rel=1e-5)
    learner = CodebookLearner(trained, decay=0.99)
    learner.observe(latents, audio_codes)
    learner.update(step=0)
    sizes, embed = trained.codebook.cluster_size, trained.codebook.embed
    got = [sizes.sum().item(), *sizes[:5].tolist()]
    assert got == pytest.approx(EXPECTED["ema/cluster_size_sum_first5"], rel=1e-5)
    assert embed.abs().mean().item() == pytest.approx(EXPECTED["ema/embed_abs_mean"], rel=1e-5)
    assert embed[0, :5].tolist() == pytest.approx(EXPECTED["ema/embed_0_first5"], rel=1e-4)


def test_a_replaced_entry_is_a_latent_and_stays_replaced():
    # the reference implementation overwrites it with the moving average in the same step
    trained = quantizer(torch.tensor([[0.0, 0.0], [100.0, 100.0]]), torch.tensor([10.0, 0.1]))
    learner = CodebookLearner(trained, dead_code_threshold=0.1)
    torch.manual_seed(0)
    latents = torch.randn(1, 2, 20)
    for step in range(3):
        learner.observe(latents, trained.encode(latents))
        learner.update(step)
        distances = (latents[0].T - trained.codebook.embed[1]).norm(dim=1)
        if step == 0:
            assert distances.min() == 0
        assert distances.min() < 1  # and not on its way back to (100, 100)
    assert len(trained.encode(latents).unique()) == 2
    assert learner.report()["restarts"] == 1


def test_entries_in_use_are_not_replaced():
    torch.manual_seed(0)
    trained = quantizer(torch.randn(4, 3))
    learner = CodebookLearner(trained, dead_code_threshold=0.1)
    latents = trained.codebook.embed.T[None].repeat(1, 1, 5)
    before = trained.codebook.embed.clone()
    learner.observe(latents, trained.encode(latents))
    learner.update(0)
    assert learner.report()["restarts"] == 0
    torch.testing.assert_close(trained.codebook.embed, before, rtol=1e-4, atol=1e-4)


def test_restarts_lift_utilization():
    torch.manual_seed(0)
    trained = quantizer(torch.cat([torch.zeros(1, 4), 50 + torch.randn(15, 4)]))  # one entry near the latents
    learner = CodebookLearner(trained, decay=0.9, dead_code_threshold=0.1)
    shares = []
    for step in range(80):
        latents = torch.randn(1, 4, 200)
        learner.observe(latents, trained.encode(latents))
        learner.update(step)
        shares.append(learner.report()["utilization"])
    assert shares[0] == 1 / 16
    assert shares[-1] == 1.0


def test_kmeans_finds_existing_clusters():
    torch.manual_seed(0)
    centres = 20 * torch.eye(8)
    latents = (centres[:, None] + 0.1 * torch.randn(8, 50, 8)).flatten(0, 1)[torch.randperm(400)]
    trained = quantizer(torch.zeros(32, 8))
    trained.codebook.inited.zero_()
    CodebookLearner(trained).start([latents], iterations=50, latents_per_step=100)
    assert trained.codebook.inited.item() == 1
    nearest = torch.cdist(centres, trained.codebook.embed).amin(dim=1)
    assert nearest.max() < 0.5
    assert trained.codebook.cluster_size.sum().item() == pytest.approx(100)
    torch.testing.assert_close(
        trained.codebook.embed_avg, trained.codebook.embed * trained.codebook.cluster_size[:, None]
    )


def test_kmeans_centers_are_the_means_of_their_nearest_latents():
    torch.manual_seed(0)
    latents = torch.randn(500, 3)
    trained = quantizer(torch.zeros(10, 3))
    CodebookLearner(trained).start([latents[:250], latents[250:]], iterations=500, latents_per_step=500)
    nearest = torch.cdist(latents.double(), trained.codebook.embed.double()).argmin(dim=1)
    for entry in range(10):
        expected = latents[nearest == entry].mean(dim=0)
        torch.testing.assert_close(trained.codebook.embed[entry], expected, rtol=1e-4, atol=1e-4)


def test_kmeans_does_not_hold_all_distances_at_once():
    # the reference implementation allocates latents x entries x dimensions; here not even latents x entries
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    torch.manual_seed(0)
    trained = quantizer(torch.zeros(256, 4))
    latents = torch.randn(20_000, 4)
    with Largest() as largest:
        CodebookLearner(trained).start([latents], iterations=2, latents_per_step=100, chunk=500)
    assert 500 * 256 <= largest.numbers < 0.1 * 20_000 * 256


def test_kmeans_with_fewer_latents_than_entries_still_starts():
    trained = quantizer(torch.zeros(16, 2))
    CodebookLearner(trained).start([torch.randn(5, 2)], iterations=5, latents_per_step=5)
    assert trained.codebook.embed.isfinite().all()
    assert len(trained.codebook.embed.unique(dim=0)) > 1


def test_usage_metrics_are_utilization_and_exponential_of_entropy():
    metrics = usage_metrics(torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert metrics["utilization"] == 0.75
    assert metrics["perplexity"] == pytest.approx(2**1.5)  # entropy of (1/4, 1/4, 1/2): 1.5 bits
    assert usage_metrics(torch.full((8,), 3.0))["perplexity"] == pytest.approx(8)
