"""Classify images by what their classes are called, without having seen one of them:

    python -m clip.zero_shot --run runs/lit_flickr8k --data cifar10
    python -m clip.zero_shot --weights openai/ViT-B-32 --data /data/imagenet/val --classes LOC_synset_mapping.txt

Each class name is put into several sentences; the mean of their embeddings is the classifier's weight vector of that
class (Radford et al. 2021, section 3.1.4, arXiv:2103.00020). An image belongs to the class whose vector is most similar
to its own. Prints top-1, top-5 and every class, writes `zero_shot/<data>.json` and a line an image in `.csv`; the last
line of stdout is the content of the JSON file.

Legend: N images, C classes, P sentences a class, E numbers of an embedding.
"""

# The command line is read before PyTorch is imported, so that a typo is reported in a blink.
import argparse

from clip.arguments import model_parser
from clip.arguments import parse as parse_model

# Sentences like captions of the images in question, ours; CLIP's own, seven for ImageNet and 18 for CIFAR among them,
# are at https://github.com/openai/CLIP/blob/main/data/prompts.md and go into a file for --templates.
TEMPLATES = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "objects": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a close-up of a {}.",
        "a picture of a large {}.",
        "a picture of a small {}.",
        "there is a {} in the picture.",
        "many {} in a photo.",
        "a drawing of a {}.",
    ),
    "small": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a small picture of a {}.",
        "a blurry photo of a {}.",
        "a low resolution photo of a {}.",
        "a cropped photo of a {}.",
        "there is a {} in the picture.",
    ),
}
BY_DATA = {"cifar10": "small", "cifar100": "small"}  # a folder: objects


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = model_parser("zero_shot", __doc__)
    parser.add_argument("--data", required=True, help="cifar10, cifar100, or a folder with a sub-folder for each class")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="choose on train, report test")
    parser.add_argument("--classes", help="file of the classes' names: lines `folder name, name` or JSON")
    parser.add_argument(
        "--templates", help=f"{', '.join(TEMPLATES)}, or a file with a sentence a line, {{}} for the name of the class"
    )
    parser.add_argument("--limit", type=int, default=0, help="classify only so many images, drawn by --seed (0 = all)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit")
    parser.add_argument("--out", help="folder of the results (default: zero_shot/ of the run)")
    args = parse_model(parser, argv)
    if args.limit < 0:
        parser.error("--limit must not be negative")
    return args


if __name__ == "__main__":
    ARGS = parse()

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip.data.labelled import BATCH, Labelled, load_labelled, names_for
from clip.load import Loaded
from clip.model.published import data_root, home_of, load_chosen, name_of
from common.errors import ProjectError, exits_cleanly
from common.files import write_csv, write_json
from common.logging import Display

CHUNK = 50  # classes whose sentences are embedded at once


class ZeroShot(NamedTuple):
    """What `classify` found. Images that could not be read are not in it."""

    top1: float  # fractions of the images
    top5: float
    per_class: dict[str, float]  # top-1; without the classes that have no image
    numbers: Tensor  # int64 (n,): which images these are
    best: Tensor  # int64 (n, min(5, C)): the most similar classes, best first
    scores: Tensor  # float32 (n, min(5, C)): their cosines


def class_weights(
    encode_texts: Callable[[list[str]], Tensor], names: Sequence[Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """The classifier: one vector of length 1 a class, float32 (C, E).

    Args:
        encode_texts: texts -> (number, E), each of length 1.
        names: of each class, one or more that mean the same; each is put into each of the templates.
    """
    weights: list[Tensor] = []
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        prompts = [[template.replace("{}", name) for name in each for template in templates] for each in chunk]
        embeddings = encode_texts([prompt for each in prompts for prompt in each])
        # Each sentence has the same say, for all are of length 1. Their mean is shorter, and made as long again.
        weights += [each.mean(dim=0) for each in embeddings.split([len(each) for each in prompts])]  # (P, E) -> (E,)
    return torch.nn.functional.normalize(torch.stack(weights), dim=1)


def classify(loaded: Loaded, data: Labelled, weights: Tensor, display: Display | None = None) -> ZeroShot:
    """Classify every usable image by the most similar of the classes' vectors (C, E)."""
    display = display or Display(False)
    parts: list[Tensor] = []
    index: list[Tensor] = []
    for images, numbers in display.track(data.batches(), -(-len(data) // BATCH), f"batches of {BATCH} images"):
        parts.append(loaded.encode_images(images) @ weights.T)  # (B, C)
        index.append(numbers)
    scores = torch.cat(parts)
    return measure(scores, torch.cat(index), data.labels, data.classes)


def measure(scores: Tensor, index: Tensor, labels: Tensor, classes: Sequence[str]) -> ZeroShot:
    """Accuracy of scores float32 (n, C), of the images `index` (n,) among those of `labels` (N,).

    A class as similar as the right one counts as more similar: a model that maps everything to one point would
    otherwise be always right.
    """
    own = labels[index]  # (n,)
    right = scores.gather(1, own[:, None])  # (n, 1)
    rank = (scores >= right).sum(dim=1)  # 1 is best
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hit = (rank == 1).double()
    per_class = {}
    for number, name in enumerate(classes):
        if bool((own == number).any()):
            per_class[name] = hit[own == number].mean().item()
    top5 = (rank <= 5).double().mean().item()
    return ZeroShot(hit.mean().item(), top5, per_class, index, best.indices, best.values)


def read_templates(chosen: str | None, data: str) -> tuple[str, ...]:
    """The sentences that --templates names. `ProjectError` for a file that has none or a line without {}."""
    chosen = chosen or BY_DATA.get(data, "objects")
    if chosen in TEMPLATES:
        return TEMPLATES[chosen]
    path = Path(chosen).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        raise ProjectError(f"--templates: {chosen} is neither {', '.join(TEMPLATES)} nor a text file") from None
    templates = tuple(line for line in lines if line and line[0] != "#")
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong or not templates:
        what = f"has {wrong[0]!r}" if wrong else "is empty"
        raise ProjectError(f"--templates: {path} {what}; each line needs one {{}}, for the name of the class")
    return templates


@exits_cleanly
def main(args: argparse.Namespace) -> None:
    """Classify, print and write."""
    started = time.perf_counter()
    templates = read_templates(args.templates, args.data)
    loaded = load_chosen(args)
    display = Display(True)
    size = loaded.preprocess.size
    data = load_labelled(
        args.data, args.split, data_root(args), size, workers=args.workers, limit=args.limit, seed=args.seed
    )
    for note in data.notes:
        display.say(f"note: {note}")
    names = names_for(data.classes, Path(args.classes).expanduser() if args.classes else None)
    found = classify(loaded, data, class_weights(loaded.encode_texts, names, templates), display)
    result = {
        "project": "clip",
        "config": name_of(args),
        "checkpoint_step": loaded.step,
        "metrics": metrics(found),
        "per_class": {name: round(value, 4) for name, value in found.per_class.items()},
        "n": {"images": len(found.numbers), "classes": len(data.classes), "templates": len(templates)},
        "seeds": [loaded.config.seed],
        "data": data.name,
        "split": args.split,
        "limit": args.limit,
        "templates": list(templates),
        "weights": loaded.weights_hash,
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder = Path(args.out).expanduser() if args.out else home_of(args) / "zero_shot"
    write_csv(folder / f"{data.name}.csv", rows(found, data))
    write_json(folder / f"{data.name}.json", result)
    show(found, data, f"{name_of(args)} on {data.name}, zero-shot")
    print(json.dumps(result), flush=True)


def metrics(found: ZeroShot) -> dict[str, float]:
    """Fractions, under the names that runs are compared by."""
    values = {"zero_shot_top1": found.top1, "zero_shot_top5": found.top5}
    # a folder's classes may be of very different sizes
    return values | {"zero_shot_mean_per_class": sum(found.per_class.values()) / len(found.per_class)}


def rows(found: ZeroShot, data: Labelled) -> list[dict[str, Any]]:
    """A line an image: what it is, what it was taken for, and how similar it is to that."""
    lines = []
    for i, best, scores in zip(found.numbers.tolist(), found.best.tolist(), found.scores.tolist(), strict=True):
        line = {"image": data.ids[i], "class": data.classes[int(data.labels[i])]}
        for place, (number, score) in enumerate(zip(best, scores, strict=True), 1):
            line |= {f"guess_{place}": data.classes[number], f"score_{place}": f"{score:.4f}"}
        lines.append(line)
    return lines


def show(found: ZeroShot, data: Labelled, title: str) -> None:
    """Print a line a class, the worst first, with what it is mostly mistaken for."""
    own = data.labels[found.numbers]
    table = Table("class", "images", "top-1", "mistaken for", title=title)
    for name, accuracy in sorted(found.per_class.items(), key=lambda item: item[1]):
        number = data.classes.index(name)
        guesses = Counter(found.best[own == number, 0].tolist())
        total = guesses.total()
        del guesses[number]
        wrong = ", ".join(f"{data.classes[i]} {count}" for i, count in guesses.most_common(2))
        table.add_row(name, str(total), f"{accuracy:.1%}", wrong)
    console = Console()
    console.print(table)
    console.print(f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%} of {len(found.numbers)} images")


if __name__ == "__main__":
    main(ARGS)
