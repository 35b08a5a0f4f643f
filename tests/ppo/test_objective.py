"""The clipped objective by hand, and a whole minibatch against stable-baselines3's own training step with copied
weights.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import explained_variance as their_explained_variance
from torch import distributions as td

from ppo.config import ModelConfig, TrainConfig
from ppo.distributions import Categorical, Gaussian, distribution_for
from ppo.gradients import normalized
from ppo.model import ActorCritic
from ppo.objective import explained_variance, ppo_terms, total_loss

ALONE = SimpleNamespace(world=1)
# ratio, advantage: inside the clip (eps = .2), above it and below it, with both signs; the last two on its edges
RATIO = [1.0, 1.1, 0.9, 1.5, 1.5, 0.5, 0.5, 1.05, 0.95, 1.2, 0.8]
ADVANTAGE = [1.0, -2.0, 3.0, 2.0, -2.0, 2.0, -2.0, 0.0, -1.0, 1.0, -1.0]
# whether the policy's gradient flows; undefined on an edge
FREE = [True, True, True, False, True, True, False, True, True]


def minibatch() -> dict[str, torch.Tensor]:
    n = len(RATIO)
    g = torch.Generator().manual_seed(0)
    old_log_prob = -torch.rand(n, generator=g, dtype=torch.float64) - 1
    values, old_values, returns, entropy = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(4))
    return {
        "log_prob": (old_log_prob + torch.tensor(RATIO, dtype=torch.float64).log()).requires_grad_(),
        "entropy": entropy.abs(),
        "values": values.requires_grad_(),
        "old_log_prob": old_log_prob,
        "old_values": old_values,
        "advantages": torch.tensor(ADVANTAGE, dtype=torch.float64),
        "returns": returns,
    }


def by_hand(batch: dict[str, torch.Tensor], clip: float, clip_value: float) -> dict[str, list[float]]:
    """Case by case, sample by sample, in plain numbers."""
    found: dict[str, list[float]] = {name: [] for name in ("policy", "value", "entropy", "kl", "clipped")}
    for row in zip(*(value.detach().tolist() for value in batch.values()), strict=True):
        log_prob, entropy, value, old_log_prob, old_value, advantage, target = row
        ratio = math.exp(log_prob) / math.exp(old_log_prob)
        if advantage >= 0:  # to make it more likely pays up to 1 + eps
            gain = advantage * (ratio if ratio < 1 + clip else 1 + clip)
        else:  # to make it less likely pays down to 1 - eps
            gain = advantage * (ratio if ratio > 1 - clip else 1 - clip)
        error = (value - target) ** 2 / 2
        if clip_value:
            step = max(-clip_value, min(clip_value, value - old_value))
            error = max(error, (old_value + step - target) ** 2 / 2)
        for name, number in zip(
            found, (-gain, error, entropy, ratio - 1 - math.log(ratio), float(abs(ratio - 1) > clip))
        ):
            found[name].append(number)
    return found


@pytest.mark.parametrize("clip", [0.2, 0.05, 0.6])
@pytest.mark.parametrize("clip_value", [0.0, 0.3, 5.0])
def test_terms_equal_a_hand_calculation(clip, clip_value):
    batch = minibatch()
    terms, expected = ppo_terms(**batch, clip=clip, clip_value=clip_value), by_hand(batch, clip, clip_value)
    edge = [abs(abs(ratio - 1) - clip) < 1e-9 for ratio in RATIO]
    for name in expected:
        found = getattr(terms, name).detach().numpy()
        assert found.shape == (len(RATIO),)
        rows = ~np.array(edge) if name == "clipped" else slice(None)  # on the edge itself rounding decides
        np.testing.assert_allclose(found[rows], np.array(expected[name])[rows], rtol=1e-12, atol=1e-12, err_msg=name)
    assert not (terms.kl.requires_grad or terms.clipped.requires_grad), "only watched"


def test_total_loss_by_hand():
    batch = minibatch()
    terms, expected = ppo_terms(**batch, clip=0.2, clip_value=0.3), by_hand(batch, 0.2, 0.3)
    found = total_loss(terms, TrainConfig(value_weight=0.7, entropy_weight=0.03))
    by_name = {name: np.array(numbers) for name, numbers in expected.items()}
    np.testing.assert_allclose(
        found.detach(), by_name["policy"] + 0.7 * by_name["value"] - 0.03 * by_name["entropy"], rtol=1e-12
    )


def test_gradient_of_the_policy_stops_where_clipped_unfavourably():
    """Beyond the clip in the direction that the advantage asks for: zero. Elsewhere -A ratio, also far on the other
    side.
    """
    batch = minibatch()
    ppo_terms(**batch, clip=0.2, clip_value=0.0).policy.sum().backward()
    found = batch["log_prob"].grad.numpy()
    for i, free in enumerate(FREE):
        assert found[i] == pytest.approx(-ADVANTAGE[i] * RATIO[i] if free else 0.0, abs=1e-12), (RATIO[i], ADVANTAGE[i])
    assert not any(free for free, ratio, a in zip(FREE, RATIO, ADVANTAGE) if a * (ratio - 1) > 0.2 * abs(a) + 1e-9)


def test_gradient_equals_a_finite_difference():
    batch, h = minibatch(), 1e-6
    keep = slice(0, len(FREE))  # off the edges
    batch = {name: value.detach()[keep] for name, value in batch.items()}
    for clip_value in (0.0, 0.3):
        for name in ("log_prob", "values"):
            x = batch[name].clone().requires_grad_()
            weights = TrainConfig(value_weight=0.7)
            total_loss(ppo_terms(**{**batch, name: x}, clip=0.2, clip_value=clip_value), weights).sum().backward()
            up, down = (
                total_loss(ppo_terms(**{**batch, name: batch[name] + s * h}, clip=0.2, clip_value=clip_value), weights)
                for s in (1, -1)
            )
            torch.testing.assert_close(x.grad, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


def test_first_epoch_is_the_plain_policy_gradient():
    """With ratio 1 the gradient of the objective is -A grad log pi."""
    batch = minibatch()
    batch["old_log_prob"] = batch["log_prob"].detach()
    terms = ppo_terms(**batch, clip=0.2, clip_value=0.0)
    terms.policy.sum().backward()
    torch.testing.assert_close(batch["log_prob"].grad, -batch["advantages"])
    assert (terms.kl == 0).all() and (terms.clipped == 0).all()


@pytest.mark.parametrize("clip_value", [0.0, 0.2])
def test_gradient_of_the_value(clip_value):
    """V moved from 0 towards R = 1 or away from it: past the limit in the right direction nothing pulls, in the
    wrong one all does.
    """
    values = torch.tensor([0.1, 0.5, -0.1, -0.5], requires_grad=True)
    zero, one = torch.zeros(4), torch.ones(4)
    ppo_terms(zero, zero, values, zero, zero, one, one, 0.2, clip_value).value.sum().backward()
    pulls = (values.detach() - 1).tolist()
    assert values.grad.tolist() == pytest.approx([pulls[0], 0.0 if clip_value else pulls[1], pulls[2], pulls[3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_is_never_negative(dtype):
    """Not by rounding either, for steps of any size, and right for tiny ones: x^2 / 2."""
    sizes = torch.logspace(-20, 1, 2001, dtype=dtype)
    log_ratio = torch.cat([-sizes, torch.zeros(1, dtype=dtype), sizes])
    zero = torch.zeros_like(log_ratio)
    kl = ppo_terms(log_ratio, zero, zero, zero, zero, zero, zero, 0.2, 0.0).kl
    assert (kl >= 0).all() and float(kl[2001]) == 0.0 and (kl[log_ratio.abs() > 1e-3] > 0).all()
    small = (log_ratio.abs() > 1e-3) & (log_ratio.abs() < 1e-2)
    torch.testing.assert_close(kl[small], log_ratio[small].square() / 2, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("step", [0.02, 0.1])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_kl_is_close_to_the_true_one_for_small_steps(kind, step):
    """Mean over actions that the old policy drew, against KL(old || new) in closed form."""
    g, count = torch.Generator().manual_seed(0), 400_000
    if kind == "categorical":
        ours = Categorical(spaces.Discrete(4))
        old = torch.tensor([0.3, -0.2, 0.8, 0.0], dtype=torch.float64)
        new = old + step * torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
        true = td.kl_divergence(td.Categorical(logits=old), td.Categorical(logits=new))
    else:
        ours = Gaussian(spaces.Box(-1, 1, (2,)))
        old = torch.tensor([0.3, -0.2, -0.5, 0.1], dtype=torch.float64)
        new = old + step * torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
        true = td.kl_divergence(*(td.Independent(td.Normal(p[:2], p[2:].exp()), 1) for p in (old, new)))
    actions = ours.sample(old.expand(count, -1), ours.noise((count,), g).double())
    old_log_prob, log_prob = (ours.log_prob_entropy(p.expand(count, -1), actions)[0] for p in (old, new))
    zero = torch.zeros(count, dtype=torch.float64)
    kl = ppo_terms(log_prob, zero, zero, old_log_prob, zero, zero, zero, 0.2, 0.0).kl
    assert float(kl.mean()) == pytest.approx(float(true), rel=0.03)


def test_explained_variance():
    g = np.random.default_rng(0)
    returns = g.normal(size=500) * 3 + 10
    for noise in (0.0, 1.0, 5.0):
        values = returns + noise * g.normal(size=500)
        found = float(explained_variance(torch.from_numpy(values), torch.from_numpy(returns)))
        assert found == pytest.approx(1 - np.var(returns - values) / np.var(returns), abs=1e-12)
        assert found == pytest.approx(float(their_explained_variance(values, returns)), abs=1e-12)
    R = torch.from_numpy(returns)
    assert float(explained_variance(R, R)) == 1.0
    assert float(explained_variance(R + 7, R)) == pytest.approx(1.0), "a constant error is not a matter of variance"
    assert float(explained_variance(torch.full_like(R, R.mean()), R)) == pytest.approx(0.0, abs=1e-12)
    assert float(explained_variance(2 * R.mean() - R, R)) == pytest.approx(-3.0)
    assert torch.isnan(explained_variance(R, torch.ones_like(R)))


def test_normalized_advantages():
    """Of a minibatch: zero mean, unit variance; of one row or of equal rows: nothing infinite."""
    a = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 + 3
    found = normalized(a, 50, ALONE)
    torch.testing.assert_close(found, (a - a.mean()) / (a.std() + 1e-8))
    assert float(normalized(torch.tensor([5.0]), 1, ALONE)) == 5.0
    assert (normalized(torch.full((4,), 2.0), 4, ALONE) == 0).all()


def names(our: ActorCritic, their: torch.nn.Module) -> dict[str, str]:
    """Our parameter names -> theirs."""
    pairs = {
        "policy.linear": "action_net",
        "value": "value_net",
        "actor_trunk": "mlp_extractor.policy_net",
        "critic_trunk": "mlp_extractor.value_net",
    }
    found = {"policy.log_std": "log_std"} if "policy.log_std" in our.state_dict() else {}
    for name in our.state_dict():
        for a, b in pairs.items():
            if name.startswith(a + "."):
                found[name] = b + name.removeprefix(a)
    assert set(found) == set(our.state_dict()) and set(found.values()) == set(their.state_dict())
    return found


class Fixed(gym.Env):
    """Only its spaces matter."""

    def __init__(self, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (6,)), action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(6, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(6, dtype=np.float32), 0.0, False, False, {}


def peer(space, settings: TrainConfig, rows: int) -> PPO:
    """stable-baselines3's PPO with our settings, for one minibatch of so many rows."""
    theirs = PPO(
        "MlpPolicy",
        Fixed(space),
        n_steps=rows,
        batch_size=rows,
        n_epochs=1,
        learning_rate=settings.lr,
        clip_range=settings.clip,
        ent_coef=settings.entropy_weight,
        vf_coef=settings.value_weight / 2,
        max_grad_norm=settings.max_grad_norm,
        normalize_advantage=settings.normalize_advantage,
        device="cpu",
        seed=0,
        policy_kwargs={"net_arch": [32, 16], "ortho_init": False},
    )
    theirs.set_logger(configure(None, []))
    return theirs


def same_figures(loss: torch.Tensor, terms, logged: dict[str, float]) -> None:
    """Our loss and terms are what the peer has logged of its update."""
    for ours, name in (
        (loss, "loss"),
        (terms.policy.mean(), "policy_gradient_loss"),
        (2 * terms.value.mean(), "value_loss"),
        (-terms.entropy.mean(), "entropy_loss"),
        (terms.kl.mean(), "approx_kl"),
        (terms.clipped.mean(), "clip_fraction"),
    ):
        assert float(ours.detach()) == pytest.approx(float(logged[f"train/{name}"]), rel=1e-5, abs=1e-6), name


def fill(buffer, **columns: torch.Tensor) -> None:
    """Put rows of our own into its rollout buffer, as if it had just played them."""
    for name, value in columns.items():
        array = getattr(buffer, name)
        setattr(buffer, name, value.numpy().reshape(array.shape).astype(array.dtype))
    buffer.pos, buffer.full, buffer.generator_ready = len(columns["values"]), True, False


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), spaces.Box(-1, 1, (2,))], ids=str)
def test_an_update_equals_that_of_stable_baselines3(space, normalize, rows=48):
    """Their own `train` on a buffer filled with our rows, weights copied: the loss, every gradient, and the weights
    after Adam's step.
    """
    settings = TrainConfig(
        value_weight=0.8, entropy_weight=0.02, lr=3e-3, clip=0.2, max_grad_norm=0.5, normalize_advantage=normalize
    )
    theirs = peer(space, settings, rows)
    distribution = distribution_for(space)
    model = ActorCritic(ModelConfig(hidden=(32, 16)), (6,), distribution)
    pairs, state = names(model, theirs.policy), theirs.policy.state_dict()
    model.load_state_dict({name: state[other].clone() for name, other in pairs.items()})
    model_before = {name: value.clone() for name, value in model.state_dict().items()}

    g = torch.Generator().manual_seed(1)
    observations = torch.randn(rows, 6, generator=g) * 2
    old_values, advantages, returns = (torch.randn(rows, generator=g) for _ in range(3))
    with torch.no_grad():
        parameters = model.act(observations)
        actions = distribution.sample(parameters, distribution.noise((rows,), g))
        log_prob, _ = distribution.log_prob_entropy(parameters, actions)
        old_log_prob = log_prob + 0.3 * torch.randn(rows, generator=g)  # ratios on both sides of the clip
    fill(
        theirs.rollout_buffer,
        observations=observations,
        actions=actions.view(rows, -1),
        values=old_values,
        log_probs=old_log_prob,
        advantages=advantages,
        returns=returns,
    )
    theirs.train()
    logged = theirs.logger.name_to_value

    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, eps=settings.adam_eps)
    parameters, values = model(observations)
    log_prob, entropy = distribution.log_prob_entropy(parameters, actions)
    scaled = normalized(advantages, rows, ALONE) if normalize else advantages
    terms = ppo_terms(
        log_prob, entropy, values, old_log_prob, old_values, scaled, returns, settings.clip, settings.clip_value
    )
    loss = total_loss(terms, settings).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()

    assert 0.2 < float(terms.clipped.mean()) < 0.8
    same_figures(loss, terms, logged)
    gradients = {name: p.grad for name, p in theirs.policy.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[pairs[name]], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        torch.testing.assert_close(p, theirs.policy.get_parameter(pairs[name]), rtol=1e-4, atol=2e-5)
    assert any(not torch.equal(p, model_before[name]) for name, p in model.named_parameters())
