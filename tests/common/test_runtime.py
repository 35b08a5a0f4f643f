"""Devices, precision, seeds and the states of generators."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from common import runtime
from common.config import BaseConfig, ConfigError

CPU = torch.device("cpu")
RECORDED = (4578411104364001874, 6506799515145037213, 6233904063939786893)


def test_mix_seed_separates_near_inputs():
    seeds = {runtime.mix_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.mix_seed(1, 2) != runtime.mix_seed(2, 1)
    tuples = [numbers for length in range(1, 6) for numbers in itertools.product(range(3), repeat=length)]
    assert len({runtime.mix_seed(*numbers) for numbers in tuples}) == len(tuples), "lengths and zeros at the end count"
    assert runtime.mix_seed(-1) == runtime.mix_seed(2**64 - 1)
    assert runtime.mix_seed(0, 1) == 2918264622725855778, "every run's data order hangs on this"


def test_recorded_seeds_stay():
    """Those of the first batch of samples, the first fold and the first episode, and of a run's initial weights."""
    assert runtime.indexed_seed(3, 1_000_000_007, 0) == runtime.mix_seed(3, 1_000_000_007) == RECORDED[0]
    assert runtime.indexed_seed(3, 1_000_000_007, 2) == runtime.mix_seed(3, 1_000_000_007, 2) == RECORDED[1]
    assert runtime.mix_seed(3, 0) == RECORDED[2]


def test_dropout_and_noise_of_a_step_are_of_different_streams():
    """The first process's global generators, from which dropout draws, and the generator of the step."""
    seed, step, rank = 5, 9, 0
    runtime.seed_generators(CPU, seed, step, rank)
    noise = torch.Generator().manual_seed(runtime.mix_seed(seed, step))
    assert not torch.equal(torch.rand(5), torch.rand(5, generator=noise))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cudaa", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(ConfigError, match="device"):
        runtime.choose_device(name)


def test_precision_by_device(monkeypatch):
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    assert runtime.choose_precision("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    assert runtime.choose_precision("auto", CPU) is None
    assert runtime.choose_precision("bf16", CPU) == torch.bfloat16
    assert runtime.choose_precision("fp64", CPU) is None
    with pytest.raises(ConfigError, match="GPU"):
        runtime.choose_precision("fp16", CPU)


def test_start_seeds_every_generator():
    def draw() -> tuple:
        runtime.start(BaseConfig(seed=2**40 + 7, device="cpu", precision="fp32"))
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_generator_states_come_back():
    state = runtime.rng_state()
    first = (random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist())
    runtime.set_rng_state(state)
    assert first == (random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist())


def test_seed_generators_is_what_manual_seed_gives():
    runtime.seed_generators(CPU, 3, 4)
    mine = torch.rand(5)
    torch.manual_seed(runtime.mix_seed(3, 4))
    assert torch.equal(mine, torch.rand(5))


def test_alone_nobody_has_to_be_asked():
    machine = runtime.Runtime(CPU, None, 0, 1, None)
    assert machine.is_main and machine.any(True) and not machine.any(False)
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_environment_names_what_made_a_run():
    env = runtime.environment(runtime.Runtime(CPU, torch.bfloat16, 0, 1, None))
    assert env["precision"] == "bfloat16" and env["versions"]["torch"] == torch.__version__.split("+")[0]
    assert env["device"] == "cpu" and env["processes"] == 1 and env["command"]


def test_peak_flops_is_for_known_gpus_only():
    assert runtime.peak_flops(CPU) is None
    assert runtime.count_parameters(torch.nn.Linear(3, 2)) == 8
