"""All images and captions of a split as embeddings: what validation and evaluation measure.

Legend: N images, M captions, E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clip.config import Config
from clip.data.batches import in_order
from clip.data.features import FeaturePairs
from clip.data.pairs import Pairs
from clip.model.tokenizer import trim
from clip.model.towers import Towers
from clip.retrieval import retrieve
from common.run import Run


class Embedded(NamedTuple):
    """In the order of the dataset, without images that could not be read."""

    image: Tensor  # float32 (N, E), of length 1, on the device
    text: Tensor  # float32 (M, E)
    owner: Tensor  # int64 (M,): the row of `image` that each caption belongs to
    numbers: list[int]  # of each image in its dataset
    captions: list[str]


@torch.no_grad()
def embed(pairs: Pairs | FeaturePairs, towers: Towers, config: Config, run: Run) -> Embedded:
    """Embed a split. Raises `Stopped` where a stop signal arrives."""
    was_training = towers.model.training
    towers.model.eval()
    if isinstance(pairs, FeaturePairs):
        found = _from_features(pairs, towers, config, run)
    else:
        found = _from_images(pairs, towers, config, run)
    towers.model.train(was_training)
    return found


def measure(found: Embedded, config: Config) -> dict[str, float]:
    """Recall and median rank in both directions; `val_` and so on is put before by whoever logs it."""
    fold = min(config.eval.fold, len(found.image))
    return retrieve(found.image, found.text, found.owner, fold, config.eval.block)


def _from_images(pairs: Pairs, towers: Towers, config: Config, run: Run) -> Embedded:
    parts: list[Tensor] = []
    index: list[int] = []
    size = config.eval.batch_size
    for pixels, numbers in run.track(in_order(pairs, towers.preprocess, size, config.data.workers)):
        if len(numbers):
            x = towers.preprocess.normalise(pixels.to(run.device))
            parts.append(_apply(x, towers.image_base, towers.model.encode_image, run))
            index += numbers.tolist()
    texts = [pairs.captions(i) for i in index]
    captions = [caption for each in texts for caption in each]
    text = torch.cat(list(encode_texts(captions, towers.model.encode_text, towers, config, run)))
    return Embedded(torch.cat(parts), text, owners([len(each) for each in texts], run.device), index, captions)


def encode_texts(
    texts: list[str], encode: Callable[[Tensor], Tensor], towers: Towers, config: Config, run: Run
) -> Iterator[Tensor]:
    """What `encode`, a part of the model, makes of texts, some at a time: float32 (n, width). Raises `Stopped` where a
    stop signal arrives.
    """
    size = config.eval.batch_size
    for start in run.track(range(0, len(texts), size)):
        ids = towers.tokenizer(texts[start : start + size])
        if config.model.text.pool != "last":
            ids = trim(ids, towers.tokenizer.end_id)
        yield _apply(ids.to(run.device), towers.text_base, encode, run)


def _from_features(pairs: FeaturePairs, towers: Towers, config: Config, run: Run) -> Embedded:
    """The first view of each image, and all captions."""
    size = config.eval.batch_size
    images = [
        _apply(pairs.images[0].take(pairs.usable[s : s + size]).to(run.device), None, towers.model.encode_image, run)
        for s in run.track(range(0, len(pairs), size))
    ]
    counts = [len(pairs.pairs.texts[i]) for i in pairs.usable]
    numbers = [pairs.first[i] + k for i, count in zip(pairs.usable, counts, strict=True) for k in range(count)]
    texts = []
    for start in run.track(range(0, len(numbers), size)):
        rows = pairs.take_texts(numbers[start : start + size])
        if isinstance(pairs.texts, Tensor) and config.model.text.pool != "last":
            rows = trim(rows, towers.tokenizer.end_id)
        texts.append(_apply(rows.to(run.device), None, towers.model.encode_text, run))
    captions = [caption for i in pairs.usable for caption in pairs.pairs.texts[i]]
    return Embedded(torch.cat(images), torch.cat(texts), owners(counts, run.device), pairs.usable, captions)


def _apply(x: Tensor, base: nn.Module | None, encode, run: Run) -> Tensor:  # type: ignore[no-untyped-def]  # a method
    with run.autocast():
        return encode(x if base is None else base(x)).float()


def owners(counts: list[int], device: torch.device) -> Tensor:
    """[2, 1] -> [0, 0, 1]."""
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
