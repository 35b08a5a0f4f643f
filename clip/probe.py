"""How good the image features are by themselves: logistic regression on them, all else locked.

    python -m clip.probe --run runs/lit_flickr8k --data cifar10 [--limit 5000]
    python -m clip.probe --weights openai/ViT-B-32 --data /my/folder/with/classes

Radford et al. 2021, section 3.2 (arXiv:2103.00020): the features are those before the projection to the space that
images and texts share; L2 regularisation is chosen on images held out from training, then all of these are used. Prints
top-1 and top-5, writes `probe/<data>.json`; the last line of stdout is its content.

Legend: N images, F numbers of a feature, C classes.
"""

# The command line is read before PyTorch is imported, so that a typo is reported in a blink.
import argparse

from clip.arguments import model_parser
from clip.arguments import parse as parse_model

STRENGTHS = tuple(10.0**k for k in range(-6, 3))  # of scikit-learn's C, the inverse of the regularisation; then finer
HELD_OUT = 0.2  # of the training images to choose on; of a folder without train/ and test/, also of all to test with


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = model_parser("probe", __doc__)
    parser.add_argument("--data", required=True, help="cifar10, cifar100, or a folder with a sub-folder for each class")
    parser.add_argument(
        "--features",
        choices=("tower", "embedding"),
        default="tower",
        help="tower: before the projection (default); embedding: what search and zero-shot compare",
    )
    parser.add_argument("--limit", type=int, default=0, help="train on only so many images, drawn by --seed (0 = all)")
    parser.add_argument("--test-limit", type=int, default=0, help="test on only so many (0 = all)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit, and of the images that L2 is chosen on")
    parser.add_argument("--out", help="folder of the results (default: probe/ of the run)")
    args = parse_model(parser, argv)
    if args.limit < 0 or args.test_limit < 0:
        parser.error("--limit and --test-limit must not be negative")
    return args


if __name__ == "__main__":
    ARGS = parse()

import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from clip.data.labelled import BATCH, Labelled, load_labelled
from clip.load import Loaded
from clip.model.published import data_root, home_of, load_chosen, name_of
from common.errors import ProjectError, exits_cleanly
from common.files import write_json
from common.logging import Display
from common.runtime import choose_precision

ITERATIONS = 1000  # of L-BFGS, at most, as in the paper


class Probe(NamedTuple):
    """What `fit` found."""

    top1: float  # on the test images
    top5: float
    strength: float  # scikit-learn's C that did best on the held-out images
    tried: dict[float, float]  # C -> top-1 on these
    converged: bool


@torch.no_grad()
def encode(loaded: Loaded, data: Labelled, kind: str, display: Display | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (N, F) of every usable image, and their classes int64 (N,).

    kind: tower, or embedding (of length 1).
    """
    display = display or Display(False)
    parts = []
    labels = []
    for images, index in display.track(data.batches(), -(-len(data) // BATCH), f"batches of {BATCH} images"):
        parts.append(loaded.encode_images(images) if kind == "embedding" else tower_features(loaded, images))
        labels.append(data.labels[index])
    return torch.cat(parts).numpy(), torch.cat(labels).numpy()


@torch.no_grad()
def tower_features(loaded: Loaded, images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, F), what the image tower hands to its projection; on the CPU."""
    dtype = choose_precision(loaded.config.precision, loaded.device)
    with torch.autocast(loaded.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        x = loaded.preprocess.normalise(loaded.preprocess.batch(images).to(loaded.device))
        if loaded.image_base is not None:
            x = loaded.image_base(x)
        return loaded.model.image_encoder(x).float().cpu()


def fit(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
    display: Display | None = None,
) -> Probe:
    """Logistic regression of features (N, F) and classes (N,), tested on others.

    The best of `STRENGTHS` on a fifth of the training images, then of two between it and its neighbours, is used for
    all of them; the test images are looked at once. Features are brought to zero mean and unit variance, with the
    training images' numbers.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    display = display or Display(False)
    x, y = train
    least = np.unique(y, return_counts=True)[1].min()
    if len(np.unique(y)) < 2 or least < 2:
        raise ProjectError("a probe needs at least two classes with two training images each; give more images")
    few = max(HELD_OUT, len(np.unique(y)) / len(y))  # at least one of each class
    first, second, first_y, second_y = train_test_split(x, y, test_size=few, random_state=seed, stratify=y)
    tried: dict[float, float] = {}

    def regression(strength: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))

    def attempt(strengths: list[float]) -> None:
        for strength in display.track(strengths, len(strengths), "strengths of L2"):
            tried[strength] = float(regression(strength).fit(first, first_y).score(second, second_y))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regressions that stop before they have converged; the last one is asked
        attempt(list(STRENGTHS))
        best = max(tried, key=lambda c: (tried[c], -c))
        attempt([best / 10**0.5, best * 10**0.5])
        best = max(tried, key=lambda c: (tried[c], -c))  # of equals the stronger regularisation
        model = regression(best).fit(x, y)
    scores = model.decision_function(test[0])
    scores = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores  # (N, C)
    numbers = model[-1].classes_
    order = numbers[np.argsort(-scores, axis=1)[:, :5]]
    hits = order == test[1][:, None]
    converged = int(model[-1].n_iter_.max()) < ITERATIONS
    return Probe(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()), best, tried, converged)


@exits_cleanly
def main(args: argparse.Namespace) -> None:
    """Compute features, fit, print and write."""
    started = time.perf_counter()
    loaded = load_chosen(args)
    display = Display(True)
    size = loaded.preprocess.size
    sides = {}
    for split, limit in (("train", args.limit), ("test", args.test_limit)):
        data = load_labelled(
            args.data,
            "train" if split == "train" else "test",
            data_root(args),
            size,
            workers=args.workers,
            limit=limit,
            seed=args.seed,
            share=HELD_OUT,
        )
        for note in data.notes:
            display.say(f"note: {note}")
        sides[split] = encode(loaded, data, args.features, display)
    found = fit(sides["train"], sides["test"], args.seed, display)
    if not found.converged:
        display.say(f"note: the regression had not converged after {ITERATIONS} iterations")
    result = {
        "project": "clip",
        "config": name_of(args),
        "checkpoint_step": loaded.step,
        "metrics": {"probe_top1": found.top1, "probe_top5": found.top5},
        "n": {"train": len(sides["train"][1]), "test": len(sides["test"][1]), "features": sides["train"][0].shape[1]},
        "seeds": [args.seed],
        "data": data.name,
        "features": args.features,
        "strength": found.strength,
        "validation": {f"{strength:.3g}": round(value, 4) for strength, value in sorted(found.tried.items())},
        "weights": loaded.weights_hash,
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder = Path(args.out).expanduser() if args.out else home_of(args) / "probe"
    write_json(folder / f"{data.name}.json", result)
    Console().print(
        f"{name_of(args)} on {data.name}: linear probe top-1 {found.top1:.2%}, top-5 {found.top5:.2%} "
        f"(C = {found.strength:.3g}, {result['n']})",
        soft_wrap=True,
    )
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(ARGS)
