"""The samplers, step by step: one path for all, fresh noise, clipping, guidance, evaluations, determinism, mistakes."""

import math

import pytest
import torch

from diffusion.config import SampleConfig
from diffusion.objectives import DDPM, EDM, Flow
from diffusion.samplers import (
    SAMPLERS,
    Grid,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    euler_step,
    guided,
    heun_step,
    resolve_sampler,
    sample,
)
from diffusion.schedule import Schedule
from tests.diffusion.mixture import SHAPE, ideal_net, normal, run

# One path, one formula


def paths(steps=12):
    """The three families, each ending at sigma = 0."""
    angle = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    arc = Grid(angle.cos(), angle.sin(), angle[:-1])
    arc.alpha[0] = arc.sigma[-1] = 0  # exactly
    return {"arc": arc, "line": EDM().grid(steps, SampleConfig()), "diagonal": Flow().grid(steps, SampleConfig())}


@pytest.mark.parametrize("name", ["arc", "line", "diagonal"])
def test_a_perfect_denoiser_stays_on_the_path(name):
    """If x0 is known, every deterministic step goes from alpha x0 + sigma eps to alpha' x0 + sigma' eps exactly,
    also from alpha = 0.
    """
    grid, x0, eps = paths()[name], normal(seed=2), normal(seed=3)
    for i in range(len(grid)):
        here, there = (grid.alpha[j] * x0 + grid.sigma[j] * eps for j in (i, i + 1))
        for step in (
            euler_step(here, x0, grid, i),
            ddim_step(here, x0, grid, i),
            dpmpp_2m_step(here, x0, x0, grid, i),
            heun_step(here, x0, lambda x, t: x0, grid, i, None),
        ):
            torch.testing.assert_close(step, there, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["arc", "line", "diagonal"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_steps_keep_the_marginal(name, eta):
    """Whatever eta, x' given x_0 must have deviation sigma': old and new noise add up in squares (Song et al. 2021,
    appendix B).
    """
    grid, zero, one = (
        paths()[name],
        torch.zeros(1, 1, 1, 1, dtype=torch.float64),
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
    )
    for i in range(len(grid)):
        old = ddim_step(grid.sigma[i] * one, zero, grid, i, eta, zero)  # eps = 1, no fresh noise, x0 = 0
        new = ddim_step(zero, zero, grid, i, eta, one)
        assert (old**2 + new**2).item() == pytest.approx(grid.sigma[i + 1].item() ** 2, rel=1e-9, abs=1e-15)
        if grid.sigma[i + 1] > 0:
            assert new > 0


@pytest.mark.parametrize("name", ["arc", "line", "diagonal"])
def test_ddim_with_eta_one_is_ddpm(name):
    grid, x, x0, noise = paths()[name], normal(seed=2), normal(seed=3), normal(seed=4)
    for i in range(len(grid)):
        torch.testing.assert_close(
            ddim_step(x, x0, grid, i, 1.0, noise), ddpm_step(x, x0, grid, i, noise), rtol=1e-9, atol=1e-12
        )


def test_ddpm_step_on_all_timesteps_is_the_posterior_of_the_schedule():
    objective, x, x0, noise = DDPM(Schedule.cosine(40)), normal(seed=2), normal(seed=3), normal(seed=4)
    grid = objective.grid(40, SampleConfig())
    for i in range(40):
        t = torch.full((3,), 39 - i)
        mean, variance, log_variance = objective.schedule.posterior(x0, x, t)
        torch.testing.assert_close(
            ddpm_step(x, x0, grid, i, noise), mean + variance.sqrt() * noise, rtol=1e-9, atol=1e-12
        )
        if i < 39:
            torch.testing.assert_close(variance.log(), log_variance)


def test_no_noise_at_the_last_step():
    grid, x, x0 = DDPM(Schedule.linear(1000)).grid(10, SampleConfig()), normal(seed=2), normal(seed=3)
    loud = torch.full(SHAPE, 1e6, dtype=torch.float64)
    torch.testing.assert_close(ddpm_step(x, x0, grid, 9, loud), x0)
    torch.testing.assert_close(ddim_step(x, x0, grid, 9, 1.0, loud), x0)
    assert (ddpm_step(x, x0, grid, 8, loud) - x0).abs().max() > 1000


def test_clipping_changes_eps_too():
    """After x0 is clipped, x = alpha x0 + sigma eps must still hold; with the old eps, x' would be somewhere else."""
    objective = DDPM(Schedule.linear(1000), "x0")
    grid, x_init = objective.grid(2, SampleConfig()), normal()
    x, loose = grid.sigma[0] * x_init, torch.full(SHAPE, 3.0, dtype=torch.float64)
    clipped, free = (
        run(objective, "ddim", 2, net=lambda *_: loose, x_init=x_init, clip=clip)[0] for clip in (True, False)
    )
    alpha, sigma, alpha_next, sigma_next = grid.step(0)
    torch.testing.assert_close(clipped, alpha_next * 1.0 + sigma_next * (x - alpha * 1.0) / sigma)
    torch.testing.assert_close(free, alpha_next * 3.0 + sigma_next * (x - alpha * 3.0) / sigma)
    kept_eps = alpha_next * 1.0 + sigma_next * (x - alpha * 3.0) / sigma
    assert (clipped - kept_eps).abs().min() > 1e-3
    for sampler in ("euler", "heun", "dpmpp"):  # clip leaves these alone
        assert run(objective, sampler, 2, net=lambda *_: loose, clip=True)[-1].min() == 3


# Guidance


class Counter:
    """A denoiser whose x_0 is a known function of the label; 9 is the null label."""

    def __init__(self):
        self.batches = []

    def denoise(self, net, x, time, labels):
        self.batches.append((len(x), None if labels is None else labels.tolist()))
        return x + (torch.full((len(x),), 9.0) if labels is None else labels.double()).view(-1, 1, 1, 1)


def test_guidance_is_u_plus_w_times_c_minus_u():
    x, time, labels = normal(), torch.tensor(1.0), torch.tensor([2, 3, 4])
    for w in (-0.5, 0.5, 2.0, 7.5):
        counter = Counter()
        guess = guided(counter, None, labels, 9, w)(x, time)
        c, u = x + labels.view(-1, 1, 1, 1), x + 9
        torch.testing.assert_close(guess, u + w * (c - u))
        assert counter.batches == [(6, [2, 3, 4, 9, 9, 9])]  # one pass of 2B
    for w, expected in ((1, [2, 3, 4]), (0, [9, 9, 9])):
        counter = Counter()
        guess = guided(counter, None, labels, 9, w)(x, time)
        assert torch.equal(guess, x + torch.tensor(expected).view(-1, 1, 1, 1))
        assert counter.batches == [(3, expected)]  # one pass of B


def test_guidance_on_x0_is_guidance_on_eps():
    schedule = Schedule.linear(1000)
    x, labels = normal(), torch.tensor([0, 1, 2])

    def net(x, time, labels):
        return torch.sin(x * (1 + labels.view(-1, 1, 1, 1)))

    for t in (10, 700):
        time = torch.tensor(t)
        guess = guided(DDPM(schedule), net, labels, 3, 4.0)(x, time)
        c, u = net(x, None, labels), net(x, None, torch.full((3,), 3))
        eps = u + 4.0 * (c - u)
        torch.testing.assert_close(guess, (x - schedule.sigma[t] * eps) / schedule.alpha[t])


def test_guidance_without_labels():
    counter = Counter()
    guided(counter, None, None, None, 1.0)(normal(), torch.tensor(1.0))
    assert counter.batches == [(3, None)]
    with pytest.raises(ValueError, match="guidance=1"):
        guided(counter, None, None, None, 2.0)


# Bookkeeping


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("ddpm", 6), ("ddim", 6), ("dpmpp", 6), ("euler", 6), ("heun", 11)]
)
def test_number_of_evaluations_and_their_times(sampler, evaluations):
    objective, times = DDPM(Schedule.linear(1000)), []
    inner = ideal_net(objective)

    def net(x, time, labels):
        times.append(time[0].item())
        return inner(x, time, labels)

    run(objective, sampler, 6, net=net)
    grid = objective.grid(6, SampleConfig()).time.tolist()
    assert len(times) == evaluations
    assert times == (grid if sampler != "heun" else [grid[0]] + [t for t in grid[1:] for _ in range(2)])


@pytest.mark.parametrize("objective", [DDPM(Schedule.linear(1000)), EDM(), Flow()])
def test_a_batch_is_sampled_as_its_halves_would_be(objective):
    x_init = normal((4, 2, 4, 4))
    for sampler in ("ddim", "dpmpp", "euler", "heun"):
        whole = run(objective, sampler, 5, shape=(4, 2, 4, 4), x_init=x_init)[-1]
        halves = [run(objective, sampler, 5, shape=(2, 2, 4, 4), x_init=half)[-1] for half in x_init.split(2)]
        torch.testing.assert_close(whole, torch.cat(halves), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS["ddpm"])
def test_samples_are_float32_and_a_function_of_the_generator(sampler):
    objective = DDPM(Schedule.linear(1000))

    def draw(seed):
        return sample(
            lambda x, t: objective.denoise(ideal_net(objective), x, t, None),
            objective.grid(5, SampleConfig()),
            sampler,
            SHAPE,
            torch.Generator().manual_seed(seed),
            device="cpu",
            eta=1.0,
        )

    assert draw(0).dtype == torch.float32 and draw(0).shape == SHAPE
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    loud = torch.ones(SHAPE, requires_grad=True)
    grid = objective.grid(2, SampleConfig())
    assert not sample(lambda x, t: x * loud, grid, sampler, SHAPE, torch.Generator(), device="cpu").requires_grad


def test_fresh_noise_depends_on_the_generator_and_eta():
    objective = DDPM(Schedule.linear(1000))
    for sampler, eta, random in (("ddpm", 0.0, True), ("ddim", 1.0, True), ("ddim", 0.0, False), ("heun", 1.0, False)):
        one, two = (run(objective, sampler, 5, eta=eta, seed=seed)[-1] for seed in (1, 2))
        assert torch.equal(one, two) != random


def test_track_wraps_the_loop_and_may_end_it():
    objective, seen = Flow(), []

    def first_two(steps):
        assert len(steps) == 5
        for i in steps:
            if i == 2:
                return
            yield i

    sample(
        lambda x, t: torch.zeros_like(x),
        objective.grid(5, SampleConfig()),
        "euler",
        SHAPE,
        torch.Generator(),
        device="cpu",
        track=first_two,
        on_step=lambda i, x, x0: seen.append((i, x0.abs().max().item())),
    )
    assert seen == [(0, 0.0), (1, 0.0)]


def test_resolve_sampler():
    assert [resolve_sampler(kind, "auto") for kind in ("ddpm", "edm", "flow")] == ["ddim", "heun", "euler"]
    assert resolve_sampler("edm", "dpmpp") == "dpmpp" and resolve_sampler("ddpm", "ddpm") == "ddpm"
    for kind in ("edm", "flow"):
        with pytest.raises(ValueError, match=r"not available.*heun.*ddim, dpmpp"):
            resolve_sampler(kind, "ddpm")
    with pytest.raises(ValueError, match="ddpm, edm, flow"):
        resolve_sampler("vae", "auto")
    with pytest.raises(ValueError, match="ddim, ddpm, dpmpp, euler, heun"):
        sample(None, Flow().grid(2, SampleConfig()), "auto", SHAPE, torch.Generator(), device="cpu")
