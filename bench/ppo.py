"""Our PPO against stable-baselines3's: whole training loops, same environments, network and settings.  python -m bench.ppo

First the two must agree: with copied weights, on values, log-probabilities, entropies, and on the advantages of one rollout. Then each
round trains ours, the peer, and ours again for some updates from scratch, in one process, by CPU time on one thread, environments
included. The ratio is steps per CPU-second, ours over the peer's; ours again over ours is the A/A control, whose spread says which
differences are noise. How ours spends its time is measured in a last run of its own.
The last line of stdout is one JSON object: ratio, aa_ratio, ours and peer (environment steps per CPU-second), split, circumstances.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch

from common.config import Options, resolve
from ppo.collect import Collector
from ppo.config import Config
from ppo.distributions import distribution_for
from ppo.envs import GymVector, LocalVector
from ppo.model import ActorCritic
from ppo.registry import make_vector, observation_shape
from ppo.rollout import gae
from ppo.train import train

TOLERANCE = 1e-5


def make_peer(config: Config) -> Any:
    """stable-baselines3's PPO with the settings of `config`. SystemExit where it has no equal."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError:
        raise SystemExit("bench.ppo compares with stable-baselines3: pip install stable-baselines3") from None
    t = config.train
    if config.model.kind != "mlp" or config.model.shared or config.env.normalize_observations or config.env.normalize_rewards:
        raise SystemExit("bench.ppo compares plain MLP runs: separate networks, nothing normalised")

    def schedule(start: float, kind: str) -> Any:
        return (lambda left: start * left) if kind == "linear" else start

    extra = {"continuous": True} if config.env.continuous else {}
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[config.model.activation]
    hidden = list(config.model.hidden)
    return PPO("MlpPolicy", make_vec_env(config.env.id, config.env.count, seed=config.seed, env_kwargs=extra), n_steps=t.rollout,
               batch_size=t.batch_size, n_epochs=t.epochs, gamma=t.gamma, gae_lambda=t.gae_lambda, ent_coef=t.entropy_weight,
               vf_coef=t.value_weight, max_grad_norm=t.max_grad_norm, learning_rate=schedule(t.lr, t.lr_decay),
               clip_range=schedule(t.clip, t.clip_decay), seed=config.seed, device="cpu",
               policy_kwargs={"net_arch": {"pi": hidden, "vf": hidden}, "activation_fn": activation})


def copy_weights(model: ActorCritic, policy: Any) -> None:
    """Ours into the peer's policy."""
    pairs = [(model.actor_trunk, policy.mlp_extractor.policy_net), (model.critic_trunk, policy.mlp_extractor.value_net),
             (model.policy.linear, policy.action_net), (model.value, policy.value_net)]
    with torch.no_grad():
        for mine, theirs in pairs:
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                b.copy_(a)
        if model.policy.log_std is not None:
            policy.log_std.copy_(model.policy.log_std)


def largest_difference(config: Config) -> dict[str, float]:
    """Of what the networks say, and of the advantages of a random rollout, relative to the largest entry."""
    from stable_baselines3.common.buffers import RolloutBuffer

    torch.manual_seed(0)
    vector, peer = make_vector(config.env, 0, 2), make_peer(config)
    distribution = distribution_for(vector.action_space)
    model = ActorCritic(config.model, observation_shape(vector.observation_space), distribution)
    copy_weights(model, peer.policy)
    x = torch.randn(64, *observation_shape(vector.observation_space))
    parameters, values = model(x)
    actions = distribution.sample(parameters, distribution.noise((64,), torch.Generator().manual_seed(0)))
    log_prob, entropy = distribution.log_prob_entropy(parameters, actions)
    their_values, their_log_prob, their_entropy = peer.policy.evaluate_actions(x, actions)
    T, N, rng = 40, 3, np.random.default_rng(0)
    buffer = RolloutBuffer(T, peer.observation_space, peer.action_space, gamma=config.train.gamma, gae_lambda=config.train.gae_lambda,
                           n_envs=N)
    buffer.reset()
    buffer.rewards[:], buffer.values[:] = rng.normal(size=(T, N)), rng.normal(size=(T, N))
    done = rng.random((T, N)) < 0.1
    buffer.episode_starts[:] = np.concatenate([np.zeros((1, N)), done[:-1]])
    last = rng.normal(size=N).astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(last), done[-1])
    flags, own = torch.from_numpy(done), torch.from_numpy(buffer.values.copy())
    advantages, _ = gae(torch.from_numpy(buffer.rewards.copy()), own, torch.cat([own[1:], torch.from_numpy(last)[None]]), flags, flags,
                        torch.ones_like(flags), config.train.gamma, config.train.gae_lambda)
    vector.close()
    pairs = {"values": (values, their_values.flatten()), "log_prob": (log_prob, their_log_prob), "entropy": (entropy, their_entropy),
             "advantages": (advantages, torch.from_numpy(buffer.advantages))}
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


def ours(config: Config, folder: Path) -> float:
    """CPU-seconds of a run of ours, from making its environments to its last file."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        train(config, Options("train"))
    return time.process_time() - start


def theirs(config: Config) -> float:
    """CPU-seconds of the same run of the peer."""
    start = time.process_time()
    peer = make_peer(config)
    peer.learn(config.train.steps)
    peer.env.close()
    return time.process_time() - start


@contextlib.contextmanager
def stopwatch(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time inside environments and inside the choice of actions."""
    patched: list[tuple[type, str, Any]] = []

    def watch(owner: type, name: str, label: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        patched.append((owner, name, original))

    for vector in (LocalVector, GymVector):
        watch(vector, "step", "environment")
    watch(Collector, "collect", "collect")
    try:
        yield
    finally:
        for owner, name, original in patched:
            setattr(owner, name, original)


def split(config: Config, folder: Path) -> dict[str, float]:
    """Shares of a run's time: environments, choosing actions and keeping books, learning."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with stopwatch(seconds):
        ours(config, folder)
    total = time.perf_counter() - start
    shares = {"environment": seconds["environment"], "inference": seconds["collect"] - seconds["environment"],
              "update": total - seconds["collect"]}
    return {name: round(value / total, 3) for name, value in shares.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/ppo_lunarlander.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=1, help="of each run")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        config = resolve(Config, args.config, [f"run_dir={folder}", "device=cpu", *args.overrides])
        steps = args.updates * config.env.count * config.train.rollout
        config = resolve(Config, args.config, [f"run_dir={folder}", "device=cpu", *args.overrides, f"train.steps={steps}"])
        differences = largest_difference(config)
        if max(differences.values()) > TOLERANCE:
            raise SystemExit(f"the two differ by {differences}; nothing was timed")
        print(f"largest relative differences: {differences}")
        ours(config, folder)  # warm-up
        theirs(config)
        rounds = []
        for number in range(args.rounds):
            rounds.append((ours(config, folder), theirs(config), ours(config, folder)))
            first, peer, again = rounds[-1]
            print(f"round {number + 1}: ours {first:.2f}, peer {peer:.2f}, ours again {again:.2f} CPU-s", flush=True)
        shares = split(config, folder)
    ratios = [p / ((a + b) / 2) for a, p, b in rounds]
    controls = [b / a for a, _, b in rounds]
    quartiles = lambda values: [round(q, 3) for q in statistics.quantiles(values, n=4)] if len(values) > 1 else [values[0]] * 3  # noqa: E731
    low, middle, high = quartiles(ratios)
    result = {"bench": f"PPO on {config.env.id}, {steps} steps from scratch", "ratio": middle, "ratio_iqr": [low, high],
              "aa_ratio": quartiles(controls)[1], "aa_iqr": quartiles(controls)[::2],
              "ours": round(steps / statistics.median([(a + b) / 2 for a, _, b in rounds]), 1),
              "peer": round(steps / statistics.median([p for _, p, _ in rounds]), 1), "unit": "environment steps per CPU-second",
              "split": shares, "rounds": args.rounds, "threads": 1, "dtype": "float32", "torch": torch.__version__,
              "gymnasium": gym.__version__, "python": platform.python_version(), "load": [round(x, 2) for x in os.getloadavg()]}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
