"""Train graph neural networks:

    python -m gnn.train --config configs/gcn_cora.yaml [key=value ...] [--resume] [--dry-run]

A run is `train.seeds` trainings one after another (or one a fold), each of `train.steps` updates; the weights that were
best on the validation part are kept of each. Test labels and test edges are for gnn.eval alone.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from gnn.config import Config, TrainConfig

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "gnn")

import math
from typing import Any

import torch

from common import runtime
from common.checkpoint import export_weights
from common.errors import exits_cleanly
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
        steps, total = config.train.steps, config.train.steps * task.num_trials
        model = start_trial(task, 0)
        optimizer, best = task.optimizer(model), Best()
        done = run.resume(model=model, optimizer=optimizer, kept=best)  # 0 when fresh; counts the steps of all seeds
        net = run.prepare(model)  # the same weights, compiled or spread over processes
        for line in [*task.describe(), f"{runtime.count_parameters(model):,} parameters"]:
            run.display.say(line)
        if done % steps:
            task.build(done // steps)  # the data of the trial that goes on; its weights have been loaded
        values: dict[str, float] = {}

        for step in run.steps(done, total):
            trial, epoch = (step - 1) // steps, (step - 1) % steps + 1
            if epoch == 1:
                model.load_state_dict(start_trial(task, trial).state_dict())
                optimizer.state.clear()
                best.reset()
            if not best.exhausted(epoch, config.train.patience):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(epoch, config.train)
                # the same in every process, and whatever ran before
                runtime.seed_generators(run.device, task.seed_of(trial), epoch)
                model.train()
                optimizer.zero_grad(set_to_none=True)
                loss = task.loss(net, epoch)
                loss.backward()
                grad_norm = run.check_gradients(optimizer, loss, config.train.grad_clip)  # stops on a non-finite value
                optimizer.step()
                if epoch % config.train.validate_every == 0 or epoch == steps:
                    model.eval()
                    with torch.no_grad():
                        values = task.validate(model)
                    best.update(values.pop("criterion"), epoch, model)
                run.log(step, config.train.log_every, {"steps": 1}, loss=loss.detach(), grad_norm=grad_norm, **values)
            if epoch == steps and run.is_main:
                facts = {
                    "project": "gnn",
                    "seed": str(task.seed_of(trial)),
                    "step": str(best.step),
                    "config": to_yaml(config),
                }
                export_weights(run.folder / f"models/{trial:04d}.safetensors", best.weights, facts)
            if run.save_due(step, config.train.save_every):
                run.save(step, model=model, optimizer=optimizer, kept=best)


class Best:
    """The weights with the lowest validation criterion of a trial so far."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new trial begins."""
        self.criterion, self.step = math.inf, 0
        self.weights: dict[str, torch.Tensor] = {}

    def update(self, criterion: float, step: int, model: torch.nn.Module) -> None:
        """Copy the weights if they are the best so far."""
        if criterion < self.criterion or not self.step:
            self.criterion, self.step = math.inf if math.isnan(criterion) else criterion, step
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def exhausted(self, step: int, patience: int) -> bool:
        """Whether nothing has improved for `patience` steps before this one."""
        return patience > 0 and step - self.step > patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"criterion": self.criterion, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.criterion, self.step, self.weights = state["criterion"], state["step"], state["weights"]


def start_trial(task: Task, trial: int) -> torch.nn.Module:
    """Fresh weights and the trial's split: functions of the trial's seed alone."""
    runtime.seed_generators(task.device, task.seed_of(trial), INIT_STREAM)
    return task.build(trial)


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
