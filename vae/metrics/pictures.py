"""How near reconstructions come to their originals, pixel by pixel and structure by structure."""

from __future__ import annotations

import torch
from torch import Tensor

from common.images import MemoryImages
from common.run import Run
from vae.config import Config
from vae.figures import picture
from vae.model import Autoencoder

BATCH = 500  # images decoded at once
LARGEST_WINDOW = 11  # pixels a side: SSIM's usual window; smaller images take a smaller one


@torch.no_grad()
def reconstruction_quality(
    model: Autoencoder, images: MemoryImages, codes: Tensor, config: Config, run: Run
) -> dict[str, float]:
    """PSNR in decibels and SSIM (Wang et al. 2004), mean over images in [0, 1].

    The expected image at the mean code is compared with the grey original, also where the model has seen it binarised.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ratios: list[Tensor] = []
    similarities: list[Tensor] = []
    window = min(LARGEST_WINDOW, (config.data.image_size - 1) // 2 * 2 - 1)
    for i in run.track(range(0, len(images), BATCH)):
        originals = images.images[i : i + BATCH].to(run.device).float() / 255
        with run.autocast():
            decoded = picture(model, codes[i : i + BATCH])
        ratios.append(peak_signal_noise_ratio(decoded, originals, data_range=1.0, reduction="none", dim=(1, 2, 3)))
        similarity = structural_similarity_index_measure(
            decoded, originals, data_range=1.0, kernel_size=window, gaussian_kernel=False, reduction="none"
        )
        assert isinstance(similarity, Tensor)  # a pair only where more is asked for
        similarities.append(similarity)
    ratio = torch.cat([part.reshape(-1) for part in ratios])
    return {
        "psnr": float(ratio.clamp(max=100).mean()),  # a perfect reconstruction has an infinite one
        "ssim": float(torch.cat([part.reshape(-1) for part in similarities]).mean()),
    }
