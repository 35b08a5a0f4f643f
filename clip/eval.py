"""Measure trained towers:

    python -m clip.eval --run runs/clip_scenes [eval.split=val ...]

Writes `eval.json`, what was found for every caption and image (CSV), all embeddings (`embeddings.npz`) and pictures
into the run folder; the last line of stdout is the content of `eval.json`.

Legend: N images, M captions, E numbers of an embedding, K results of a query.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from clip.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "clip", "eval")

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip import figures
from clip.compose import evaluate_scenes
from clip.data import FilePairs, Pairs, load_splits
from clip.data.features import cache_features
from clip.embed import Embedded, embed, measure
from clip.load import Loaded, load_model
from clip.retrieval import Ranks, rank_all
from common.errors import exits_cleanly
from common.files import atomic_open, write_csv, write_json
from common.metrics import bootstrap_interval
from common.provenance import discard, made_by, output_hashes
from common.run import Run
from common.terminal import show_metrics

# what is written before eval.json, and goes before it is written anew
OUTPUTS = ("figures/*.png", "text_to_image.csv", "image_to_text.csv", "embeddings.npz")
SHOWN = 8  # captions on a sheet
RESULTS = 5  # images found for each
PICTURE_SEED = 9_000_011  # of the captions that are shown


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate one checkpoint."""
    started = time.perf_counter()
    with Run(config, options) as run:
        loaded = load_model(config, run.folder, options.checkpoint, run.device)
        if loaded.step < config.train.steps:
            run.display.say(
                f"note: the weights are of step {loaded.step} of {config.train.steps}: no finished training"
            )
        metrics, pairs, found = evaluate(loaded, config, run)
        metrics["r10_mean"] = (metrics["r10_t2i"] + metrics["r10_i2t"]) / 2
        ranks = rank_all(found.image, found.text, found.owner, config.eval.block)
        discard(run.folder, OUTPUTS)
        write_results(found, ranks, pairs, config, run.folder)
        draw_figures(found, ranks, pairs, loaded, config, run.folder)
        result = {
            "project": "clip",
            "config": run.folder.name,
            "checkpoint_step": loaded.step,
            "total_steps": config.train.steps,
            "metrics": metrics,
            "intervals": intervals(ranks, found.owner, config.eval.fold),
            "n": {"images": len(found.image), "captions": len(found.text)},
            "seeds": [config.seed],
            "seconds": round(time.perf_counter() - started, 1),
            "split": config.eval.split,
            "precision": str(run.machine.amp_dtype or torch.get_default_dtype()).removeprefix("torch."),
            "files": output_hashes(run.folder, ["text_to_image.csv", "image_to_text.csv", "embeddings.npz"]),
            **made_by(config, [loaded.weights_hash]),
        }
        write_json(run.folder / "eval.json", result)
        steps = f"{loaded.step} of {config.train.steps} steps"
        show_metrics(metrics, f"{run.folder.name} after {steps}, {config.eval.split}")
        print(json.dumps(result), flush=True)


def evaluate(loaded: Loaded, config: Config, run: Run) -> tuple[dict[str, float], Pairs, Embedded]:
    """Metrics, and the images and captions that were embedded for the first of them."""
    towers = loaded.towers
    if config.data.dataset == "scenes":
        return evaluate_scenes(towers, config, run)
    splits = load_splits(config)
    for note in splits.notes:
        run.display.say(f"note: {note}")
    pairs = splits.named(config.eval.split)
    if towers.image_base is not None:
        assert isinstance(pairs, FilePairs)
        found = embed(cache_features(pairs, towers, config, run), towers, config, run)
    else:
        found = embed(pairs, towers, config, run)
    return measure(found, config), pairs, found


def intervals(ranks: Ranks, owner: Tensor, fold: int) -> dict[str, list[float]]:
    """95 percent intervals of recall over images, drawn anew with their captions; the gallery stays. Only for one
    gallery: with folds, ranks are other ones.
    """
    if fold:
        return {}
    found = {}
    has_caption = ranks.image_to_text > 0
    counts = torch.bincount(owner.cpu(), minlength=len(ranks.image_to_text))
    for k in (1, 5, 10):
        hits = torch.zeros(len(counts), dtype=torch.float64)
        hits.index_add_(0, owner.cpu(), (ranks.text_to_image <= k).double())
        per_image = {"t2i": (hits / counts)[counts > 0], "i2t": (ranks.image_to_text[has_caption] <= k).double()}
        for name, values in per_image.items():
            low, high = bootstrap_interval(values.numpy())
            found[f"r{k}_{name}"] = [round(low, 4), round(high, 4)]
    return found


# -- what was found ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, count: int, block: int) -> Tensor:
    """The rows of `keys` most similar to each query, best first: (Q, E), (N, E) -> int64 (Q, K)."""
    count = min(count, len(keys))
    return torch.cat([(part @ keys.T).topk(count, dim=1).indices.cpu() for part in queries.split(block)])


def write_results(found: Embedded, ranks: Ranks, pairs: Pairs, config: Config, folder: Path) -> None:
    """A line a caption and a line an image, by their own names; and all embeddings as NumPy arrays."""
    names = [pairs.image_name(i) for i in found.numbers]
    owner = found.owner.cpu().tolist()
    images = nearest(found.text, found.image, RESULTS, config.eval.block).tolist()
    rows = []
    for caption, target, rank, best in zip(found.captions, owner, ranks.text_to_image.tolist(), images, strict=True):
        row = {"caption": caption, "image": names[target], "rank": rank}
        rows.append(row | {f"found_{k + 1}": names[i] for k, i in enumerate(best)})
    write_csv(folder / "text_to_image.csv", rows)
    texts = nearest(found.image, found.text, RESULTS, config.eval.block).tolist()
    rows = []
    for name, rank, best in zip(names, ranks.image_to_text.tolist(), texts, strict=True):
        rows.append({"image": name, "rank": rank} | {f"found_{k + 1}": found.captions[i] for k, i in enumerate(best)})
    write_csv(folder / "image_to_text.csv", rows)
    with atomic_open(folder / "embeddings.npz") as file:
        np.savez(
            file,
            image=found.image.cpu().numpy(),
            text=found.text.cpu().numpy(),
            owner=found.owner.cpu().numpy(),
            names=np.array(names),
            captions=np.array(found.captions),
        )


def draw_figures(found: Embedded, ranks: Ranks, pairs: Pairs, loaded: Loaded, config: Config, folder: Path) -> None:
    """Captions drawn by seed with what was found for them, the worst failures, and a matrix of similarities."""
    rng = np.random.default_rng(PICTURE_SEED)
    rank = ranks.text_to_image.numpy()
    drawn = rng.permutation(len(rank))
    failed = drawn[rank[drawn] > 1]
    worst = failed[np.argsort(-rank[failed], kind="stable")]
    owner = found.owner.cpu()

    def sheet(chosen: np.ndarray, title: str, name: str) -> None:
        if len(chosen) == 0:
            return
        at = torch.from_numpy(chosen[:SHOWN].copy())
        best = nearest(found.text[at.to(found.text.device)], found.image, RESULTS, config.eval.block)
        figures.save_retrieved(
            pairs,
            loaded.preprocess,
            [found.captions[i] for i in at.tolist()],
            [found.numbers[i] for i in owner[at].tolist()],
            [[found.numbers[i] for i in row] for row in best.tolist()],
            title,
            folder / "figures" / name,
        )

    sheet(drawn, "Captions drawn at random, and the five images most similar to each", "retrieved.png")
    sheet(worst, "The worst failures: the image asked for is not among the five", "failures.png")
    first = [int(torch.nonzero(owner == i)[0]) for i in range(min(20, len(found.image))) if bool((owner == i).any())]
    x = found.image[owner[first].to(found.image.device)]
    similarity = (x @ found.text[first].T).cpu().numpy()
    captions = [found.captions[i] for i in first]
    figures.save_matrix(similarity.T, captions, "Similarity of captions and images", folder / "figures/similarity.png")


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
