"""Accuracy of the samplers on a mixture of Gaussians: orders of convergence, and the distribution of what they draw."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from diffusion.objectives import DDPM, EDM, Flow
from diffusion.samplers import SAMPLERS, Grid, sample
from diffusion.schedule import Schedule
from tests.diffusion.mixture import draw_mixture, ideal_net, normal, posterior_mean, run

# Orders of convergence, against scipy's adaptive integrator of order 8


def smooth_grid(name, steps):
    """A family's path from noise to a sigma above zero."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if name == "edm":
        sigma = (10 ** (1 / 3) + u * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3
        return Grid(torch.ones_like(sigma), sigma, sigma[:-1])
    if name == "vp":
        angle = 1.5 + u * (0.1 - 1.5)
        return Grid(angle.cos(), angle.sin(), angle[:-1])
    t = 1 - 0.9 * u  # flow, from alpha = 0
    return Grid(1 - t, t, t[:-1])


def denoise_on(name):
    coefficients = {"edm": lambda t: (1.0, t), "vp": lambda t: (t.cos(), t.sin()), "flow": lambda t: (1 - t, t)}[name]
    return lambda x, t: posterior_mean(x, *coefficients(t), std=0.4)


def exact_end(name, x_init):
    """The probability-flow ODE by scipy: dx/dt = alpha' x0 + sigma' eps in each family's own t."""
    denoise, shape = denoise_on(name), x_init.shape

    def slope(t, flat):
        x, time = torch.from_numpy(flat).view(shape), torch.tensor(t, dtype=torch.float64)
        x0 = denoise(x, time)
        if name == "vp":
            dx = -math.sin(t) * x0 + math.cos(t) * (x - math.cos(t) * x0) / math.sin(t)
        else:
            dx = (x - x0) / t  # both for alpha = 1 and for alpha = 1 - t
        return dx.flatten().numpy()

    grid = smooth_grid(name, 1)
    start = grid.time[0].item()  # every family's time ends at 0.1
    solution = solve_ivp(
        slope, (start, 0.1), (grid.sigma[0] * x_init).flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12
    )
    return torch.from_numpy(solution.y[:, -1]).view(shape)


def integrate(name, sampler, steps, x_init):
    """x after `steps` steps on the smooth grid. One more step leads to the data, so that none of them is a sampler's
    special last step.
    """
    short, one, states = smooth_grid(name, steps), torch.ones(1, dtype=torch.float64), []
    last_time = {"edm": short.sigma, "vp": short.sigma.asin(), "flow": short.sigma}[name][-1:]
    grid = Grid(torch.cat([short.alpha, one]), torch.cat([short.sigma, 0 * one]), torch.cat([short.time, last_time]))
    sample(
        denoise_on(name),
        grid,
        sampler,
        x_init.shape,
        torch.Generator(),
        device="cpu",
        x_init=x_init,
        on_step=lambda i, x, x0: states.append(x),
    )
    return states[steps - 1]


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
def test_order_of_convergence(name):
    x_init = normal((40, 2, 1, 1))
    exact = exact_end(name, x_init)
    for sampler, low, high in (("euler", 0.95, 1.05), ("heun", 1.95, 2.05), ("dpmpp", 1.95, 2.2)):
        errors = [
            (integrate(name, sampler, steps, x_init) - exact).pow(2).mean().sqrt().item() for steps in (80, 160, 320)
        ]
        order = math.log2(errors[0] / errors[2]) / 2
        assert low < order < high, (sampler, order, errors)
        assert errors[2] < {"euler": 5e-3, "heun": 5e-5, "dpmpp": 1e-4}[sampler], (sampler, errors)


# The sampled distribution


def sliced_wasserstein(a, b, directions=32):
    """Mean over directions of the 1-Wasserstein distance between projections of two equally large samples (n, 2)."""
    angle = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    axes = torch.stack([angle.cos(), angle.sin()])  # (2, directions)
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean().item()


BOUND = 0.04
CASES = [(kind, sampler, 0.0) for kind, names in SAMPLERS.items() for sampler in names] + [
    (kind, "ddim", 1.0) for kind in SAMPLERS
]


@pytest.mark.parametrize(("kind", "sampler", "eta"), CASES)
def test_samples_have_the_right_distribution(kind, sampler, eta):
    """Within 0.04 of 3,000 draws of the mixture, of which 3,000 other draws are 0.026 away. Controls: too few steps,
    a wrong denoiser.
    """
    count, rng = 3000, torch.Generator().manual_seed(5)
    objective = {"ddpm": lambda: DDPM(Schedule.linear(1000)), "edm": EDM, "flow": Flow}[kind]()
    target, again = draw_mixture(count, rng), draw_mixture(count, rng)
    assert 0.02 < sliced_wasserstein(target, again) < 0.03

    def distance(steps, **options):
        states = run(objective, sampler, steps, shape=(count, 2, 1, 1), eta=eta, clip=False, **options)
        return sliced_wasserstein(states[-1].flatten(1), target)

    steps = 100 if sampler in ("ddpm", "ddim") else 40
    assert distance(steps) < BOUND
    assert distance(4) > BOUND
    assert distance(1) > 10 * BOUND  # one step lands on the mean of the data
    assert distance(steps, net=ideal_net(objective, std=0.4)) > 3 * BOUND  # the denoiser of a wider mixture


def test_zero_terminal_snr_samples_from_pure_noise():
    objective = DDPM(Schedule.linear(1000).rescale_zero_terminal_snr(), "v")
    target = draw_mixture(2000, torch.Generator().manual_seed(5))
    for sampler in SAMPLERS["ddpm"]:
        end = run(objective, sampler, 50, shape=(2000, 2, 1, 1), clip=False)[-1]
        assert end.isfinite().all() and sliced_wasserstein(end.flatten(1), target) < 0.06
