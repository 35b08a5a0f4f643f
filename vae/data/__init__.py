"""The images that a VAE is trained and evaluated on."""

from vae.data.binarize import binarize, binarize_static, bits_per_dimension, dequantize
from vae.data.datasets import Split, load_images
from vae.data.dsprites import Dsprites

__all__ = ["Dsprites", "Split", "binarize", "binarize_static", "bits_per_dimension", "dequantize", "load_images"]
