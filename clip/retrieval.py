"""Recall@K and median rank, in both directions, as the papers define them.

Shapes:  N images   M captions   E numbers of an embedding   R rows of a block
         x (N, E) image embeddings, y (M, E) text embeddings, of length 1
         owner (M,): the number of the image that each caption belongs to

Text to image: each caption has one target, its image. Image to text: any of the image's captions counts, so the rank is
that of the best of them. Karpathy & Fei-Fei 2015 (arXiv:1412.2306), section 4.2; their COCO "1k" is the mean over five
galleries of 1,000 images, "5k" one gallery of all 5,000.

Ties count against us: everything as similar as the target is ranked before it. A model that maps all images to one
point would otherwise have a perfect score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Two dot products of unit vectors are equal if they differ by no more than float32 arithmetic does: a matrix product
# may add up equal columns in another order.
TIE = 1e-6


class Ranks(NamedTuple):
    """1 is best."""

    text_to_image: Tensor  # int64 (M,): of each caption's image among all images
    image_to_text: Tensor  # int64 (N,): of each image's best caption among all captions; 0 for an image without one


@torch.no_grad()
def rank_all(x: Tensor, y: Tensor, owner: Tensor, block: int = 1024) -> Ranks:
    """The rank of every target, with `block` rows of the similarity matrix in memory at once: of 40,000 images and as
    many captions, 160 MB instead of 6.4 GB.

    Args:
        x: (N, E); y: (M, E); owner: int64 (M,) in 0..N-1. Images without captions only stand in the others' way.
    Raises:
        ValueError: an embedding that is not finite (it would be more similar than nothing, and rank first), or an
            owner that is no image.
    """
    _check(x, y, owner)
    owner = owner.to(x.device)
    x, y = x.float(), y.float()
    everyone = torch.arange(len(x), device=x.device)
    to_image = []
    for rows, targets in zip(y.split(block), owner.split(block), strict=True):
        similarity = rows @ x.T  # (R, N)
        target = similarity.gather(1, targets[:, None])  # (R, 1)
        # the target itself is as similar as itself: it counts as the 1 of its rank
        to_image.append((similarity >= target - TIE).sum(dim=1))
    to_text = []
    for rows, numbers in zip(x.split(block), everyone.split(block), strict=True):
        similarity = rows @ y.T  # (R, M)
        own = owner[None, :] == numbers[:, None]  # (R, M)
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)  # (R, 1)
        before = ((similarity >= best - TIE) & ~own).sum(dim=1)  # its other captions are no mistakes
        to_text.append(torch.where(own.any(dim=1), before + 1, 0))
    return Ranks(torch.cat(to_image).cpu(), torch.cat(to_text).cpu())


def recalls(ranks: Ranks, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """`r1_t2i` ... `r10_i2t` as fractions, `median_rank_t2i` and `median_rank_i2t`. Images without captions do not
    count in the second direction.
    """
    found = {}
    for name, rank in (("t2i", ranks.text_to_image), ("i2t", ranks.image_to_text[ranks.image_to_text > 0])):
        for k in at:
            found[f"r{k}_{name}"] = (rank <= k).double().mean().item()
        found[f"median_rank_{name}"] = rank.double().quantile(0.5).item()  # of an even number, the mean of the middle
    return found


def retrieve(x: Tensor, y: Tensor, owner: Tensor, fold: int = 0, block: int = 1024) -> dict[str, float]:
    """`recalls` of one gallery, or with `fold` the mean over galleries of that many images each, in their order, with
    their captions ("COCO 1k": fold=1000). Images left over at the end are in no gallery.

    Raises:
        ValueError: as `rank_all`, or fewer images than a gallery needs.
    """
    if fold == 0:
        return recalls(rank_all(x, y, owner, block))
    if fold > len(x):
        raise ValueError(f"a gallery of {fold} images cannot be made of {len(x)}; lower eval.fold")
    owner = owner.to(y.device)
    results = []
    for start in range(0, len(x) - fold + 1, fold):
        inside = (owner >= start) & (owner < start + fold)
        results.append(recalls(rank_all(x[start : start + fold], y[inside], owner[inside] - start, block)))
    return {name: sum(result[name] for result in results) / len(results) for name in results[0]}


def _check(x: Tensor, y: Tensor, owner: Tensor) -> None:
    for name, embeddings in (("an image", x), ("a text", y)):
        if not bool(torch.isfinite(embeddings).all()):
            raise ValueError(f"{name} embedding is not finite: the model has diverged, or its weights are damaged")
    if len(owner) != len(y):
        raise ValueError(f"{len(y)} captions, but {len(owner)} owners")
    if len(owner) == 0 or int(owner.min()) < 0 or int(owner.max()) >= len(x):
        raise ValueError(f"every caption's owner must be a number from 0 to {len(x) - 1}, and there must be captions")
