"""Train an agent:  python -m ppo.train --config configs/ppo_cartpole.yaml [key=value ...] [--resume] [--dry-run]

An update plays a rollout (collect.py), judges its actions (data.py) and learns from it in minibatches (objective.py,
whose gradient gradients.py brings).
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require, to_yaml
from ppo.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "ppo")

import torch

from common.checkpoint import export_weights
from common.errors import exits_cleanly
from common.run import Run
from common.runtime import count_parameters, mix_seed, use_threads
from ppo.learning.advice import Advice, idle_settings
from ppo.playing.collect import Collector
from ppo.data import epochs, learning_batch, valid_rows
from ppo.learning.distributions import distribution_for
from ppo.learning.gradients import Statistics, build_gradients
from ppo.model import ActorCritic
from ppo.learning.objective import explained_variance
from ppo.playing.play import Best, policy_weights
from ppo.environments.registry import make_vector, observation_shape

ACTION_STREAM, ORDER_STREAM = 1, 2  # keep the generators of actions and of minibatches apart


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint, `last.safetensors` and `best.safetensors`."""
    if options.dry_run:
        return describe(config)
    settings = config.train
    run = Run.start(config, options)
    with run:
        use_threads(settings.threads)
        require(config.env.count % run.world == 0, "env.count", f"must be divisible by {run.world} processes")
        count = config.env.count // run.world
        vector = make_vector(config.env, config.seed, count, first=run.rank * count)
        distribution = distribution_for(vector.action_space, config.model.squash)
        torch.manual_seed(config.seed)  # equal weights in every process, whatever making the environments drew
        shape = observation_shape(vector.observation_space)
        model = ActorCritic(config.model, shape, distribution, config.precision == "bf16").to(run.device)
        learner = build_gradients(config, model, distribution, run)  # autograd, or by hand, as train.backprop says
        optimizer = torch.optim.Adam(
            learner.parameters, lr=settings.lr, eps=settings.adam_eps, fused=run.device.type != "mps"
        )
        collector = Collector(config, vector, distribution, run.rank, run.world)
        best = Best(config)
        done = run.resume(model=model, optimizer=optimizer, collector=collector, leader=best)  # updates; 0 when fresh
        updates = num_updates(config)
        run.display.say(
            f"{config.env.id}: {config.env.count} environments, {updates} updates of "
            f"{settings.rollout * config.env.count:,} steps, {count_parameters(model):,} parameters, gradients by "
            f"{'ppo/learning/backprop.py' if settings.backprop == 'manual' else 'autograd'}"
        )

        for note in [*idle_settings(config, model, vector, run.world), *collector.notes]:
            run.display.say(note)
        advice = Advice(config, run.display.say)
        for update in run.steps(done, updates):
            remaining = 1 - (update - 1) / updates  # from one down towards zero
            clip = settings.clip * (remaining if settings.clip_decay == "linear" else 1)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (remaining if settings.lr_decay == "linear" else 1)

            rollout = collector.collect(learner.act, run.generator(update, ACTION_STREAM), learner.look)
            batch = learning_batch(rollout, model, distribution, settings, run.device)
            valid = torch.from_numpy(rollout.valid).flatten().to(run.device)
            explained = explained_variance(batch.old_values[valid], batch.returns[valid])

            order = torch.Generator().manual_seed(mix_seed(config.seed, update, ORDER_STREAM))
            statistics: list[Statistics] = []
            grad_norm = torch.zeros(())
            for epoch, minibatch in epochs(valid_rows(rollout, run), settings, order):  # noqa: B007 (logged)
                loss, means = learner.gradients(batch, minibatch, clip)
                statistics.append(means)
                if settings.target_kl and means.approx_kl > 1.5 * settings.target_kl:
                    break  # without this step, all remaining minibatches and all remaining epochs
                grad_norm = run.check_gradients(optimizer, loss, settings.max_grad_norm)  # stops on a non-finite value
                optimizer.step()

            advice.look(explained, grad_norm)
            played = collector.played()  # the same numbers in every process
            if run.is_main and run.due(update, settings.evaluate_every):
                played["evaluation_return"] = best.challenge(policy_weights(model, collector), update, run.device)
            run.log(
                update,
                settings.log_every,
                {"updates": 1},
                **played,
                **Statistics.average(statistics)._asdict(),
                explained_variance=explained,
                epochs=epoch,
                grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"],
                clip=clip,
            )
            if run.save_due(update, settings.save_every):
                if run.due(update, settings.save_every):
                    collector.restart(update)
                run.save(update, model=model, optimizer=optimizer, collector=collector.gathered(), leader=best)
        vector.close()
        if run.is_main:
            export(run, config, model, collector, best)


def export(run: Run, config: Config, model: ActorCritic, collector: Collector, best: Best) -> None:
    """`last.safetensors`, and `best.safetensors` where evaluations have chosen one."""
    facts = {
        "project": "ppo",
        "config": to_yaml(config),
        "env_steps": str(collector.num_steps * run.world),
        "updates": str(num_updates(config)),  # of the whole run; fewer where it was stopped
    }
    export_weights(run.folder / "last.safetensors", policy_weights(model, collector), facts | {"update": str(run.step)})
    if best.weights:
        facts |= {"update": str(best.update), "evaluation_return": str(best.score)}
        export_weights(run.folder / "best.safetensors", best.weights, facts)


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
