"""The three training objectives: perfect predictors, weights, preconditioning, signs, times and edge cases."""

import math

import pytest
import torch
from scipy.stats import norm

from common.config import ConfigError
from diffusion.config import ObjectiveConfig, SampleConfig
from diffusion.objectives import DDPM, EDM, Flow, build_objective
from diffusion.schedule import Schedule

PREDICTIONS, WEIGHTINGS = ("eps", "x0", "v"), ("simple", "min_snr")


def batch(size=6, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, size, 3, 4, 4, generator=rng, dtype=dtype)
    return x0, noise, torch.rand(size, generator=rng, dtype=dtype)


class Recorder:
    """A network that answers `output` and remembers what it was asked."""

    def __init__(self, output):
        self.output, self.calls = output, []

    def __call__(self, x, time, labels):
        self.calls.append((x, time, labels))
        return self.output(x, time) if callable(self.output) else self.output


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_loss_is_zero_for_the_truth_only(prediction, weighting):
    """Targets from the definitions; v by rotating (x_t, eps) through the angle whose sine is sigma."""
    schedule = Schedule.cosine(50)
    objective = DDPM(schedule, prediction, weighting)
    x0, noise, u = batch()
    t = (u * 50).long()
    alpha, sigma = (
        schedule.alpha_bar[t].sqrt().view(-1, 1, 1, 1),
        (1 - schedule.alpha_bar[t]).sqrt().view(-1, 1, 1, 1),
    )
    x_t = alpha * x0 + sigma * noise
    truth = {"eps": noise, "x0": x0, "v": (noise - sigma * x_t) / alpha}[prediction]
    net = Recorder(truth)
    assert objective.loss(net, x0, None, noise, u).max() < 1e-20
    torch.testing.assert_close(net.calls[0][0], x_t)
    assert net.calls[0][1].tolist() == t.tolist()
    wrong = objective.loss(Recorder(truth + 0.5), x0, None, noise, u)
    torch.testing.assert_close(wrong, 0.25 * objective.weight(t, x0).flatten())  # per-image mean, weighted


def test_min_snr_weights():
    """Hang et al. 2023: min(SNR, 5) for x_0, and the same loss in x_0 whichever quantity the network predicts."""
    schedule, x = Schedule.linear(1000), torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([10, 250, 900])
    snr = [(a / (1 - a)).item() for a in schedule.alpha_bar[t]]
    assert snr[0] > 5 > snr[2]
    weights = {p: DDPM(schedule, p, "min_snr", gamma=5.0).weight(t, x).flatten().tolist() for p in PREDICTIONS}
    assert weights["x0"] == pytest.approx([min(s, 5) for s in snr])
    assert weights["eps"] == pytest.approx([min(s, 5) / s for s in snr])
    assert weights["v"] == pytest.approx([min(s, 5) / (s + 1) for s in snr])
    assert DDPM(schedule, "eps", "simple").weight(t, x).flatten().tolist() == [1, 1, 1]


def test_min_snr_losses_agree_across_predictions():
    """The same wrong x_0, expressed as eps, x_0 or v, has the same min-SNR loss: the formulas are one weight on |x_0
    error|^2.
    """
    schedule = Schedule.linear(1000)
    x0, noise, u = batch()
    guess = x0 + 0.3 * torch.sin(5 * noise)
    t = (u * 1000).long()
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    eps = (x_t - alpha * guess) / sigma
    outputs = {"eps": eps, "x0": guess, "v": alpha * eps - sigma * guess}
    losses = [DDPM(schedule, p, "min_snr").loss(Recorder(o), x0, None, noise, u) for p, o in outputs.items()]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_denoise_inverts_the_prediction(prediction):
    schedule = Schedule.linear(1000)
    x0, noise, _ = batch(3)
    for time in (0, 500, 999):
        t = torch.full((3,), time)
        x_t, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
        net = Recorder({"eps": noise, "x0": x0, "v": v}[prediction])
        labels = torch.tensor([4, 5, 6])
        for when in (torch.tensor(float(time)), t.double()):  # a scalar, or one time an image
            torch.testing.assert_close(
                DDPM(schedule, prediction).denoise(net, x_t, when, labels), x0, rtol=0, atol=1e-9
            )
        assert net.calls[-1][1].tolist() == [time] * 3 and net.calls[-1][2] is labels


def test_zero_terminal_snr_needs_v():
    schedule = Schedule.linear(100).rescale_zero_terminal_snr()
    for prediction in ("eps", "x0"):
        with pytest.raises(ValueError, match="prediction='v'"):
            DDPM(schedule, prediction)
        with pytest.raises(ConfigError, match="prediction=v"):
            ObjectiveConfig(zero_terminal_snr=True, prediction=prediction)
    x0, noise, _ = batch(2)
    for weighting in WEIGHTINGS:
        objective, last = DDPM(schedule, "v", weighting), torch.full((2,), 0.9999, dtype=torch.float64)
        assert objective.loss(Recorder(torch.zeros_like(x0)), x0, None, noise, last).isfinite().all()
    # at pure noise, v = -x_0
    torch.testing.assert_close(objective.denoise(Recorder(-x0), noise, torch.tensor(99.0)), x0)


def test_edm_scalings_match_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler, objective = diffusers.EDMEulerScheduler(sigma_data=0.6), EDM(sigma_data=0.6)
    x, output, _ = batch(3)
    for sigma in (0.002, 0.3, 1.0, 80.0):
        net = Recorder(output)
        ours = objective.denoise(net, x, torch.tensor(sigma, dtype=torch.float64))
        sigma = torch.tensor(sigma, dtype=torch.float64)
        torch.testing.assert_close(ours, scheduler.precondition_outputs(x, output, sigma), rtol=0, atol=1e-12)
        torch.testing.assert_close(net.calls[0][0], scheduler.precondition_inputs(x, sigma), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            net.calls[0][1], 1000 * scheduler.precondition_noise(sigma).expand(3), rtol=0, atol=1e-9
        )


def test_edm_network_sees_unit_variance_and_unit_weight():
    """The three demands that define the scalings (Karras et al. 2022, appendix B.6), with Gaussian data of deviation
    0.6.
    """
    rng, objective = torch.Generator().manual_seed(0), EDM(p_mean=0.3, p_std=0.9, sigma_data=0.6)
    x0, noise = torch.randn(2, 4, 1, 100, 500, generator=rng, dtype=torch.float64)
    x0 = 0.6 * x0
    u = torch.tensor([0.05, 0.4, 0.7, 0.99], dtype=torch.float64)
    sigma = torch.exp(torch.tensor(0.3 + 0.9 * norm.ppf(u)))
    c_skip, c_out, c_in, _ = (c.view(-1, 1, 1, 1) for c in objective.scalings(sigma))
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    target = (x0 - c_skip * x) / c_out
    for image in range(4):
        assert (c_in * x)[image].var().item() == pytest.approx(1, abs=0.03)
        assert target[image].var().item() == pytest.approx(1, abs=0.03)
    perfect = Recorder(target)
    assert objective.loss(perfect, x0, None, noise, u).max() < 1e-18
    torch.testing.assert_close(perfect.calls[0][0], c_in * x)  # so loss drew the sigma that scipy's quantile gives
    torch.testing.assert_close(perfect.calls[0][1], 250 * sigma.log())
    wrong = objective.loss(Recorder(target + 0.5), x0, None, noise, u)
    torch.testing.assert_close(wrong, torch.full((4,), 0.25, dtype=torch.float64))  # lambda c_out^2 = 1 at every sigma


def test_flow_velocity_points_from_data_to_noise():
    x0, noise, u = batch()
    objective, net = Flow(), Recorder(noise - x0)
    assert objective.loss(net, x0, None, noise, u).max() == 0
    t = u.view(-1, 1, 1, 1)
    torch.testing.assert_close(net.calls[0][0], x0 + t * (noise - x0))
    torch.testing.assert_close(net.calls[0][1], 1000 * u)
    assert objective.loss(Recorder(x0 - noise), x0, None, noise, u).min() > 1  # the opposite sign is wrong
    for time in (1.0, 0.3):
        x = (1 - time) * x0 + time * noise
        torch.testing.assert_close(objective.denoise(net, x, torch.tensor(time, dtype=torch.float64)), x0)


def test_flow_logit_normal_times():
    x0, noise, u = batch()
    net = Recorder(noise)
    Flow("logit_normal").loss(net, x0, None, noise, u)
    torch.testing.assert_close(net.calls[0][1], 1000 / (1 + torch.exp(-torch.tensor(norm.ppf(u)))))


OBJECTIVES = {
    "ddpm": lambda: DDPM(Schedule.linear(1000)),
    "ddpm_v": lambda: DDPM(Schedule.linear(1000), "v", "min_snr"),
    "edm": EDM,
    "flow": Flow,
    "flow_logit": lambda: Flow("logit_normal"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_float32_finite_and_differentiable_at_the_ends_of_u(name):
    """Float32 generators return exactly 0 about once in 17 million draws: no infinite sigma, no index T."""
    x0, noise, _ = batch(4, torch.float32)
    u = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    weight = torch.ones(1, requires_grad=True)
    net = Recorder(lambda x, time: (x * weight).bfloat16())  # as under autocast
    loss = OBJECTIVES[name]().loss(net, x0, torch.zeros(4, dtype=torch.int64), noise, u)
    assert loss.shape == (4,) and loss.dtype == torch.float32 and loss.isfinite().all()
    loss.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs() > 0
    x, time, _ = net.calls[0]
    assert time.dtype == torch.float32 and time.shape == (4,) and time.isfinite().all() and time.diff().min() >= 0
    if name.startswith("ddpm"):
        assert time.tolist() == [0, 0, 500, 999]
    x0_guess = OBJECTIVES[name]().denoise(net, x, torch.tensor(1.0))
    assert x0_guess.dtype == torch.float32 and x0_guess.shape == x0.shape


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_an_image_does_not_depend_on_its_batch(name):
    x0, noise, u = batch(4)
    objective, net = OBJECTIVES[name](), lambda x, time, labels: torch.sin(x) * time.view(-1, 1, 1, 1) / 1000
    together = objective.loss(net, x0, None, noise, u)
    apart = torch.cat([objective.loss(net, x0[i : i + 1], None, noise[i : i + 1], u[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_grids_fall_from_noise_to_data(name, steps):
    grid = OBJECTIVES[name]().grid(steps, SampleConfig())
    assert len(grid) == len(grid.time) == steps and len(grid.alpha) == len(grid.sigma) == steps + 1
    assert {grid.alpha.dtype, grid.sigma.dtype, grid.time.dtype} == {torch.float64}
    assert (grid.sigma / grid.alpha).diff().max() < 0 and (grid.sigma[:-1] > 0).all()
    assert grid.alpha[-1] == 1 and grid.sigma[-1] == 0


def test_grid_values():
    schedule, settings = Schedule.linear(1000), SampleConfig(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    ddpm, edm, flow = (objective.grid(4, settings) for objective in (DDPM(schedule), EDM(), Flow()))
    assert ddpm.time.tolist() == [999, 749, 499, 249]
    assert ddpm.alpha[1].item() ** 2 == pytest.approx(schedule.alpha_bar[749].item())
    assert DDPM(schedule).grid(1000, settings).time.tolist() == list(range(999, -1, -1))
    low, high = 0.01 ** (1 / 5), 50 ** (1 / 5)
    # Karras et al. 2022, eq. 5
    assert edm.sigma[:-1].tolist() == pytest.approx([(high + i / 3 * (low - high)) ** 5 for i in range(4)])
    assert edm.time.tolist() == edm.sigma[:-1].tolist() and edm.alpha.tolist() == [1] * 5
    assert flow.time.tolist() == [1, 0.75, 0.5, 0.25] and flow.alpha.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert EDM().grid(1, settings).sigma.tolist() == pytest.approx([50, 0])


def test_trailing_timesteps_match_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, timestep_spacing="trailing")
    for steps in (1, 2, 3, 7, 16, 30, 300, 600, 999, 1000):
        scheduler.set_timesteps(steps)
        assert DDPM(Schedule.linear(1000)).grid(steps, SampleConfig()).time.tolist() == scheduler.timesteps.tolist()


def test_build_objective_follows_the_config():
    ddpm = build_objective(
        ObjectiveConfig(schedule="cosine", timesteps=30, prediction="x0", weighting="min_snr", min_snr_gamma=3.0), 0.4
    )
    assert (len(ddpm.schedule), ddpm.prediction, ddpm.weighting, ddpm.gamma) == (30, "x0", "min_snr", 3.0)
    edm = build_objective(ObjectiveConfig(kind="edm", p_mean=-1.0, p_std=1.5), 0.4)
    assert (edm.p_mean, edm.p_std, edm.sigma_data) == (-1.0, 1.5, 0.4)
    assert build_objective(ObjectiveConfig(kind="edm", sigma_data=0.7), 0.4).sigma_data == 0.7
    assert (
        build_objective(ObjectiveConfig(kind="flow", flow_time="logit_normal"), 0.4).time_distribution == "logit_normal"
    )


def test_mistakes_are_value_errors():
    schedule = Schedule.linear(10)
    for mistake, match in [
        (lambda: DDPM(schedule, "noise"), "eps, x0 or v"),
        (lambda: DDPM(schedule, "eps", "snr"), "simple or min_snr"),
        (lambda: EDM(sigma_data=0.0), "sigma_data"),
        (lambda: Flow("normal"), "logit_normal"),
        (lambda: DDPM(schedule).grid(11, SampleConfig()), "timesteps=10"),
        (lambda: EDM().grid(0, SampleConfig()), "at least 1"),
        (lambda: Flow().grid(0, SampleConfig()), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            mistake()
    assert math.isfinite(EDM().grid(1, SampleConfig()).sigma[0])
