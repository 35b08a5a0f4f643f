"""The DDPM noise schedule against diffusers, against a chain of single steps, and against Bayes' rule."""

import math

import pytest
import torch

from common.config import ConfigError
from diffusion.config import ObjectiveConfig
from diffusion.schedule import Schedule, build_schedule

T = 1000


def schedules() -> dict[str, Schedule]:
    return {
        "linear": Schedule.linear(T),
        "cosine": Schedule.cosine(T),
        "linear_zero": Schedule.linear(T).rescale_zero_terminal_snr(),
        "cosine_zero": Schedule.cosine(T).rescale_zero_terminal_snr(),
    }


def oracle(name: str):
    diffusers = pytest.importorskip("diffusers")
    beta_schedule = "linear" if name.startswith("linear") else "squaredcos_cap_v2"
    return diffusers.DDPMScheduler(T, beta_schedule=beta_schedule, rescale_betas_zero_snr=name.endswith("zero"))


@pytest.mark.parametrize("name", schedules())
def test_betas_and_alpha_bar_match_diffusers(name):
    ours, theirs = schedules()[name], oracle(name)
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", schedules())
def test_add_noise_and_velocity_match_diffusers(name):
    ours, theirs = schedules()[name], oracle(name)
    # compared above; theirs is float32, whose rounding alone moves sigma_0 by 4e-5
    theirs.alphas_cumprod = ours.alpha_bar
    x0, noise = torch.randn(2, 9, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 1, 2, 100, 500, 900, 997, 998, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=0, atol=1e-12)
    float32 = ours.add_noise(x0.float(), noise.float(), t).double()
    torch.testing.assert_close(float32, theirs.add_noise(x0, noise, t), rtol=0, atol=1e-6)


def test_betas_from_the_formulas():
    linear, cosine = Schedule.linear(5, 0.1, 0.3), Schedule.cosine(50)
    assert linear.betas.tolist() == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
    assert linear.alpha_bar[2].item() == pytest.approx(0.9 * 0.85 * 0.8)

    def f(t):
        return math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert [a.item() for a in cosine.alpha_bar[:-1]] == pytest.approx([f(t) / f(0) for t in range(1, 50)])
    assert cosine.betas[-1].item() == 0.999


def test_marginal_is_the_composition_of_single_steps():
    """Noising step by step, x' = sqrt(1 - beta) x + sqrt(beta) eps, must give the factor and variance that add_noise
    uses at once.
    """
    schedule = Schedule.cosine(20)
    factor, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        factor, variance = factor * math.sqrt(1 - beta), (1 - beta) * variance + beta
        assert schedule.alpha[t].item() == pytest.approx(factor, abs=1e-14)
        assert schedule.sigma[t].item() ** 2 == pytest.approx(variance, abs=1e-14)
        assert schedule.snr[t].item() == pytest.approx(factor**2 / variance)


@pytest.mark.parametrize("name", schedules())
def test_posterior_is_bayes_rule(name):
    """q(x_{t-1} | x_t, x_0) by completing the square in q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
    schedule = schedules()[name]
    x0, x_t = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    for t in (1, 2, 500, T - 1):
        beta, alpha_bar = schedule.betas[t], schedule.alpha_bar[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - alpha_bar)
        expected = ((1 - beta).sqrt() * x_t / beta + alpha_bar.sqrt() * x0 / (1 - alpha_bar)) / precision
        mean, variance, log_variance = schedule.posterior(x0.view(1, 1, 1, 1), x_t.view(1, 1, 1, 1), torch.tensor([t]))
        assert mean.item() == pytest.approx(expected.item(), rel=1e-9)
        assert variance.item() == pytest.approx(1 / precision.item(), rel=1e-9)
        assert log_variance.item() == pytest.approx(-precision.log().item(), rel=1e-9)


def test_posterior_at_time_zero_has_no_noise_and_a_finite_log_variance():
    schedule = Schedule.linear(T)
    x0, x_t = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance, log_variance = schedule.posterior(x0, x_t, torch.tensor([0, 0, 1]))
    # one step from the data, the posterior mean is the data
    torch.testing.assert_close(mean[:2], x0[:2], rtol=0, atol=1e-12)
    assert variance[:2].abs().max() == 0 and variance[2] > 0
    assert log_variance.isfinite().all() and (log_variance == log_variance[2]).all()  # t = 0 borrows the value of t = 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_zero_terminal_snr_keeps_the_start_and_ends_in_pure_noise(name):
    before, after = schedules()[name], schedules()[name + "_zero"]
    assert after.alpha_bar[-1] == 0 and after.snr[-1] == 0 and before.alpha_bar[-1] > 0
    assert after.alpha[0].item() == pytest.approx(before.alpha[0].item(), abs=1e-12)
    # alpha is an affine image of what it was
    ratio = after.alpha[:-1] - after.alpha[1:], before.alpha[:-1] - before.alpha[1:]
    torch.testing.assert_close(ratio[0] / ratio[0].sum(), ratio[1] / ratio[1].sum(), rtol=1e-6, atol=1e-12)


def test_tables_are_float64_and_results_have_the_dtype_of_the_images():
    schedule = Schedule(torch.full((10,), 0.1))
    for table in (
        "betas",
        "alphas",
        "alpha_bar",
        "alpha",
        "sigma",
        "snr",
        "posterior_variance",
        "posterior_log_variance",
    ):
        assert getattr(schedule, table).dtype == torch.float64 and getattr(schedule, table).shape == (10,)
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([0, 9])
    for result in (schedule.add_noise(x, x, t), schedule.velocity(x, x, t), *schedule.posterior(x, x, t)):
        assert result.dtype == torch.float32
    precise = schedule.add_noise(x.double() + 1, x.double(), t)[:, 0, 0, 0]
    assert torch.equal(precise, schedule.alpha[t])  # the float32 copies made above are not handed out for float64
    assert (schedule.sigma.diff() > 0).all() and (schedule.alpha.diff() < 0).all()


def test_build_schedule_follows_the_config():
    torch.testing.assert_close(build_schedule(ObjectiveConfig()).betas, Schedule.linear(1000).betas)
    torch.testing.assert_close(
        build_schedule(ObjectiveConfig(schedule="cosine", timesteps=30)).betas, Schedule.cosine(30).betas
    )
    assert build_schedule(ObjectiveConfig(zero_terminal_snr=True, prediction="v")).alpha_bar[-1] == 0
    for timesteps in (2, 10, 100, 1000, 4000):  # however few steps, little of the image is left at the end
        schedule = build_schedule(ObjectiveConfig(timesteps=timesteps))
        assert len(schedule) == timesteps and 0 < schedule.alpha[-1] < 0.04


def test_mistakes_are_value_errors():
    with pytest.raises(ConfigError, match="prediction=v"):
        ObjectiveConfig(zero_terminal_snr=True, prediction="eps")
    with pytest.raises(ValueError, match="two betas"):
        Schedule(torch.tensor([0.1]))
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        Schedule.linear(10, 0.1, 1.2)
