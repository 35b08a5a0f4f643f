"""A hierarchy of latents: drawn from the top down by the prior, and inferred in the same order by the posterior, which
corrects the prior by what it sees in the image (Sønderby et al. 2016, Kingma et al. 2016, Vahdat & Kautz 2020).

    p(z) = p(z_1) p(z_2 | z_1) ... p(z_L | z_1 .. z_L-1)          q(z | x) has the same shape, given x

Legend: B images, K draws for each, S = B K, L layers, Z_l latents of layer l and Z of all, W width of the states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae.config import ModelConfig
from vae.likelihoods import Likelihood, at_least_fp32
from vae.model import ACTIVATIONS, Autoencoder, Draw, Gaussian, build_decoder, build_encoder, initialise, zeros

# Log-variances are bent into (-6, 6), as the program of Vahdat & Kautz 2020 bends its own. The wide limits that do for
# one layer are none for a hierarchy: every layer's deviation scales what those below are told, and five multiply.
LOG_VARIANCE_LIMIT = 6.0


def bent_gaussian(output: Tensor) -> Gaussian:
    """(..., 2 Z) -> mean and log-variance, the latter in (-6, 6) by a smooth curve that leaves small numbers alone."""
    mean, log_variance = at_least_fp32(output).chunk(2, -1)
    return Gaussian(mean, LOG_VARIANCE_LIMIT * torch.tanh(log_variance / LOG_VARIANCE_LIMIT))


class ResidualLinear(nn.Module):
    """h + linear(act(linear(act(norm(h))))), the identity at first. (S, W) -> (S, W)

    The layer norm keeps what a block adds at the size it had when it was trained, however large the state has become.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        act = ACTIVATIONS[config.activation]
        last = zeros(nn.Linear(config.width, config.width))
        first = nn.Linear(config.width, config.width)
        self.layers = nn.Sequential(nn.LayerNorm(config.width), act(), first, act(), last)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


class Layer(nn.Module):
    """One layer of latents on the way down: a prior that reads the state, a correction that reads the image as well,
    and the next state.
    """

    def __init__(self, config: ModelConfig, latents: int) -> None:
        super().__init__()
        act = ACTIVATIONS[config.activation]
        # starts at zero: the prior as a standard normal distribution
        self.prior = nn.Sequential(
            ResidualLinear(config), nn.LayerNorm(config.width), act(), zeros(nn.Linear(config.width, 2 * latents))
        )
        self.join = nn.Linear(2 * config.width, config.width)
        # does not: a posterior that starts as the prior tells the decoder nothing, which then learns to do without it
        self.correction = nn.Sequential(
            ResidualLinear(config), nn.LayerNorm(config.width), act(), nn.Linear(config.width, 2 * latents)
        )
        self.read = nn.Linear(latents, config.width)
        self.onward = ResidualLinear(config)

    @property
    def head(self) -> nn.Linear:
        """The layer that puts out the posterior's correction."""
        return self.correction[-1]  # type: ignore[return-value]  # what a Sequential holds is known to us only

    def step(self, h: Tensor, z: Tensor) -> Tensor:
        """The state after the layer's latents are known. (S, W), (S, Z_l) -> (S, W)"""
        return self.onward(h + self.read(z))


class Ladder(Autoencoder):
    """The hierarchy. Its code is all layers' latents one after the other, from the top.

    Args:
        config: the model section.
        image_size: H = W.
        likelihood: what the decoder's output means.
    """

    def __init__(self, config: ModelConfig, image_size: int, likelihood: Likelihood) -> None:
        super().__init__()
        self.sizes = config.ladder
        self.size = sum(config.ladder)
        self.likelihood = likelihood
        self.encoder, features = build_encoder(config.network, config, image_size)
        self.bottom = nn.Linear(features, config.width)
        self.up = nn.ModuleList(ResidualLinear(config) for _ in config.ladder)
        self.start = nn.Parameter(torch.zeros(config.width))
        self.layers = nn.ModuleList(Layer(config, latents) for latents in config.ladder)
        self.decoder = build_decoder(config.network, config, image_size, config.width, likelihood.outputs)
        initialise(self, config.init, [layer.head for layer in self.levels])

    @property
    def levels(self) -> list[Layer]:
        """The layers, from the top."""
        return list(self.layers)  # type: ignore[arg-type]  # what a ModuleList holds is known to us only

    def infer(self, x: Tensor) -> list[Tensor]:
        """What each layer is told about images in [0, 1], from the top: L tensors (B, W)."""
        d = self.bottom(self.encoder(2 * x - 1))
        told = []
        for block in self.up:  # from the bottom up: the top reads the most processed features
            d = block(d)
            told.append(d)
        return told[::-1]

    def draw(self, x: Tensor, told: list[Tensor], noise: Tensor) -> Draw:
        """Latents from q(z | x), decoded and compared with the images. (B, C, H, W), L times (B, W), (B, K, Z)"""
        count, samples = noise.shape[:2]
        h = self.start.expand(count * samples, -1)  # (S, W)
        latents, divergences = [], []
        log_q = log_p = torch.zeros((), device=x.device)
        for layer, d, e in zip(self.levels, told, noise.flatten(0, 1).split(self.sizes, 1), strict=True):
            prior = bent_gaussian(layer.prior(h))  # (S, Z_l)
            seen = torch.cat([h, d.repeat_interleave(samples, 0)], 1)  # (S, 2 W)
            correction = bent_gaussian(layer.correction(layer.join(seen)))
            # a mean in units of the prior's standard deviation, a factor on its variance (Vahdat & Kautz 2020, eq. 2)
            posterior = Gaussian(prior.sample(correction.mean), prior.log_variance + correction.log_variance)
            z = posterior.sample(e)
            h = layer.step(h, z)
            latents.append(z)
            # in those units the KL divergence from the prior is that of the correction from N(0, I)
            divergences.append(correction.kl().sum(1))
            log_q = log_q + posterior.log_prob(z)
            log_p = log_p + prior.log_prob(z)
        log_p_x = self.likelihood.log_prob(x, self.decoder(h)).view(count, samples)  # (S,) -> (B, K)
        return Draw(
            torch.cat(latents, 1).view(count, samples, -1),
            log_p_x,
            torch.stack(divergences, 1).view(count, samples, -1),
            log_q.view(count, samples),
            log_p.view(count, samples),
            None,
        )

    def codes(self, x: Tensor) -> Tensor:
        """The mean of each layer's posterior, given the means of the layers above. (B, Z)"""
        silent = torch.zeros(len(x), 1, self.size, device=x.device)
        return self.draw(x, self.infer(x), silent).latents[:, 0]

    def decode(self, z: Tensor) -> Tensor:
        """What the likelihood reads. (S, Z) -> (S, P, H, W)"""
        h = self.start.expand(z.shape[0], -1)  # not len(z): an exported decoder would keep the number that it had then
        for layer, part in zip(self.levels, z.split(self.sizes, 1), strict=True):
            h = layer.step(h, part)
        return self.decoder(h)

    def prior(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Latents from the prior, layer by layer, given standard normal noise. (S, Z)"""
        return self.complete(torch.zeros_like(noise), 0, temperature * noise)

    def complete(self, z: Tensor, kept: int, noise: Tensor) -> Tensor:
        """The first `kept` layers as they are in z, the others from the prior given those. (S, Z), (S, Z) -> (S, Z)"""
        h = self.start.expand(len(z), -1)
        latents = []
        parts = zip(self.levels, z.split(self.sizes, 1), noise.split(self.sizes, 1), strict=True)
        for level, (layer, given, e) in enumerate(parts):
            part = given if level < kept else bent_gaussian(layer.prior(h)).sample(e)
            h = layer.step(h, part)
            latents.append(part)
        return torch.cat(latents, 1)
