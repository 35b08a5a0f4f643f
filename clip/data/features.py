"""Features of locked towers, computed once and kept on the disk: training then costs no more than what is trained.

    <data_root>/clip_features/<key>/00000000.npy ...     `PART` rows a file, each written whole or not at all

The key is a hash of everything that decides the numbers: locked weights, preprocessing, precision, the images or texts
themselves. An interrupted computation goes on where it stopped; with several processes each computes its share.

Legend: N images, M captions, V views of an image, C width, T tokens of a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip.config import Config
from clip.data.batches import Batch, in_order, order_of
from clip.data.pairs import NO_CROP, Crop, FilePairs, draw_numbers, random_of
from clip.data.splits import read_bytes, size_of
from clip.model.tokenizer import Tokenizer, trim
from clip.model.towers import Towers
from common.checkpoint import weights_hash
from common.errors import ProjectError
from common.files import atomic_open, read_json, write_json
from common.run import Run

FOLDER = "clip_features"  # below data_root
PART = 512  # rows a file: what an interruption may cost
BATCH = 32  # images or texts in a tower at once
VIEW_STREAM = 8_000_023  # keeps the generator of views apart


class Rows:
    """Rows of equal shape, or of equal width and different length, in files that are mapped into memory."""

    def __init__(self, folder: Path, count: int) -> None:
        self.values: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []  # of ragged rows: where each begins, and where the last ends
        for start in range(0, count, PART):
            self.values.append(np.load(part_path(folder, start), mmap_mode="r", allow_pickle=False))
            lengths = lengths_path(folder, start)
            if lengths.is_file():
                ends = np.load(lengths, allow_pickle=False).cumsum()
                self.starts.append(np.concatenate([[0], ends]))

    def take(self, index: list[int]) -> Tensor:
        """Rows of equal shape: float32 (n, ...). Ragged ones: (n, T, C + 1), the last number 1 for a token and 0 for
        padding.
        """
        if not self.starts:
            rows = np.stack([self.values[i // PART][i % PART] for i in index])
            return torch.from_numpy(rows).float()
        texts = []
        for i in index:
            starts = self.starts[i // PART]
            texts.append(self.values[i // PART][starts[i % PART] : starts[i % PART + 1]])
        longest = max(map(len, texts))
        padded = np.zeros((len(texts), longest, texts[0].shape[1] + 1), np.float32)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text), :-1] = text
            row[: len(text), -1] = 1
        return torch.from_numpy(padded)


def part_path(folder: Path, start: int) -> Path:
    """The file whose first row has this number."""
    return folder / f"{start:08d}.npy"


def lengths_path(folder: Path, start: int) -> Path:
    """Beside it, the lengths of ragged rows."""
    return folder / f"{start:08d}_lengths.npy"


class FeaturePairs:
    """A dataset as the towers' trained parts see it.

    images: one `Rows` a view. texts: rows of the captions' features, or the ids of all captions (M, T). first: number
    of each image's first caption. usable: images that could be read.
    """

    def __init__(
        self, pairs: FilePairs, images: list[Rows], texts: Rows | Tensor, first: list[int], usable: list[int]
    ) -> None:
        self.pairs = pairs
        self.images = images
        self.texts = texts
        self.first = first
        self.usable = usable

    def __len__(self) -> int:
        return len(self.usable)

    def take_texts(self, numbers: list[int]) -> Tensor:
        """Features of captions, or their ids."""
        return self.texts[numbers] if isinstance(self.texts, Tensor) else self.texts.take(numbers)

    def batches(
        self, config: Config, tokenizer: Tokenizer, first_step: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Endless batches on the CPU from step `first_step` on, each a function of (seed, step)."""
        step = first_step
        count = config.data.captions
        while True:
            order = order_of(step, config.train.batch_size, len(self), config.seed, rank, world)
            views: list[list[int]] = [[] for _ in self.images]  # places in the batch
            numbers: list[int] = []
            index = [self.usable[i] for i in order.numbers]
            for place, (i, epoch) in enumerate(zip(index, order.epochs, strict=True)):
                drawn = random_of(config.seed, VIEW_STREAM, epoch, i).integers(len(self.images))
                views[int(drawn)].append(place)
                texts = draw_numbers(len(self.pairs.texts[i]), count, i, epoch, config.seed)
                numbers += [self.first[i] + text for text in texts]
            parts = {v: self.images[v].take([index[p] for p in places]) for v, places in enumerate(views) if places}
            images = torch.empty(len(index), *next(iter(parts.values())).shape[1:])
            for v, part in parts.items():
                images[views[v]] = part
            ids = self.take_texts(numbers)
            if isinstance(self.texts, Tensor) and config.model.text.pool != "last":
                ids = trim(ids, tokenizer.end_id)
            image_ids = torch.tensor(index)
            yield Batch(images, ids, image_ids, image_ids.repeat_interleave(count))
            step += 1


def cache_features(pairs: FilePairs, towers: Towers, config: Config, run: Run, views: int = 1) -> FeaturePairs:
    """Everything that the locked towers make of a dataset, from the disk or computed now.

    views: versions of each image; see data.views.
    """
    assert towers.image_base is not None
    root = Path(config.data_root) / FOLDER
    precision = str(run.machine.amp_dtype or torch.get_default_dtype())
    facts: dict[str, Any] = {"weights": weights_hash(towers.image_base.state_dict()), "precision": precision}
    facts |= {"preprocess": asdict(towers.preprocess), "images": fingerprint(pairs), "grid": config.model.image.grid}
    facts |= {"pool": config.model.image.pool}  # where it belongs to the locked part
    images = []
    bad: set[int] = set()
    for view in range(views):
        folder = root / key_of(facts | describe_view(view, config))
        note = f"{pairs.name}: features of {len(pairs)} images, view {view + 1} of {views}"
        _fill(folder, len(pairs), note, run, _image_maker(pairs, towers, config, run, view, folder))
        images.append(Rows(folder, len(pairs)))
        for path in folder.glob("[0-9]*_bad.json"):
            bad |= set(read_json(path)["images"])
    if len(bad) == len(pairs):
        raise ProjectError(f"{pairs.name}: no image could be read")
    captions = [text for texts in pairs.texts for text in texts]
    first = np.cumsum([0, *map(len, pairs.texts)])[:-1].tolist()
    usable = [i for i in range(len(pairs)) if i not in bad]
    if towers.text_base is None:
        return FeaturePairs(pairs, images, towers.tokenizer(captions), first, usable)
    facts = {"weights": weights_hash(towers.text_base.state_dict()), "precision": precision, "texts": digest(captions)}
    facts |= {"context": config.model.text.context, "pool": config.model.text.pool}
    folder = root / key_of(facts)
    note = f"{pairs.name}: features of {len(captions)} captions"
    _fill(folder, len(captions), note, run, _text_maker(captions, towers, run))
    return FeaturePairs(pairs, images, Rows(folder, len(captions)), first, usable)


def describe_view(view: int, config: Config) -> dict[str, Any]:
    """What makes a view what it is: 0 the image, then its mirror image where data.flip, then random crops."""
    crops = view >= 1 + config.data.flip
    return {"view": view, "crop": config.data.crop if crops else 1.0, "flip": config.data.flip and view > 0}


def key_of(facts: dict[str, Any]) -> str:
    """The name of a cache."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def fingerprint(pairs: FilePairs) -> str:
    """A hash that other images would not have: names, sizes and first bytes of all files."""
    files = zip(pairs.names, pairs.sources, strict=True)
    return digest(f"{name} {size_of(source)} {read_bytes(source, 1024).hex()}" for name, source in files)


def digest(texts: Any) -> str:
    """SHA-256 over texts in their order."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return whole.hexdigest()


Maker = Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]


def _fill(folder: Path, count: int, note: str, run: Run, make: Maker) -> None:
    """Compute the parts that are not there yet; `make(start, stop)` gives rows, and their lengths where ragged."""
    starts = [s for s in range(0, count, PART) if not part_path(folder, s).is_file()]
    mine = starts[run.rank :: run.world]
    if starts:
        run.display.say(f"{note} -> {folder}")
    for start in run.track(run.display.track(mine, len(mine), "features")):
        values, lengths = make(start, min(start + PART, count))
        if lengths is not None:
            _write(lengths_path(folder, start), lengths)
        _write(part_path(folder, start), values)
    run.machine.any(False)  # wait for the other processes' parts


def _write(path: Path, values: np.ndarray) -> None:
    with atomic_open(path) as file:
        np.save(file, values, allow_pickle=False)


def _image_maker(pairs: FilePairs, towers: Towers, config: Config, run: Run, view: int, folder: Path) -> Maker:
    """Features of a slice of the images, float16; those of an image that cannot be read are zero, and it is noted."""
    base = _ready(towers.image_base, run)
    about = describe_view(view, config)
    is_mirror = about["flip"] and about["crop"] == 1
    crop = NO_CROP if view == 0 or is_mirror else Crop(about["crop"], about["flip"])

    @torch.no_grad()
    def make(start: int, stop: int) -> tuple[np.ndarray, None]:
        part = pairs.take(range(start, stop))
        rows: np.ndarray | None = None
        seen: set[int] = set()
        for pixels, index in in_order(part, towers.preprocess, BATCH, config.data.workers, crop, view):
            if len(index) == 0:
                continue
            pixels = pixels.flip(-1) if is_mirror else pixels
            with run.autocast():
                x = towers.preprocess.normalise(pixels.to(run.device))
                features = base(x).float().clamp(-65504, 65504).half().cpu().numpy()  # what float16 can hold
            if rows is None:
                rows = np.zeros((stop - start, *features.shape[1:]), np.float16)
            rows[index.numpy()] = features
            seen |= set(index.tolist())
        missing = [start + i for i in range(stop - start) if i not in seen]
        if rows is None:
            raise ProjectError(f"{pairs.name}: none of the images {start} to {stop - 1} can be read")
        if missing:
            write_json(folder / f"{start:08d}_bad.json", {"images": missing})
        return rows, None

    return make


def _text_maker(captions: list[str], towers: Towers, run: Run) -> Maker:
    """Features of a slice of the captions, float16: packed tokens and their numbers, or one row each."""
    base = _ready(towers.text_base, run)

    @torch.no_grad()
    def make(start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        packed: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for at in range(start, stop, BATCH):
            ids = trim(towers.tokenizer(captions[at : min(at + BATCH, stop)]), towers.tokenizer.end_id)
            with run.autocast():
                features = base(ids.to(run.device)).float().cpu()
            if features.ndim == 2:  # pooled
                packed.append(features.half().numpy())
                continue
            real = features[:, :, -1] > 0  # (n, T)
            packed.append(features[:, :, :-1][real].half().numpy())
            lengths.append(real.sum(dim=1).numpy())
        return np.concatenate(packed), np.concatenate(lengths) if lengths else None

    return make


def _ready(base: nn.Module | None, run: Run) -> nn.Module:
    assert base is not None
    return base.to(run.device).eval()
