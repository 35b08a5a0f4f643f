"""A problem that diffusion solves exactly, for the tests of the samplers.

For a mixture of Gaussians, E[x_0 | x] has a closed form, so the ideal network is known at every noise level and for
every objective.
"""

import torch

from diffusion.config import SampleConfig
from diffusion.objectives import DDPM, EDM
from diffusion.samplers import sample

MEANS, STD = torch.tensor([[0.8, 0.3], [-0.5, 0.6], [-0.2, -0.7]], dtype=torch.float64), 0.1
SHAPE = (3, 2, 4, 4)


def posterior_mean(x, alpha, sigma, std=STD):
    """E[x_0 | alpha x_0 + sigma eps = x] for the mixture over the two channels of x (B, 2, H, W), in closed form."""
    alpha, sigma = (torch.as_tensor(a, dtype=x.dtype).view(-1, 1, 1, 1, 1) for a in (alpha, sigma))
    means = MEANS.to(x.dtype).view(1, 3, 2, 1, 1)  # (1, K, 2, 1, 1)
    variance = (alpha * std) ** 2 + sigma**2  # of x, given the component
    away = x[:, None] - alpha * means  # (B, K, 2, H, W)
    share = (-(away**2).sum(2, keepdim=True) / (2 * variance)).softmax(1)  # (B, K, 1, H, W): which component is it?
    return (share * (means + alpha * std**2 / variance * away)).sum(1)


def draw_mixture(count, rng):
    chosen = torch.randint(3, (count,), generator=rng)
    return MEANS[chosen] + STD * torch.randn(count, 2, generator=rng, dtype=torch.float64)


def ideal_net(objective, distort=0.0, std=STD):
    """The network that is right about the mixture, in the terms of its objective; `distort` makes it wrong in a
    smooth way.
    """

    def net(x, time, labels):
        if isinstance(objective, DDPM):
            alpha_bar = objective.schedule.alpha_bar[time.long()].to(x.dtype).view(-1, 1, 1, 1)
            x0 = posterior_mean(x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), std)
            v_turn = (alpha_bar.sqrt() * x - x0) / (1 - alpha_bar).sqrt()
            output = {"eps": (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt(), "x0": x0, "v": v_turn}[
                objective.prediction
            ]
        elif isinstance(objective, EDM):
            sigma, s = (time / 250).exp().view(-1, 1, 1, 1), objective.sigma_data
            total = sigma**2 + s**2
            noisy = x * total.sqrt()
            output = (posterior_mean(noisy, 1.0, sigma, std) - s**2 / total * noisy) * total.sqrt() / (sigma * s)
        else:
            t = (time / 1000).view(-1, 1, 1, 1)
            output = (x - posterior_mean(x, 1 - t, t, std)) / t
        return output + distort * torch.sin(3 * x + time.view(-1, 1, 1, 1) / 200)

    return net


def normal(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(objective, sampler, steps, *, net=None, shape=SHAPE, x_init=None, seed=1, settings=None, **options):
    """The states after every step, and the result."""
    grid = objective.grid(steps, settings or SampleConfig())
    net = net or ideal_net(objective)
    states, x_init = [], normal(shape) if x_init is None else x_init
    result = sample(
        lambda x, t: objective.denoise(net, x, t, None),
        grid,
        sampler,
        shape,
        torch.Generator().manual_seed(seed),
        device="cpu",
        x_init=x_init,
        on_step=lambda i, x, x0: states.append(x),
        **options,
    )
    assert torch.equal(result, states[-1]) and len(states) == steps
    return states
