"""What the network learns, in three dialects of one sentence: "here is x = alpha x_0 + sigma eps; what was x_0?"

            path                                the network predicts    the time it is told
    DDPM    x = sqrt(a) x_0 + sqrt(1 - a) eps   eps, x_0 or v           t in 0..T-1
    EDM     x = x_0 + sigma eps                 a mix of x_0 and eps    250 ln(sigma), about -1600..1100
    Flow    x = (1 - t) x_0 + t eps             eps - x_0               1000 t in 0..1000

with a = alpha_bar_t. Each class has the same three methods: `loss` for training, `denoise` (x_0 from x, whatever the
network predicts) and `grid` (the noise levels to visit) for sampling. No randomness here: the caller brings eps and u,
uniform on [0, 1), which decides the time.

The time is stretched so that one sinusoidal embedding serves all three: its fastest wave turns by one radian per unit,
so a range of about a thousand is resolved, while EDM's c_noise = ln(sigma) / 4 spans only -1.6..1.1. Networks see 1000
c_noise.

Legend: B batch, C channels, H height, W width, T timesteps, N sampling steps.
Sources: Ho et al. 2020 (DDPM), Salimans & Ho 2022 (v), Hang et al. 2023 (min-SNR), Karras et al. 2022 (EDM),
Lipman et al. 2023 and Liu et al. 2023 (flow matching), Esser et al. 2024 (logit-normal times).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.config import ObjectiveConfig, SampleConfig
from diffusion.samplers import Grid
from diffusion.schedule import Schedule, build_schedule

# (x (B, C, H, W), time (B,), labels (B,) or None) -> (B, C, H, W)
Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class DDPM:
    """Denoising in T discrete steps (Ho et al. 2020).

    `prediction` is the network's target: "eps", "x0" or "v"; `weighting` the weight of its squared error:
        simple     1 (Ho et al. 2020, eq. 14)
        min_snr    min(SNR, gamma) as a weight of the error in x_0 (Hang et al. 2023, section 3.4), carried over to the
                   target: the errors in eps, v and x_0 are proportional. With zero terminal SNR the weight of the very
                   last t is therefore 0.
    Raises ValueError for an unknown choice, and for a schedule with zero terminal SNR unless v is predicted.
    """

    def __init__(
        self, schedule: Schedule, prediction: str = "eps", weighting: str = "simple", gamma: float = 5.0
    ) -> None:
        if prediction not in ("eps", "x0", "v"):
            raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0 or v")
        if weighting not in ("simple", "min_snr"):
            raise ValueError(f"unknown weighting {weighting!r}: choose simple or min_snr")
        if schedule.alpha_bar[-1] == 0 and prediction != "v":
            raise ValueError(
                f"zero terminal SNR needs prediction='v', not {prediction!r}: at zero signal, eps says nothing about "
                "x_0"
            )
        self.schedule = schedule
        self.prediction = prediction
        self.weighting = weighting
        self.gamma = gamma

    def loss(self, net: Net, x0: Tensor, labels: Tensor | None, noise: Tensor, u: Tensor) -> Tensor:
        """Losses (B,) of the images x0 (B, C, H, W), noised by `noise` at t = floor(u T), u (B,) in [0, 1)."""
        t = (u * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)  # (B,)
        x_t = self.schedule.add_noise(x0, noise, t)
        output = net(x_t, t.to(x0.dtype), labels).to(x0.dtype)
        if self.prediction == "eps":
            target = noise
        else:
            target = x0 if self.prediction == "x0" else self.schedule.velocity(x0, noise, t)
        return mean_per_image(self.weight(t, x0) * (output - target) ** 2)

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        """Loss weights (B, 1, 1, 1) at times t (B,), in the dtype and device of `like` (B, C, H, W)."""
        snr = self.schedule.at("snr", t, like)
        if self.weighting == "simple":
            return torch.ones_like(snr)
        clipped = snr.clamp(max=self.gamma)
        if self.prediction == "x0":
            return clipped
        # |x_0 error|^2 = |eps error|^2 / SNR = |v error|^2 / (SNR + 1)
        return clipped / snr if self.prediction == "eps" else clipped / (snr + 1)

    def denoise(self, net: Net, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The estimate of x_0 (B, C, H, W) from x at `time` t in 0..T-1, a scalar or (B,)."""
        t = per_image(time, x)
        output = net(x, t, labels).to(x.dtype)
        alpha, sigma = self.schedule.at("alpha", t.long(), x), self.schedule.at("sigma", t.long(), x)  # (B, 1, 1, 1)
        if self.prediction == "eps":
            return (x - sigma * output) / alpha
        return output if self.prediction == "x0" else alpha * x - sigma * output

    def grid(self, num_steps: int, sample: SampleConfig) -> Grid:
        """N of the T timesteps, evenly spaced from T - 1 down ("trailing", Lin et al. 2023, table 2), then the data.

        Starting at T - 1 matters: it is the one level where pure noise is what the network was trained on.
        """
        T = len(self.schedule)
        if not 1 <= num_steps <= T:
            raise ValueError(f"sample.steps={num_steps} must be between 1 and objective.timesteps={T}")
        t = (T - torch.arange(num_steps, dtype=torch.float64) * (T / num_steps)).round().long() - 1  # (N,)
        alpha = torch.cat([self.schedule.alpha[t], torch.ones(1, dtype=torch.float64)])
        sigma = torch.cat([self.schedule.sigma[t], torch.zeros(1, dtype=torch.float64)])
        return Grid(alpha, sigma, t.double())


class EDM:
    """Karras et al. 2022: any noise level sigma > 0, and a network whose input and target have unit variance at all of
    them.

    `p_mean`, `p_std`: training noise levels are ln(sigma) ~ N(p_mean, p_std^2). `sigma_data`: standard deviation of the
    pixels. Raises ValueError unless p_std and sigma_data are positive.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, sigma_data: float = 0.5) -> None:
        if p_std <= 0 or sigma_data <= 0:
            raise ValueError(
                f"p_std={p_std} and sigma_data={sigma_data} must be positive: measure sigma_data on the training images"
            )
        self.p_mean = p_mean
        self.p_std = p_std
        self.sigma_data = sigma_data

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise of table 1, each in the shape of sigma."""
        total = sigma**2 + self.sigma_data**2  # the variance of x
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4

    def loss(self, net: Net, x0: Tensor, labels: Tensor | None, noise: Tensor, u: Tensor) -> Tensor:
        """Losses (B,) of the images x0 (B, C, H, W) at ln(sigma) = p_mean + p_std times the normal quantile of u
        (B,) in [0, 1).
        """
        sigma = (self.p_mean + self.p_std * normal_quantile(u.to(x0.dtype))).exp()  # (B,)
        # 1 / c_out^2: all sigma count the same
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        x = x0 + broadcast(sigma, x0) * noise
        # eq. 2 with table 1
        return mean_per_image(broadcast(weight, x0) * (self.denoise(net, x, sigma, labels) - x0) ** 2)

    def denoise(self, net: Net, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The estimate of x_0 (B, C, H, W) from x at `time` sigma > 0, a scalar or (B,): Karras et al. 2022, eq. 7."""
        sigma = per_image(time, x)  # (B,)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        output = net(broadcast(c_in, x) * x, 1000 * c_noise, labels).to(x.dtype)
        return broadcast(c_skip, x) * x + broadcast(c_out, x) * output

    def grid(self, num_steps: int, sample: SampleConfig) -> Grid:
        """N noise levels from sample.sigma_max to sample.sigma_min, dense at the low end (Karras et al. 2022, eq.
        5), then the data.
        """
        check_steps(num_steps)
        low, high = sample.sigma_min ** (1 / sample.rho), sample.sigma_max ** (1 / sample.rho)
        sigma = torch.linspace(high, low, num_steps, dtype=torch.float64) ** sample.rho  # (N,)
        return Grid(
            torch.ones(num_steps + 1, dtype=torch.float64),
            torch.cat([sigma, torch.zeros(1, dtype=torch.float64)]),
            sigma,
        )


class Flow:
    """Flow matching on straight lines from data (t = 0) to noise (t = 1): the network predicts their direction dx/dt =
    eps - x_0.

    This is the orientation of Esser et al. 2024 and of the diffusion models here; Lipman et al. 2023 run t the other
    way. `time_distribution` in training: "uniform", or "logit_normal", which favours the middle (Esser et al. 2024,
    section 3.1). Raises ValueError for an unknown choice.
    """

    def __init__(self, time_distribution: str = "uniform") -> None:
        if time_distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"unknown time distribution {time_distribution!r}: choose uniform or logit_normal")
        self.time_distribution = time_distribution

    def loss(self, net: Net, x0: Tensor, labels: Tensor | None, noise: Tensor, u: Tensor) -> Tensor:
        """Losses (B,) of the images x0 (B, C, H, W) at t = u (B,) in [0, 1), or the logistic of its normal quantile."""
        u = u.to(x0.dtype)
        time = u if self.time_distribution == "uniform" else normal_quantile(u).sigmoid()  # (B,)
        t = broadcast(time, x0)
        output = net((1 - t) * x0 + t * noise, 1000 * time, labels).to(x0.dtype)
        return mean_per_image((output - (noise - x0)) ** 2)  # Liu et al. 2023, eq. 1

    def denoise(self, net: Net, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The estimate of x_0 (B, C, H, W) from x at `time` t in (0, 1], a scalar or (B,): x - t v, the foot of the
        line.
        """
        t = per_image(time, x)
        return x - broadcast(t, x) * net(x, 1000 * t, labels).to(x.dtype)

    def grid(self, num_steps: int, sample: SampleConfig) -> Grid:
        """N + 1 evenly spaced times from 1 (pure noise, alpha = 0) to 0 (data)."""
        check_steps(num_steps)
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return Grid(1 - t, t, t[:-1])


def build_objective(config: ObjectiveConfig, sigma_data: float) -> DDPM | EDM | Flow:
    """The objective that a config asks for. `sigma_data` is measured on the training images; a value set in the
    config takes precedence.
    """
    if config.kind == "ddpm":
        return DDPM(build_schedule(config), config.prediction, config.weighting, config.min_snr_gamma)
    if config.kind == "edm":
        return EDM(config.p_mean, config.p_std, config.sigma_data or sigma_data)
    if config.kind == "flow":
        return Flow(config.flow_time)
    raise ValueError(f"unknown objective {config.kind!r}: choose ddpm, edm or flow")


def per_image(time: Tensor | float, x: Tensor) -> Tensor:
    """A scalar or (B,) time as (B,), in the dtype and device of the images x (B, C, H, W)."""
    return torch.as_tensor(time, dtype=x.dtype, device=x.device).expand(len(x))


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), ready to multiply images x (B, C, H, W)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def mean_per_image(error: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)"""
    return error.flatten(1).mean(1)


def normal_quantile(u: Tensor) -> Tensor:
    """The inverse of the normal distribution function. u = 0, which float32 generators do return, becomes 2^-25
    instead of -infinity.
    """
    return torch.special.ndtri(u.clamp(min=2**-25))


def check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"sample.steps={num_steps} must be at least 1")
