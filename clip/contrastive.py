"""The two contrastive losses, over one process or many, at once or in blocks, and the gradient cache.

Shapes:  N images, M texts of this process   W processes   E numbers of an embedding
         x (N, E) image embeddings, y (M, E) text embeddings, all of length 1
         z_ij = t x_i . y_j + b   logits of image i and text j, with t = exp(t')

An image and a text belong together when their ids are equal. Ids are of images: the five captions of a photograph all
carry its id, so that none of them is called a mistake. Without ids, x_i belongs to y_i and to nothing else.

Radford et al. 2021   Learning transferable visual models (CLIP), figure 3       arXiv:2103.00020
Khosla et al. 2020    Supervised contrastive learning, eq. 2 (many positives)    arXiv:2004.11362
Zhai et al. 2023      Sigmoid loss for language image pre-training (SigLIP)      arXiv:2303.15343
Gao et al. 2021       Scaling deep contrastive learning batch size (cache)       arXiv:2101.06983
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clip.model import CLIP, Output


def contrastive_loss(
    output: Output,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    block: int = 0,
    smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE, or with a bias the sigmoid loss, of this process's pairs against those of all processes.

    The mean of this value over the processes is the loss of the whole batch, and DistributedDataParallel's mean of the
    gradients is its gradient: what one process would have computed. Every process must call it.

    Args:
        output: embeddings of this process; every process has the same N and the same M.
        image_ids: int64 (N,); text_ids: int64 (M,). Both or neither. Every image has a text among the M W texts, and
            every text its image: otherwise InfoNCE is not a number.
        block: rows of logits held at once, recomputed in the backward pass; 0 = all. Memory is then that of
            block * M * W logits instead of N * M * W, at the price of a second matrix product.
        smoothing: InfoNCE: share of the target that all columns have alike (Szegedy et al. 2015, section 7).
    Returns:
        A float32 scalar, outside of autocast: see `model.normalise`.
    Raises:
        ValueError: other numbers of images and texts, without ids.
    """
    x, y = output.image, output.text
    if image_ids is None or text_ids is None:
        if len(x) != len(y):
            raise ValueError(f"{len(x)} images and {len(y)} texts: which belong together must be said by ids")
        image_ids = text_ids = rank() * len(x) + torch.arange(len(x), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        t = output.log_scale.exp()
        if output.bias is not None:
            all_y = gather(y)
            return in_blocks(sigmoid_rows, x, image_ids, all_y, gather(text_ids), (t, output.bias), block) / len(x)
        all_x, all_y = gather(torch.cat([x, y])).view(-1, len(x) + len(y), x.shape[1]).split([len(x), len(y)], dim=1)
        all_x, all_y = all_x.flatten(0, 1), all_y.flatten(0, 1)  # (W, N, E) -> (W N, E), (W, M, E) -> (W M, E)
        rest = (t, t.new_tensor(smoothing))
        to_text = in_blocks(softmax_rows, x, image_ids, all_y, gather(text_ids), rest, block) / len(x)
        to_image = in_blocks(softmax_rows, y, text_ids, all_x, gather(image_ids), rest, block) / len(y)
        return (to_text + to_image) / 2


def softmax_rows(x: Tensor, x_ids: Tensor, y: Tensor, y_ids: Tensor, t: Tensor, smoothing: Tensor) -> Tensor:
    """Sum over the rows i of -1/|P_i| sum_{p in P_i} log softmax_p(t x_i . y), where P_i are the positives of i.

    With one positive that is the cross-entropy of Radford et al. 2021, figure 3; with several, Khosla et al. 2020,
    eq. 2: the sum stands outside of the logarithm, so that each of the five captions must be likely, not just one.
    `smoothing` s makes the target (1 - s) / |P_i| for the positives and s / columns more for every column.
    """
    logits = t * (x @ y.T)  # (rows, columns)
    positive = (x_ids[:, None] == y_ids[None, :]).to(logits.dtype)
    mean_positive = (logits * positive).sum(dim=1) / positive.sum(dim=1)
    aimed_at = torch.lerp(mean_positive, logits.mean(dim=1), smoothing)
    return (logits.logsumexp(dim=1) - aimed_at).sum()


def sigmoid_rows(x: Tensor, x_ids: Tensor, y: Tensor, y_ids: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """Sum over rows i and columns j of -log sigmoid(s_ij (t x_i . y_j + b)), with s_ij = 1 for a pair that belongs
    together and -1 for any other (Zhai et al. 2023, eq. 1).

    Each pair is a question of its own: no sum over the batch stands below a fraction, and any number of positives is
    allowed.
    """
    logits = t * (x @ y.T) + b  # (rows, columns)
    positive = x_ids[:, None] == y_ids[None, :]
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()


def in_blocks(
    rows: Callable[..., Tensor],
    x: Tensor,
    x_ids: Tensor,
    y: Tensor,
    y_ids: Tensor,
    rest: tuple[Tensor, ...],
    block: int,
) -> Tensor:
    """The sum of `rows` over all rows of x, `block` of them at once; their logits are not kept but computed again in
    the backward pass.
    """
    if block == 0 or block >= len(x):
        return rows(x, x_ids, y, y_ids, *rest)
    parts = zip(x.split(block), x_ids.split(block), strict=True)
    return torch.stack([checkpoint(rows, part, ids, y, y_ids, *rest, use_reentrant=False) for part, ids in parts]).sum()


# -- several processes -------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process; 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """The tensors of all processes, one behind the other: (N, ...) -> (W N, ...). Gradients flow back to the process
    that each row came from.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """`dist.all_gather` alone is a dead end for gradients: rows of other processes would count as constants, and each
    embedding would learn only as a query of its own process, never as a negative example of the others.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # My rows were used in the loss of every process: their gradient is the sum over all of these.
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total[rank() * ctx.rows :][: ctx.rows]


# -- any batch in bounded memory ---------------------------------------------------------------------------------------


class RandomState:
    """The state of PyTorch's global generators, of the CPU and of `device`, at the time this is made."""

    def __init__(self, device: torch.device):
        self.cpu = torch.get_rng_state()
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.device_state = None if self.module is None else self.module.get_rng_state()

    def restore(self) -> None:
        """Draw again from here what was drawn since."""
        torch.set_rng_state(self.cpu)
        if self.module is not None:
            self.module.set_rng_state(self.device_state)


def cached_backward(
    model: CLIP | DistributedDataParallel,
    images: Tensor,
    ids: Tensor,
    objective: Callable[[Output], Tensor],
    microbatch: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    loss_scale: Tensor | float = 1.0,
) -> Tensor:
    """Add the gradients of the loss of a whole batch to the parameters, with only `microbatch` images in the towers at
    once: `objective(model(images, ids)).backward()` in less memory (Gao et al. 2021).

    A contrastive loss does not split into a sum over microbatches, for each pair is compared with all others. But it
    needs of the towers no more than their embeddings:

        1. embed all parts without a graph;
        2. from the embeddings alone: the loss, and its gradient with respect to each embedding;
        3. embed each part again, now with a graph, and send that gradient through it.

    Dropout must drop the same in 1 and 3, so the generators' states are kept and replayed. BatchNorm normalises within
    a part, and its running averages move once, not twice.

    Args:
        model: `CLIP`, or DistributedDataParallel around it (gradients are exchanged once, in the last part).
        images: (N, ...); ids: (M, ...): split into equally many parts.
        objective: the loss of an `Output`.
        autocast: makes the context of each forward pass. Do not call this function inside of such a context: weights
            cast in step 1 would be reused, without a graph, in step 3.
        loss_scale: of a GradScaler.
    Returns:
        The loss, detached and unscaled.
    """
    num_parts = -(-len(images) // microbatch)
    parts = list(zip(images.tensor_split(num_parts), ids.tensor_split(num_parts), strict=True))
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(RandomState(images.device))
            with autocast():
                outputs.append(model(*part))
    averages = [buffer.clone() for buffer in model.buffers()]

    whole = _leaves(outputs)
    loss = objective(whole)
    (loss * loss_scale).backward()

    sizes = [(len(output.image), len(output.text)) for output in outputs]
    grads = _split(whole, sizes)
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        with contextlib.nullcontext() if i == len(parts) - 1 else _apart(model):
            state.restore()
            with autocast():
                output = model(*part)
            _send(output, grads[i])
    with torch.no_grad():
        for buffer, average in zip(model.buffers(), averages, strict=True):
            buffer.copy_(average)
    return loss.detach()


def _apart(model: CLIP | DistributedDataParallel) -> contextlib.AbstractContextManager[None]:
    """Within it, gradients add up in this process without being exchanged."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def _leaves(outputs: list[Output]) -> Output:
    """The embeddings of all parts together, as leaves that collect gradients."""
    image = torch.cat([output.image for output in outputs])
    text = torch.cat([output.text for output in outputs])
    log_scale = outputs[0].log_scale.detach().clone()
    bias = None if outputs[0].bias is None else outputs[0].bias.detach().clone()
    whole = Output(image, text, log_scale, bias)
    for tensor in whole:
        if tensor is not None:
            tensor.requires_grad_()
    return whole


def _split(whole: Output, sizes: list[tuple[int, int]]) -> list[list[Tensor | None]]:
    """The gradient of each part's output. That of t' and b goes to the last part, the others get zero."""
    images = _grad(whole.image).split([n for n, _ in sizes])
    texts = _grad(whole.text).split([m for _, m in sizes])
    grads: list[list[Tensor | None]] = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        share = float(i == len(sizes) - 1)
        scalars = [None if s is None else share * _grad(s) for s in (whole.log_scale, whole.bias)]
        grads.append([image, text, *scalars])
    return grads


def _grad(leaf: Tensor) -> Tensor:
    """The gradient of a leaf; zero where the loss does not depend on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _send(output: Output, grads: list[Tensor | None]) -> None:
    """Backward from a part's output; what does not depend on a trained parameter, such as a locked tower, is left
    out.
    """
    pairs = [(t, g) for t, g in zip(output, grads, strict=True) if t is not None and t.requires_grad]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
