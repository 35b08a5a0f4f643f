"""Our PPO against stable-baselines3's: whole training loops, same environments, network and settings.:

    python -m bench.ppo

First the two must agree: with copied weights, on values, log-probabilities, entropies, the gradients of a minibatch,
and the advantages of one rollout. Then each round trains ours, the peer as it comes (with PyTorch's own choice of
threads), the peer on one thread, and ours again, for some updates from scratch, in one process, by CPU time,
environments included. `ratio` is steps per CPU-second, ours over the peer's as it comes; `ratio_one_thread` is ours
over the peer's on one thread, which is what ours uses. Ours again over ours is the A/A control, whose spread says which
differences are noise. How ours spends its time is measured in a last run of its own. The last line of stdout is one
JSON object: the ratios, ours and peer (environment steps per CPU-second), split, circumstances.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ppo.train
from bench.rounds import circumstances, report
from common.config import Options, resolve
from ppo.config import Config
from ppo.data import Batch, gae
from ppo.environments.registry import make_vector, observation_shape
from ppo.learning.backprop import Backprop
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic
from ppo.playing.collect import Collector
from ppo.train import train

TOLERANCE = 1e-5


def make_peer(config: Config) -> Any:
    """stable-baselines3's PPO with the settings of `config`. SystemExit where it has no equal."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import VecNormalize
    except ImportError:
        raise SystemExit("bench.ppo compares with stable-baselines3: pip install stable-baselines3") from None
    t, e = config.train, config.env
    if config.model.kind != "mlp" or config.model.shared:
        raise SystemExit("bench.ppo compares MLP runs with separate networks")

    def schedule(start: float, kind: str) -> Any:
        return (lambda left: start * left) if kind == "linear" else start

    # the peer's value loss is the squared error, ours (as in the paper's code) half of it
    extra = {"continuous": True} if e.continuous else {}
    vector = make_vec_env(e.id, e.count, seed=config.seed, env_kwargs=extra)
    if e.normalize_observations or e.normalize_rewards:
        vector = VecNormalize(
            vector,
            norm_obs=e.normalize_observations,
            norm_reward=e.normalize_rewards,
            clip_obs=e.clip_observations,
            clip_reward=e.clip_rewards,
            gamma=t.gamma,
        )
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[config.model.activation]
    hidden = list(config.model.hidden)
    return PPO(
        "MlpPolicy",
        vector,
        n_steps=t.rollout,
        batch_size=t.batch_size,
        n_epochs=t.epochs,
        gamma=t.gamma,
        gae_lambda=t.gae_lambda,
        ent_coef=t.entropy_weight,
        vf_coef=t.value_weight / 2,
        max_grad_norm=t.max_grad_norm,
        learning_rate=schedule(t.lr, t.lr_decay),
        clip_range=schedule(t.clip, t.clip_decay),
        seed=config.seed,
        device="cpu",
        policy_kwargs={"net_arch": {"pi": hidden, "vf": hidden}, "activation_fn": activation},
    )


def copy_weights(model: ActorCritic, policy: Any) -> None:
    """Ours into the peer's policy."""
    pairs = [
        (model.actor_trunk, policy.mlp_extractor.policy_net),
        (model.critic_trunk, policy.mlp_extractor.value_net),
        (model.policy.linear, policy.action_net),
        (model.value, policy.value_net),
    ]
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
    actions = distribution.sample(parameters.detach(), distribution.noise((64,), torch.Generator().manual_seed(0)))
    log_prob, entropy = distribution.log_prob_entropy(parameters, actions)
    their_values, their_log_prob, their_entropy = peer.policy.evaluate_actions(x, actions)
    returns, advantages = torch.randn(64), torch.randn(64)
    old = log_prob.detach() + 0.3 * torch.randn(64)
    gradients = (
        ours_gradients(config, model, distribution, x, actions, old, advantages, returns),
        peer_gradients(peer, x, actions, old, advantages, returns),
    )
    T, N, rng = 40, 3, np.random.default_rng(0)
    buffer = RolloutBuffer(
        T,
        peer.observation_space,
        peer.action_space,
        gamma=config.train.gamma,
        gae_lambda=config.train.gae_lambda,
        n_envs=N,
    )
    buffer.reset()
    buffer.rewards[:], buffer.values[:] = rng.normal(size=(T, N)), rng.normal(size=(T, N))
    done = rng.random((T, N)) < 0.1
    buffer.episode_starts[:] = np.concatenate([np.zeros((1, N)), done[:-1]])
    last = rng.normal(size=N).astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(last), done[-1])
    flags, own = torch.from_numpy(done), torch.from_numpy(buffer.values.copy())
    found, _ = gae(
        torch.from_numpy(buffer.rewards.copy()),
        own,
        torch.cat([own[1:], torch.from_numpy(last)[None]]),
        flags,
        flags,
        torch.ones_like(flags),
        config.train.gamma,
        config.train.gae_lambda,
    )
    vector.close()
    pairs = {
        "values": (values, their_values.flatten()),
        "log_prob": (log_prob, their_log_prob),
        "entropy": (entropy, their_entropy),
        "gradients": gradients,
        "advantages": (found, torch.from_numpy(buffer.advantages)),
    }
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


def ours_gradients(
    config: Config,
    model: ActorCritic,
    distribution: Any,
    x: torch.Tensor,
    actions: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
) -> torch.Tensor:
    """All gradients of a minibatch (64 rows) in one vector, actor before critic, by ppo.learning.backprop."""
    model = copy.deepcopy(model)
    manual = Backprop(model, distribution, config.train)
    batch = Batch(x, actions, old, torch.zeros_like(old), advantages, returns)
    manual.gradients(batch, torch.arange(len(x)), config.train.clip)
    start, parts = 0, {}
    for name, parameter in model.named_parameters():
        parts[name] = manual.weights.grad[start : (start := start + parameter.numel())]
    return torch.cat([parts[name] for name in sorted(parts)])


def peer_gradients(
    peer: Any,
    x: torch.Tensor,
    actions: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
) -> torch.Tensor:
    """The same by the loss that the peer's `train` writes down, with its autograd."""
    values, log_prob, entropy = peer.policy.evaluate_actions(x, actions)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio, clip = torch.exp(log_prob - old), peer.clip_range(1)
    policy_loss = -torch.min(advantages * ratio, advantages * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    value_loss = torch.nn.functional.mse_loss(returns, values.flatten())
    peer.policy.zero_grad()
    (policy_loss + peer.vf_coef * value_loss - peer.ent_coef * entropy.mean()).backward()
    names = {
        "mlp_extractor.policy_net": "actor_trunk",
        "mlp_extractor.value_net": "critic_trunk",
        "action_net": "policy.linear",
        "value_net": "value",
        "log_std": "policy.log_std",
    }
    parts = {}
    for name, parameter in peer.policy.named_parameters():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        parts[names[prefix] + name.removeprefix(prefix)] = parameter.grad.flatten()
    return torch.cat([parts[name] for name in sorted(parts)])


def ours(config: Config, folder: Path) -> float:
    """CPU-seconds of a run of ours, from making its environments to its last file."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        train(config, Options("train"))
    return time.process_time() - start


def theirs(config: Config, threads: int) -> float:
    """CPU-seconds of the same run of the peer with so many threads."""
    torch.set_num_threads(threads)
    start = time.process_time()
    peer = make_peer(config)
    peer.learn(config.train.steps)
    peer.env.close()
    return time.process_time() - start


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Add up the seconds inside environments and inside the choice of actions; and count the threads that the
    environments have brought.
    """
    spent = {"environment": 0.0, "collect": 0.0, "threads": 0.0}

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[label] += time.perf_counter() - start

        return call

    def make_vector(*args: Any, **kwargs: Any) -> Any:
        before = num_threads()
        vector = original[0](*args, **kwargs)
        spent["threads"] = num_threads() - before
        vector.step = timed(vector.step, "environment")
        return vector

    original = ppo.train.make_vector, Collector.collect
    ppo.train.make_vector, Collector.collect = make_vector, timed(Collector.collect, "collect")
    try:
        yield spent
    finally:
        ppo.train.make_vector, Collector.collect = original


def num_threads() -> int:
    """Threads of this process (Linux; 0 elsewhere)."""
    folder = Path("/proc/self/task")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def split(config: Config, folder: Path) -> dict[str, float]:
    """Shares of a run's time: environments, choosing actions and keeping books, learning."""
    start = time.perf_counter()
    with stopwatch() as seconds:
        ours(config, folder)
    total = time.perf_counter() - start
    shares = {
        "environment": seconds["environment"],
        "inference": seconds["collect"] - seconds["environment"],
        "update": total - seconds["collect"],
    }
    return {name: round(value / total, 3) for name, value in shares.items()}


def summarise(rounds: list[tuple[float, float, float, float]], steps: int) -> dict[str, Any]:
    """Ratios and rates of rounds (ours, peer, peer on one thread, ours again) in CPU-seconds: medians, with
    quartiles of the ratios.
    """
    mine = [(first + again) / 2 for first, _, _, again in rounds]
    result: dict[str, Any] = {}
    for name, values in (
        ("ratio", [row[1] / own for row, own in zip(rounds, mine)]),
        ("ratio_one_thread", [row[2] / own for row, own in zip(rounds, mine)]),
        ("aa_ratio", [row[3] / row[0] for row in rounds]),
    ):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        result |= {name: round(middle, 3), f"{name.replace('aa_ratio', 'aa')}_iqr": [round(low, 3), round(high, 3)]}
    for name, seconds in (
        ("ours", mine),
        ("peer", [row[1] for row in rounds]),
        ("peer_one_thread", [row[2] for row in rounds]),
    ):
        result[name] = round(steps / statistics.median(seconds), 1)
    return result | {"unit": "environment steps per CPU-second"}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/ppo_lunarlander.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=4, help="of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        config = resolve(Config, args.config, [f"run_dir={folder}", "device=cpu", *args.overrides])
        steps = args.updates * config.env.count * config.train.rollout
        config = resolve(
            Config, args.config, [f"run_dir={folder}", "device=cpu", *args.overrides, f"train.steps={steps}"]
        )
        differences = largest_difference(config)
        if max(differences.values()) > TOLERANCE:
            raise SystemExit(f"the two differ by {differences}; nothing was timed")
        print(f"largest relative differences: {differences}")
        ours(config, folder)  # warm-up
        theirs(config, threads)
        rounds = []
        for number in range(args.rounds):
            rounds.append((ours(config, folder), theirs(config, threads), theirs(config, 1), ours(config, folder)))
            first, peer, single, again = rounds[-1]
            print(
                f"round {number + 1}: ours {first:.2f}, peer {peer:.2f}, peer on one thread {single:.2f}, ours again "
                f"{again:.2f} CPU-s",
                flush=True,
            )
        shares = split(config, folder)
    result = {
        "bench": f"PPO on {config.env.id}, {steps} steps from scratch",
        **summarise(rounds, steps),
        "split": shares,
        "rounds": args.rounds,
        "threads": 1,
        "peer_threads": threads,
        "dtype": "float32",
        **circumstances(load, "torch", "gymnasium"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
