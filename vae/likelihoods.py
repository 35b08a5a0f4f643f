"""p(x | z): what the numbers that a decoder puts out mean.

Every likelihood turns an image and the decoder's output into log p(x | z) in nats, summed over pixels and channels,
and knows which numbers an image must consist of.

Legend: S decodings, C channels, H = W pixels, P numbers the decoder puts out for a channel, M mixture components.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import LikelihoodConfig

SMALLEST_LOG_SIGMA = math.log(1 / 256)  # a grey level: finer than the data, a density could grow without bound
LEVELS = 256


class Likelihood(nn.Module):
    """What the objectives and the evaluation need of a likelihood. A module, for it may have something to learn.

    Attributes:
        outputs: numbers a decoder must put out for each pixel of an image.
        dimension_bits: bits a pixel and channel to add to -log2 p(x) to make it bits per dimension of the 8-bit image;
            None where the images are not 8-bit ones.
    """

    outputs: int
    dimension_bits: float | None

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x | z), summed over pixels and channels. (S, C, H, W), (S, P, H, W) -> (S,)"""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """The expected image, in [0, 1]. (S, P, H, W) -> (S, C, H, W)"""
        raise NotImplementedError

    def draw(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """An image drawn from p(x | z), in [0, 1]. (S, P, H, W) -> (S, C, H, W)"""
        raise NotImplementedError


def at_least_fp32(values: Tensor) -> Tensor:
    """What a network computed in half precision, in fp32: a sum over a thousand pixels needs the digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sum_pixels(values: Tensor) -> Tensor:
    """(S, ...) -> (S,)"""
    return values.flatten(1).sum(1)


class Bernoulli(Likelihood):
    """Black and white pixels; the decoder puts out logits.

    The same formula can be evaluated for grey values, as many programs do, but is then no log-likelihood of anything:
    over [0, 1] it does not integrate to one. `vae.config` refuses it.
    """

    dimension_bits = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.outputs = channels

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x | z) for x in {0, 1}. (S, C, H, W), (S, C, H, W) -> (S,)"""
        logits = at_least_fp32(output)
        # log Bernoulli(x; sigmoid(l)) = x l - log(1 + exp(l)): no sigmoid, hence no log of zero
        return sum_pixels(x * logits - F.softplus(logits))

    def mean(self, output: Tensor) -> Tensor:
        """Probability of white, in [0, 1]. (S, C, H, W)"""
        return torch.sigmoid(at_least_fp32(output))

    def draw(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """A black and white image. (S, C, H, W)"""
        return torch.bernoulli(self.mean(output), generator=rng)


class Gaussian(Likelihood):
    """Grey values in [0, 1] as a density, around the mean that the decoder puts out.

    An 8-bit image v becomes x = (v + u) / 256 with u uniform on [0, 1): without that noise a density may grow without
    bound on the 256 points that occur. By Jensen's inequality -E log2 p(x) / D + 8 is an upper bound of the bits per
    dimension of v (Theis et al. 2016): the 8 is log2 of the width of a grey level.

    The standard deviation sigma is one number for all pixels: fixed, learned, or the best one for the batch at hand,
    which has a closed form, sigma^2 = mean (x - mean)^2 (sigma-VAE, Rybkin et al. 2021, section 3.2); or the decoder
    puts one out for each pixel. It never goes below a grey level.
    """

    dimension_bits = 8.0

    def __init__(self, channels: int, config: LikelihoodConfig) -> None:
        super().__init__()
        self.log_sigma: Tensor
        self.sigma_from = config.sigma_from
        self.channels = channels
        self.outputs = 2 * channels if config.sigma_from == "decoder" else channels
        log_sigma = torch.tensor(math.log(config.sigma))
        if config.sigma_from == "learned":
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)  # optimal: a running average, for evaluation

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log sigma, the latter limited from below; either (S, C, H, W) or a number."""
        output = at_least_fp32(output)
        if self.sigma_from == "decoder":
            mean, log_sigma = output.split(self.channels, 1)
        else:
            mean, log_sigma = output, self.log_sigma
        # no sigmoid: it would slow the learning of values near black and white, and a Gaussian has no need of it
        return mean + 0.5, soft_floor(log_sigma, SMALLEST_LOG_SIGMA)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log density of x at z. (S, C, H, W), (S, P, H, W) -> (S,)"""
        mean, log_sigma = self.split(output)
        if self.sigma_from == "optimal" and self.training:
            log_sigma = self.best_log_sigma(x, mean)
        return sum_pixels(-0.5 * ((x - mean) / log_sigma.exp()) ** 2 - log_sigma - 0.5 * math.log(2 * math.pi))

    def best_log_sigma(self, x: Tensor, mean: Tensor) -> Tensor:
        """The log sigma that makes the batch likeliest; gradients flow through it, as in the authors' code."""
        best = soft_floor(0.5 * ((x - mean) ** 2).mean().log(), SMALLEST_LOG_SIGMA)
        with torch.no_grad():
            self.log_sigma.lerp_(best, 0.01)
        return best

    def mean(self, output: Tensor) -> Tensor:
        """Expected grey values in [0, 1]. (S, C, H, W)"""
        return self.split(output)[0].clamp(0, 1)

    def draw(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """Grey values with pixel noise, cut to [0, 1]. (S, C, H, W)"""
        mean, log_sigma = self.split(output)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        return (mean + log_sigma.exp() * noise).clamp(0, 1)


def soft_floor(value: Tensor, floor: float) -> Tensor:
    """`value` where it is well above the floor, approaching the floor smoothly below (Rybkin et al. 2021, code)."""
    return floor + F.softplus(value - floor)


class LogisticMixture(Likelihood):
    """The 256 grey values themselves: a mixture of logistic distributions, cut into bins of a grey level (Salimans et
    al. 2017, PixelCNN++, section 2.1).

    In colour, green's mean depends linearly on red and blue's on both (section 2.2), so that the channels of a pixel,
    which are nearly the same, need not be described three times. Grey values are scaled to [-1, 1].
    """

    dimension_bits = 0.0

    def __init__(self, channels: int, config: LikelihoodConfig) -> None:
        super().__init__()
        self.channels = channels
        self.mixtures = config.mixtures
        self.coefficients = channels * (channels - 1) // 2  # of each channel's mean on those before it
        self.outputs = config.mixtures * (1 + 2 * channels + self.coefficients)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log weights (S, M, H, W), means and log scales (S, M, C, H, W), coefficients (S, M, C(C-1)/2, H, W)."""
        size, _, height, width = output.shape
        # (S, P, H, W) -> (S, M, P/M, H, W)
        table = at_least_fp32(output).reshape(size, self.mixtures, -1, height, width)
        weight, mean, log_scale, slope = table.split((1, self.channels, self.channels, self.coefficients), 2)
        return weight.squeeze(2).log_softmax(1), mean, log_scale.clamp(min=-7.0), torch.tanh(slope)

    def shifted(self, mean: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        """Means given the channels before. (S, M, C, H, W); x in [-1, 1] is (S, M or 1, C, H, W)."""
        shifted = []
        i = 0
        for channel in range(self.channels):
            value = mean[:, :, channel]
            for before in range(channel):
                value = value + slope[:, :, i] * x[:, :, before]
                i += 1
            shifted.append(value)
        return torch.stack(shifted, 2)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log probability of grey values x = v / 255 in [0, 1]. (S, C, H, W), (S, P, H, W) -> (S,)"""
        log_weight, mean, log_scale, slope = self.split(output)
        x = (2 * x - 1)[:, None]  # (S, 1, C, H, W) in [-1, 1]
        mean = self.shifted(mean, slope, x)
        half = 1 / (LEVELS - 1)  # half a grey level in [-1, 1]
        upper = (x + half - mean) / log_scale.exp()
        lower = (x - half - mean) / log_scale.exp()
        # log(sigmoid(upper) - sigmoid(lower)) without cancellation: the difference of the two factors out as
        # sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper))
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        # the outermost values take everything beyond them
        inside = torch.where(x > 1 - half, F.logsigmoid(-lower), inside)
        log_bin = torch.where(x < -1 + half, F.logsigmoid(upper), inside)
        return sum_pixels(torch.logsumexp(log_weight + log_bin.sum(2), 1))  # channels, then components

    def mean(self, output: Tensor) -> Tensor:
        """Expected grey values in [0, 1], each channel's mean following those before it. (S, C, H, W)"""
        log_weight, mean, _, slope = self.split(output)
        expected = mean.clamp(-1, 1)
        for _ in range(self.channels - 1):
            expected = self.shifted(mean, slope, expected).clamp(-1, 1)
        return ((log_weight.exp()[:, :, None] * expected).sum(1) + 1) / 2

    def draw(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """Grey values in [0, 1], multiples of 1/255: a component for each pixel, then its channels in order."""
        log_weight, mean, log_scale, slope = self.split(output)
        gumbel = -torch.log(-torch.log(uniform(log_weight.shape, rng, output.device)))
        chosen = (log_weight + gumbel).argmax(1)[:, None, None]  # (S, 1, 1, H, W)
        mean, log_scale, slope = (
            part.gather(1, chosen.expand(-1, 1, part.shape[2], -1, -1)) for part in (mean, log_scale, slope)
        )
        u = uniform(mean.shape, rng, output.device)
        offset = log_scale.exp() * (u.log() - torch.log1p(-u))  # a logistic variable
        x = (mean + offset).clamp(-1, 1)
        for _ in range(self.channels - 1):
            x = (self.shifted(mean, slope, x) + offset).clamp(-1, 1)
        return (((x[:, 0] + 1) / 2) * (LEVELS - 1)).round() / (LEVELS - 1)


def uniform(shape: torch.Size, rng: torch.Generator, device: torch.device) -> Tensor:
    """Numbers strictly between 0 and 1."""
    return torch.rand(shape, generator=rng, device=device).clamp(1e-6, 1 - 1e-6)


def build_likelihood(config: LikelihoodConfig, channels: int) -> Likelihood:
    """The likelihood that a config names, for images of that many channels."""
    if config.kind == "bernoulli":
        return Bernoulli(channels)
    if config.kind == "gaussian":
        return Gaussian(channels, config)
    return LogisticMixture(channels, config)
