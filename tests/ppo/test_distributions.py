"""Distributions against torch.distributions and stable-baselines3; sampling; what the environment is given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from torch import distributions as td

from common.errors import ProjectError
from ppo.config import ModelConfig
from ppo.learning.distributions import (
    Categorical,
    Gaussian,
    MultiCategorical,
    PolicyHead,
    SquashedGaussian,
    distribution_for,
)
from ppo.model import ActorCritic

B = 64
BOX = spaces.Box(np.array([-2.0, -0.5, 0.0], np.float32), np.array([2.0, 3.0, 0.3], np.float32))
OPEN = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DISCRETE = [
    spaces.Discrete(5),
    spaces.Discrete(2, start=-1),
    spaces.Discrete(1),
    spaces.MultiDiscrete([3, 2, 4]),
    spaces.MultiDiscrete([3, 2], start=[-1, 10]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 3)),
]
ALL = [*DISCRETE, BOX, OPEN, spaces.Box(-1, 1, (2, 2), np.float64)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_categorical():
    ours, logits, actions = Categorical(spaces.Discrete(5)), normal(B, 5, scale=3), torch.arange(B) % 5
    theirs = td.Categorical(logits=logits)
    log_prob, entropy = ours.log_prob_entropy(logits, actions)
    close(log_prob, theirs.log_prob(actions))
    close(entropy, theirs.entropy())
    assert torch.equal(ours.mode(logits), theirs.mode)
    close(ours.log_prob_entropy(logits + 100, actions)[0], log_prob)  # a constant on all logits changes nothing


@pytest.mark.parametrize("space", [s for s in DISCRETE if not isinstance(s, spaces.Discrete)], ids=str)
def test_multi_categorical(space):
    """A sum of independent choices, each as torch has it."""
    ours = MultiCategorical(space)
    sizes = (
        space.nvec.flatten().tolist() if isinstance(space, spaces.MultiDiscrete) else [2] * int(np.prod(space.shape))
    )
    logits = normal(B, sum(sizes), scale=3)
    actions = torch.stack([torch.randint(n, (B,), generator=generator(i)) for i, n in enumerate(sizes)], dim=1)
    theirs = [td.Categorical(logits=part) for part in logits.split(sizes, dim=1)]
    log_prob, entropy = ours.log_prob_entropy(logits, actions)
    close(log_prob, sum(d.log_prob(actions[:, i]) for i, d in enumerate(theirs)))
    close(entropy, sum(d.entropy() for d in theirs))
    assert torch.equal(ours.mode(logits), torch.stack([d.mode for d in theirs], dim=1))


def test_multi_binary_is_bernoulli():
    logits, actions = normal(B, 4, scale=2), (normal(B, 4, seed=1) > 0).long()
    pairs = torch.stack([torch.zeros_like(logits), logits], dim=-1).flatten(1)  # log-odds as logits of 0 and 1
    log_prob, entropy = MultiCategorical(spaces.MultiBinary(4)).log_prob_entropy(pairs, actions)
    theirs = td.Independent(td.Bernoulli(logits=logits), 1)
    close(log_prob, theirs.log_prob(actions.double()))
    close(entropy, theirs.entropy())


def test_gaussian():
    ours, mean, log_std, noise = Gaussian(BOX), normal(B, 3), normal(B, 3, seed=1), normal(B, 3, seed=2)
    parameters, theirs = torch.cat([mean, log_std], dim=1), td.Independent(td.Normal(mean, log_std.exp()), 1)
    actions = ours.sample(parameters, noise)
    close(actions, mean + log_std.exp() * noise)
    log_prob, entropy = ours.log_prob_entropy(parameters, actions)
    close(log_prob, theirs.log_prob(actions))
    close(entropy, theirs.entropy())
    assert torch.equal(ours.mode(parameters), theirs.mean)


def test_squashed_gaussian_is_a_transformed_normal():
    ours, mean, log_std = SquashedGaussian(BOX), normal(B, 3), normal(B, 3, seed=1, scale=0.3)
    parameters = torch.cat([mean, log_std], dim=1)
    u = ours.sample(parameters, normal(B, 3, seed=2))
    theirs = td.Independent(
        td.TransformedDistribution(td.Normal(mean, log_std.exp()), td.TanhTransform(cache_size=1)), 1
    )
    log_prob, entropy = ours.log_prob_entropy(parameters, u)
    close(log_prob, theirs.log_prob(torch.tanh(u)), 1e-6)  # they take u back out of tanh(u)
    close(entropy, -log_prob)
    assert torch.equal(ours.mode(parameters), mean)


def test_squashed_gaussian_equals_stable_baselines3():
    """Its formula adds 1e-6 inside a logarithm, so only moderate u agree closely."""
    mean, log_std = normal(B, 3, scale=0.5).float(), normal(3, seed=1, scale=0.2).float() - 1
    theirs = SquashedDiagGaussianDistribution(3).proba_distribution(mean, log_std.expand(B, 3))
    u = td.Normal(mean, log_std.exp()).sample()
    ours, _ = SquashedGaussian(BOX).log_prob_entropy(torch.cat([mean, log_std.expand(B, 3)], dim=1), u)
    close(ours, theirs.log_prob(torch.tanh(u), u), 1e-4)
    theirs.epsilon = 0.0
    close(ours, theirs.log_prob(torch.tanh(u), u), 2e-5)


def test_squashed_density_integrates_to_one():
    """By quadrature over a = tanh(u) in (-1, 1)."""
    a = torch.linspace(-1, 1, 200_002, dtype=torch.float64)[1:-1]
    parameters = torch.tensor([0.4, -0.7], dtype=torch.float64).expand(len(a), 2)
    density = SquashedGaussian(spaces.Box(-1, 1, (1,))).log_prob_entropy(parameters, torch.atanh(a)[:, None])[0].exp()
    assert float(torch.trapezoid(density, a)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("squash", [False, True])
def test_entropy_is_the_mean_of_minus_log_prob(squash):
    """For both Gaussians, from many draws; the squashed one against a numerical integral."""
    ours, g = (SquashedGaussian if squash else Gaussian)(spaces.Box(-1, 1, (1,))), generator()
    parameters = torch.tensor([[0.3, -0.5]], dtype=torch.float64).expand(200_000, 2)
    u = ours.sample(parameters, ours.noise((200_000,), g).double())
    log_prob, entropy = ours.log_prob_entropy(parameters, u)
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    p = td.Normal(x.new_tensor(0.3), x.new_tensor(-0.5).exp()).log_prob(x)
    log_density = p - torch.log(1 / torch.cosh(x).square()) if squash else p
    expected = float(torch.trapezoid(-p.exp() * log_density, x))
    assert float(-log_prob.mean()) == pytest.approx(expected, abs=0.01)
    assert float(entropy.mean()) == pytest.approx(expected, abs=0.01 if squash else 1e-9)


@pytest.mark.parametrize("logits", [[0.0, 1.0, -1.0, 2.5, 0.3], [0.0, 0.0, 0.0, 0.0, 8.0], [5.0, 5.0, -20.0, 5.0, 5.0]])
def test_gumbel_sampling_has_the_frequencies_of_the_softmax(logits):
    ours, count = Categorical(spaces.Discrete(5)), 200_000
    parameters = torch.tensor(logits).expand(count, 5)
    found = torch.bincount(ours.sample(parameters, ours.noise((count,), generator())), minlength=5).numpy()
    expected = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy() * count
    likely = expected > 5
    assert stats.chisquare(found[likely], expected[likely] * found[likely].sum() / expected[likely].sum()).pvalue > 1e-3
    assert found[~likely].sum() <= 5


def test_multi_categorical_choices_are_independent():
    """The table of joint frequencies is the product of the two softmaxes."""
    ours, count = MultiCategorical(spaces.MultiDiscrete([2, 3])), 200_000
    logits = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.2])
    actions = ours.sample(logits.expand(count, 5), ours.noise((count,), generator()))
    table = torch.bincount(actions[:, 0] * 3 + actions[:, 1], minlength=6).numpy()
    expected = torch.outer(logits[:2].softmax(0), logits[2:].softmax(0)).flatten().double().numpy()
    assert stats.chisquare(table, expected / expected.sum() * count).pvalue > 1e-3


def test_gaussian_noise_is_standard_normal():
    noise = Gaussian(BOX).noise((20_000,), generator()).numpy()
    assert noise.shape == (20_000, 3)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03


def test_noise_is_finite_even_where_the_generator_gives_zero(monkeypatch):
    for value in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *shape, value=value, **_: torch.full(shape, value))
        assert torch.isfinite(Categorical(spaces.Discrete(3)).noise((2,), generator())).all()


@pytest.mark.parametrize("space", ALL, ids=str)
def test_shapes_and_reproducibility(space):
    ours = distribution_for(space)
    noise = ours.noise((7, B), generator())
    assert torch.equal(noise, ours.noise((7, B), generator())) and not torch.equal(
        noise, ours.noise((7, B), generator(1))
    )
    assert noise.shape == (7, B, *ours.noise_shape)
    parameters = normal(B, ours.num_parameters).float()
    actions = ours.sample(parameters, noise[0])
    assert actions.shape == (B, *ours.action_shape) and actions.dtype == (
        torch.int64 if ours.discrete else torch.float32
    )
    assert ours.mode(parameters).shape == actions.shape
    assert all(value.shape == (B,) for value in ours.log_prob_entropy(parameters, actions))


@pytest.mark.parametrize("squash", [False, True], ids=["plain", "squashed"])
@pytest.mark.parametrize("space", ALL, ids=str)
def test_the_environment_accepts_every_action(space, squash):
    if squash and (not isinstance(space, spaces.Box) or space is OPEN):
        return
    ours = distribution_for(space, squash)
    parameters = normal(B, ours.num_parameters, scale=4).float()
    for actions in (ours.sample(parameters, ours.noise((B,), generator())), ours.mode(parameters)):
        given = ours.to_env(actions.numpy())
        assert given.shape == (B, *space.shape)
        for action in given:
            assert space.contains(action if space.shape else int(action)), action


def test_every_action_can_be_drawn_and_start_is_added():
    for space, expected in ((spaces.Discrete(3, start=-1), {-1, 0, 1}), (spaces.Discrete(2, start=7), {7, 8})):
        ours = Categorical(space)
        drawn = ours.to_env(ours.sample(torch.zeros(500, ours.num_parameters), ours.noise((500,), generator())).numpy())
        assert set(drawn.tolist()) == expected
    space = spaces.MultiDiscrete([3, 2], start=[-1, 10])
    ours = MultiCategorical(space)
    drawn = ours.to_env(ours.sample(torch.zeros(500, 5), ours.noise((500,), generator())).numpy())
    assert {tuple(row) for row in drawn.tolist()} == {(a, b) for a in (-1, 0, 1) for b in (10, 11)}


def test_bounds_hold_for_awkward_numbers():
    """Stretching tanh to the bounds must not round past them."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=4000).astype(np.float32)
    high = (low + rng.exponential(size=4000) * 10 ** rng.uniform(-3, 3, size=4000)).astype(np.float32)
    space = spaces.Box(low, high)
    for distribution in (SquashedGaussian(space), Gaussian(space)):
        for u in (-50.0, -9.0, -1.0, 0.0, 1.0, 9.0, 50.0):
            action = distribution.to_env(np.full((1, 4000), u, dtype=np.float32))[0]
            assert action.dtype == np.float32
            assert (action >= low).all() and (action <= high).all()
    given = SquashedGaussian(space).to_env(np.stack([np.full(4000, u, dtype=np.float32) for u in (-50, 0, 50)]))
    np.testing.assert_allclose(given, np.stack([low, (low + high) / 2, high]), rtol=1e-5, atol=1e-5)


def test_an_action_is_clipped_only_after_it_was_scored():
    """The density is that of the draw; two draws beyond a bound are the same to the environment and not to the
    policy.
    """
    ours, parameters = Gaussian(BOX), torch.zeros(2, 6)
    actions = torch.tensor([[2.5, 0.0, 0.0], [4.0, 0.0, 0.0]])
    log_prob, _ = ours.log_prob_entropy(parameters, actions)
    close(log_prob, td.Independent(td.Normal(torch.zeros(2, 3), 1.0), 1).log_prob(actions), 1e-6)
    assert log_prob[0] > log_prob[1]
    kept = actions.numpy().copy()
    assert (ours.to_env(actions.numpy()) == [[2.0, 0, 0], [2.0, 0, 0]]).all()
    assert (actions.numpy() == kept).all(), "the stored action is left as it was"


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("space", [s for s in DISCRETE if s != spaces.Discrete(1)], ids=str)
def test_extreme_logits(space, size):
    ours = distribution_for(space)
    logits = torch.where(normal(B, ours.num_parameters) > 0, size, -size).float().requires_grad_()
    actions = ours.sample(logits, ours.noise((B,), generator()))
    log_prob, entropy = ours.log_prob_entropy(logits, torch.zeros_like(actions))
    assert (
        torch.isfinite(log_prob).all()
        and torch.isfinite(entropy).all()
        and (entropy >= 0).all()
        and (log_prob <= 0).all()
    )
    (log_prob.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("u", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
def test_squashed_gaussian_far_out(u):
    """log(1 - tanh(u)^2) tends to 2 log 2 - 2 |u|, where tanh itself has long become 1."""
    ours = SquashedGaussian(spaces.Box(-1, 1, (1,)))
    parameters = torch.tensor([[0.0, 0.0]], requires_grad=True)
    actions = torch.tensor([[u]], requires_grad=True)
    log_prob, entropy = ours.log_prob_entropy(parameters, actions)
    log_prob.backward()
    assert torch.isfinite(log_prob).all() and torch.isfinite(entropy).all()
    assert torch.isfinite(parameters.grad).all() and torch.isfinite(actions.grad).all()
    expected = -0.5 * u * u - 0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * abs(u)
    assert float(log_prob.detach()) == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_those_of_torch():
    logits = normal(B, 5).requires_grad_()
    actions = torch.arange(B) % 5
    for log_prob, entropy in (
        Categorical(spaces.Discrete(5)).log_prob_entropy(logits, actions),
        (td.Categorical(logits=logits).log_prob(actions), td.Categorical(logits=logits).entropy()),
    ):
        logits.grad = None
        (log_prob.sum() + 2 * entropy.sum()).backward()
        found, first = logits.grad.clone(), locals().get("found")
    close(found, first)
    p = normal(B, 6).requires_grad_()
    a = normal(B, 3, seed=1)
    ours = torch.autograd.grad(Gaussian(BOX).log_prob_entropy(p, a)[0].sum(), p)[0]
    theirs = torch.autograd.grad(td.Normal(p[:, :3], p[:, 3:].exp()).log_prob(a).sum(), p)[0]
    close(ours, theirs)


def test_head():
    """Deviations are parameters of their own for a Gaussian, the same in every state, and none otherwise."""
    head, features = PolicyHead(8, Gaussian(BOX), log_std=-0.7), normal(B, 8).float()
    out = head(features)
    assert out.shape == (B, 6) and head.linear.out_features == 3
    close(out[:, 3:], torch.full((B, 3), -0.7))
    out[:, 3:].sum().backward()
    close(head.log_std.grad, torch.full((3,), float(B)))
    assert PolicyHead(8, Categorical(spaces.Discrete(4)), 0.0).log_std is None
    model = ActorCritic(ModelConfig(log_std=-1.0), (4,), Gaussian(BOX))
    assert "policy.log_std" in model.state_dict() and model.act(torch.zeros(2, 4)).shape == (2, 6)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Discrete(2)}),
        spaces.Tuple((spaces.Discrete(2),)),
        spaces.Text(3),
        spaces.Box(0, 5, (2,), np.int64),
        spaces.Sequence(spaces.Discrete(2)),
    ],
    ids=str,
)
def test_spaces_without_a_policy(space):
    with pytest.raises(ProjectError, match=r"^action space .* is not supported: Discrete, MultiDiscrete") as caught:
        distribution_for(space)
    assert "\n" not in str(caught.value)


def test_squashing_needs_bounds():
    with pytest.raises(ProjectError, match="finite bounds"):
        distribution_for(OPEN, squash=True)
    assert isinstance(distribution_for(BOX, squash=True), SquashedGaussian)
    assert type(distribution_for(BOX)) is Gaussian
