"""Tiny runs of the ppo project, and an environment that counts for itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors.torch import load_file

from common.config import Options, resolve
from common.logging import read_metrics
from ppo.config import Config
from ppo.environments.registry import observation_shape
from ppo.environments.vectors import GymVector, LocalVector, Vector
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic
from ppo.playing.collect import Act, Collector
from tests.helpers import ROOT, environment, status

CARTPOLE = ROOT / "configs/ppo_cartpole.yaml"
# 4 environments x 16 steps are an update, 6 of them a run
TINY = (
    "env.count=4",
    "train.rollout=16",
    "train.steps=384",
    "train.epochs=2",
    "train.batch_size=32",
    "train.save_every=4",
    "train.backprop=autograd",
    "model.hidden=[8]",
    "device=cpu",
    "eval.episodes=4",
    "eval.video=false",
)
UPDATES = 6
TIMING = ("updates_per_second",)


def config(run_dir: Path, *overrides: str) -> Config:
    """The CartPole config, shrunk to 6 updates of 64 steps, in this folder."""
    return resolve(Config, CARTPOLE, [*TINY, f"run_dir={run_dir}", *overrides])


def train(config: Config, **options: bool) -> int:
    """Run the training program in this process; its exit status."""
    from ppo.train import train

    return status(train, config, Options("train", **options))


def evaluate(config: Config) -> int:
    """Run the evaluation program in this process; its exit status."""
    from ppo.eval import main

    return status(main, config, Options("eval"))


def collector_for(config: Config, vector: Vector) -> tuple[Collector, ActorCritic]:
    """What fills rollouts, and fresh weights to act with."""
    distribution = distribution_for(vector.action_space)
    torch.manual_seed(0)
    return Collector(config, vector, distribution), ActorCritic(
        config.model, observation_shape(vector.observation_space), distribution
    )


def log(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock; NaN is written as text, so that it equals
    itself.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: repr(v) for k, v in line.items() if k not in TIMING} for line in lines]


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a run exports: the last policy, and the best one if there is one, with their scaling of observations."""
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def acting(model: ActorCritic) -> Act:
    """What `Collector.collect` asks for its actions."""
    return lambda seen: model.act(torch.from_numpy(np.ascontiguousarray(seen)))


def two_processes(folder: Path, source: str) -> None:
    """Run the lines of `source` in two gloo processes, with this module's names; fails if one of them does not end
    well.
    """
    script, ports = folder / "two.py", []
    for _ in range(4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    prelude = f"""
        import os, sys, types
        sys.path.insert(0, {str(ROOT)!r})
        sys.modules["tests"] = types.ModuleType("tests")  # other packages may bring one
        sys.modules["tests"].__path__ = [{str(ROOT / "tests")!r}]
        from pathlib import Path
        import pytest
        from common.checkpoint import Checkpoints
        from common.processes import leave
        from tests.helpers import stop_in_check
        from tests.ppo import helpers
        from tests.ppo.helpers import *

        ports = {ports}

        def train(config, **options):  # each run's processes meet at a port of its own
            os.environ["MASTER_PORT"] = str(ports.pop())
            return helpers.train(config, **options)

    """
    script.write_text(textwrap.dedent(prelude) + textwrap.dedent(source) + "\nleave(0)\n")
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    said = [folder / f"stderr{rank}.txt" for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=path.open("w"),
        )
        for rank, path in enumerate(said)
    ]
    deadline = time.monotonic() + 100
    while None in (codes := [process.poll() for process in started]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.05)  # until both are done, or one has failed
    for process in started:
        process.kill()
        process.wait()
    assert codes == [0, 0], "\n".join(path.read_text() for path in said)


class Counting(gym.Env):
    """Its observation is (episode, step, identity); how long an episode is, how it ends and what is paid follow from
    them and the action.

    Every third episode terminates, every third is truncated, and in the others both flags are set in the last step.

    Args:
        identity: told apart by it. limit: -1 = by identity and episode, 0 = never ends by itself, else the number of
            steps.
        trouble: "nan", "die" (the process ends at once) or nothing; it comes in the third episode's second step.
        reuse: return the same array each time, overwritten, as some simulators do.
        noisy: add noise to the observation from the environment's own generator, which outlives an episode.
    Attributes:
        played: (return, length) of each finished episode. seeds: those handed to `reset`. rows: every step, as it was.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(
        self,
        identity: int = 0,
        limit: int = -1,
        trouble: str = "",
        reuse: bool = False,
        noisy: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.identity, self.limit, self.trouble, self.reuse, self.noisy = identity, limit, trouble, reuse, noisy
        self.render_mode = render_mode
        self.episode, self.steps, self.total = -1, 0, 0.0
        self.buffer = np.zeros(3, dtype=np.float32)
        self.played: list[tuple[float, int]] = []
        self.seeds: list[int | None] = []
        self.rows: list[tuple] = []

    def look(self) -> np.ndarray:
        self.buffer[:] = self.episode, self.steps, self.identity
        if self.noisy:
            self.buffer[2] += self.np_random.normal()
        return self.buffer if self.reuse else self.buffer.copy()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        if self.noisy and seed is not None:  # a seed says all that there is to know
            self.episode = -1
        self.episode, self.steps, self.total = self.episode + 1, 0, 0.0
        return self.look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        before = self.look().copy()
        self.steps += 1
        reward = float(self.identity + 10 * int(action) + self.steps / 8)
        self.total += reward
        over = self.limit != 0 and self.steps >= (
            self.limit if self.limit > 0 else 2 + (self.identity * 3 + self.episode * 5) % 7
        )
        kind = self.episode % 3
        terminated, truncated = over and kind != 1, over and kind != 0
        if over:
            self.played.append((self.total, self.steps))
        after = self.look()
        if self.trouble and (self.episode, self.steps) == (2, 2):
            if self.trouble == "die":
                os._exit(9)
            after = after * np.nan
        self.rows.append((tuple(before), reward, terminated, truncated, tuple(after)))
        return after, reward, terminated, truncated, {}


def register(**arguments: Any) -> str:
    """Make `Counting` known to gymnasium under an id of its own; the id."""
    name = "Counting" + "".join(f"{k.title()}{v}".replace("-", "") for k, v in sorted(arguments.items())) + "-v0"
    if name not in gym.registry:
        gym.register(name, entry_point=Counting, kwargs=arguments)
    return name


def vector_of(mode: AutoresetMode | None, toys: list[gym.Env]) -> Vector:
    """A toy in each row, under one of gymnasium's modes, or in our own vector (None)."""
    return (
        LocalVector(toys, 0)
        if mode is None
        else GymVector(SyncVectorEnv([lambda e=e: e for e in toys], autoreset_mode=mode), 0)
    )
