"""Shapes, sizes, initial weights, and that the three ways to call the networks agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from torch import nn

from ppo.config import ModelConfig
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic, NatureCNN, mlp

SPACES = [spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(4), spaces.Box(-1, 1, (2,))]
PARAMETERS = [3, 5, 8, 4]


def build(space: spaces.Space = SPACES[0], shape: tuple[int, ...] = (5,), **settings) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(ModelConfig(**settings), shape, distribution_for(space))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pixels(n: int = 2, channels: int = 4, size: int = 84) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("space", "numbers"), list(zip(SPACES, PARAMETERS)), ids=map(str, SPACES))
def test_shapes_and_agreement(space, numbers, shared):
    model, x = build(space, shared=shared), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    parameters, values = model(x)
    assert parameters.shape == (7, numbers) and values.shape == (7,)
    assert torch.equal(model.act(x), parameters) and torch.equal(model.evaluate(x), values)
    assert model.act(x[:1]).shape == (1, numbers) and model.evaluate(x[:1]).shape == (1,)
    torch.testing.assert_close(model.evaluate(x[:1]), values[:1])


@pytest.mark.parametrize("shared", [False, True])
def test_trunks(shared):
    """Separate ones have nothing in common: the loss of one leaves the other without a gradient."""
    model, x = build(shared=shared), torch.randn(7, 5)
    assert (model.critic_trunk is None) == shared
    model.evaluate(x).sum().backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == ({"actor_trunk", "value"} if shared else {"critic_trunk", "value"})
    model.zero_grad(set_to_none=True)
    model.act(x).sum().backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"actor_trunk", "policy"}


def test_sizes():
    """(in + 1) out for each layer."""
    trunk = 6 * 64 + 65 * 64
    assert count(build()) == 2 * trunk + 65 * 3 + 65
    assert count(build(shared=True)) == trunk + 65 * 3 + 65
    assert count(build(hidden=(10, 20, 30))) == 2 * (6 * 10 + 11 * 20 + 21 * 30) + 31 * 3 + 31
    assert count(build(hidden=())) == 6 * 3 + 6, "no hidden layer: linear in the observation"
    assert count(build(SPACES[3])) == 2 * trunk + 65 * 2 + 2 + 65


@pytest.mark.parametrize(("activation", "kind"), [("tanh", nn.Tanh), ("relu", nn.ReLU)])
def test_layers(activation, kind):
    network = mlp([5, 8, 3], activation)
    layers = list(network)
    assert [type(layer) for layer in layers] == [nn.Linear, kind, nn.Linear, kind]
    x = torch.randn(4, 5)
    f = torch.tanh if activation == "tanh" else torch.relu
    expected = f(f(x @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias)
    torch.testing.assert_close(network(x), expected)


def gain(weight: torch.Tensor) -> float:
    """g of a matrix whose shorter side is orthogonal with length g; fails for any other."""
    matrix = weight.detach().flatten(1).double()
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    g = math.sqrt(float(gram[0, 0]))
    torch.testing.assert_close(
        gram, g * g * torch.eye(len(gram), dtype=torch.float64), atol=1e-5 * max(g * g, 1e-6), rtol=0
    )
    return g


@pytest.mark.parametrize(
    "settings", [{}, {"shared": True}, {"hidden": (16, 64, 8), "activation": "relu"}, {"kind": "cnn"}], ids=str
)
@pytest.mark.parametrize("space", [SPACES[0], SPACES[3]], ids=str)
def test_orthogonal_gains(settings, space):
    model = build(space, (4, 84, 84) if "kind" in settings else (5,), **settings)
    special = {"policy.linear": 0.01, "value": 1.0}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(special) < set(layers)
    for name, layer in layers.items():
        assert gain(layer.weight) == pytest.approx(special.get(name, math.sqrt(2)), rel=1e-4), name
        assert (layer.bias == 0).all(), name


def test_initial_policy_is_close_to_uniform():
    x = torch.randn(100, 5) * 3
    p = build().act(x).softmax(dim=1)
    assert (p - 1 / 3).abs().max() < 0.01
    plain = build(orthogonal=False)
    assert (plain.act(x).softmax(dim=1) - 1 / 3).abs().max() > 0.05, "PyTorch's own initial weights, when asked for"
    with pytest.raises(AssertionError):
        gain(plain.actor_trunk[0].weight)


def test_initial_deviation():
    model = build(SPACES[3], log_std=-0.5)
    assert model.policy.log_std.tolist() == [-0.5, -0.5]
    assert torch.equal(model.act(torch.zeros(1, 5)), torch.tensor([[0, 0, -0.5, -0.5]]))


def test_nature_cnn_has_the_size_of_the_paper():
    """Mnih et al. 2015, Methods: 32 filters 8 x 8 stride 4, 64 of 4 x 4 stride 2, 64 of 3 x 3 stride 1, 512 rectifier
    units.

    On 84 x 84 that leaves maps of 20, 9 and 7 pixels a side. With one linear output for each of four actions:
    1,686,180.
    """
    convolutions = (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64
    trunk = convolutions + (64 * 7 * 7 + 1) * 512
    assert count(NatureCNN(4, 84, 84)) == trunk == 1_684_128
    assert trunk + 513 * 4 == 1_686_180
    assert count(build(spaces.Discrete(4), (4, 84, 84), kind="cnn")) == 1_686_180 + 513
    sizes, x = [], torch.zeros(1, 4, 84, 84)
    for layer in NatureCNN(4, 84, 84).body:
        x = layer(x)
        sizes += [tuple(x.shape[1:])] if isinstance(layer, nn.Conv2d) else []
    assert sizes == [(32, 20, 20), (64, 9, 9), (64, 7, 7)]


def test_nature_cnn_equals_stable_baselines3():
    """Same weights, same pixels: features, policy and value."""
    box, actions = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)
    theirs, ours = ActorCriticCnnPolicy(box, actions, lambda _: 1e-3), build(actions, (4, 84, 84), kind="cnn")
    cnn, state = theirs.features_extractor, ours.state_dict()
    for i in (0, 2, 4):
        cnn.cnn[i].load_state_dict({kind: state[f"actor_trunk.body.{i}.{kind}"] for kind in ("weight", "bias")})
    cnn.linear[0].load_state_dict({kind: state[f"actor_trunk.last.{kind}"] for kind in ("weight", "bias")})
    theirs.action_net.load_state_dict({kind: state[f"policy.linear.{kind}"] for kind in ("weight", "bias")})
    theirs.value_net.load_state_dict({kind: state[f"value.{kind}"] for kind in ("weight", "bias")})
    x = pixels(3)
    with torch.no_grad():
        torch.testing.assert_close(ours.actor_trunk(x), cnn(x.float() / 255), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.act(x).softmax(dim=1), theirs.get_distribution(x).distribution.probs, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(ours.evaluate(x), theirs.predict_values(x).flatten(), rtol=1e-4, atol=1e-5)


def test_pixels_are_bytes_scaled_to_one():
    model = build(SPACES[0], (4, 84, 84), kind="cnn")
    assert model.critic_trunk is None, "pixels share a trunk whatever the config says"
    x = pixels()
    parameters, values = model(x)
    assert parameters.shape == (2, 3) and values.shape == (2,) and parameters.dtype == torch.float32
    torch.testing.assert_close(model.evaluate(x.float()), values)
    assert torch.equal(model.act(x), parameters) and torch.equal(model.evaluate(x), values)
    (parameters.sum() + values.sum()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 36, 36), (3, 96, 96), (4, 64, 100)])
def test_other_sizes_of_images(channels, height, width):
    x = torch.zeros(2, channels, height, width, dtype=torch.uint8)
    assert NatureCNN(channels, height, width)(x).shape == (2, 512)


def test_double_precision_follows_the_weights():
    model = build(SPACES[0], (4, 84, 84), kind="cnn").double()
    assert model.act(pixels()).dtype == model.evaluate(pixels()).dtype == torch.float64


def test_equal_seeds_equal_weights():
    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(1)
    other = ActorCritic(ModelConfig(), (5,), distribution_for(SPACES[0]))
    assert not torch.equal(first.actor_trunk[0].weight, other.actor_trunk[0].weight)
