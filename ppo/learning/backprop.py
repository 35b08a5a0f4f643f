"""Backpropagation by hand: the gradient of the clipped objective for small MLPs on a CPU, without autograd.

With layers of 64 units PyTorch spends most of a minibatch on dispatching about 150 small operations and on recording
them; the arithmetic is a fifth of it. Here the chain rule is written out in NumPy, on arrays that share their memory
with the model's weights and gradients. What comes out is what `loss.backward()` would give, up to rounding
(tests/ppo/test_backprop.py), at a fourth of the time.

Legend: B samples of a minibatch, O numbers of an observation, P numbers that describe a distribution, A actions, D
dimensions of an action, N rows of the whole rollout. dX is the derivative of the loss with respect to X.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ppo.config import TrainConfig
from ppo.data import Batch
from ppo.learning.distributions import LOG_SQRT_2PI, Categorical, Distribution, Gaussian
from ppo.model import ActorCritic

ACTIVATIONS = {
    nn.Tanh: (np.tanh, lambda y: 1 - y * y),
    nn.ReLU: (lambda x, out: np.maximum(x, 0, out=out), lambda y: y > 0),
}


def can_backprop(model: ActorCritic, distribution: Distribution, device: torch.device, world: int) -> bool:
    """Whether this module knows the derivatives: separate MLPs of numbers, one categorical or Gaussian action, one
    process, a CPU.
    """
    return (
        device.type == "cpu"
        and world == 1
        and model.kind == "mlp"
        and not model.pictures
        and model.critic_trunk is not None
        and type(distribution) in (Categorical, Gaussian)
    )


@dataclass
class Layer:
    """A linear layer's arrays, weight (out, in) and bias (out,), and where their gradients go."""

    weight: np.ndarray
    bias: np.ndarray
    weight_gradient: np.ndarray
    bias_gradient: np.ndarray


class Network:
    """A trunk and its head, as a list of layers with one activation between them."""

    def __init__(self, layers: list[Layer], activation: type[nn.Module]) -> None:
        self.layers = layers
        self.activate, self.slope = ACTIVATIONS[activation]  # the slope as a function of what the activation put out

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        """Inputs of all layers, then the output of the last: (B, O), (B, 64), (B, 64), (B, P)."""
        values = [x]
        for layer in self.layers[:-1]:
            y = values[-1] @ layer.weight.T
            y += layer.bias
            values.append(self.activate(y, out=y))
        return [*values, values[-1] @ self.layers[-1].weight.T + self.layers[-1].bias]

    def backward(self, values: list[np.ndarray], d: np.ndarray) -> None:
        """From d, the derivative with respect to the output (B, P), to the gradients of all weights.

        y = x W^T + b gives dW = dy^T x, db = sum of dy, dx = dy W; an activation y = f(x) gives dx = f'(x) dy.
        """
        for number in range(len(self.layers) - 1, -1, -1):
            layer, x = self.layers[number], values[number]
            np.matmul(d.T, x, out=layer.weight_gradient)
            np.add.reduce(d, axis=0, out=layer.bias_gradient)
            if number:
                d = d @ layer.weight
                d *= self.slope(x)


class PolicyMeans(NamedTuple):
    """Means over a minibatch, as in `objective.Terms`."""

    loss: float
    entropy: float
    kl: float
    clipped: float


def mean(values: np.ndarray) -> float:
    """As `values.mean()`, for (B,), in a third of the time."""
    return np.add.reduce(values) / len(values)


class Backprop:
    """Gradients of `objective.total_loss`, averaged over a minibatch, for the weights of `model`.

    All weights are moved into one vector, so that clipping and Adam handle a single tensor.

    Attributes:
        weights: that vector, with its gradient in `weights.grad`: what the optimizer gets. The model's own parameters
            are views of it.
    """

    def __init__(self, model: ActorCritic, distribution: Distribution, settings: TrainConfig) -> None:
        self.settings = settings
        self.gaussian = isinstance(distribution, Gaussian)
        parameters = list(model.parameters())
        self.weights = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
        self.weights.grad = torch.zeros_like(self.weights)
        arrays = {}
        start = 0
        for parameter in parameters:
            part = slice(start, start := start + parameter.numel())
            parameter.data = self.weights.data[part].view_as(parameter)
            arrays[parameter] = (parameter.detach().numpy(), self.weights.grad[part].view_as(parameter).numpy())
        self.actor = network(model.actor_trunk, model.policy.linear, arrays)
        self.critic = network(model.critic_trunk, model.value, arrays)
        if self.gaussian:
            self.log_std, self.log_std_gradient = arrays[model.policy.log_std]

    def act(self, observations: np.ndarray) -> Tensor:
        """As `ActorCritic.act`, without recording anything: parameters of the distribution (B, P)."""
        x = observations.reshape(len(observations), -1).astype(self.actor.layers[0].weight.dtype, copy=False)
        out = self.actor.forward(x)[-1]
        return torch.from_numpy(
            np.concatenate([out, np.broadcast_to(self.log_std, out.shape)], axis=1) if self.gaussian else out
        )

    def gradients(self, batch: Batch, rows: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """Fill `weights.grad` for the minibatch `rows` (B,) of a batch whose observations are (N, O).

        Returns:
            the loss, and the means of policy loss, value loss, entropy, KL and clipped share (5,), as
            `objective.Terms`.
        """
        chosen = rows.numpy()
        settings = self.settings
        advantages = batch.advantages.numpy()[chosen]
        if settings.normalize_advantage and len(chosen) > 1:
            advantages = advantages - mean(advantages)
            advantages /= np.sqrt(advantages @ advantages / (len(chosen) - 1)) + 1e-8
        x = batch.observations.numpy()[chosen]
        policy = self.policy_gradient(
            x, batch.actions.numpy()[chosen], batch.old_log_prob.numpy()[chosen], advantages, clip
        )
        value_loss = self.value_gradient(x, batch.old_values.numpy()[chosen], batch.returns.numpy()[chosen])
        means = [policy.loss, value_loss, policy.entropy, policy.kl, policy.clipped]
        loss = policy.loss + settings.value_weight * value_loss - settings.entropy_weight * policy.entropy
        return torch.tensor(loss), torch.tensor(means, dtype=self.weights.dtype)

    def policy_gradient(
        self, x: np.ndarray, actions: np.ndarray, old_log_prob: np.ndarray, advantages: np.ndarray, clip: float
    ) -> PolicyMeans:
        """The actor's part: the clipped loss and the entropy bonus of observations x (B, O)."""
        hidden = self.actor.forward(x)
        score_of = self.score_gaussian if self.gaussian else self.score_categorical
        log_prob, entropy, score = score_of(hidden[-1], actions)
        log_ratio = log_prob - old_log_prob
        ratio = np.exp(log_ratio)
        plain = ratio * advantages
        clipped = np.minimum(np.maximum(ratio, 1 - clip), 1 + clip) * advantages
        weight = 1 / len(x)
        # d ratio = ratio d log_prob; 0 where the clipped one counts
        d_log_prob = np.where(plain <= clipped, -weight * plain, 0)
        self.actor.backward(hidden, score(d_log_prob, -self.settings.entropy_weight * weight))
        return PolicyMeans(
            loss=-mean(np.minimum(plain, clipped)),
            entropy=mean(entropy),
            kl=mean(np.expm1(log_ratio) - log_ratio),
            clipped=np.count_nonzero(abs(ratio - 1) > clip) * weight,
        )

    def value_gradient(self, x: np.ndarray, old_values: np.ndarray, returns: np.ndarray) -> float:
        """The critic's part: half the squared error of its values, or with clip_value the larger of that and the same
        for a value near the old one. Returns the mean loss.
        """
        hidden = self.critic.forward(x)
        values = hidden[-1][:, 0]
        weight = 1 / len(x)
        error = values - returns
        d_values = error  # of the loss of each row, to its value
        limit = self.settings.clip_value
        if limit > 0:
            moved = values - old_values
            near = old_values + np.clip(moved, -limit, limit) - returns
            larger = near * near > error * error
            # a clipped value does not move with the weights
            d_values = np.where(larger, near * (np.abs(moved) <= limit), error)
            error = np.where(larger, near, error)
        self.critic.backward(hidden, (self.settings.value_weight * weight) * d_values[:, None])
        return error @ error * (weight / 2)

    @staticmethod
    def score_categorical(logits: np.ndarray, actions: np.ndarray) -> tuple:
        """Log-probability (B,) and entropy (B,) of actions (B,), and the function that carries their derivatives on to
        the logits (B, A).

        d log p(a) / d z_k = [k = a] - p_k and d H / d z_k = -p_k (log p_k + H).
        """
        log_p = logits - np.maximum.reduce(logits, axis=1, keepdims=True)
        log_p -= np.log(np.add.reduce(np.exp(log_p), axis=1, keepdims=True))
        p = np.exp(log_p)
        each = np.arange(len(actions))
        entropy = -np.add.reduce(p * log_p, axis=1)

        def score(d_log_prob: np.ndarray, d_entropy: float) -> np.ndarray:
            d = p * -d_log_prob[:, None]
            d[each, actions] += d_log_prob
            return d - (d_entropy * p) * (log_p + entropy[:, None]) if d_entropy else d

        return log_p[each, actions], entropy, score

    def score_gaussian(self, mean: np.ndarray, actions: np.ndarray) -> tuple:
        """The same for a Gaussian around `mean` (B, D), actions (B, D).

        With z = (a - mean) / std: d log p / d mean = z / std, d log p / d log std = z^2 - 1, d H / d log std = 1.
        """
        inverse = np.exp(-self.log_std)
        z = (actions - mean) * inverse
        log_prob = (-0.5 * z * z - self.log_std - LOG_SQRT_2PI).sum(axis=1)
        entropy = np.full(len(mean), (self.log_std + 0.5 + LOG_SQRT_2PI).sum(), dtype=mean.dtype)

        def score(d_log_prob: np.ndarray, d_entropy: float) -> np.ndarray:
            self.log_std_gradient[:] = d_log_prob @ (z * z - 1) + d_entropy * len(mean)
            return d_log_prob[:, None] * z * inverse

        return log_prob, entropy, score


def network(trunk: nn.Sequential, head: nn.Linear, arrays: dict) -> Network:
    """The layers of a trunk and its head; `arrays` has each parameter's values and gradient."""
    modules = [*trunk, head]
    layers = [
        Layer(arrays[m.weight][0], arrays[m.bias][0], arrays[m.weight][1], arrays[m.bias][1])
        for m in modules
        if isinstance(m, nn.Linear)
    ]
    activation = next((type(m) for m in modules if not isinstance(m, nn.Linear)), nn.Tanh)
    return Network(layers, activation)
