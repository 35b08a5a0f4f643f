"""How likely a model finds images it has not seen, in nats an image, and how much of its code it uses.

Legend: B images, K draws of z for each, Z latents, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.images import Images
from common.run import Run
from common.runtime import mix_seed
from vae.config import Config
from vae.images import prepare
from vae.model import Autoencoder, Draw

EVALUATION_STREAM = 5_000_011  # keeps evaluation's random numbers apart from those of training
ACTIVE = 0.01  # variance of a latent's posterior mean from which on it is in use (Burda et al. 2016, section 5.2)


@dataclass(frozen=True)
class Bounds:
    """Means over the images.

    Attributes:
        elbo: evidence lower bound.
        log_likelihood: the importance-weighted bound with K draws, which is at least the ELBO and nears log p(x) as K
            grows (Burda et al. 2016, theorem 1).
        kl: KL divergence of each latent, or of each layer of a hierarchy. (Z,) or (L,)
        each: `log_likelihood` of every image. (N,)
    """

    elbo: float
    log_likelihood: float
    kl: Tensor
    each: Tensor


def active_units(draw: Draw) -> Tensor:
    """How many latents are in use, by this batch: those whose posterior mean varies between images by more than 0.01.
    In a hierarchy, whose latents have no such mean: how many layers have a KL divergence above 0.01 nats.
    """
    if draw.posterior is None:
        return (draw.kl.detach().mean((0, 1)) > ACTIVE).sum().float()
    return (draw.posterior.mean.detach().var(0, correction=0) > ACTIVE).sum().float()


@torch.no_grad()
def estimate_bounds(
    model: Autoencoder, images: Images, config: Config, run: Run, samples: int, count: int = 0
) -> Bounds:
    """The ELBO and the importance-weighted bound.

    At most `eval.chunk` decodings are held at once: the draws of a few images are made in several passes, whose weights
    are added up as logarithms. With `compile: true` the passes are compiled, as the training step is.

    Args:
        samples: K.
        count: how many of the images, drawn by seed; 0 = all.
    """
    was_training = model.training
    model.eval()
    draw_from = torch.compile(model.draw) if config.compile else model.draw
    elbos, bounds, divergences = [], [], []
    data = images.draw(count)
    size = max(1, config.eval.chunk // samples)  # images at a time
    starts = range(0, len(data), size)
    for i in run.display.track(starts, len(starts), f"log-likelihood, {samples} draws an image"):
        rng = torch.Generator(run.device).manual_seed(mix_seed(config.seed, EVALUATION_STREAM, i))
        x = prepare(data.images[i : i + size].to(run.device), config, rng)
        with run.autocast():
            inferred = model.infer(x)
        elbo = torch.zeros(len(x), device=run.device)
        kl = torch.zeros((), device=run.device)
        log_weight = torch.full((len(x),), -math.inf, device=run.device)
        for part in passes(samples, config.eval.chunk // len(x)):
            with run.autocast():
                draw = draw_from(x, inferred, model.noise(len(x), part, rng))
            elbo += draw.elbo * part / samples
            kl = kl + draw.kl.mean((0, 1)) * part / samples
            log_weight = torch.logaddexp(log_weight, torch.logsumexp(draw.log_weights, 1))
        elbos.append(elbo)
        bounds.append(log_weight - math.log(samples))
        divergences.append(kl * len(x))
    model.train(was_training)
    each = torch.cat(bounds)
    total_kl = torch.stack(divergences).sum(0) / len(data)
    return Bounds(float(torch.cat(elbos).mean()), float(each.mean()), total_kl.cpu(), each.cpu())


def passes(samples: int, at_once: int) -> Iterator[int]:
    """Divide K draws into parts of at most `at_once`, at least one."""
    left = samples
    while left:
        part = min(left, max(1, at_once))
        yield part
        left -= part
