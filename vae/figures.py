"""Pictures of what a variational autoencoder has learnt.

Legend: N images, C channels, H = W pixels, Z latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import atomic_open, write_figure
from common.run import Run
from vae.ladder import Ladder
from vae.model import Autoencoder

GAP = 2  # white pixels between the images of a sheet
MAP_POINTS = 5000  # codes in the latent map


def to_bytes(values: Tensor) -> Tensor:
    """[0, 1], anything outside clamped -> uint8, rounded to nearest."""
    return (values.float().clamp(0, 1) * 255).round().byte()


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """A sheet of images in [0, 1], row by row. (N, C, H, W) -> PNG"""
    pixels = to_bytes(images).cpu()
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top = i // columns * (height + GAP)
        left = i % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    table = sheet.permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)
    if channels == 1:
        table = table[:, :, 0]
    with atomic_open(path) as file:
        Image.fromarray(np.ascontiguousarray(table)).save(file, "PNG")


@torch.no_grad()
def picture(model: Autoencoder, z: Tensor) -> Tensor:
    """The expected image of each code. (S, Z) -> (S, C, H, W) in [0, 1]"""
    return model.likelihood.mean(model.decode(z))


@torch.no_grad()
def save_progress(model: Autoencoder, x: Tensor, run: Run) -> None:
    """In training: a sheet of images beside their reconstructions, and one of draws from the prior."""
    save_reconstructions(model, x[:64], x[:64], run.folder / f"samples/reconstructions_{run.step:08d}.png")
    noise = model.noise(64, 1, run.generator(0, run.step))[:, 0]
    save_grid(picture(model, model.prior(noise)), run.folder / f"samples/prior_{run.step:08d}.png", 16)


@torch.no_grad()
def save_reconstructions(model: Autoencoder, x: Tensor, originals: Tensor, path: Path) -> None:
    """Rows of originals, each above what their codes decode to. (N, C, H, W) both"""
    columns = 16
    rows = []
    for i in range(0, len(x), columns):
        rows += [originals[i : i + columns], picture(model, model.codes(x[i : i + columns]))]
    save_grid(torch.cat(rows), path, columns)


# -- between two codes -------------------------------------------------------------------------------------------------


def linear(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point `share` of the way along the line. (N, Z)"""
    return start + share * (end - start)


def spherical(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Along the great circle, with the length going evenly from one to the other. (N, Z)

    Codes drawn from a normal distribution in many dimensions lie near a sphere of radius sqrt(Z); the middle of a line
    between two of them lies well inside, where the decoder has seen little (White 2016, arXiv:1609.04468).
    """
    start_length = start.norm(dim=1, keepdim=True)
    end_length = end.norm(dim=1, keepdim=True)
    cosine = ((start / start_length) * (end / end_length)).sum(1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos().clamp(min=1e-6)  # (N, 1)
    a = torch.sin((1 - share) * angle) / torch.sin(angle) * (start / start_length)
    b = torch.sin(share * angle) / torch.sin(angle) * (end / end_length)
    return (a + b) * ((1 - share) * start_length + share * end_length)


@torch.no_grad()
def save_interpolations(model: Autoencoder, x: Tensor, path: Path, steps: int = 12) -> None:
    """For each pair of neighbouring images two rows: along a line, and along a great circle."""
    codes = model.codes(x)
    start = codes[0::2]
    end = codes[1::2]
    shares = torch.linspace(0, 1, steps).tolist()
    by_line = torch.stack([picture(model, linear(start, end, share)) for share in shares], 1)
    by_circle = torch.stack([picture(model, spherical(start, end, share)) for share in shares], 1)
    rows = torch.stack([by_line, by_circle], 1)  # (pairs, 2, steps, C, H, W)
    save_grid(rows.flatten(0, 2), path, steps)


# -- what each latent does ---------------------------------------------------------------------------------------------


@torch.no_grad()
def save_traversals(model: Autoencoder, x: Tensor, kl: Tensor, reach: float, path: Path, rows: int = 10) -> list[int]:
    """One latent a row, from -reach to +reach while the others stay as they are for the image x (1, C, H, W); the
    latents that say most come first. Returns their numbers.

    Args:
        kl: of each latent, mean over images, in nats. (Z,)
        reach: in standard deviations of the prior.
    """
    order = kl.argsort(descending=True)[:rows].tolist()
    code = model.codes(x)  # (1, Z)
    values = torch.linspace(-reach, reach, 11, device=code.device)
    sheets = []
    for latent in order:
        moved = code.repeat(len(values), 1)
        moved[:, latent] = values
        sheets.append(picture(model, moved))
    save_grid(torch.cat(sheets), path, len(values))
    return order


@torch.no_grad()
def save_layers(model: Ladder, x: Tensor, rng: torch.Generator, path: Path, columns: int = 11) -> None:
    """For a hierarchy, one row for each number of layers kept: the top ones as inferred from x (1, C, H, W), the others
    drawn from the prior given those. What changes along a row is what the lower layers decide.
    """
    sheets = []
    for kept in range(len(model.sizes), -1, -1):
        noise = model.noise(columns, 1, rng)[:, 0]
        drawn = model.complete(model.codes(x).expand(columns, -1), kept, noise)
        sheets.append(picture(model, drawn))
    save_grid(torch.cat(sheets), path, columns)


# -- where codes lie ---------------------------------------------------------------------------------------------------


def save_map(codes: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str], path: Path) -> None:
    """Codes (N, Z) in the plane, coloured by class: as they are for Z = 2, else their two main directions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5), dpi=110, layout="constrained")
    names = ("first latent", "second latent")
    places = codes[:, :2]
    if codes.shape[1] > 2:
        from sklearn.decomposition import PCA

        pca = PCA(2, random_state=0)
        places = pca.fit_transform(codes)
        shares = pca.explained_variance_ratio_
        names = (f"first direction ({shares[0]:.0%} of the variance)", f"second direction ({shares[1]:.0%})")
    if codes.shape[1] == 1:
        places = np.concatenate([codes, np.zeros_like(codes)], 1)
    points = axes.scatter(places[:, 0], places[:, 1], c=labels, s=3, cmap="tab10" if labels is not None else None)
    if labels is not None:
        axes.legend(points.legend_elements(num=len(class_names))[0], class_names, fontsize=7, markerscale=0.7)
    axes.set(xlabel=names[0], ylabel=names[1], title="Posterior means")
    write_figure(path, figure)
    plt.close(figure)


@torch.no_grad()
def save_plane(model: Autoencoder, path: Path, side: int = 20) -> None:
    """For two latents: what every place of the plane decodes to, at even quantiles of the prior (Kingma & Welling
    2014, figure 4).
    """
    device = next(model.parameters()).device
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, side, device=device))
    down, across = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    save_grid(picture(model, torch.stack([across.flatten(), down.flatten()], 1)), path, side)


def save_kl(kl: Tensor, unit: str, path: Path) -> None:
    """Bars of the KL divergence of each latent or layer, sorted for latents. (Z,)"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = kl.sort(descending=True).values if unit == "latent" else kl
    figure, axes = plt.subplots(figsize=(6, 3), dpi=110, layout="constrained")
    axes.bar(range(1, len(values) + 1), values.tolist())
    axes.set(xlabel=unit, ylabel="KL divergence (nats)", title=f"{float(values.sum()):.1f} nats in all")
    write_figure(path, figure)
    plt.close(figure)
