"""Two ways to the same gradient, behind the same three names: `parameters`, `act` and `gradients`.

`Autograd` is the default: PyTorch differentiates what `objective.py` says. `Manual` (`train.backprop=manual`) is the
chain rule written out in `backprop.py`, four times as fast for small networks on a CPU; before it is used it must agree
with autograd on the first minibatch of the run, so that a change in `objective.py` cannot be passed over silently.

Legend: B rows of this process in a minibatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.config import require
from common.errors import ProjectError
from common.run import Run
from ppo.config import Config, TrainConfig
from ppo.data import Batch, local_rows
from ppo.learning import objective
from ppo.learning.backprop import Backprop, can_backprop
from ppo.learning.distributions import Distribution
from ppo.learning.objective import Terms
from ppo.model import ActorCritic
from ppo.playing.collect import Act, Look

TOLERANCE = 1e-3  # of the gradient's norm, in float32; rounding is a hundredth of that


class Statistics(NamedTuple):
    """Means over a minibatch, scalars."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor

    @staticmethod
    def average(of: list[Statistics]) -> Statistics:
        """The mean over minibatches."""
        return Statistics(*torch.stack([torch.stack(each) for each in of]).mean(dim=0))


class Gradients(Protocol):
    """What a training loop needs of either.

    Attributes:
        parameters: what the optimizer steps.
        act: from observations (N, *O) to the parameters of the policy's distribution (N, P), for rollouts.
        look: the same and values (N,), where they come for nothing; else None.
    """

    parameters: Iterable[nn.Parameter]
    act: Act
    look: Look | None

    def gradients(self, batch: Batch, minibatch: Tensor, clip: float) -> tuple[Tensor, Statistics]:
        """Set the gradient of the loss on the rows `minibatch` int64 of all processes' batches; the loss, and means."""


def build_gradients(config: Config, model: ActorCritic, distribution: Distribution, run: Run) -> Gradients:
    """The one that `train.backprop` names. `ConfigError` where manual does not know the derivatives."""
    if config.train.backprop == "autograd":
        return Autograd(config, model, distribution, run)
    require(
        can_backprop(model, distribution, run.device, run.world),
        "train.backprop",
        "manual works for two separate MLPs and one categorical or Gaussian action, in one process on a CPU",
    )
    return Manual(model, distribution, config.train)


class Autograd:
    """`objective.py`, differentiated by PyTorch; on any device and over several processes."""

    def __init__(self, config: Config, model: ActorCritic, distribution: Distribution, run: Run) -> None:
        self.settings = config.train
        self.model = model
        self.distribution = distribution
        self.run = run
        self.count = config.env.count // run.world
        self.net = run.prepare(model)  # the same weights, compiled or spread over processes
        self.parameters = list(model.parameters())
        self.look = self.see if model.kind == "cnn" else None  # its trunk is shared

    def act(self, observations: np.ndarray) -> Tensor:
        """Parameters of the distribution (N, P)."""
        return self.model.act(torch.from_numpy(np.ascontiguousarray(observations)).to(self.run.device))

    def see(self, observations: np.ndarray) -> tuple[Tensor, Tensor]:
        """Parameters of the distribution (N, P) and values (N,)."""
        return self.model(torch.from_numpy(np.ascontiguousarray(observations)).to(self.run.device))

    def gradients(self, batch: Batch, minibatch: Tensor, clip: float) -> tuple[Tensor, Statistics]:
        """See `Gradients`."""
        rows = batch.select(local_rows(minibatch, self.count, self.run))
        size = len(minibatch)  # over all processes
        if self.settings.normalize_advantage:
            rows = rows._replace(advantages=normalized(rows.advantages, size, self.run))
        terms = terms_of(self.net, self.distribution, rows, clip, self.settings.clip_value)
        # processes' gradients are averaged, hence x world
        loss = objective.total_loss(terms, self.settings).sum() * (self.run.world / size)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        means = summed(torch.stack([term.detach() for term in terms]).sum(dim=1), self.run) / size
        return loss, Statistics(*means)


class Manual:
    """`backprop.py`: the chain rule in NumPy, after it has agreed with autograd once."""

    def __init__(self, model: ActorCritic, distribution: Distribution, settings: TrainConfig) -> None:
        self.model = model
        self.distribution = distribution
        self.settings = settings
        self.backprop = Backprop(model, distribution, settings)
        self.parameters = [self.backprop.weights]
        self.act = self.backprop.act
        self.look = None
        self.checked = False

    def gradients(self, batch: Batch, minibatch: Tensor, clip: float) -> tuple[Tensor, Statistics]:
        """See `Gradients`. `ProjectError` on the first minibatch where `objective.py` says something else."""
        read = batch._replace(observations=self.model.read(batch.observations))
        loss, means = self.backprop.gradients(read, minibatch, clip)
        if not self.checked:
            self.check(batch.select(minibatch), loss, clip)
            self.checked = True
        return loss, Statistics(*means.unbind())

    def check(self, rows: Batch, loss: Tensor, clip: float) -> None:
        """Compare loss and gradient with autograd's on the same rows."""
        if self.settings.normalize_advantage and len(rows.advantages) > 1:
            rows = rows._replace(advantages=standardized(rows.advantages))
        terms = terms_of(self.model, self.distribution, rows, clip, self.settings.clip_value)
        wanted = objective.total_loss(terms, self.settings).mean()
        found = torch.autograd.grad(wanted, list(self.model.parameters()), allow_unused=True)
        weights = self.model.parameters()
        flat = torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found)])
        error = float((flat - self.backprop.weights.grad).norm() / flat.norm().clamp(min=1e-8))
        if error > TOLERANCE or abs(float(wanted.detach() - loss)) > TOLERANCE * max(1.0, abs(float(loss))):
            raise ProjectError(
                "train.backprop=manual computes another gradient than ppo/learning/objective.py asks for (they differ "
                f"by {error:.2g} of its norm): ppo/learning/backprop.py must follow, or use train.backprop=autograd"
            )


def terms_of(net: nn.Module, distribution: Distribution, rows: Batch, clip: float, clip_value: float) -> Terms:
    """The objective's terms for each of these rows, by the weights as they are now."""
    parameters, values = net(rows.observations)
    log_prob, entropy = distribution.log_prob_entropy(parameters, rows.actions)
    return objective.ppo_terms(
        log_prob,
        entropy,
        values,
        rows.old_log_prob,
        rows.old_values,
        rows.advantages,
        rows.returns,
        clip,
        clip_value,
    )


def standardized(advantages: Tensor) -> Tensor:
    """Zero mean and unit variance, for (B,) with B at least 2."""
    variance, mean = torch.var_mean(advantages)
    return (advantages - mean) / (variance.sqrt() + 1e-8)


def normalized(advantages: Tensor, total: int, run: Run) -> Tensor:
    """Zero mean and unit variance over the whole minibatch of `total` rows, whoever played them. One row alone stays
    as it is.
    """
    if total < 2:
        return advantages
    if run.world == 1:
        return standardized(advantages)
    mean = summed(advantages.sum(), run) / total
    centred = advantages - mean
    variance = summed(centred.square().sum(), run) / (total - 1)
    return centred / (variance.sqrt() + 1e-8)


def summed(values: Tensor, run: Run) -> Tensor:
    """Sum over the processes."""
    if run.world > 1:
        dist.all_reduce(values)
    return values
