"""Measure a trained variational autoencoder:

    python -m vae.eval --run runs/vae_mnist [eval.importance_samples=5000 eval.num_images=1000 ...]

Writes `eval.json`, `likelihoods.csv` (a line an image) and pictures into the run folder; the last line of stdout is the
content of `eval.json`.

Legend: N images, K draws of z for each, Z latents, C channels, H = W pixels.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from vae.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "vae", "eval")

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import weights_hash
from common.errors import ProjectError, exits_cleanly
from common.files import write_csv, write_json
from common.images import Images, MemoryImages
from common.judges import CACHE
from common.judges.features import Labelled, build_extractor, extract, reference_statistics
from common.metrics import FeatureStatistics, frechet_between
from common.provenance import discard, made_by, output_hashes
from common.run import Run
from common.terminal import show_metrics
from vae import figures
from vae.data import Dsprites, load_images
from vae.data.dsprites import CATEGORICAL
from vae.images import prepare
from vae.ladder import Ladder
from vae.load import load_model
from vae.metrics.disentanglement import score_codes
from vae.metrics.likelihood import Bounds, estimate_bounds
from vae.metrics.pictures import reconstruction_quality
from vae.model import Autoencoder

BATCH = 500  # images encoded or decoded at once
# what is written before eval.json, and goes before it is written anew
OUTPUTS = ("figures/*.png", "figures/*.json", "likelihoods.csv")
PICTURE_STREAM = 6_000_003  # keeps the random numbers of pictures apart


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate one checkpoint."""
    started = time.perf_counter()
    with Run(config, options) as run:
        model, step = load_model(config, options, run)
        if step < config.train.steps:
            run.display.say(f"note: the weights are of step {step} of {config.train.steps}: no finished training")
        marks = made_by(config, [weights_hash(model.state_dict())])
        images = load_images(config.data, config.data_root, config.eval.split)
        if images is None:
            raise ProjectError(f"there are no {config.eval.split} images; see data.held_out and data.validation")
        held_out = images.draw(config.eval.num_images)
        bounds = estimate_bounds(model, held_out, config, run, max(1, config.eval.importance_samples))
        metrics = density_metrics(bounds, held_out, model, config)
        codes = encode(model, held_out, config, run)
        metrics |= code_metrics(codes, bounds, model)
        metrics |= reconstruction_quality(model, held_out, codes, config, run)
        metrics |= sample_metrics(model, held_out, codes, config, run)
        if config.eval.disentanglement:
            metrics |= factor_metrics(codes, held_out, config)
        discard(run.folder, OUTPUTS)
        draw_figures(model, held_out, codes, bounds, config, run)
        write_likelihoods(bounds, held_out, run.folder / "likelihoods.csv")
        result = {
            "project": "vae",
            "config": run.folder.name,
            "checkpoint_step": step,
            "total_steps": config.train.steps,
            "metrics": metrics,
            "n": {"images": len(held_out), "importance_samples": config.eval.importance_samples},
            "seeds": [config.seed],
            "seconds": round(time.perf_counter() - started, 1),
            "split": config.eval.split,
            "precision": str(run.machine.amp_dtype or torch.get_default_dtype()).removeprefix("torch."),
            "files": output_hashes(run.folder, ["likelihoods.csv"]),
            **marks,
        }
        write_json(run.folder / "eval.json", result)
        show_metrics(metrics, f"{run.folder.name} after {step} of {config.train.steps} steps")
        print(json.dumps(result), flush=True)


def density_metrics(bounds: Bounds, images: MemoryImages, model: Autoencoder, config: Config) -> dict[str, float]:
    """How likely the images are: nats an image, and bits a pixel and channel where pixels are 8-bit numbers."""
    metrics = {"elbo": bounds.elbo, "kl": float(bounds.kl.sum())}
    if config.eval.importance_samples:
        metrics["log_likelihood"] = bounds.log_likelihood
        # of the mean over images: what another test set of this size would change
        metrics["log_likelihood_error"] = float(bounds.each.std()) / math.sqrt(len(bounds.each))
    if model.likelihood.dimension_bits is not None:
        dimensions = math.prod(images.shape)
        best = metrics.get("log_likelihood", bounds.elbo)
        metrics["bits_per_dim"] = model.likelihood.dimension_bits - best / (dimensions * math.log(2))
    return metrics


@torch.no_grad()
def encode(model: Autoencoder, images: MemoryImages, config: Config, run: Run) -> Tensor:
    """Posterior means, on the device. (N, Z)"""
    codes = []
    for i in run.track(range(0, len(images), BATCH)):
        rng = run.generator(PICTURE_STREAM, i)
        with run.autocast():
            codes.append(model.codes(prepare(images.images[i : i + BATCH].to(run.device), config, rng)).float())
    return torch.cat(codes)


def code_metrics(codes: Tensor, bounds: Bounds, model: Autoencoder) -> dict[str, float]:
    """How much of the code is in use (Burda et al. 2016, section 5.2: variance of the posterior mean above 0.01)."""
    if isinstance(model, Ladder):
        return {"active_layers": float((bounds.kl > 0.01).sum())}
    return {"active_units": float((codes.var(0, correction=0) > 0.01).sum())}


@torch.no_grad()
def decode(model: Autoencoder, codes: Tensor, run: Run) -> Tensor:
    """Expected images as bytes, on the CPU. (N, Z) -> uint8 (N, C, H, W)"""
    parts = []
    for chunk in run.track(codes.split(BATCH)):
        with run.autocast():
            parts.append(figures.to_bytes(figures.picture(model, chunk)).cpu())
    return torch.cat(parts)


def sample_metrics(
    model: Autoencoder, held_out: MemoryImages, codes: Tensor, config: Config, run: Run
) -> dict[str, float]:
    """The Fréchet distance of generated images, and of reconstructions, from the training images, in the eyes of the
    network that `eval.features` names; beside it what held-out images themselves score.
    """
    if config.eval.features == "none" or not config.eval.num_samples:
        return {}
    train = load_images(config.data, config.data_root, "train")
    test = load_images(config.data, config.data_root, "test")
    assert train is not None
    cache = Path(config.data_root) / CACHE
    extractor = build_extractor(
        config.eval.features,
        config.data.dataset,
        Path(config.data_root),
        cache,
        labelled(train, test),
        device=run.device,
        log=run.display.say,
        track=run.track,
    )
    identity = {"dataset": config.data.dataset, "image_size": config.data.image_size, "split": "train"}
    if config.data.validation:
        identity["validation"] = config.data.validation
    real = reference_statistics(extractor, train.draw(0).images, cache, identity, track=run.track)
    count = config.eval.num_samples
    noise = model.noise(count, 1, run.generator(PICTURE_STREAM))[:, 0]
    with torch.no_grad():
        latents = torch.cat([model.prior(part, config.sample.temperature) for part in noise.split(BATCH)])

    def distance(images: Tensor) -> float:
        features, _ = extract(extractor, images, track=run.track)
        return frechet_between(real, FeatureStatistics().update(features), len(features))

    return {
        extractor.name: distance(decode(model, latents, run)),
        f"{extractor.name}_reconstructions": distance(decode(model, codes, run)),
        "fd_floor": distance(held_out.images),
    }


def labelled(train: Images, test: Images | None):  # type: ignore[no-untyped-def]  # what build_extractor asks for
    """The two splits with their labels, for a classifier to be trained on; None where there are none."""
    if not train.class_names or test is None:
        return None

    def both() -> Labelled:
        a = train.draw(0)
        b = test.draw(0)
        assert a.labels is not None
        assert b.labels is not None
        return (a.images, a.labels), (b.images, b.labels)

    return both


def factor_metrics(codes: Tensor, images: MemoryImages, config: Config) -> dict[str, float]:
    """How well single latents stand for single factors of dSprites."""
    assert isinstance(images, Dsprites)
    return score_codes(codes, images.factors, CATEGORICAL, config.seed, config.eval.bins)


def draw_figures(
    model: Autoencoder, images: MemoryImages, codes: Tensor, bounds: Bounds, config: Config, run: Run
) -> None:
    """Every picture of the run, in `figures/`."""
    folder = run.folder / "figures"
    shown = images.draw(64)
    originals = shown.images.to(run.device).float() / 255
    x = prepare(shown.images.to(run.device), config, run.generator(PICTURE_STREAM))
    figures.save_reconstructions(model, x, originals, folder / "reconstructions.png")
    noise = model.noise(256, 1, run.generator(PICTURE_STREAM))[:, 0]
    with torch.no_grad():
        drawn = model.prior(noise, config.sample.temperature)
    figures.save_grid(figures.picture(model, drawn), folder / "samples.png", 16)
    figures.save_interpolations(model, x[:10], folder / "interpolations.png")
    if isinstance(model, Ladder):
        figures.save_layers(model, x[:1], run.generator(PICTURE_STREAM, 1), folder / "layers.png")
    else:
        order = figures.save_traversals(model, x[:1], bounds.kl, config.eval.traversal, folder / "traversals.png")
        write_json(folder / "traversals.json", {"latents": order, "kl": [round(float(v), 4) for v in bounds.kl[order]]})
    figures.save_kl(bounds.kl, "layer" if isinstance(model, Ladder) else "latent", folder / "kl.png")
    chosen = codes[: figures.MAP_POINTS].cpu().numpy()
    labels = None if images.labels is None else images.labels[: figures.MAP_POINTS].cpu().numpy()
    figures.save_map(chosen, labels, images.class_names, folder / "map.png")
    if model.size == 2 and not isinstance(model, Ladder):
        figures.save_plane(model, folder / "plane.png")


def write_likelihoods(bounds: Bounds, images: MemoryImages, path: Path) -> None:
    """A line an image: its place in the split, its class, and the bound of its log-likelihood in nats."""
    rows = []
    for i, value in enumerate(bounds.each.tolist()):
        label = "" if images.labels is None else images.class_names[int(images.labels[i])]
        rows.append({"image": i, "class": label, "log_likelihood": round(value, 4)})
    write_csv(path, rows)


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
