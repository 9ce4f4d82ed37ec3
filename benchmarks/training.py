"""Compare the time of a training step with the reference implementation, at full size, interleaved in one process.

    git clone https://github.com/jishengpeng/WavTokenizer ../WavTokenizer
    pip install einops scipy
    python benchmarks/training.py ../WavTokenizer

Prints the median step times, and the median of the ratios within each round (under 1: ours is faster). The reference
step is rebuilt from the modules of the reference implementation, in the order of its `training_step` and with
Lightning's work around it, since Lightning 1.8 does not run with a current torch. Its mel-only step leaves out the two
terms that make it crash. Both steps use the same mel loss, since torchaudio may be missing.
"""

import argparse
import ctypes
import statistics
import sys
import time
import types
from pathlib import Path

import torch
from compare_with_original import reference_folder
from fixtures import build_checkpoint, original

from wavtokenizer_hf.training import Settings
from wavtokenizer_hf.training.loop import train_step
from wavtokenizer_hf.training.losses import MelLoss
from wavtokenizer_hf.training.state import build


ROOT = Path(__file__).parent.parent


class ReferenceStep:
    """Training step of the reference implementation: discriminators, then codec, each with its own forward pass."""

    def __init__(self, checkout: str, rate: int, gan: bool):
        self.model = original.load_original(checkout, rate, build_checkpoint.state_dict(rate)).train()
        # the reference losses import it, and only the mel loss uses it
        sys.modules["torchaudio"].transforms = types.ModuleType("torchaudio.transforms")
        from decoder.discriminator_dac import DACDiscriminator
        from decoder.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator
        from decoder.loss import DACGANLoss, DiscriminatorLoss, FeatureMatchingLoss, GeneratorLoss

        self.gan = gan
        self.mp, self.mrd = MultiPeriodDiscriminator(num_embeddings=4), MultiResolutionDiscriminator(num_embeddings=4)
        self.dac_loss = DACGANLoss(DACDiscriminator())
        optimizer_dac = DACDiscriminator()  # the reference optimizer has another instance than the loss
        self.disc_loss, self.gen_loss, self.features_loss = DiscriminatorLoss(), GeneratorLoss(), FeatureMatchingLoss()
        self.mel_loss = MelLoss()
        self.discriminators = [*self.mp.parameters(), *self.mrd.parameters(), *optimizer_dac.parameters()]
        self.codec = list(self.model.parameters())
        self.discriminator_optimizer = torch.optim.AdamW(self.discriminators, lr=2e-4)
        self.codec_optimizer = torch.optim.AdamW(self.codec, lr=2e-4)

    def run(self, audio: torch.Tensor, bandwidth_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, _, commitment = self.model.feature_extractor(audio, bandwidth_id=bandwidth_id)
        return self.model.head(self.model.backbone(features, bandwidth_id=bandwidth_id)), commitment

    def __call__(self, audio: torch.Tensor) -> None:
        bandwidth_id = torch.randint(4, (1,))
        if self.gan:
            self._toggle(self.discriminators, self.codec)
            self.discriminator_optimizer.zero_grad()
            with torch.no_grad():
                fake, _ = self.run(audio, bandwidth_id)
            loss = self.dac_loss.discriminator_loss(fake.unsqueeze(1), audio.unsqueeze(1))
            for discriminator in (self.mp, self.mrd):
                real_scores, fake_scores, _, _ = discriminator(y=audio, y_hat=fake, bandwidth_id=bandwidth_id)
                total, real_losses, _ = self.disc_loss(real_scores, fake_scores)
                loss = loss + total / len(real_losses)
            loss.backward()
            self._gradient_norm()
            self.discriminator_optimizer.step()
            self._toggle(self.codec, self.discriminators)
        self.codec_optimizer.zero_grad()
        fake, commitment = self.run(audio, bandwidth_id)
        loss = 45 * self.mel_loss(fake, audio) + 1000 * commitment
        if self.gan:
            loss = loss + sum(self.dac_loss.generator_loss(fake.unsqueeze(1), audio.unsqueeze(1)))
            for discriminator in (self.mp, self.mrd):
                _, scores, real_features, fake_features = discriminator(y=audio, y_hat=fake, bandwidth_id=bandwidth_id)
                total, losses = self.gen_loss(scores)
                loss = loss + total / len(losses)
                loss = loss + self.features_loss(real_features, fake_features) / len(real_features)
        loss.backward()
        self._gradient_norm()
        self.codec_optimizer.step()

    def _gradient_norm(self) -> None:
        """Compute the gradient norm as the callback in the reference YAML does after each backward pass."""
        gradients = [p.grad for p in (*self.codec, *self.discriminators) if p.grad is not None]
        torch.norm(torch.stack([torch.norm(gradient.detach(), 2.0) for gradient in gradients]), 2.0).item()

    @staticmethod
    def _toggle(on: list[torch.nn.Parameter], off: list[torch.nn.Parameter]) -> None:
        """Enable gradients of one set of parameters only, as Lightning does for each optimizer."""
        for parameters, value in ((off, False), (on, True)):
            for parameter in parameters:
                parameter.requires_grad_(value)


def keep_memory() -> None:
    """Make glibc keep freed memory.

    Otherwise it returns memory to the kernel and requests it again, with a page fault per 4 kB. Which of the two steps
    pays for that changes from run to run.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate no block with mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing to the kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="checkout of jishengpeng/WavTokenizer")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--batch-size", type=int, default=2, help="segments per batch (default 2)")
    parser.add_argument("--seconds", type=float, default=1, help="length of a segment in seconds (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default 5)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the checkpoint")
    arguments = parser.parse_args()
    keep_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32")
    print(f"| {arguments.batch_size} segments of {arguments.seconds:g} s | step: reference | ours | ratio |")
    print("|---|---|---|---|")
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(arguments.batch_size, 1, round(arguments.seconds * 24000))
    folder = str(reference_folder(arguments.work, arguments.rate))
    for name, gan in (("mel-only", False), ("with all discriminators", True)):
        reference = ReferenceStep(arguments.checkout, arguments.rate, gan)
        state = build(Settings(model=folder, mel_only_steps=0 if gan else 1_000_000))
        reference_time, our_time, ratio = _median_times(
            arguments.rounds,
            lambda reference=reference: reference(audio[:, 0]),
            lambda state=state: train_step(state, [audio]),
        )
        print(f"| {name} | {reference_time:.2f} s | {our_time:.2f} s | **{ratio:.2f}** |", flush=True)


def _median_times(rounds: int, reference, ours) -> tuple[float, float, float]:
    """Return the medians of both times in seconds, and of the ratios within each round, which are more stable."""
    reference(), ours()
    pairs = []
    for index in range(rounds):
        pair = {}
        for function in (reference, ours) if index % 2 == 0 else (ours, reference):
            started = time.perf_counter()
            function()
            pair[function] = time.perf_counter() - started
        pairs.append((pair[reference], pair[ours]))
    reference_times, our_times = zip(*pairs, strict=True)
    ratios = [our_time / reference_time for reference_time, our_time in pairs]
    return statistics.median(reference_times), statistics.median(our_times), statistics.median(ratios)


if __name__ == "__main__":
    main()
