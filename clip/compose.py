"""Drawn scenes as a test of composition: are words put together, or only collected?

A hard gallery consists of families: scenes with the same colours, shapes and background, which differ only in where the
groups stand (relation), how many there are of each (count), or which colour goes with which shape (binding).

Two numbers are taken of each kind:

    pairs    of a family's base and one variant, with both images and both captions: are all four comparisons right?
             That is the group score of Winoground; by guessing, 1 in 6.
    recall   on the whole gallery

Thrush et al. 2022   Winoground, section 3.2   arXiv:2204.03162
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip.config import Config
from clip.data.pairs import ScenePairs
from clip.data.scenes import FAMILY, Scenes, Split, Variant
from clip.embed import Embedded, embed, measure
from clip.model.towers import Towers
from common.config import require
from common.run import Run

KINDS = ("relation", "count", "binding")


def hard_gallery(config: Config, split: Split, size: int) -> tuple[ScenePairs, list[Variant]]:
    """Scenes of a split in families, as many as `size`. `ConfigError` where there is nothing to exchange."""
    require(config.data.groups > 1, "data.groups", "must be 2 or 3 for clip.eval: one group has no relation")
    scenes = Scenes(config.seed, split, config.data.groups)
    variants = scenes.hard_gallery(size, min(FAMILY, size))
    return ScenePairs(scenes, size, [variant.scene for variant in variants]), variants


def easy_gallery(config: Config, split: Split, size: int) -> ScenePairs:
    """Different scenes of a split, drawn at random."""
    scenes = Scenes(config.seed, split, config.data.groups)
    return ScenePairs(scenes, size, scenes.gallery(size))


def pair_scores(found: Embedded, variants: list[Variant]) -> dict[str, float]:
    """`pairs_relation`, `pairs_count`, `pairs_binding`: the share of (base, variant) pairs with all four comparisons
    right. A kind without pairs, as relations are where scenes have one group, is left out.
    """
    bases = {variant.family: i for i, variant in enumerate(variants) if variant.kind == "base"}
    scores = {}
    for kind in KINDS:
        b = torch.tensor([bases[v.family] for v in variants if v.kind == kind], dtype=torch.int64)
        v = torch.tensor([i for i, variant in enumerate(variants) if variant.kind == kind], dtype=torch.int64)
        if len(v):
            scores[f"pairs_{kind}"] = float(all_four(found.image.cpu(), found.text.cpu(), b, v).double().mean())
    return scores


def all_four(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether images a and b prefer their own captions and captions a and b their own images: bool (n,). A tie is no
    preference.
    """

    def cosine(image: Tensor, text: Tensor) -> Tensor:
        return (x[image] * y[text]).sum(dim=1)  # (n,)

    lowest = torch.minimum(cosine(a, a), cosine(b, b))
    highest = torch.maximum(cosine(a, b), cosine(b, a))
    return lowest > highest


def evaluate_scenes(towers: Towers, config: Config, run: Run) -> tuple[dict[str, float], ScenePairs, Embedded]:
    """Every gallery of `eval.split`: metrics, and the hard gallery of it with its embeddings.

    Without an ending: the hard gallery, of combinations that training shows. `_easy`: scenes drawn at random. `_novel`
    and `_novel_only`: hard galleries in which one group, or each, has a combination of colour and shape that training
    never shows.
    """
    size = config.eval.gallery
    pairs, variants = hard_gallery(config, config.eval.split, size)
    found = embed(pairs, towers, config, run)
    metrics = measure(found, config) | pair_scores(found, variants)
    easy = embed(easy_gallery(config, config.eval.split, size), towers, config, run)
    metrics |= {f"{name}_easy": value for name, value in measure(easy, config).items()}
    splits: tuple[Split, ...] = ("novel", "novel_only")
    for split in splits:
        other, members = hard_gallery(config, split, size)
        embedded = embed(other, towers, config, run)
        scores = measure(embedded, config) | pair_scores(embedded, members)
        metrics |= {f"{name}_{split}": value for name, value in scores.items()}
    return metrics, pairs, found
