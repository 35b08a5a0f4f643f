"""Measure a trained model:

    python -m diffusion.eval --run runs/ddpm_mnist [eval.num_samples=10000 sample.guidance=1.5 ...]

Writes `eval.json`, tables and pictures into the run folder; the last line of stdout is the content of `eval.json`.
Generated images are kept in `eval_samples/` until the end, batch by batch, so that an evaluation that was stopped goes
on where it was.

Legend: N real images, M generated ones, C channels, H = W pixels, D features, K classes.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from diffusion.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "diffusion", "eval")

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import exits_cleanly
from common.files import atomic_open, write_figure, write_json
from common.metrics import FeatureStatistics, frechet_between
from common.provenance import discard, made_by
from common.run import Run
from common.terminal import show_metrics
from common.judges import CACHE
from diffusion.data import load_images
from common.judges.features import (
    FeatureExtractor,
    Labelled,
    build_extractor,
    conditional_accuracy,
    extract,
    inception_score,
    nearest_neighbours,
    precision_recall_density_coverage,
    reference_statistics,
)
from diffusion.images import Images, MemoryImages
from diffusion.latents import pictured, reconstructions, to_pictures
from diffusion.sample import Network, Objective, generate_batch, grid_labels, load_model, sample_key, save_grid
from diffusion.samplers import SAMPLERS, resolve_sampler

MANIFOLD_NEIGHBOURS = 5  # k of precision, recall, density and coverage
# what is written before eval.json, and goes before it is written anew
PICTURES = ("figures/samples.png", "figures/neighbours.png", "figures/samplers.*", "figures/guidance.json")
NEIGHBOUR_SAMPLES = 1000  # generated and held-out images whose distance to the training images is measured


@dataclass
class Judge:
    """What generated images are compared with: an extractor, and the training images in its eyes.

    Attributes:
        cache: the folder of statistics of real images; of which ones, `identity` says.
    """

    extractor: FeatureExtractor
    real: MemoryImages
    statistics: FeatureStatistics
    held_out: MemoryImages | None
    cache: Path
    identity: dict[str, object]

    def floor(self, count: int, run: Run) -> float | None:
        """The distance of `count` held-out images, drawn by seed (all, if there are fewer), from the training images:
        what a perfect model would score.

        It falls with `count`, because a covariance estimated from few images is off; so does the distance of generated
        images.
        """
        if self.held_out is None:
            return None
        images = self.held_out.draw(count).images
        identity = {**self.identity, "split": "test"}
        statistics = reference_statistics(self.extractor, images, self.cache, identity, track=run.track)
        return frechet_between(self.statistics, statistics, len(images))

    def distance(self, images: Tensor, run: Run) -> float:
        """The distance of images uint8 (M, C, H, W) from the training images."""
        features, _ = extract(self.extractor, images, track=run.track)
        return frechet_between(self.statistics, FeatureStatistics().update(features), len(features))


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate one checkpoint."""
    started = time.perf_counter()
    with Run(config, options) as run:
        model, objective, step = load_model(config, options, run)
        if step < config.train.steps:
            run.display.say(f"note: the weights are of step {step} of {config.train.steps}: no finished training")
        shown = pictured(config)  # samples of latents are judged as the images that they stand for
        train, test = load_images(shown.data, config.data_root), load_images(shown.data, config.data_root, "test")
        assert train is not None
        judge = build_judge(shown, config.eval.features, train, test, run)
        name = judge.extractor.name
        key = sample_key(model, config)
        marks = made_by(config, [key["weights"]])
        labels = grid_labels(config, config.eval.num_samples)
        generated = generate_resumable(model, objective, config, config.eval.num_samples, labels, key, run)
        metrics = measure(generated, labels, judge, config, run)
        if (floor := judge.floor(len(generated), run)) is not None:
            metrics["fd_floor"] = floor
        if (decoded := reconstructions(config, len(generated), run.device)) is not None:
            metrics["fd_reconstruction_floor"] = judge.distance(decoded, run)
        for features in config.eval.more_features:
            metrics |= further_distance(generated, build_judge(shown, features, train, test, run), run)
        if judge.extractor.test_accuracy is not None:
            metrics["classifier_test_accuracy"] = judge.extractor.test_accuracy
        discard(run.folder, PICTURES)
        metrics |= memorisation(generated, judge.real, test, config, run.folder / "figures/neighbours.png")
        save_grid(generated[:100], run.folder / "figures/samples.png")
        metrics |= sampler_table(model, objective, config, judge, marks, run)
        metrics |= guidance_table(model, objective, config, judge, marks, run)
        result = {
            "project": "diffusion",
            "config": run.folder.name,
            "checkpoint_step": step,
            "total_steps": config.train.steps,
            "metrics": metrics,
            "n": {name: len(generated), "reference": judge.statistics.count, "table": config.eval.nfe_samples},
            "seeds": [config.seed],
            "seconds": round(time.perf_counter() - started, 1),
            "sampler": resolve_sampler(config.objective.kind, config.sample.sampler),
            "sampler_steps": config.sample.steps,
            "guidance": config.sample.guidance,
            "weights": config.sample.weights,
            **marks,
        }
        write_json(run.folder / "eval.json", result)
        shutil.rmtree(run.folder / "eval_samples", ignore_errors=True)
        show_metrics(metrics, f"{run.folder.name} after {step} of {config.train.steps} steps")
        print(json.dumps(result), flush=True)


def build_judge(config: Config, features: str, train: Images, test: Images | None, run: Run) -> Judge:
    """The extractor of that name and the training images' statistics, from the cache under data_root where possible."""
    cache = Path(config.data_root) / CACHE
    real = train.draw(config.eval.num_reference)
    held_out = test.draw(0) if test is not None else None
    labelled = None
    if real.labels is not None and held_out is not None and held_out.labels is not None:
        everything = train.draw(0)

        def labelled() -> Labelled:
            return (everything.images, everything.labels), (held_out.images, held_out.labels)

    extractor = build_extractor(
        features,
        config.data.dataset,
        Path(config.data_root),
        cache,
        labelled,
        weights=config.eval.classifier_weights,
        inception=config.eval.inception_weights,
        dtype=torch.bfloat16 if config.eval.feature_precision == "bf16" else torch.float32,
        device=run.device,
        log=run.display.say,
        track=run.track,
    )
    identity = {"dataset": config.data.dataset, "folder": config.data.folder, "image_size": config.data.image_size}
    if extractor.name in ("sfid", "fd_inception768"):
        identity["precision"] = config.eval.feature_precision
    statistics = reference_statistics(extractor, real.images, cache, {**identity, "split": "train"}, track=run.track)
    return Judge(extractor, real, statistics, held_out, cache, identity)


def generate_resumable(
    model: Network, objective: Objective, config: Config, count: int, labels: Tensor | None, key: dict, run: Run
) -> Tensor:
    """As `sample.generate`, keeping each finished batch on disk until the evaluation is over. uint8 (count, C, H,
    W).
    """
    named = json.dumps(key | {"count": count}, sort_keys=True)  # a last batch that is not full depends on it
    folder = run.folder / "eval_samples" / hashlib.sha256(named.encode()).hexdigest()[:16]
    size = config.sample.batch_size
    parts = []
    for b in run.display.track(range(0, count, size), -(-count // size), "generating"):
        path = folder / f"{b:08d}.npy"
        chunk = None if labels is None else labels[b : b + size]
        if not path.exists():
            drawn = generate_batch(model, objective, config, b // size, min(size, count - b), chunk, config.seed, run)
            with atomic_open(path) as file:
                np.save(file, to_pictures(drawn, model, config).numpy(), allow_pickle=False)
        parts.append(torch.from_numpy(np.load(path, allow_pickle=False)))
    return torch.cat(parts)


def measure(generated: Tensor, labels: Tensor | None, judge: Judge, config: Config, run: Run) -> dict[str, float]:
    """Every metric of generated images uint8 (M, C, H, W) with the labels (M,) they were asked for."""
    features, log_probs = extract(judge.extractor, generated, track=run.track)
    metrics = {
        judge.extractor.name: frechet_between(judge.statistics, FeatureStatistics().update(features), len(generated))
    }
    if log_probs is not None:
        kind = "inception_score" if judge.extractor.name == "fid" else "classifier_score"
        metrics[kind], metrics[f"{kind}_std"] = inception_score(log_probs.exp(), splits=min(10, len(generated)))
        judged = judge.extractor.class_names  # None: those of the dataset
        if labels is not None and judged in (None, judge.real.class_names):
            metrics["conditional_accuracy"] = conditional_accuracy(log_probs, labels)
    side = min(config.eval.manifold_samples, len(generated), len(judge.real))
    if side > MANIFOLD_NEIGHBOURS:  # fewer have no fifth neighbour
        chosen = torch.randperm(len(judge.real), generator=torch.Generator().manual_seed(config.seed))[:side]
        real_features, _ = extract(
            judge.extractor, judge.real.images[chosen.to(judge.real.images.device)], track=run.track
        )
        metrics |= precision_recall_density_coverage(real_features, features[:side], MANIFOLD_NEIGHBOURS)
    elif config.eval.manifold_samples:
        run.display.say(f"no precision, recall, density, coverage: {side} images a side are too few")
    return metrics


def further_distance(generated: Tensor, judge: Judge, run: Run) -> dict[str, float]:
    """The Fréchet distance of generated images in the eyes of one more extractor, and what held-out images score."""
    name = judge.extractor.name
    features, _ = extract(judge.extractor, generated, track=run.track)
    distances = {name: frechet_between(judge.statistics, FeatureStatistics().update(features), len(generated))}
    if (floor := judge.floor(len(generated), run)) is not None:
        distances[f"{name}_floor"] = floor
    return distances


def memorisation(
    generated: Tensor, real: MemoryImages, test: Images | None, config: Config, path: Path
) -> dict[str, float]:
    """Are samples copies of training images? Mean pixel distance to the nearest one, beside that of held-out images,
    and a picture.

    Each row of the picture starts with a generated image; its nearest training images follow. Distances are root mean
    square in [0, 255].
    """
    if not config.eval.neighbours:
        return {}
    scale = generated[0].numel() ** 0.5
    reference = real.images.cpu()
    pixels = generated[:NEIGHBOUR_SAMPLES]
    distance, index = nearest_neighbours(pixels, reference, 9)
    rows = range(min(config.eval.neighbours, len(pixels)))
    save_grid(torch.cat([torch.cat([pixels[i : i + 1], reference[index[i]]]) for i in rows]), path, columns=10)
    metrics = {"nearest_train_rms": float(distance[:, 0].mean()) / scale}
    if test is not None:
        held_out = test.draw(NEIGHBOUR_SAMPLES).images.cpu()
        metrics["nearest_train_rms_test_images"] = float(nearest_neighbours(held_out, reference, 1)[0].mean()) / scale
    return metrics


def quick_distance(model: Network, objective: Objective, config: Config, judge: Judge, run: Run) -> dict[str, float]:
    """Frechet distance, and agreement with the label, of `eval.nfe_samples` images drawn as `config.sample` says."""
    count = config.eval.nfe_samples
    labels = grid_labels(config, count)
    generated = generate_resumable(model, objective, config, count, labels, sample_key(model, config), run)
    plain = dataclasses.replace(config, eval=dataclasses.replace(config.eval, manifold_samples=0))
    metrics = measure(generated, labels, judge, plain, run)
    return {name: metrics[name] for name in (judge.extractor.name, "conditional_accuracy") if name in metrics}


def with_sampling(config: Config, **changes: object) -> Config:
    """The same config with other sampling settings."""
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changes))


def sampler_table(
    model: Network, objective: Objective, config: Config, judge: Judge, marks: dict[str, str], run: Run
) -> dict[str, float]:
    """Frechet distance by sampler and number of network evaluations: the price of an image against its quality."""
    if not config.eval.nfe_samples:
        return {}
    floor = judge.floor(config.eval.nfe_samples, run)
    rows = {}
    for sampler in SAMPLERS[config.objective.kind]:
        for nfe in config.eval.nfe_table:
            # heun: 2 * steps - 1 evaluations, so never more than nfe
            steps = (nfe + 1) // 2 if sampler == "heun" else nfe
            if steps > config.objective.timesteps and config.objective.kind == "ddpm":
                continue
            changed = with_sampling(config, sampler=sampler, steps=steps, eta=0.0)
            rows.setdefault(sampler, {})[str(nfe)] = quick_distance(model, objective, changed, judge, run)[
                judge.extractor.name
            ]
    write_json(
        run.folder / "figures/samplers.json",
        {"metric": judge.extractor.name, "n": config.eval.nfe_samples, "floor": floor, "rows": rows, **marks},
    )
    plot_samplers(rows, judge.extractor.name, floor, run.folder / "figures/samplers.png")
    return {
        f"{judge.extractor.name}_{sampler}_nfe{nfe}": value
        for sampler, cells in rows.items()
        for nfe, value in cells.items()
    }


def guidance_table(
    model: Network, objective: Objective, config: Config, judge: Judge, marks: dict[str, str], run: Run
) -> dict[str, float]:
    """Frechet distance and agreement with the label by guidance scale: fidelity against diversity."""
    if not config.eval.nfe_samples or not config.model.num_classes:
        return {}
    rows = {
        f"{w:g}": quick_distance(model, objective, with_sampling(config, guidance=w), judge, run)
        for w in config.eval.guidance_table
    }
    write_json(
        run.folder / "figures/guidance.json",
        {"n": config.eval.nfe_samples, "floor": judge.floor(config.eval.nfe_samples, run), "rows": rows, **marks},
    )
    return {f"{name}_w{w}": value for w, row in rows.items() for name, value in row.items()}


def plot_samplers(rows: dict[str, dict[str, float]], metric: str, floor: float | None, path: Path) -> None:
    """Draw the sampler table on logarithmic axes, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), dpi=110, layout="constrained")
    for sampler, cells in rows.items():
        axes.plot([int(n) for n in cells], list(cells.values()), marker="o", markersize=4, label=sampler)
    if floor:
        axes.axhline(floor, color="grey", linestyle=":", label="held-out images")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations an image", ylabel=f"{metric} (lower is better)")
    axes.legend()
    write_figure(path, figure)
    plt.close(figure)


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
