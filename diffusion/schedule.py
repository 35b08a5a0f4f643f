"""The discrete noise schedule of DDPM: how much of the image is left after t + 1 of T noising steps.

    x_t = alpha_t x_0 + sigma_t eps,   alpha_t = sqrt(alpha_bar_t),    sigma_t = sqrt(1 - alpha_bar_t),    eps ~ N(0, I)

Time runs from t = 0 (nearly clean) to t = T - 1 (nearly pure noise): our t is the paper's t - 1.
Tables are float64 on the CPU, because alpha_bar is a product of a thousand numbers close to one; results have the dtype
and device of the images.

Legend: B batch, C channels, H height, W width, T number of timesteps.
Sources: Ho et al. 2020 (linear schedule, posterior), Nichol & Dhariwal 2021 (cosine schedule),
Salimans & Ho 2022 (velocity), Lin et al. 2023 (zero terminal signal-to-noise ratio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffusion.config import ObjectiveConfig


@dataclass(frozen=True, eq=False)
class Schedule:
    """T noise levels, derived from the variances `betas` (T,) float64 that each step of the forward process adds.

    Raises ValueError when `betas` is not one-dimensional, has fewer than two entries, or leaves (0, 1].
    """

    betas: Tensor  # (T,)
    # copies of the tables on the devices that asked for them
    _moved: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) < 2:
            raise ValueError(
                f"a schedule needs at least two betas in one dimension, got shape {tuple(self.betas.shape)}"
            )
        if not bool(((self.betas > 0) & (self.betas <= 1)).all()):
            low, high = self.betas.min().item(), self.betas.max().item()
            raise ValueError(f"betas must lie in (0, 1], got {low:.4g} to {high:.4g}: use a smaller beta_end")
        object.__setattr__(self, "betas", self.betas.double().cpu())

    @classmethod
    def linear(cls, T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """beta grows linearly (Ho et al. 2020, section 4). The default ends are meant for T = 1000."""
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def cosine(cls, T: int, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """alpha_bar falls like a squared cosine (Nichol & Dhariwal 2021, eq. 17); no beta exceeds `max_beta`."""
        u = torch.arange(T + 1, dtype=torch.float64) / T
        # (T + 1,), not yet divided by f(0): ratios do not care
        alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    def rescale_zero_terminal_snr(self) -> Schedule:
        """A new schedule whose last step is pure noise: alpha_{T-1} = 0, alpha_0 unchanged (Lin et al. 2023,
        algorithm 1).
        """
        first, last = self.alpha[0], self.alpha[-1]
        # shift the end to zero, then stretch the start back
        alpha_bar = ((self.alpha - last) * first / (first - last)) ** 2
        return Schedule(torch.cat([1 - alpha_bar[:1], 1 - alpha_bar[1:] / alpha_bar[:-1]]))

    def __len__(self) -> int:
        return len(self.betas)

    # Tables, all (T,) float64.

    @cached_property
    def alphas(self) -> Tensor:
        """1 - beta: the share of variance that one step keeps. Not to be confused with `alpha`, the factor of x_0."""
        return 1 - self.betas

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The share of variance kept by all steps up to t (Ho et al. 2020, eq. 4)."""
        return self.alphas.cumprod(0)

    @cached_property
    def alpha(self) -> Tensor:
        """The factor of x_0 in x_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """The factor of eps in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio alpha^2 / sigma^2."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def alpha_bar_previous(self) -> Tensor:
        """alpha_bar one step earlier; before the first step nothing is lost."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @cached_property
    def posterior_x0(self) -> Tensor:
        """The factor of x_0 in the posterior mean (Ho et al. 2020, eq. 7)."""
        return self.alpha_bar_previous.sqrt() * self.betas / (1 - self.alpha_bar)

    @cached_property
    def posterior_x_t(self) -> Tensor:
        """The factor of x_t in the posterior mean (Ho et al. 2020, eq. 7)."""
        return self.alphas.sqrt() * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta tilde (Ho et al. 2020, eq. 7). Zero at t = 0: knowing x_0, nothing is left to guess."""
        return self.betas * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """log beta tilde, with the -inf at t = 0 replaced by its neighbour at t = 1."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    # The same, for a batch of images.

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (B,) of the named table as (B, 1, 1, 1), ready to multiply images `like` (B, C, H, W).

        A table moves to a device once and stays there: looking up must not make the CPU wait for the GPU.
        """
        key = (table, like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = getattr(self, table).to(like.dtype).to(like.device)
        return self._moved[key][t.to(like.device)].view(-1, *[1] * (like.ndim - 1))  # (B, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from x_0 and eps, both (B, C, H, W), at integer times t (B,) in 0..T-1 (Ho et al. 2020, eq. 4)."""
        return self.at("alpha", t, x0) * x0 + self.at("sigma", t, x0) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = alpha eps - sigma x_0 (Salimans & Ho 2022, section 4): x_t turned by 90 degrees in the plane of x_0
        and eps.
        """
        return self.at("alpha", t, x0) * noise - self.at("sigma", t, x0) * x0

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0), a Gaussian: where x was one step ago (Ho et al. 2020, eq. 6 and 7).

        Returns the mean (B, C, H, W), the variance (B, 1, 1, 1), which is zero at t = 0, and its clamped logarithm (B,
        1, 1, 1), which is finite everywhere.
        """
        mean = self.at("posterior_x0", t, x0) * x0 + self.at("posterior_x_t", t, x0) * x_t
        return mean, self.at("posterior_variance", t, x0), self.at("posterior_log_variance", t, x0)


def build_schedule(config: ObjectiveConfig) -> Schedule:
    """The schedule that a config asks for.

    The linear ends 1e-4 and 0.02 destroy the image in 1000 steps. For another number of timesteps they are scaled by
    1000 / T, as in the code of Nichol & Dhariwal 2021; with fewer, unscaled steps the last x_t would still show the
    image. Raises ValueError for an unknown schedule, and for zero terminal SNR without prediction=v.
    """
    if config.zero_terminal_snr and config.prediction != "v":
        raise ValueError(
            f"zero_terminal_snr needs prediction='v', not {config.prediction!r}: at zero signal, eps says nothing "
            "about x_0"
        )
    if config.schedule == "linear":
        scale = 1000 / config.timesteps
        schedule = Schedule.linear(config.timesteps, min(1e-4 * scale, 0.999), min(0.02 * scale, 0.999))
    elif config.schedule == "cosine":
        schedule = Schedule.cosine(config.timesteps)
    else:
        raise ValueError(f"unknown schedule {config.schedule!r}: choose linear or cosine")
    return schedule.rescale_zero_terminal_snr() if config.zero_terminal_snr else schedule
