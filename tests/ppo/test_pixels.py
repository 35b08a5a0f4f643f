"""Pixels: sizes of pictures, bfloat16 in the convolutions and nowhere else, and values that are computed once."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from common.config import ConfigError, resolve
from ppo.config import Config, EnvConfig, ModelConfig
from ppo.data import learning_batch
from ppo.environments.registry import make_vector
from ppo.learning.distributions import distribution_for
from ppo.learning.gradients import Autograd
from ppo.model import ActorCritic
from tests.helpers import ROOT, same, stop_in_check
from tests.ppo.helpers import collector_for, config, evaluate, log, train, weights

SMALL_PONG = (
    "env.id=ALE/Pong-v5",
    "env.image_size=42",
    "env.threads=1",
    "model.kind=cnn",
    "env.count=2",
    "train.rollout=8",
    "train.steps=32",
    "train.batch_size=8",
    "train.epochs=1",
)
CPU = torch.device("cpu")


def pixels(count: int = 6, size: int = 42) -> torch.Tensor:
    """Random pictures uint8 (count, 4, size, size)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 4, size, size), dtype=torch.uint8, generator=generator)


def twins(size: int = 42) -> tuple[ActorCritic, ActorCritic]:
    """The same weights, computing in fp32 and in bf16."""
    distribution = distribution_for(gym.spaces.Discrete(6))
    plain, half = (ActorCritic(ModelConfig(kind="cnn"), (4, size, size), distribution, bf16) for bf16 in (False, True))
    half.load_state_dict(plain.state_dict())
    return plain, half


@pytest.mark.parametrize("size", [36, 42, 64, 84])
def test_games_are_drawn_as_large_as_asked(size):
    vector = make_vector(EnvConfig("ALE/Pong-v5", image_size=size), 0, 2)
    seen = vector.reset()
    assert vector.observation_space.shape == (4, size, size)
    assert seen.shape == (2, 4, size, size)
    assert seen.dtype == np.uint8
    vector.close()


def test_games_do_not_depend_on_threads():
    def played(threads):
        vector = make_vector(EnvConfig("ALE/Pong-v5", threads=threads), 0, 3)
        vector.reset()
        random = np.random.default_rng(0)
        found = [vector.step(random.integers(0, 6, 3)).observations.copy() for _ in range(30)]
        vector.close()
        return np.stack(found)

    np.testing.assert_array_equal(played(1), played(2))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("env.image_size=35",), "env.image_size"),
        (("env.threads=-1",), "env.threads"),
        (("precision=bf16",), "precision"),
    ],
)
def test_bad_settings_name_their_key(words, key, tmp_path):
    """bf16 is refused where there is no convolutional network."""
    with pytest.raises(ConfigError) as error:
        config(tmp_path, *words)
    assert key in str(error.value)


def test_bf16_stays_within_the_convolutional_trunk():
    """Features are rounded to bfloat16; the heads, the weights and their gradients are float32 to the last bit."""
    plain, half = twins()
    features = half.actor_trunk(pixels())
    parameters, values = half(pixels())
    assert features.dtype == parameters.dtype == values.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float()), "the trunk ends in bfloat16"
    assert torch.equal(values, half.value(features).squeeze(-1)), "the head is float32"
    assert not torch.equal(values, values.bfloat16().float())
    wanted, wanted_values = plain(pixels())
    torch.testing.assert_close(parameters, wanted, rtol=0.05, atol=2e-3)
    torch.testing.assert_close(values, wanted_values, rtol=0.05, atol=2e-2)
    for model in (plain, half):
        (model(pixels())[1].square().mean()).backward()
    for (name, a), b in zip(plain.actor_trunk.named_parameters(), half.actor_trunk.parameters(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("number", [0, 1])
def test_the_network_leaves_its_input_alone(number, kind):
    """It divides a copy by 255, of bytes and of numbers alike."""
    model, seen = twins()[number], pixels().to(kind)
    kept = seen.clone()
    model(seen)
    assert torch.equal(seen, kept)


def learner_of(made, model, vector):
    """What training acts and learns with, on one CPU."""
    run = SimpleNamespace(world=1, device=CPU, prepare=lambda model: model)
    return Autograd(made, model, distribution_for(vector.action_space), run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_values_of_the_collection_are_those_of_a_second_pass(precision, tmp_path):
    """T + 1 passes of N rows are kept; without them the same numbers come from reading the rollout again."""
    made = config(tmp_path / "run", *SMALL_PONG, f"precision={precision}", "train.rollout=12")
    vector = make_vector(made.env, 0, 2)
    collector, model = collector_for(made, vector)
    model.actor_trunk.bf16 = precision == "bf16"
    with torch.no_grad():
        model.policy.linear.weight.mul_(100)  # far from uniform, so that log-probabilities say something
    learner = learner_of(made, model, vector)
    rollout = collector.collect(learner.act, torch.Generator().manual_seed(1), learner.look)
    assert len(rollout.passes) == 13
    kept = learning_batch(rollout, model, collector.distribution, made.train, CPU)
    rollout.passes = []
    again = learning_batch(rollout, model, collector.distribution, made.train, CPU)
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for one, other in zip(kept[2:], again[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert not one.is_inference()
    collector.collect(learner.act, torch.Generator().manual_seed(2), learner.look)
    assert len(rollout.passes) == 13, "the next rollout forgets them"
    vector.close()


def test_networks_without_pixels_keep_no_passes(tmp_path):
    """Also not where actor and critic share a trunk: their numbers stay what they were."""
    made = config(tmp_path / "run", "model.shared=true")
    vector = make_vector(made.env, 0, 4)
    collector, model = collector_for(made, vector)
    learner = learner_of(made, model, vector)
    assert learner.look is None
    assert collector.collect(learner.act, torch.Generator(), learner.look).passes == []
    vector.close()


def test_bf16_run_resumes_exactly_and_is_evaluated(tmp_path, monkeypatch, capsys):
    words = (*SMALL_PONG, "precision=bf16")
    assert train(config(tmp_path / "whole", *words)) == 0
    said = capsys.readouterr()
    assert "bfloat16" in said.out + said.err, "a run says in what it computes"
    with monkeypatch.context() as patch:
        stop_in_check(patch, 1)
        assert train(config(tmp_path / "run", *words)) == 143
    assert train(config(tmp_path / "run", *words), resume=True) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    last = weights(tmp_path / "run")["last"]
    assert {value.dtype for name, value in last.items() if name.startswith("model.")} == {torch.float32}
    short = ("env.max_episode_steps=20", "eval.episodes=2")
    assert evaluate(config(tmp_path / "run", *words, *short)) == 0


@pytest.mark.parametrize("name", ["ppo_pong", "ppo_breakout"])
def test_configs_for_pixels_say_what_they_compute_in(name):
    made = resolve(Config, ROOT / f"configs/{name}.yaml", [])
    assert made.precision == "bf16"
    assert made.train.batch_size <= made.env.count * made.train.rollout
