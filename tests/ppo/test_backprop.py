"""Gradients by hand against autograd's, one minibatch at a time and over a whole run."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch

from common.logging import read_metrics
from ppo.config import ModelConfig, TrainConfig
from ppo.data import Batch
from ppo.learning import objective
from ppo.learning.backprop import Backprop, can_backprop
from ppo.learning.distributions import distribution_for
from ppo.learning.objective import ppo_terms, total_loss
from ppo.model import ActorCritic
from tests.ppo.helpers import TIMING, config, train

SPACES = {"categorical": gym.spaces.Discrete(3), "gaussian": gym.spaces.Box(-1, 1, (2,))}
N = 40


def case(space: str, model: ModelConfig, seed: int = 0, **settings) -> tuple:
    """Two equal models in float64, one for each way, with random data in which ratios lie on both sides of the clip."""
    distribution = distribution_for(SPACES[space])
    torch.manual_seed(seed)
    ours = ActorCritic(model, (5,), distribution).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # away from a policy that is nearly uniform
    theirs = ActorCritic(model, (5,), distribution).double()
    theirs.load_state_dict(ours.state_dict())
    settings = TrainConfig(**{"entropy_weight": 0.03, "clip_value": 0.2, **settings})
    observations = torch.randn(N, 5, dtype=torch.float64)
    actions = torch.randint(0, 3, (N,)) if space == "categorical" else torch.randn(N, 2, dtype=torch.float64)
    log_prob, _ = distribution.log_prob_entropy(theirs(observations)[0].detach(), actions)
    batch = Batch(
        observations,
        actions,
        *[
            log_prob + 0.3 * torch.randn(N),
            theirs(observations)[1].detach() + 0.3 * torch.randn(N),
            torch.randn(N, dtype=torch.float64),
            torch.randn(N, dtype=torch.float64),
        ],
    )
    return Backprop(ours, distribution, settings), ours, theirs, distribution, settings, batch


def by_autograd(model, distribution, settings, batch, rows, clip):
    """Loss, means of the terms, and gradients by name, as the training loop computes them for other networks."""
    observations, actions, old_log_prob, old_values, advantages, returns = batch.select(rows)
    parameters, values = model(observations)
    log_prob, entropy = distribution.log_prob_entropy(parameters, actions)
    if settings.normalize_advantage and len(rows) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    terms = ppo_terms(
        log_prob, entropy, values, old_log_prob, old_values, advantages, returns, clip, settings.clip_value
    )
    loss = total_loss(terms, settings).mean()
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return loss.detach(), torch.stack([term.detach().mean() for term in terms]), gradients


def named_gradients(manual: Backprop, model: ActorCritic) -> dict[str, torch.Tensor]:
    """The parts of the one vector, by the names of the model's parameters."""
    found, start = {}, 0
    for name, parameter in model.named_parameters():
        found[name] = manual.weights.grad[start : (start := start + parameter.numel())].view_as(parameter)
    return found


@pytest.mark.parametrize(
    ("space", "activation", "hidden"), list(itertools.product(SPACES, ["tanh", "relu"], [(), (7,), (8, 6)]))
)
@pytest.mark.parametrize(
    "settings", [{}, {"clip_value": 0.0, "entropy_weight": 0.0}, {"normalize_advantage": False, "value_weight": 0.7}]
)
def test_gradients_equal_those_of_autograd(space, activation, hidden, settings):
    manual, ours, theirs, *rest = case(space, ModelConfig(hidden=hidden, activation=activation), **settings)
    rows = torch.randperm(N)[:24]
    loss, means = manual.gradients(*rest[2:], rows, clip=0.2)
    expected_loss, expected_means, expected = by_autograd(theirs, *rest, rows, clip=0.2)
    assert 0 < float(means[4]) < 1, "some ratios are clipped and some are not"
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(means, expected_means, rtol=1e-12, atol=1e-12)
    found = named_gradients(manual, ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert gradient.abs().max() > 0 or "log_std" in name


@pytest.mark.parametrize("space", SPACES)
def test_minibatch_of_one(space):
    manual, ours, theirs, *rest = case(space, ModelConfig(hidden=(7,)))
    rows = torch.tensor([11])
    manual.gradients(*rest[2:], rows, clip=0.2)
    *_, expected = by_autograd(theirs, *rest, rows, clip=0.2)
    for name, gradient in named_gradients(manual, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


def test_gradients_are_those_of_the_latest_minibatch_only():
    manual, _, _, *rest = case("gaussian", ModelConfig(hidden=(7,)))
    first, second = torch.arange(10), torch.arange(10, 40)
    manual.gradients(*rest[2:], second, clip=0.2)
    alone = manual.weights.grad.clone()
    manual.gradients(*rest[2:], first, clip=0.2)
    manual.gradients(*rest[2:], second, clip=0.2)
    assert torch.equal(manual.weights.grad, alone), "nothing is left over from the minibatch before"


@pytest.mark.parametrize("space", SPACES)
def test_the_weights_are_one_vector_and_the_models_own(space):
    manual, ours, theirs, *_ = case(space, ModelConfig(hidden=(8, 6)))
    x = np.random.default_rng(0).normal(size=(9, 5))
    with torch.no_grad():
        manual.weights.mul_(0.5)
        expected = theirs.act(torch.from_numpy(x))
        assert not torch.allclose(ours.act(torch.from_numpy(x)), expected)
        for parameter in theirs.parameters():
            parameter.mul_(0.5)
        expected = theirs.act(torch.from_numpy(x))
    torch.testing.assert_close(ours.act(torch.from_numpy(x)).detach(), expected)
    torch.testing.assert_close(manual.act(x), expected, msg="acting reads the same weights")
    ours.load_state_dict({name: 3 * value for name, value in theirs.state_dict().items()})
    torch.testing.assert_close(
        manual.act(x), ours.act(torch.from_numpy(x)).detach(), msg="loading a checkpoint reaches them"
    )


def test_what_it_cannot_do_is_left_to_autograd(tmp_path):
    cpu = torch.device("cpu")
    for space, model, able in (
        (SPACES["categorical"], ModelConfig(), True),
        (SPACES["categorical"], ModelConfig(shared=True), False),
        (gym.spaces.MultiDiscrete([2, 3]), ModelConfig(), False),
        (SPACES["gaussian"], ModelConfig(), True),
    ):
        distribution = distribution_for(space)
        net = ActorCritic(model, (5,), distribution)
        assert can_backprop(net, distribution, cpu, world=1) == able
        assert not can_backprop(net, distribution, cpu, world=2) and not can_backprop(
            net, distribution, torch.device("cuda"), world=1
        )
    squashed = distribution_for(SPACES["gaussian"], squash=True)
    assert not can_backprop(ActorCritic(ModelConfig(), (5,), squashed), squashed, cpu, world=1)


def test_asking_for_the_impossible_is_one_clear_line(tmp_path, capsys):
    assert train(config(tmp_path / "run", "train.backprop=manual", "model.shared=true")) == 2
    assert "train.backprop" in capsys.readouterr().err
    assert train(config(tmp_path / "other", "model.shared=true", "train.backprop=autograd")) == 0


def test_a_changed_objective_is_not_passed_over(tmp_path, monkeypatch, capsys):
    """What one reads is what runs: with another `objective.py` the gradient by hand is refused, autograd follows."""

    def unclipped(*args):
        log_prob, _, _, old_log_prob, _, advantages, *_ = args
        return original(*args)._replace(policy=-(((log_prob - old_log_prob).exp() * advantages) ** 3))

    original = objective.ppo_terms
    assert train(config(tmp_path / "before", "train.backprop=autograd")) == 0
    monkeypatch.setattr(objective, "ppo_terms", unclipped)
    assert train(config(tmp_path / "manual", "train.backprop=manual")) == 1
    err = capsys.readouterr().err
    assert "ppo/learning/objective.py" in err and "train.backprop=autograd" in err
    assert train(config(tmp_path / "autograd", "train.backprop=autograd")) == 0
    logged = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["policy_loss"] for name in ("before", "autograd")]
    assert logged[0] != logged[1]


def test_the_first_lines_of_a_run_say_who_computes_the_gradient(tmp_path, capsys):
    for kind, said in (("manual", "gradients by ppo/learning/backprop.py"), ("autograd", "gradients by autograd")):
        assert train(config(tmp_path / kind, f"train.backprop={kind}")) == 0
        assert said in capsys.readouterr().err


PENDULUM = ("env.id=Pendulum-v1", "model.activation=relu", "train.clip_value=0.1", "train.entropy_weight=0.01")


@pytest.mark.parametrize("extra", [(), PENDULUM])
def test_a_whole_run_is_the_same_either_way(tmp_path, extra):
    rows = {}
    for kind in ("autograd", "manual"):
        assert train(config(tmp_path / kind, "precision=fp64", f"train.backprop={kind}", *extra)) == 0
        rows[kind] = read_metrics(tmp_path / kind / "metrics.jsonl")
    assert len(rows["manual"]) == len(rows["autograd"]) > 3
    for mine, theirs in zip(rows["manual"], rows["autograd"], strict=True):
        for name in theirs.keys() - set(TIMING):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9, nan_ok=True), name
