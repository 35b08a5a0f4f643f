"""One run of a project: its folder, its checkpoints, its log, its stop signals.

A training loop creates a `Run` and calls these small things by name; nothing here calls back into the loop.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common import runtime
from common.checkpoint import UNFIT, CheckpointError, Checkpoints
from common.config import BaseConfig, ConfigError, Options, to_yaml
from common.errors import ProjectError
from common.finite import FiniteCheck
from common.folder import RunFolder, nothing_to_resume
from common.logging import Display, MetricLog, check_trackers
from common.signals import Stopped, StopSignals, stoppable

T = TypeVar("T")


class Run:
    """A training run, from `Run.start` to the end of the `with` block.

    Attributes:
        folder: `runs/<name>/`.
        device, rank, world, is_main: see `common.runtime.Runtime`.
        memory_format: the layout in which this device's convolutions are fastest.
        flops_per_step: set it to have model FLOPs utilisation logged on a known GPU.
    """

    def __init__(self, config: BaseConfig, options: Options) -> None:
        self.config = config
        self.options = options
        self.folder = Path(config.run_dir)
        self.machine = runtime.start(config)
        self.device = self.machine.device
        self.rank = self.machine.rank
        self.world = self.machine.world
        self.is_main = self.machine.is_main
        self.signals = StopSignals()
        self.display = Display(self.is_main)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_last, config.keep_every)
        self.autocast = self.machine.autocast
        # GPU convolutions want the channels last; on a CPU PyTorch's bf16 GroupNorm is several times slower that way
        self.memory_format = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.machine.amp_dtype == torch.float16)
        self.finite = FiniteCheck(self.device, self.scaler, self.checkpoints)
        self.flops_per_step = 0.0
        self.step = self.saved_step = self.total = 0
        self._begun = False
        self._agreed_to_stop = False
        self._last_log = (0, 0.0)
        self.owner = RunFolder(config, options, self.checkpoints, self.display.say)  # in a training's main process
        self.log_file: MetricLog | None = None

    @classmethod
    def start(cls, config: BaseConfig, options: Options) -> Run:
        """Open the run folder: a new one, or with --resume an old one. Refuses to write over an earlier run unless
        told to. What is in it changes with the first step, when all else that the run needs is there.
        """
        run = cls(config, options)
        run.in_main_process(lambda: run.owner.open(runtime.environment(run.machine)))
        run.display.say(
            f"{run.folder}: {run.device}, "
            f"{str(run.machine.amp_dtype or torch.get_default_dtype()).removeprefix('torch.')}"
            + (f", {run.world} processes" if run.world > 1 else "")
        )
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.log_file:
            self.log_file.close()
        self.owner.close()
        self.machine.leave_group(together=error is None)
        if (error is None or kind is Stopped) and self.signals.received:
            after = f" after step {self.step}; add --resume to the same command to go on" if self.step else ""
            self.display.say(f"stopped by {self.signals.received}{after}")
            sys.exit(self.signals.exit_code)

    def in_main_process(self, act: Callable[[], None]) -> None:
        """Call `act` in the main process; a `ProjectError` there ends them all."""
        problem = ""
        if self.is_main:
            try:
                act()
            except ProjectError as error:
                problem = str(error)
        if self.machine.any(bool(problem)):
            raise ProjectError(problem or "the main process could not open the run folder")

    # -- models and randomness -----------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, compiled: bool = False) -> nn.Module:
        """The model to call in the loop: the same weights, wrapped for several processes and compiled as the config
        asks.

        Args:
            compiled: parts of it are compiled already, and the whole shall not be.
        """
        net: nn.Module = model
        if self.world > 1:
            net = nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        if compiled or not self.config.compile:
            return net
        return torch.compile(net)  # type: ignore[return-value]  # called as a module is

    def generator(self, *numbers: int) -> torch.Generator:
        """A generator on the device whose stream depends on the run's seed and these numbers only; equal in every
        process.
        """
        return torch.Generator(self.device).manual_seed(runtime.mix_seed(self.config.seed, *numbers))

    def shard(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch that every process has drawn alike. `ConfigError` if it cannot be divided
        evenly.
        """
        size, rest = divmod(len(batch), self.world)
        if rest:
            raise ConfigError(
                "train.batch_size", f"{len(batch)} must be divisible by the number of processes, {self.world}"
            )
        return batch[self.rank * size : (self.rank + 1) * size]

    # -- the loop ------------------------------------------------------------------------------------------------------

    def steps(self, done: int, total: int) -> Iterator[int]:
        """Step numbers done+1 to total. After a stop signal it ends as soon as the loop has saved.

        The global generators are seeded anew from (seed, step, process) before each step, so that dropout does not
        depend on history.
        """
        self.total = total
        self.step = done
        self.saved_step = done
        self.begin()
        if self.is_main:  # what the report compares the last logged step with
            self.owner.note(threads=torch.get_num_threads(), total_steps=total)
        self._last_log = (done, time.perf_counter())
        for step in self.display.track(range(done + 1, total + 1), total, self.folder.name, done, every=0):
            self.step = step
            runtime.seed_generators(self.device, self.config.seed, step, self.rank)
            # asked here, where every process passes once a step whatever the loop does in between
            self._agreed_to_stop = self.machine.any(self.signals.received is not None)
            yield step
            if self.stopping and self.saved_step == step:
                break
        self.finite.check()

    @property
    def stopping(self) -> bool:
        """Whether a stop signal has arrived; with several processes, whether they have all seen that one of them got
        it.
        """
        return self._agreed_to_stop if self.world > 1 else self.signals.received is not None

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens at this one; the last step counts, 0 means
        never.
        """
        return every > 0 and (step % every == 0 or step == self.total)

    def save_due(self, step: int, every: int) -> bool:
        """`due`, and also once a stop signal has arrived."""
        return self.due(step, every) or self.stopping

    def check_gradients(self, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 0.0) -> Tensor:
        """Clip the gradients, and stop the run if the loss or a gradient is not finite; the step comes next.

        On a CPU that raises `NonFinite` at once. On a GPU asking would make the host wait for the device at every step,
        so a fused optimizer is told to skip from the first bad step on, and the error is raised when a line is logged
        or a checkpoint is due.

        Args:
            loss: the loss of this step, detached or not; only looked at.
            clip: largest global norm of the gradients; 0 = no limit.
        Returns:
            The gradients' global norm before clipping, a scalar on the device.
        """
        return self.finite.gradients(self.step, optimizer, loss, clip)

    def log(self, step: int, every: int, units: dict[str, int] | None = None, **values: Tensor | float) -> None:
        """Write a line of metrics if one is due. Tensors are read from the device, and averaged over the processes,
        only then.

        Args:
            units: work a step, such as {"images": 128}; logged as `images_per_second` since the last line.
        """
        if not self.due(step, every):
            return
        self.finite.check()
        self.begin()
        # reading waits for the device, so the clock comes after
        row = {name: self._mean(value) for name, value in values.items()}
        (last_step, last_time), now = self._last_log, time.perf_counter()
        rate = (step - last_step) / max(now - last_time, 1e-9)
        row |= {f"{name}_per_second": rate * amount for name, amount in (units or {}).items()}
        peak = runtime.peak_flops(self.device)
        if peak and self.flops_per_step:
            row["mfu"] = self.flops_per_step * rate / (peak * self.world)
        self._last_log = (step, now)
        if self.is_main and self.log_file:
            self.log_file.write(step, row)
            self.display.note(step, self.total, row, (self.total - step) / max(rate, 1e-9))

    def _mean(self, value: Tensor | float) -> float:
        if self.world > 1 and isinstance(value, Tensor):
            torch.distributed.all_reduce(value := value.detach().clone())
            value /= self.world
        return float(value)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate; raises `Stopped` between two items once a stop signal has arrived."""
        return stoppable(self.signals, items)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part of a step, such as drawing samples, that a stop signal may cut short; the loop goes on to its
        checkpoint.
        """
        with contextlib.suppress(Stopped):
            yield

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, step: int, best: bool = False, **parts: Any) -> None:
        """Write a checkpoint of everything that has a `state_dict`, and of plain values; the main process writes."""
        self.finite.check()
        self.finite.check_weights(step, parts.values())
        self.begin()
        self.saved_step = step
        if self.is_main:
            if self.log_file:
                self.log_file.flush()
            state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
            self.checkpoints.save(
                step,
                {
                    "step": step,
                    "config": to_yaml(self.config),
                    "rng": runtime.rng_state(),
                    "scaler": self.scaler.state_dict(),
                    "parts": state,
                },
                best,
            )
            if not self.owner.environment.get("first_saved"):  # a later --resume must find one
                self.owner.note(first_saved=step)

    @contextlib.contextmanager
    def fitting(self, what: str) -> Iterator[None]:
        """What a foreign or forged state raises in the part that loads it becomes a `CheckpointError` with its name."""
        try:
            yield
        except UNFIT as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.checkpoints.folder}: {what} does not fit: {reason}") from None

    def resume(self, **parts: Any) -> int:
        """With --resume, load the newest whole checkpoint into `parts`; returns the number of steps done, 0 for a fresh
        start.

        An optimizer gets its moments back; its learning rate, betas and so on stay those of the config, which may have
        changed.
        """
        state = self.checkpoints.load_newest() if self.options.resume else None
        if self.options.resume and state is None:
            nothing_to_resume(self.folder, self.checkpoints, self.display.say)
        done = 0
        if state is not None:
            for name, part in parts.items():
                with self.fitting(name):
                    saved = state["parts"][name]
                    if isinstance(part, torch.optim.Optimizer):
                        saved = {**saved, "param_groups": part.state_dict()["param_groups"]}
                    part.load_state_dict(saved)
            with self.fitting("what it holds beside these"):
                if state["scaler"]:  # empty unless the run was in fp16
                    self.scaler.load_state_dict(state["scaler"])
                runtime.set_rng_state(state["rng"])
                done = int(state["step"])
            self.display.say(f"resumed after step {done}")
        self.step = done
        return done

    def begin(self) -> None:
        """Put the folder in order, once: an earlier run is deleted where that is wanted, config.yaml is written, the
        log is opened. `steps`, `log` and `save` see to it, so that a run which cannot be opened has changed nothing.
        """
        if not self._begun:
            self._begun = True
            self.in_main_process(self._open_log)

    def _open_log(self) -> None:
        check_trackers(self.config.tensorboard, self.config.wandb)
        self.owner.environment["threads"] = torch.get_num_threads()
        self.owner.begin()
        self.log_file = MetricLog(self.folder, self.step + 1, self.config.tensorboard, self.config.wandb)
