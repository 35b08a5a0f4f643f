"""Train an agent:  python -m ppo.train --config configs/ppo_cartpole.yaml [key=value ...] [--resume] [--dry-run]

Legend: T steps of a rollout, N environments of this process, M = valid rows of all processes' T x N.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require, to_yaml
from ppo.config import Config, TrainConfig

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "ppo")

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.checkpoint import export_weights
from common.errors import exits_cleanly
from common.run import Run
from common.runtime import count_parameters, mix_seed, use_threads
from ppo.backprop import Backprop, can_backprop
from ppo.collect import RECENT, Collector
from ppo.distributions import Distribution, distribution_for
from ppo.model import ActorCritic
from ppo.objective import explained_variance, ppo_terms, total_loss
from ppo.registry import make_vector, observation_shape
from ppo.rollout import Rollout, gae, minibatches

ACTION_STREAM, ORDER_STREAM = 1, 2  # keep the generators of actions and of minibatches apart
WATCHED = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")  # as in `Terms`
KL = 3
# rows a forward pass when a whole rollout is read: more need gigabytes for pixels, and break up the heap for small
# networks
PART = 512


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint and `best.safetensors` and `last.safetensors`."""
    if options.dry_run:
        return describe(config)
    settings = config.train
    run = Run.start(config, options)
    with run:
        use_threads(settings.threads)
        require(
            config.env.count % run.world == 0,
            "env.count",
            f"{config.env.count} must be divisible by {run.world} processes",
        )
        count = config.env.count // run.world
        vector = make_vector(config.env, config.seed, count, first=run.rank * count)
        distribution = distribution_for(vector.action_space, config.model.squash)
        torch.manual_seed(config.seed)  # equal weights in every process, whatever making the environments drew
        model = ActorCritic(config.model, observation_shape(vector.observation_space), distribution).to(run.device)
        manual = by_hand(config, model, distribution, run)  # None where autograd has to do it
        weights = model.parameters() if manual is None else [manual.weights]
        optimizer = torch.optim.Adam(weights, lr=settings.lr, eps=settings.adam_eps, fused=run.device.type != "mps")
        collector, best = Collector(config, vector, distribution, run.rank, run.world), Best()
        done = run.resume(model=model, optimizer=optimizer, collector=collector, leader=best)  # updates; 0 when fresh
        net, updates = run.prepare(model), num_updates(config)
        run.display.say(
            f"{config.env.id}: {config.env.count} environments, {updates} updates of "
            f"{settings.rollout * config.env.count:,} "
            f"steps, {count_parameters(model):,} parameters"
        )

        for update in run.steps(done, updates):
            left = 1 - (update - 1) / updates  # from one down towards zero
            clip = settings.clip * (left if settings.clip_decay == "linear" else 1)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (left if settings.lr_decay == "linear" else 1)
            rollout = collector.collect(model, run.generator(update, ACTION_STREAM), run.device, manual and manual.act)
            observations, actions, numbers = prepare(rollout, model, distribution, settings, run.device)
            rows = valid_rows(rollout, run)  # int64 (M,), the same in every process
            known = torch.from_numpy(rollout.valid).flatten().to(run.device)
            explained = explained_variance(numbers[1][known], numbers[3][known])
            order = torch.Generator().manual_seed(mix_seed(config.seed, update, ORDER_STREAM))
            watched, grad_norm = [], torch.zeros(())
            for epoch, part in epochs(rows, settings, order):  # noqa: B007 (logged)
                if manual is None:
                    mine = owned(part, count, run)
                    old_log_prob, old_values, advantages, returns = numbers.index_select(1, mine).unbind()
                    parameters, values = net(observations.index_select(0, mine))
                    log_prob, entropy = distribution.log_prob_entropy(parameters, actions.index_select(0, mine))
                    if settings.normalize_advantage:
                        advantages = normalized(advantages, len(part), run)
                    terms = ppo_terms(
                        log_prob,
                        entropy,
                        values,
                        old_log_prob,
                        old_values,
                        advantages,
                        returns,
                        clip,
                        settings.clip_value,
                    )
                    # processes' gradients are averaged, hence x world
                    loss = total_loss(terms, settings).sum() * (run.world / len(part))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    means = summed(torch.stack([term.detach() for term in terms]).sum(dim=1), run) / len(part)
                else:  # the same, with the chain rule written out
                    loss, means = manual.gradients(model.read(observations), actions, numbers, part, clip)
                watched.append(means)
                if settings.target_kl and means[KL] > 1.5 * settings.target_kl:
                    break  # without this step, all remaining minibatches and all remaining epochs
                grad_norm = run.check_gradients(optimizer, loss, settings.max_grad_norm)  # stops on a non-finite value
                optimizer.step()
            played = collector.played()  # the same numbers in every process
            run.log(
                update,
                settings.log_every,
                {"updates": 1},
                **played,
                **dict(zip(WATCHED, torch.stack(watched).mean(dim=0))),
                explained_variance=explained,
                epochs=epoch,
                grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"],
                clip=clip,
            )
            best.update(played, update, model, collector)
            if run.save_due(update, settings.save_every):
                if run.due(update, settings.save_every):
                    collector.restart(update)
                run.save(update, model=model, optimizer=optimizer, collector=collector.gathered(), leader=best)
        vector.close()
        if run.is_main:
            export(run, config, model, collector, best)


def by_hand(config: Config, model: ActorCritic, distribution: Distribution, run: Run) -> Backprop | None:
    """What computes gradients without autograd, where the config wants that and it can be done."""
    possible = can_backprop(model, distribution, run.device, run.world)
    require(
        possible or config.train.backprop != "manual",
        "train.backprop",
        "manual works for two separate MLPs and one categorical or Gaussian action, in one process on a CPU",
    )
    return Backprop(model, distribution, config.train) if possible and config.train.backprop != "autograd" else None


def prepare(
    rollout: Rollout, model: ActorCritic, distribution: Distribution, settings: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What the epochs learn from; row t N + n belongs to step t of environment n.

    Values and log-probabilities of the whole rollout are computed in one pass, with the weights that played it.

    Returns: observations (T N, *O), actions (T N, *D), and (4, T N): log-probability, value, advantage, return.
    """
    T, N = rollout.rewards.shape
    shape = rollout.observations.shape[2:]
    observations = torch.from_numpy(rollout.observations).to(device, copy=True).view((T + 1) * N, *shape)
    actions = torch.from_numpy(rollout.actions).to(device, copy=True).flatten(0, 1)
    with torch.no_grad():
        passes = [model(part) for part in observations.split(PART)]
        parameters, values = (
            torch.cat([p for p, _ in passes])[: T * N],
            torch.cat([v for _, v in passes]).view(T + 1, N),
        )
        next_values = values[1:].clone()
        if rollout.final_at:
            final = torch.from_numpy(np.stack(rollout.final)).to(device)
            t, n = torch.tensor(rollout.final_at, device=device).T
            next_values[t, n] = torch.cat([model.evaluate(part) for part in final.split(PART)])
        observations = observations[: T * N]
        log_prob, _ = distribution.log_prob_entropy(parameters, actions)
        terminated, done, valid = (
            torch.from_numpy(flags).to(device) for flags in (rollout.terminated, rollout.done, rollout.valid)
        )
        ends = terminated if settings.bootstrap_truncated else done
        rewards = torch.from_numpy(rollout.rewards).to(device, values.dtype)
        advantages, returns = gae(
            rewards, values[:-1], next_values, ends, done, valid, settings.gamma, settings.gae_lambda
        )
    return (
        observations,
        actions,
        torch.stack([log_prob, values[:-1].flatten(), advantages.flatten(), returns.flatten()]),
    )


def valid_rows(rollout: Rollout, run: Run) -> Tensor:
    """Numbers t N' + n of the rows that hold a real step, n counting the N' environments of all processes: int64
    (M,) on the CPU.
    """
    valid = torch.from_numpy(rollout.valid)
    if run.world > 1:
        parts = [torch.empty_like(valid, dtype=torch.uint8, device=run.device) for _ in range(run.world)]
        dist.all_gather(parts, valid.to(run.device, torch.uint8))
        valid = torch.cat(parts, dim=1).bool().cpu()  # (T, N')
    return valid.flatten().nonzero().flatten()


def epochs(rows: Tensor, settings: TrainConfig, order: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(epoch 1, 2, ..., rows of a minibatch)."""
    for epoch in range(1, settings.epochs + 1):
        for part in minibatches(rows, settings.batch_size, order):
            yield epoch, part


def owned(part: Tensor, count: int, run: Run) -> Tensor:
    """Which of a minibatch's rows this process played, as rows of its own batch, on its device."""
    if run.world > 1:
        t, n = part // (count * run.world), part % (count * run.world) - run.rank * count
        part = (t * count + n)[(n >= 0) & (n < count)]
    return part.to(run.device)


def summed(values: Tensor, run: Run) -> Tensor:
    """Sum over the processes."""
    if run.world > 1:
        dist.all_reduce(values)
    return values


def normalized(advantages: Tensor, total: int, run: Run) -> Tensor:
    """Zero mean and unit variance over the whole minibatch of `total` rows, whoever played them. One row alone stays
    as it is.
    """
    if total < 2:
        return advantages
    if run.world == 1:
        variance, mean = torch.var_mean(advantages)
        return (advantages - mean) / (variance.sqrt() + 1e-8)
    mean = summed(advantages.sum(), run) / total
    centred = advantages - mean
    variance = summed(centred.square().sum(), run) / (total - 1)
    return centred / (variance.sqrt() + 1e-8)


class Best:
    """The policy with the highest mean return over the last 100 training episodes, with the scaling of observations
    that it saw.
    """

    def __init__(self) -> None:
        self.score, self.update_number, self.weights = -math.inf, 0, {}

    def update(self, played: dict[str, float], update: int, model: ActorCritic, collector: Collector) -> None:
        """Keep a copy if it is the best so far; only once 100 episodes have been played, or means of a few lucky
        ones would win.
        """
        if collector.num_episodes * collector.world >= RECENT and played["return_mean"] >= self.score:
            self.score, self.update_number = played["return_mean"], update
            self.weights = everything(model, collector)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"score": self.score, "update": self.update_number, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.score, self.update_number, self.weights = state["score"], state["update"], state["weights"]


def everything(model: ActorCritic, collector: Collector) -> dict[str, Tensor]:
    """What it takes to act: weights under `model.`, and the mean and variance of observations under `observations.`."""
    moments = collector.observations.state_dict()
    found = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    return found | {f"observations.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}


def export(run: Run, config: Config, model: ActorCritic, collector: Collector, best: Best) -> None:
    """`last.safetensors` and `best.safetensors` (the last where fewer than 100 episodes were played)."""
    facts = {"project": "ppo", "config": to_yaml(config), "env_steps": str(collector.num_steps * run.world)}
    last = everything(model, collector)
    export_weights(run.folder / "last.safetensors", last, facts | {"update": str(run.step)})
    export_weights(
        run.folder / "best.safetensors", best.weights or last, facts | {"update": str(best.update_number or run.step)}
    )


def num_updates(config: Config) -> int:
    """Updates that reach `train.steps` environment steps."""
    return -(-config.train.steps // (config.env.count * config.train.rollout))


def describe(config: Config) -> None:
    """What --dry-run prints: the resolved config, then sizes and shapes."""
    vector = make_vector(config.env, config.seed, 1)
    distribution = distribution_for(vector.action_space, config.model.squash)
    model = ActorCritic(config.model, observation_shape(vector.observation_space), distribution)
    print(to_yaml(config), end="")
    print(f"# {config.env.id}: observations {vector.observation_space}, actions {vector.action_space}")
    print(
        f"# {count_parameters(model):,} parameters; {num_updates(config)} updates of {config.env.count} x "
        f"{config.train.rollout} steps, {config.train.epochs} epochs of minibatches of {config.train.batch_size}"
    )
    vector.close()


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
