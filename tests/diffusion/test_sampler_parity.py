"""Whole sampling trajectories, step by step, against diffusers and the text of the EDM paper."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion.config import SampleConfig
from diffusion.objectives import DDPM, EDM, Flow
from diffusion.samplers import Grid, sample
from diffusion.schedule import Schedule
from tests.diffusion.mixture import SHAPE, ideal_net, normal, run

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers with numpy 2

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def assert_same_path(ours, theirs, tolerance):
    assert len(ours) == len(theirs) > 1
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(1.0, b.abs().max().item())  # EDM starts at sigma = 80
        assert (a - b.to(a)).abs().max().item() <= tolerance * scale, f"step {i}"


def discrete(cls, prediction, **options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, cls)(
        1000, prediction_type=PREDICTIONS[prediction], timestep_spacing="trailing", **options
    )
    scheduler.alphas_cumprod = Schedule.linear(1000).alpha_bar  # float64, so that only the sampler is compared
    return scheduler


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [7, 20, 200])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_matches_diffusers(prediction, steps, variance):
    objective, scheduler = (
        DDPM(Schedule.linear(1000), prediction),
        discrete("DDPMScheduler", prediction, variance_type=f"fixed_{variance}"),
    )
    net, rng = ideal_net(objective, 0.1), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x, theirs = objective.schedule.sigma[999] * normal(), []
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.double().expand(3), None), t, x, generator=rng).prev_sample
        theirs.append(x)
    ours = run(objective, "ddpm", steps, net=net, variance=variance)
    # diffusers adds noise to the finished image when the last t of the grid is not 0
    compared = len(ours) - (variance == "large")
    assert_same_path(ours[:compared], theirs[:compared], 1e-8)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_matches_diffusers(prediction, eta, clip):
    objective, scheduler = (
        DDPM(Schedule.linear(1000), prediction),
        discrete("DDIMScheduler", prediction, clip_sample=clip),
    )
    net, rng = ideal_net(objective, 0.1), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(20)
    x, theirs = objective.schedule.sigma[999] * normal(), []
    for t in scheduler.timesteps:
        output = net(x, t.double().expand(3), None)
        x = scheduler.step(output, t, x, eta=eta, use_clipped_model_output=True, generator=rng).prev_sample
        theirs.append(x)
    assert_same_path(run(objective, "ddim", 20, net=net, eta=eta, clip=clip), theirs, 1e-9)


@pytest.mark.parametrize("steps", [8, 25])  # diffusers treats fewer than 15 steps specially
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpmpp_matches_diffusers(prediction, steps):
    objective, scheduler = DDPM(Schedule.linear(1000), prediction), discrete("DPMSolverMultistepScheduler", prediction)
    net = ideal_net(objective, 0.1)
    scheduler.set_timesteps(steps)
    x, theirs = objective.schedule.sigma[999] * normal(), []
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.double().expand(3), None), t, x).prev_sample
        theirs.append(x)
    assert_same_path(run(objective, "dpmpp", steps, net=net), theirs, 1e-5)  # diffusers computes this one in float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_on_a_ddpm_matches_diffusers(prediction):
    """diffusers steps in the scaled variable y = x / alpha; ours in x."""
    objective, scheduler = DDPM(Schedule.linear(1000), prediction), discrete("EulerDiscreteScheduler", prediction)
    net = ideal_net(objective, 0.1)
    scheduler.set_timesteps(20)
    grid = objective.grid(20, SampleConfig())
    y, theirs = objective.schedule.sigma[999] * normal() / grid.alpha[0], []
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(net(scheduler.scale_model_input(y, t), t.double().expand(3), None), t, y).prev_sample
        theirs.append(y * grid.alpha[i + 1])
    assert_same_path(run(objective, "euler", 20, net=net), theirs, 1e-5)


def test_euler_on_edm_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=0.6)
    objective = EDM(sigma_data=0.6)
    net = ideal_net(objective, 0.1)
    scheduler.set_timesteps(20)
    x, theirs = 50 * normal(), []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(net(scaled, (1000 * t).double().expand(3), None), t, x).prev_sample
        theirs.append(x)
    assert_same_path(
        run(objective, "euler", 20, net=net, settings=SampleConfig(sigma_min=0.01, sigma_max=50.0)), theirs, 1e-5
    )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_heun_matches_diffusers_in_scaled_variables(prediction):
    """A DDPM seen as y = x / alpha is an EDM path: alpha = 1, sigma = the ratio. There, Heun must be diffusers'
    Heun.
    """
    objective, scheduler = DDPM(Schedule.linear(1000), prediction), discrete("HeunDiscreteScheduler", prediction)
    net = ideal_net(objective, 0.1)
    scheduler.set_timesteps(12)
    grid = objective.grid(12, SampleConfig())
    scaled = Grid(torch.ones(13, dtype=torch.float64), grid.sigma / grid.alpha, grid.time)
    states = []
    sample(
        lambda y, t: objective.denoise(net, y * objective.schedule.alpha[t.long()], t, None),
        scaled,
        "heun",
        SHAPE,
        torch.Generator(),
        device="cpu",
        x_init=normal(),
        on_step=lambda i, y, x0: states.append(y),
    )
    y, theirs = scaled.sigma[0] * normal(), []
    for t in scheduler.timesteps:
        y = scheduler.step(net(scheduler.scale_model_input(y, t), t.double().expand(3), None), t, y).prev_sample
        if scheduler.state_in_first_order:
            theirs.append(y)
    assert_same_path(states, [*theirs, y], 1e-5)  # its last step stays first-order


def test_heun_on_edm_matches_the_paper_s_algorithm():
    """Karras et al. 2022, algorithm 1 with sigma(t) = t and s(t) = 1, written out in numpy."""
    objective = EDM(sigma_data=0.6)
    net = ideal_net(objective, 0.1)
    sigma = np.append((80 ** (1 / 7) + np.arange(10) / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)

    def slope(x, t):
        x0 = objective.denoise(net, torch.from_numpy(x), torch.tensor(t, dtype=torch.float64)).numpy()
        return (x - x0) / t

    x, theirs = sigma[0] * normal().numpy(), []
    for t, t_next in pairwise(sigma):
        d = slope(x, t)
        x_next = x + (t_next - t) * d
        if t_next != 0:
            x_next = x + (t_next - t) * (d / 2 + slope(x_next, t_next) / 2)
        x = x_next
        theirs.append(torch.from_numpy(x))
    assert_same_path(run(objective, "heun", 10, net=net), theirs, 1e-10)


@pytest.mark.parametrize(
    ("sampler", "cls"), [("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")]
)
def test_flow_matches_diffusers(sampler, cls):
    diffusers = pytest.importorskip("diffusers")
    objective, scheduler = Flow(), getattr(diffusers, cls)(num_train_timesteps=1000)
    net = ideal_net(objective, 0.1)
    scheduler.set_timesteps(10)
    t = torch.linspace(1, 0, 11)
    repeat = 2 if sampler == "heun" else 1  # theirs lists the inner points twice
    scheduler.sigmas = torch.cat([t[:1], t[1:-1].repeat_interleave(repeat), t[-1:]])
    scheduler.timesteps = torch.cat([t[:1], t[1:-1].repeat_interleave(repeat)]) * 1000
    x, theirs = normal(), []
    for time in scheduler.timesteps:
        x = scheduler.step(net(x, time.double().expand(3), None), time, x).prev_sample.double()
        if sampler == "euler" or scheduler.state_in_first_order:
            theirs.append(x)
    assert_same_path(run(objective, sampler, 10, net=net), theirs if sampler == "euler" else [*theirs, x], 1e-5)
