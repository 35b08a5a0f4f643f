"""The variational autoencoder: an encoder q(z | x), latents with a standard normal prior, a decoder p(x | z).

Legend: B images, K draws of z for each, S = B K decodings (the draws of an image are neighbours), Z latents,
C channels, H = W pixels, P numbers the decoder puts out for a pixel (what they mean is the likelihood's business).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import ModelConfig
from vae.likelihoods import Likelihood, at_least_fp32

L = TypeVar("L", bound=nn.Module)
LOG_VARIANCE_RANGE = (-20.0, 10.0)  # exp() of what an untrained or a half-precision network says stays finite
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


class Gaussian(NamedTuple):
    """A diagonal normal distribution. Both tensors (..., Z), in fp32 or finer whatever the network computes in."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_network(cls, output: Tensor) -> Gaussian:
        """(..., 2 Z) -> mean and log variance, the latter limited."""
        mean, log_variance = at_least_fp32(output).chunk(2, -1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise: the reparameterisation of Kingma & Welling 2014, section 2.4."""
        return self.mean + torch.exp(self.log_variance / 2) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log density in nats, summed over the latents. (..., Z) -> (...)"""
        scaled = (z - self.mean) ** 2 / self.log_variance.exp()
        return -0.5 * (scaled + self.log_variance + math.log(2 * math.pi)).sum(-1)

    def kl(self) -> Tensor:
        """KL(self || N(0, I)) in nats of each latent (Kingma & Welling 2014, appendix B). (..., Z)"""
        return 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance)


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats, summed over the latents. (..., Z) -> (...)"""
    return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)


class Draw(NamedTuple):
    """Latents drawn from q(z | x), and everything that the objectives ask about them; in nats and fp32.

    Attributes:
        latents: (B, K, Z); for a hierarchy, its layers one after the other.
        log_likelihood: log p(x | z). (B, K)
        kl: KL divergence of each latent, the same for every draw (B, 1, Z); of each layer of a hierarchy, given the
            layers above it (B, K, L).
        log_q: log q(z | x). (B, K)
        log_p: log p(z). (B, K)
        posterior: q(z | x) itself, of (B, Z); None for a hierarchy, whose lower layers depend on the draw.
    """

    latents: Tensor
    log_likelihood: Tensor
    kl: Tensor
    log_q: Tensor
    log_p: Tensor
    posterior: Gaussian | None

    @property
    def elbo(self) -> Tensor:
        """log p(x | z) - KL(q(z | x) || p(z)), mean over the draws. (B,)"""
        return self.log_likelihood.mean(1) - self.kl.sum(2).mean(1)

    @property
    def log_weights(self) -> Tensor:
        """log of the importance weights p(x | z) p(z) / q(z | x). (B, K)"""
        return self.log_likelihood + self.log_p - self.log_q


class Autoencoder(nn.Module):
    """What both kinds of model, one layer of latents (`VAE`) and a hierarchy (`vae.ladder`), can do.

    Attributes:
        size: Z.
        likelihood: what the decoder's output means.
    """

    size: int
    likelihood: Likelihood

    def noise(self, count: int, samples: int, rng: torch.Generator) -> Tensor:
        """What `draw` and `prior` turn into latents: standard normal (B, K, Z)."""
        return torch.randn(count, samples, self.size, generator=rng, device=rng.device)

    def forward(self, x: Tensor, noise: Tensor) -> Draw:
        """What a training step calls: infer, draw, decode, compare. (B, C, H, W) in [0, 1], (B, K, Z)"""
        return self.draw(x, self.infer(x), noise)

    def infer(self, x: Tensor) -> Any:
        """What `draw` needs to know of images (B, C, H, W) in [0, 1]; made once, however many draws follow."""
        raise NotImplementedError

    def draw(self, x: Tensor, inferred: Any, noise: Tensor) -> Draw:
        """Latents from q(z | x), decoded and compared with the images. (B, C, H, W), what was inferred, (B, K, Z)"""
        raise NotImplementedError

    def codes(self, x: Tensor) -> Tensor:
        """The code of an image, as it is written out: means of the posterior. (B, C, H, W) -> (B, Z)"""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """What the likelihood reads. (S, Z) -> (S, P, H, W)"""
        raise NotImplementedError

    def prior(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Latents from the prior, given standard normal noise; its deviations are multiplied by the temperature.
        (S, Z)
        """
        raise NotImplementedError


class VAE(Autoencoder):
    """One layer of latents.

    Args:
        config: the model section.
        image_size: H = W.
        likelihood: what the decoder's output means; a module, for it may have something to learn.
    """

    def __init__(self, config: ModelConfig, image_size: int, likelihood: Likelihood) -> None:
        super().__init__()
        self.size = config.latents
        self.likelihood = likelihood
        self.encoder, features = build_encoder(config.kind, config, image_size)
        self.posterior = nn.Linear(features, 2 * self.size)
        self.decoder = build_decoder(config.kind, config, image_size, self.size, likelihood.outputs)
        initialise(self, config.init, [self.posterior])

    def infer(self, x: Tensor) -> Gaussian:
        """q(z | x) of images in [0, 1]. (B, C, H, W) -> (B, Z)"""
        return Gaussian.from_network(self.posterior(self.encoder(2 * x - 1)))

    def codes(self, x: Tensor) -> Tensor:
        """The mean of q(z | x): what is written out as the code of an image. (B, Z)"""
        return self.infer(x).mean

    def decode(self, z: Tensor) -> Tensor:
        """What the likelihood reads. (S, Z) -> (S, P, H, W)"""
        return self.decoder(z)

    def prior(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Latents from the prior, given standard normal noise. (S, Z)"""
        return temperature * noise

    def draw(self, x: Tensor, posterior: Gaussian, noise: Tensor) -> Draw:
        """Latents from q(z | x), decoded and compared with the images. (B, C, H, W), (B, Z), (B, K, Z)"""
        each = Gaussian(posterior.mean[:, None], posterior.log_variance[:, None])  # (B, 1, Z)
        z = each.sample(noise)  # (B, K, Z)
        output = self.decode(z.flatten(0, 1))  # (B, K, Z) -> (S, Z)
        log_p_x = self.likelihood.log_prob(x, output).view(noise.shape[:2])  # (S,) -> (B, K)
        return Draw(z, log_p_x, each.kl(), each.log_prob(z), standard_log_prob(z), posterior)


# -- two kinds of network ----------------------------------------------------------------------------------------------


def build_encoder(kind: str, config: ModelConfig, image_size: int) -> tuple[nn.Sequential, int]:
    """From images in [-1, 1] (B, C, H, W) to features (B, F); and F.

    Args:
        kind: mlp for linear layers, conv for convolutions, each level of which halves the resolution, rounded up, so
            that any image size will do. No layer keeps statistics of a batch: an image has the same code whatever
            is encoded beside it.
    """
    act = ACTIVATIONS[config.activation]
    if kind == "mlp":
        pixels = config.image_channels * image_size**2
        return nn.Sequential(nn.Flatten(), *linear_layers((pixels, *config.hidden), config)), config.hidden[-1]
    widths = [config.image_channels, *(config.channels * multiplier for multiplier in config.multipliers)]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
        layers += [Residual(after, config) for _ in range(config.blocks)]
    flat = widths[-1] * grid_sizes(image_size, config)[-1] ** 2
    return nn.Sequential(*layers, act(), nn.Flatten(), *linear_layers((flat, config.width), config)), config.width


def build_decoder(kind: str, config: ModelConfig, image_size: int, latents: int, outputs: int) -> nn.Sequential:
    """From codes (S, Z) to (S, P, H, W): the encoder's mirror image."""
    act = ACTIVATIONS[config.activation]
    if kind == "mlp":
        widths = (latents, *reversed(config.hidden))
        last = nn.Linear(widths[-1], outputs * image_size**2)
        return nn.Sequential(*linear_layers(widths, config), last, nn.Unflatten(1, (outputs, image_size, image_size)))
    sizes = grid_sizes(image_size, config)
    channels = [outputs, *(config.channels * multiplier for multiplier in config.multipliers)]
    shape = (channels[-1], sizes[-1], sizes[-1])
    layers = [*linear_layers((latents, config.width, math.prod(shape)), config), nn.Unflatten(1, shape)]
    for level in reversed(range(1, len(channels))):
        layers += [Residual(channels[level], config) for _ in range(config.blocks)]
        layers += [act(), Upsample(channels[level], channels[level - 1], sizes[level - 1])]
    return nn.Sequential(*layers)


def initialise(model: nn.Module, kind: str, heads: Iterable[nn.Linear]) -> None:
    """Draw the first weights of the linear and convolutional layers; those that `zeros` has set to zero stay there.

    A question of who has to prove what. With `lecun` every latent says something from the start, and loses it if it is
    not worth its nats. With `near_prior` none does, and each has to be taken up. PyTorch's layers, as they come, put
    out a third of the variance they are given, so that in a deep network few ever are: the decoder learns early to do
    without. The first is good for a likelihood, the second for disentanglement, where few latents should do the work.

    Args:
        kind: lecun: normal of variance 1 / (inputs of a unit), biases zero (LeCun et al. 1998, "Efficient backprop",
            section 4.6); near_prior: as PyTorch's layers come, the heads near zero, so that q(z | x) starts near the
            prior.
        heads: the layers that put out a posterior.
    """
    if kind == "near_prior":
        for head in heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        return
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def zeros(layer: L) -> L:
    """The layer, its weights and biases set to zero."""
    for part in layer.parameters():
        nn.init.zeros_(part)
    return layer


def linear_layers(widths: tuple[int, ...], config: ModelConfig) -> list[nn.Module]:
    """Linear, activation and dropout for each pair of neighbouring widths."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[config.activation]()]
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
    return layers


def grid_sizes(image_size: int, config: ModelConfig) -> list[int]:
    """Side of the image, and of the grid after each halving: 28, 14, 7 for two levels."""
    sizes = [image_size]
    for _ in config.multipliers:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


class Residual(nn.Module):
    """x + conv(act(conv(act(x)))). (B, C, H, W) -> (B, C, H, W)

    The second convolution starts at zero: the block starts as the identity, which does for depth what normalisation
    would, without statistics.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        act = ACTIVATIONS[config.activation]
        first = nn.Conv2d(channels, channels, 3, padding=1)
        second = zeros(nn.Conv2d(channels, channels, 3, padding=1))
        self.layers = nn.Sequential(act(), first, act(), nn.Dropout(config.dropout), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Upsample(nn.Module):
    """A convolution, then each value of the grid becomes a square of 2 x 2, cut to `size`. (B, C, h, w) -> (B, D, H, W)

    The convolution puts out the four values of each square (Shi et al. 2016), so it works on the smaller grid.
    """

    def __init__(self, before: int, after: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(before, 4 * after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)[:, :, : self.size, : self.size]
