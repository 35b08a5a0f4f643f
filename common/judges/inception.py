"""The Inception network of the FID, whole, or as far as a mirror without its last layers reaches.

Whole, it gives the FID (Heusel et al. 2017). Its layers up to `mixed_7` suffice for two other published measures, which
are never called FID here and compare with no FID:

    fd_inception768   Frechet distance on the 768 averages before the auxiliary classifier (pytorch-fid's dims=768)
    sfid              Frechet distance on a map of 7 channels and 17 x 17 places, which keeps where things are, not only
                      what they are (Nash et al. 2021, arXiv:2103.03841; Dhariwal & Nichol 2021 report it as sFID)

Both networks are torch-fidelity's port of the TensorFlow graph, resizing to 299 pixels as that graph does: other
Inception weights or another resizing give other distances (Parmar et al. 2022).
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.request
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ProjectError
from common.files import sha256
from common.judges.classifier import load_tensors

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # how the file's SHA-256 begins, as its name says
SPATIAL_CHANNELS = 7  # of mixed_6's first branch: 7 x 17 x 17 = 2,023 features, about as many as the FID's 2,048


class InceptionFeatures(nn.Module):
    """The Inception-v3 network of the FID (Heusel et al. 2017). uint8 (B, 1 or 3, H, W) -> features (B, 2048),
    log-probabilities (B, 1008).

    The log-probabilities leave out the bias of the last layer, as the Inception score's original code does.
    `ProjectError` when torch-fidelity is missing or `weights` holds anything but tensors.
    """

    name = "fid"
    class_names: tuple[str, ...] = ()  # ImageNet's, of which no dataset here has any use
    test_accuracy: float | None = None

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ProjectError("the Inception network needs torch-fidelity: pip install torch-fidelity") from error
        load_tensors(weights)  # refuses a file that could run code, before the library reads it less strictly
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
        ).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))  # (B, 2048), (B, 1008)
        return features, F.log_softmax(logits, dim=1)


class TruncatedInception(nn.Module):
    """The same network up to `mixed_7`. uint8 (B, 1 or 3, H, W) -> features (B, 768) or, spatial, (B, 2023), and None.

    Args:
        weights: torch-fidelity's file of the whole network, or a safetensors file (or a folder that holds one) of
            TensorFlow's layers with the batch normalisation folded into weight and bias.
        kind: "inception768" or "inception_spatial".
        dtype: what convolutions compute in, float32 or bfloat16.
    `ProjectError` when torch-fidelity is missing, or the file lacks a layer.
    """

    class_names: tuple[str, ...] = ()
    test_accuracy: float | None = None

    def __init__(self, weights: Path, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
        except ImportError as error:
            raise ProjectError("the Inception network needs torch-fidelity: pip install torch-fidelity") from error
        self.spatial = kind == "inception_spatial"
        self.name = "sfid" if self.spatial else "fd_inception768"
        self.dtype = dtype
        self.resize = interpolate_bilinear_2d_like_tensorflow1x
        self.layers = nn.ModuleDict(
            OrderedDict(
                Conv2d_1a_3x3=fidelity.BasicConv2d(3, 32, kernel_size=3, stride=2),  # 299 -> 149 pixels
                Conv2d_2a_3x3=fidelity.BasicConv2d(32, 32, kernel_size=3),
                Conv2d_2b_3x3=fidelity.BasicConv2d(32, 64, kernel_size=3, padding=1),
                MaxPool_1=nn.MaxPool2d(3, stride=2),  # 147 -> 73
                Conv2d_3b_1x1=fidelity.BasicConv2d(64, 80, kernel_size=1),
                Conv2d_4a_3x3=fidelity.BasicConv2d(80, 192, kernel_size=3),
                MaxPool_2=nn.MaxPool2d(3, stride=2),  # 71 -> 35
                Mixed_5b=fidelity.InceptionA(192, pool_features=32),  # TensorFlow's mixed
                Mixed_5c=fidelity.InceptionA(256, pool_features=64),  # mixed_1
                Mixed_5d=fidelity.InceptionA(288, pool_features=64),  # mixed_2
                Mixed_6a=fidelity.InceptionB(288),  # mixed_3, 35 -> 17
                Mixed_6b=fidelity.InceptionC(768, channels_7x7=128),  # mixed_4
                Mixed_6c=fidelity.InceptionC(768, channels_7x7=160),  # mixed_5
                Mixed_6d=fidelity.InceptionC(768, channels_7x7=160),  # mixed_6
                Mixed_6e=fidelity.InceptionC(768, channels_7x7=192),  # mixed_7
            )
        )
        self._load(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            # on a CPU the activations of more images at once (5 MB each) fall out of its caches
            size = 8 if images.device.type == "cpu" else len(images)
            return torch.cat([self.features(part).float() for part in images.split(size)]), None

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) -> (B, 768) or (B, 2023)."""
        x = self.resize(images.expand(-1, 3, -1, -1).float(), size=(299, 299), align_corners=False)
        x = (x - 128) / 128  # (B, 3, 299, 299)
        for name, layer in self.layers.items():
            if self.spatial and name == "Mixed_6d":
                # (B, 192, 17, 17): this layer's first branch is all that is asked for
                branch = layer.get_submodule("branch1x1")(x)
                return branch[:, :SPATIAL_CHANNELS].flatten(1)  # (B, 7 * 17 * 17)
            x = layer(x)
        return x.float().mean(dim=(2, 3))  # (B, 768, 17, 17) -> (B, 768)

    def _load(self, path: Path) -> None:
        """Weights by name, from either kind of file."""
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ProjectError(f"no Inception weights at {path}")
        if files[0].suffix == ".safetensors":
            found = unfold(load_safetensors(files[0]))
        else:
            found = {f"layers.{name}": value for name, value in load_tensors(files[0]).items()}
        own = self.state_dict()
        missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
        if missing:
            raise ProjectError(f"{files[0]} lacks the Inception layer {missing[0].removeprefix('layers.')}")
        self.load_state_dict({name: found.get(name, value) for name, value in own.items()})


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file as float32. `ProjectError` where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ProjectError(f"{path} cannot be read: {error}") from error


# TensorFlow's names of the convolutions of a block, in the words of the PyTorch port
BRANCHES_A = {
    "conv": "branch1x1",
    "tower_conv": "branch5x5_1",
    "tower_conv_1": "branch5x5_2",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_conv_2": "branch3x3dbl_3",
    "tower_2_conv": "branch_pool",
}
BRANCHES_B = {
    "conv": "branch3x3",
    "tower_conv": "branch3x3dbl_1",
    "tower_conv_1": "branch3x3dbl_2",
    "tower_conv_2": "branch3x3dbl_3",
}
BRANCHES_C = {
    "conv": "branch1x1",
    "tower_conv": "branch7x7_1",
    "tower_conv_1": "branch7x7_2",
    "tower_conv_2": "branch7x7_3",
    "tower_1_conv": "branch7x7dbl_1",
    "tower_1_conv_1": "branch7x7dbl_2",
    "tower_1_conv_2": "branch7x7dbl_3",
    "tower_1_conv_3": "branch7x7dbl_4",
    "tower_1_conv_4": "branch7x7dbl_5",
    "tower_2_conv": "branch_pool",
}
STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
BLOCKS = {
    "mixed": ("Mixed_5b", BRANCHES_A),
    "mixed_1": ("Mixed_5c", BRANCHES_A),
    "mixed_2": ("Mixed_5d", BRANCHES_A),
    "mixed_3": ("Mixed_6a", BRANCHES_B),
    "mixed_4": ("Mixed_6b", BRANCHES_C),
    "mixed_5": ("Mixed_6c", BRANCHES_C),
    "mixed_6": ("Mixed_6d", BRANCHES_C),
    "mixed_7": ("Mixed_6e", BRANCHES_C),
}


def layer_names() -> dict[str, str]:
    """TensorFlow's name of each convolution -> its name in the port: mixed_4_tower_conv_1 -> Mixed_6b.branch7x7_2."""
    names = dict(STEM)
    for block, (module, branches) in BLOCKS.items():
        names |= {f"{block}_{conv}": f"{module}.{branch}" for conv, branch in branches.items()}
    return names


def unfold(folded: dict[str, Tensor], eps: float = 0.001) -> dict[str, Tensor]:
    """Weights and biases with the batch normalisation folded in, as a state dict that has one.

    BasicConv2d computes relu(batch_norm(conv(x))). With running mean 0, running variance 1 - eps and scale 1, its
    normalisation divides by sqrt(1 - eps + eps) = 1 and only adds the bias.
    """
    state: dict[str, Tensor] = {}
    for source, target in layer_names().items():
        if f"{source}.weight" not in folded or f"{source}.bias" not in folded:
            continue
        bias = folded[f"{source}.bias"]  # (C_out,)
        state[f"layers.{target}.conv.weight"] = folded[f"{source}.weight"]  # (C_out, C_in, kh, kw)
        state[f"layers.{target}.bn.weight"] = torch.ones_like(bias)
        state[f"layers.{target}.bn.bias"] = bias
        state[f"layers.{target}.bn.running_mean"] = torch.zeros_like(bias)
        state[f"layers.{target}.bn.running_var"] = torch.full_like(bias, 1 - eps)
    return state


def truncated_weights(data_root: Path, given: str) -> Path:
    """Where the weights for `TruncatedInception` are: `given`, else data_root/inception_fid_2015, else the FID's own.

    `ProjectError` that names all of these places when there are none.
    """
    if given:
        return Path(given)
    folder = data_root / "inception_fid_2015"
    if folder.is_dir():
        return folder
    with contextlib.suppress(ProjectError):
        return inception_weights()
    raise ProjectError(
        f"no Inception weights: put the layers up to mixed_7 into {folder}, or the file of {INCEPTION_URL} into "
        f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or name a file by eval.inception_weights"
    )


def inception_weights(timeout: float = 5.0) -> Path:
    """The file with the Inception weights in torch's hub folder, downloaded (95 MB) when absent.

    `ProjectError`, within about `timeout` seconds, when they are neither there nor to be had; it says where to put
    them.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not path.is_file():
        if not reachable(INCEPTION_URL, timeout):
            raise ProjectError(
                f"no Inception weights at {path}, and {INCEPTION_URL} cannot be reached: put that file there"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ProjectError(f"the download of {INCEPTION_URL} failed: {error}") from error
    if not sha256(path).startswith(INCEPTION_SHA256):
        raise ProjectError(f"{path} is damaged: delete it")
    return path


def reachable(url: str, timeout: float) -> bool:
    """Whether `url` answers within `timeout` seconds. In a thread, since looking up a name knows no timeout."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as response:
                answers.append(response.status == 200)
        except (OSError, http.client.HTTPException):
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers == [True]
