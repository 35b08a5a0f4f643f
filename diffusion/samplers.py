"""Sampling: from noise to an image, along a grid of noise levels. Every method here moves along one path,

    x = alpha x_0 + sigma eps,

and the three families of models differ only in the curve (alpha, sigma) that leads from noise to data:

    DDPM    alpha^2 + sigma^2 = 1    an arc                   (Ho et al. 2020; "variance preserving")
    EDM     alpha = 1                a vertical line          (Karras et al. 2022; "variance exploding")
    flow    alpha + sigma = 1        the straight diagonal    (Lipman et al. 2023, Liu et al. 2023; "rectified flow")

A denoiser guesses x_0 from x; then eps = (x - alpha x_0) / sigma. With both in hand, the plainest step keeps the guess
and moves on to the next point of the grid:

    x' = alpha' x_0 + sigma' eps                                                                                (*)

This one line is DDIM (Song et al. 2021) on the arc, Euler's method of EDM on the line and Euler's method for flow on
the diagonal. The other samplers improve it:

    ddim     (*) with part of eps exchanged for fresh noise, as much as eta says
    ddpm     (*) with as much fresh noise as the posterior q(x' | x, x_0) has: the same as ddim with eta = 1
    dpmpp    (*) with x_0 extrapolated linearly in lambda = log(alpha / sigma) from the last two guesses: second order
             for one evaluation
    heun     the average of (*)'s slope here and its slope there: second order for two evaluations

Heun needs a variable to take slopes in. Between two neighbouring points of the grid we use the straight chord in the
(alpha, sigma) plane, which is legitimate: the probability-flow ODE carries alpha y(sigma / alpha) to alpha' y(sigma' /
alpha') along any curve that joins the two points, and only the end points are evaluated. On the line of EDM the chord
is the path, and the step is Karras et al. 2022, algorithm 1; on the diagonal it is Heun's method in t. On the arc it
agrees to second order with algorithm 1 in the scaled variables y = x / alpha, s = sigma / alpha; unlike that form, it
is finite where alpha = 0, at the pure noise that flow models and schedules with zero terminal signal start from.

Legend: B batch, C channels, H height, W width, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# (x (B, C, H, W), time of the grid, a scalar tensor) -> x_0 estimate (B, C, H, W)
Denoiser = Callable[[Tensor, Tensor], Tensor]

# Which samplers each objective offers; "auto" is the first. Ancestral sampling is defined by a Markov chain, which only
# ddpm has.
SAMPLERS = {
    "ddpm": ("ddim", "ddpm", "dpmpp", "euler", "heun"),
    "edm": ("heun", "euler", "ddim", "dpmpp"),
    "flow": ("euler", "heun", "ddim", "dpmpp"),
}


def resolve_sampler(kind: str, sampler: str) -> str:
    """The sampler's name for an objective `kind`, with "auto" replaced. Raises ValueError, listing the choices, for
    any other name.
    """
    if kind not in SAMPLERS:
        raise ValueError(f"unknown objective {kind!r}: choose one of {', '.join(SAMPLERS)}")
    if sampler == "auto":
        return SAMPLERS[kind][0]
    if sampler not in SAMPLERS[kind]:
        raise ValueError(
            f"sampler {sampler!r} is not available for objective {kind!r}: choose one of auto, "
            f"{', '.join(SAMPLERS[kind])}"
        )
    return sampler


@dataclass(frozen=True, eq=False)
class Grid:
    """N + 1 points of a path, float64 on the CPU, from noise (index 0) to data (index N).

    `time` is what the denoiser is told at point i, in the unit of its objective; at the last point nothing is asked.
    """

    alpha: Tensor  # (N + 1,)
    sigma: Tensor  # (N + 1,)
    time: Tensor  # (N,)

    def __post_init__(self) -> None:
        assert len(self.alpha) == len(self.sigma) == len(self.time) + 1

    def __len__(self) -> int:
        return len(self.time)

    def step(self, i: int) -> tuple[float, float, float, float]:
        """alpha, sigma at point i, and at point i + 1."""
        return self.alpha[i].item(), self.sigma[i].item(), self.alpha[i + 1].item(), self.sigma[i + 1].item()

    @cached_property
    def log_ratio(self) -> Tensor:
        """lambda = log(alpha / sigma) (N + 1,), half the log signal-to-noise ratio; -inf at pure noise, +inf at the
        data.
        """
        return self.alpha.log() - self.sigma.log()


def guided(objective, net, labels: Tensor | None, null_label: int | None, guidance: float) -> Denoiser:
    """A denoiser with classifier-free guidance: u + w (c - u), u unconditional, c conditional, w = `guidance`.

    w = 1 is the plain conditional model and w = 0 the unconditional one, each for one pass of B images; any other w
    makes one pass of 2 B. (Ho & Salimans 2022 write (1 + w') c - w' u, so their w' is our w - 1.) They combine eps; we
    combine x_0, which is the same: x_0 is a linear function of the network's output, and x is shared.
    `labels` int64 (B,), or None for a model without classes. Raises ValueError when there are no labels to be guided
    by.
    """
    if labels is None:
        if guidance not in (0, 1):
            raise ValueError(
                f"guidance {guidance} needs class labels: set sample.guidance=1, or train with model.num_classes > 0"
            )
        return lambda x, time: objective.denoise(net, x, time, None)
    if guidance == 1:
        return lambda x, time: objective.denoise(net, x, time, labels)
    null = torch.full_like(labels, null_label)
    if guidance == 0:
        return lambda x, time: objective.denoise(net, x, time, null)
    both = torch.cat([labels, null])  # (2B,)

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        c, u = objective.denoise(net, torch.cat([x, x]), time, both).chunk(2)  # (2B, C, H, W) -> 2 of (B, C, H, W)
        return u + guidance * (c - u)

    return denoise


# One step each, from point i of the grid to point i + 1. All are pure functions of (B, C, H, W) tensors of one floating
# dtype.


def euler_step(x: Tensor, x0: Tensor, grid: Grid, i: int) -> Tensor:
    """Keep the guess, move on to the next noise level: equation (*) above. Exact if x0 is. Arrives at x0 itself when
    sigma' = 0.
    """
    alpha, sigma, alpha_next, sigma_next = grid.step(i)
    eps = (x - alpha * x0) / sigma
    return alpha_next * x0 + sigma_next * eps


def ddim_step(x: Tensor, x0: Tensor, grid: Grid, i: int, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """Song et al. 2021, eq. 12, for any path. eta = 0: `euler_step`; eta = 1: `ddpm_step`. `noise` ~ N(0, I) is needed
    for eta > 0.

    eps is derived from the x0 given. If the caller has clipped it, eps changes with it, so that x = alpha x0 + sigma
    eps still holds; with the network's own eps, x' would be off the path.
    """
    alpha, sigma, alpha_next, sigma_next = grid.step(i)
    eps = (x - alpha * x0) / sigma
    # eq. 16: deviation of the new noise
    fresh = eta * sigma_next * math.sqrt(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)
    x_next = alpha_next * x0 + math.sqrt(sigma_next**2 - fresh**2) * eps
    return x_next + fresh * noise if fresh > 0 else x_next  # none at the last step, where sigma' = 0


def ddpm_step(
    x: Tensor, x0: Tensor, grid: Grid, i: int, noise: Tensor | None = None, variance: str = "small"
) -> Tensor:
    """A draw from q(x' | x, x_0) (Ho et al. 2020, eq. 6 and 7), also between points many timesteps apart.

    `noise` ~ N(0, I); not needed at the last step, which adds none. `variance`: "small" is beta tilde of eq. 7, right
    when all images are one; "large" is beta itself, right when they are N(0, I) (section 3.2), and gave the paper's FID
    of 3.17.
    """
    alpha, sigma, alpha_next, sigma_next = grid.step(i)
    # x = ratio x' + N(0, beta): the forward step between the two points, sqrt(1 - beta_t) in the paper
    ratio = alpha / alpha_next
    beta = sigma**2 - (ratio * sigma_next) ** 2
    mean = (alpha_next * beta / sigma**2) * x0 + (ratio * sigma_next**2 / sigma**2) * x
    if sigma_next == 0:
        return mean
    return mean + math.sqrt(beta) * (1.0 if variance == "large" else sigma_next / sigma) * noise


def dpmpp_2m_step(x: Tensor, x0: Tensor, x0_previous: Tensor | None, grid: Grid, i: int) -> Tensor:
    """DPM-Solver++(2M): Lu et al. 2022b, algorithm 2. `x0_previous` is the guess of step i - 1.

    First order, that is `euler_step`, at the first step, which has no previous guess, and at the last, where lambda' is
    infinite. A start from alpha = 0 has lambda = -inf, so h_previous = inf after it: the extrapolation vanishes by
    itself.
    """
    if i == 0 or grid.sigma[i + 1] == 0:
        return euler_step(x, x0, grid, i)
    h_previous, h = grid.log_ratio[i - 1 : i + 2].diff().tolist()
    extrapolated = x0 + h / (2 * h_previous) * (x0 - x0_previous)  # x_0 half a step ahead, on a line in lambda
    return euler_step(x, extrapolated, grid, i)


def heun_step(x: Tensor, x0: Tensor, denoise: Denoiser, grid: Grid, i: int, time_next: Tensor | None) -> Tensor:
    """Heun's method along the chord from point i to point i + 1 (Karras et al. 2022, algorithm 1, where alpha = 1).

    Evaluates `denoise` once more, at the point that Euler predicts and at `time_next`; not at the last step, where
    sigma' = 0 and the slope would be 0 / 0.
    """
    alpha, sigma, alpha_next, sigma_next = grid.step(i)
    predicted = euler_step(x, x0, grid, i)
    if sigma_next == 0:
        return predicted
    x0_next = denoise(predicted, time_next)
    d_alpha, d_sigma = alpha_next - alpha, sigma_next - sigma
    slope = d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma
    slope_next = d_alpha * x0_next + d_sigma * (predicted - alpha_next * x0_next) / sigma_next
    return x + (slope + slope_next) / 2


@torch.no_grad()
def sample(
    denoise: Denoiser,
    grid: Grid,
    sampler: str,
    shape: tuple[int, ...],
    rng: torch.Generator,
    *,
    device: torch.device | str,
    eta: float = 0.0,
    variance: str = "small",
    clip: bool = True,
    track: Callable = iter,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    x_init: Tensor | None = None,
) -> Tensor:
    """Draw `shape` = (B, C, H, W) images with the sampler ddpm, ddim, dpmpp, euler or heun (see `resolve_sampler`).

    Starts at sigma_0 times standard normal noise: `x_init` (B, C, H, W) if given, else drawn from `rng`, as is the
    noise of later steps. The result is a function of rng's state and device. `eta` matters to ddim only, `variance` to
    ddpm only. `clip` limits each x_0 guess to [-1, 1], for ddpm and ddim only: it breaks the smoothness that the
    higher-order methods build on. `track` wraps the iterable of step indices (a progress bar, a stop signal).
    `on_step(i, x, x0)` sees the state after step i and the guess that led to it. Returns (B, C, H, W) in the
    default dtype, or that of `x_init`, not clamped. Raises ValueError for an unknown sampler.
    """
    if sampler not in SAMPLERS["ddpm"]:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS['ddpm'])}")
    dtype = torch.get_default_dtype() if x_init is None else x_init.dtype

    def normal() -> Tensor:
        return torch.randn(shape, generator=rng, device=rng.device, dtype=dtype).to(device)

    x = grid.sigma[0].item() * (normal() if x_init is None else x_init.to(device))
    times = grid.time.to(dtype).to(device)  # once: a copy in every step would make the CPU wait for the GPU
    x0_previous = None
    for i in track(range(len(grid))):
        last = grid.sigma[i + 1] == 0
        x0 = denoise(x, times[i])
        if clip and sampler in ("ddpm", "ddim"):
            x0 = x0.clamp(-1, 1)
        if sampler == "ddpm":
            x = ddpm_step(x, x0, grid, i, None if last else normal(), variance)
        elif sampler == "ddim":
            x = ddim_step(x, x0, grid, i, eta, None if last or eta == 0 else normal())
        elif sampler == "dpmpp":
            x = dpmpp_2m_step(x, x0, x0_previous, grid, i)
        elif sampler == "heun":
            x = heun_step(x, x0, denoise, grid, i, None if last else times[i + 1])
        else:
            x = euler_step(x, x0, grid, i)
        x0_previous = x0
        if on_step is not None:
            on_step(i, x, x0)
    return x
