"""Train graph neural networks:

    python -m gnn.train --config configs/gcn_cora.yaml [key=value ...] [--resume] [--dry-run]

A run is `train.seeds` trainings one after another (or one a fold), each of `train.steps` updates; the weights that were
best on the validation part are kept of each. Test labels and test edges are for gnn.eval alone.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, flatten, load, require, to_yaml
from gnn.config import Config, TrainConfig

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "gnn")

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import runtime
from common.checkpoint import export_weights
from common.errors import exits_cleanly
from common.provenance import trained_otherwise
from common.run import Run
from gnn.task import Task
from gnn.tasks import build_task

INIT_STREAM = 0  # steps count from 1, so this keeps the initial weights' generator apart from theirs


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to the weights of each seed in `models/`."""
    if options.dry_run:
        return describe(config)
    run = Run.start(config, options)
    with run:
        runtime.use_threads(config.train.threads)
        task = build_task(config, run.device)
        task.shard = run.shard
        num_epochs = config.train.steps  # of one trial: a seed, or a fold
        model = start_trial(task, 0)
        optimizer = task.optimizer(model)
        best = Best()
        begun = Settings(config, task.fingerprint(), run.display.say)
        # 0 when fresh; counts the steps of all trials
        done = run.resume(model=model, optimizer=optimizer, kept=best, settings=begun)
        for line in [*task.describe(), f"{runtime.count_parameters(model):,} parameters"]:
            run.display.say(line)

        steps = run.steps(done, num_epochs * task.num_trials)
        for trial in range(done // num_epochs, task.num_trials):
            first_epoch = max(1, done - trial * num_epochs + 1)  # above 1 in a trial that was stopped half way
            if first_epoch > 1:
                task.build(trial)  # its data; its weights have been loaded
            else:
                model = start_trial(task, trial)
                optimizer = task.optimizer(model)
                best = Best()
            net = run.prepare(model)  # the same weights, compiled or spread over processes

            # the epochs first: zip must not take a step that no epoch is left for
            for epoch, step in zip(range(first_epoch, num_epochs + 1), steps):
                if not best.exhausted(epoch, config.train.patience):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(epoch, config.train)
                    # the same in every process, and whatever ran before
                    runtime.seed_generators(run.device, task.seed_of(trial), epoch)
                    model.train()
                    optimizer.zero_grad(set_to_none=True)
                    loss = task.loss(net, epoch)
                    loss.backward()
                    # stops on a non-finite value
                    grad_norm = run.check_gradients(optimizer, loss, config.train.grad_clip)
                    optimizer.step()
                    if epoch % config.train.validate_every == 0 or epoch == num_epochs:
                        model.eval()
                        with torch.no_grad():
                            best.values = task.validate(model)
                        best.update(same_in_all_processes(best.values.pop("criterion"), run.device), epoch, model)
                    values = {"loss": loss.detach(), "grad_norm": grad_norm, **best.values}
                    run.log(step, config.train.log_every, {"steps": 1}, **values)
                if epoch == num_epochs and run.is_main:
                    export_trial(run.folder, config, task.seed_of(trial), trial, best)
                if run.save_due(step, config.train.save_every):
                    run.save(step, model=model, optimizer=optimizer, kept=best, settings=begun)
            if run.step < (trial + 1) * num_epochs:  # a stop signal has ended the steps
                break
        next(steps, None)  # what run.steps does after the last one


class Best:
    """The weights with the lowest validation criterion of a trial so far.

    Attributes:
        step: the epoch that they are of; 0 = none yet.
        values: what the trial's latest validation measured, logged until the next one.
    """

    def __init__(self) -> None:
        self.criterion = math.inf
        self.step = 0
        self.weights: dict[str, torch.Tensor] = {}
        self.values: dict[str, float] = {}

    def update(self, criterion: float, step: int, model: torch.nn.Module) -> None:
        """Copy the weights if they are the best so far."""
        if criterion < self.criterion or not self.step:
            self.criterion = math.inf if math.isnan(criterion) else criterion
            self.step = step
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def exhausted(self, step: int, patience: int) -> bool:
        """Whether nothing has improved for `patience` steps before this one."""
        return patience > 0 and step - self.step > patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"criterion": self.criterion, "step": self.step, "weights": self.weights, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.criterion = state["criterion"]
        self.step = state["step"]
        self.weights = state["weights"]
        self.values = state["values"]


class Settings:
    """The settings that a run began with, kept in its checkpoints and compared when it goes on.

    Seeds that are done stay as they are. With other steps, data or splits they could not stand beside the seeds still
    to come: refused; so are other data behind the same settings. Another learning rate, say, may be meant: said.
    """

    FIXED = ("task", "seed", "train.steps", "data.", "synthetic.", "graph.", "link.val_share", "link.test_share")
    FREE = (
        *("run_dir", "data_root", "device", "compile", "keep_", "tensorboard", "wandb", "eval.", "train.seeds"),
        *("train.log_every", "train.save_every", "train.threads", "synthetic.folder", "data.storage"),
    )
    # how trained weights are tested, and with how many digits
    EVALUATION = (
        *("precision", "deterministic", "link.num_negatives", "community.resolution", "community.restarts"),
        *("sampling.validate", "sampling.chunk_edges", "sampling.prefetch"),
    )

    def __init__(self, config: Config, fingerprint: str, say: Callable[[str], None]) -> None:
        self.now = flatten(config) | {"data.content": fingerprint[:12]}
        self.say = say

    @classmethod
    def difference(cls, noted: str, config: Config) -> str:
        """What weights were trained with otherwise than `config` has it: `trained with train.lr=0.1, not 0.2`, or
        nothing. `noted` is the YAML text beside them.
        """
        return trained_otherwise(noted, config, free=(*cls.FREE, *cls.EVALUATION))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.now.items()}

    def load_state_dict(self, before: dict[str, Any]) -> None:
        """Compare with a checkpoint's. `ConfigError` for a setting that must not change."""
        now = self.state_dict()
        changed = [key for key in now if key in before and now[key] != before[key] and not key.startswith(self.FREE)]
        for key in changed:
            require(
                not key.startswith(self.FIXED),
                key,
                f"was {before[key]} when this run began and cannot become {now[key]}: its seeds would not be alike; "
                "take another run_dir",
            )
        for key in changed:
            self.say(
                f"note: {key} was {before[key]} and is now {now[key]}; seeds that are done keep the old one and are "
                "none of this config for gnn.eval"
            )


def start_trial(task: Task, trial: int) -> torch.nn.Module:
    """Fresh weights and the trial's split: functions of the trial's seed alone."""
    runtime.seed_generators(task.device, task.seed_of(trial), INIT_STREAM)
    return task.build(trial)


def same_in_all_processes(value: float, device: torch.device) -> float:
    """The first process's value. What is kept, and when a trial ends, must not differ between processes: they would
    wait for each other for ever. It would, where each has running means of its own.
    """
    if not torch.distributed.is_initialized():
        return value
    shared = torch.tensor(value, device=device, dtype=torch.float64)
    torch.distributed.broadcast(shared, 0)
    return shared.item()


def export_trial(folder: Path, config: Config, seed: int, trial: int, best: Best) -> None:
    """Write the kept weights of a trial to `models/`, with the seed and the epoch, of how many, that they are of."""
    facts = {
        "project": "gnn",
        "seed": str(seed),
        "step": str(best.step),
        "total_steps": str(config.train.steps),
        "config": to_yaml(config),
    }
    export_weights(folder / f"models/{trial:04d}.safetensors", best.weights, facts)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 1, 2, ...: constant, or half a cosine down to zero at the last step."""
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / max(1, config.steps - 1)))
    return config.lr


def describe(config: Config) -> None:
    """What --dry-run prints: the resolved config, then sizes."""
    task = build_task(config, torch.device("cpu"))
    model = start_trial(task, 0)
    print(to_yaml(config), end="")
    for line in task.describe():
        print(f"# {line}")
    print(
        f"# {runtime.count_parameters(model):,} parameters; {task.num_trials} trainings of {config.train.steps} steps"
    )


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
