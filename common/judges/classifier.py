"""Classifiers whose features measure generated images where the Inception network is absent or says little (digits, for
instance).

`ResNet20` is the CIFAR-10 network of He et al. 2016 and loads a public checkpoint. `SmallCNN` is trained on the spot,
in about a minute on one CPU core for MNIST, and kept in a cache. Both map uint8 images to (features,
log-probabilities), and judge only: nothing here is trained together with a generative model.

Shape legend: B images, C channels, H x W pixels, D features, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import export_weights
from common.errors import ProjectError
from common.runtime import choose_precision

logger = logging.getLogger(__name__)

RECIPE: dict[str, Any] = {
    "architecture": "small-cnn-1",
    "widths": [32, 64, 128],
    "images_seen": 240_000,
    "epochs": [4, 20],
    "lr": 0.01,
    "weight_decay": 0.02,
}


# -- ResNet-20 ---------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, section 4.2, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, channels, H / stride, W / stride)
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        # option A: every stride-th pixel, and zeros for the new channels, half of them before the old ones and half
        # after
        shortcut = F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new_channels // 2, self.new_channels // 2)
        )
        return F.relu(h + shortcut)


class ResNet20(nn.Module):
    """The 0.27M parameter CIFAR-10 network of He et al. 2016, section 4.2. uint8 (B, 1 or 3, H, W) -> features (B, 64),
    log-probs (B, 10).

    The features are the averages that the last linear layer reads. Greyscale images are repeated over the three
    channels.
    """

    name = "fd_resnet20"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    test_accuracy: float | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, stride=1)
        self.layer2 = self._stage(16, 32, stride=2)
        self.layer3 = self._stage(32, 64, stride=2)
        self.linear = nn.Linear(64, 10)
        # mean and standard deviation of ImageNet, which this checkpoint was trained with, one number a channel
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            ResidualBlock(in_channels, channels, stride),
            ResidualBlock(channels, channels, 1),
            ResidualBlock(channels, channels, 1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.expand(-1, 3, -1, -1)  # (B, 1 or 3, H, W) -> (B, 3, H, W)
        x = (x.float() / 255 - self.pixel_mean) / self.pixel_std
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        features = x.mean(dim=(2, 3))  # (B, 64, H / 4, W / 4) -> (B, 64)
        return features, F.log_softmax(self.linear(features), dim=1)


def load_resnet20(path: Path) -> ResNet20:
    """The network with the weights at `path`, in evaluation mode.

    `path` is a file, or a folder that holds resnet20*.th: a checkpoint {"state_dict": ...} of
    github.com/akamaster/pytorch_resnet_cifar10, whose keys carry the prefix "module." of a data-parallel wrapper.
    `ProjectError` when it is missing or something else.
    """
    files = sorted(path.glob("resnet20*.th")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ProjectError(
            f"no ResNet-20 weights at {path}: put resnet20-12fca82f.th of github.com/akamaster/pytorch_resnet_cifar10 "
            "there, or choose eval.features=classifier"
        )
    network = ResNet20()
    checkpoint = load_tensors(files[0])
    try:
        network.load_state_dict(
            {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
        )
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ProjectError(f"{files[0]} is not a ResNet-20 checkpoint: other tensors than expected") from error
    return network.eval().requires_grad_(False)


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote to `path`. `ProjectError` when it is damaged or holds anything but tensors, which
    could run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything from EOFError to UnpicklingError, depending on where the damage is
        raise ProjectError(f"{path} is damaged, or holds more than tensors: {type(error).__name__}") from error


# -- a classifier trained on the spot ----------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """A 0.13M parameter network for images of any size. uint8 (B, C, H, W) -> features (B, 128), log-probabilities
    (B, K).
    """

    def __init__(self, name: str, channels: int, num_classes: int) -> None:
        super().__init__()
        narrow, middle, wide = RECIPE["widths"]
        self.name = name
        self.class_names: tuple[str, ...] | None = None  # the dataset's
        self.test_accuracy: float | None = None
        self.body = nn.Sequential(
            # (B, C, H, W) -> (B, 4 C, H / 2, W / 2): most of the cost of a network is at full resolution
            nn.PixelUnshuffle(2),
            self._block(4 * channels, narrow, stride=1),
            self._block(narrow, middle, stride=2),
            self._block(middle, middle, stride=1),
            self._block(middle, wide, stride=2),
        )
        self.linear = nn.Linear(wide, num_classes)

    @staticmethod
    def _block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.classify(self.normalise(images))
        return features.float(), F.log_softmax(logits.float(), dim=1)

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """uint8 -> float32 in [-1, 1], at an even size of at least 16 pixels, which the three halvings need."""
        x = images.float() / 127.5 - 1
        if min(x.shape[2:]) < 16:
            scale = -(-16 // min(x.shape[2:]))
            x = F.interpolate(x, scale_factor=scale, mode="bilinear")
        return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) -> features (B, 128), logits (B, K)."""
        features = self.body(x).mean(dim=(2, 3))  # (B, 128, H / 8, W / 8) -> (B, 128)
        return features, self.linear(features)


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """A random affine map an image: rotation to 11 degrees, scale and shear to 10 and 15 percent, shifts to 1/14 of the
    size.

    x: (B, C, H, W) on any device; the random numbers come from `rng`, a CPU generator.
    """
    # five times (B,), in [-1, 1)
    angle, scale, shear, right, down = (torch.rand(5, len(x), generator=rng) * 2 - 1).to(x.device)
    # the image is 2 units wide
    angle = 0.2 * angle
    scale = 1 + 0.1 * scale
    shear = 0.15 * shear
    right = right / 7
    down = down / 7
    matrix = torch.stack(
        [scale * angle.cos(), shear - angle.sin(), right, angle.sin(), scale * angle.cos(), down], dim=1
    ).view(-1, 2, 3)  # (B, 6) -> (B, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(
    network: SmallCNN,
    images: Tensor,
    labels: Tensor,
    seed: int,
    device: torch.device | str = "cpu",
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> SmallCNN:
    """Train `network` on uint8 images (N, C, H, W) and int64 labels (N,); returns it in evaluation mode, on `device`.

    Order and augmentation are functions of `seed`. A one-cycle learning rate (Smith & Topin 2018) reaches in 4 epochs
    what takes tens otherwise. `track` wraps the loop over steps.
    """
    rng = torch.Generator().manual_seed(seed)
    device = torch.device(device)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    batch_size = min(256 if len(images) >= 10_000 else 64, len(images))
    fewest, most = RECIPE["epochs"]
    epochs = min(most, max(fewest, RECIPE["images_seen"] // len(images)))
    steps_per_epoch = len(images) // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RECIPE["lr"], total_steps=epochs * steps_per_epoch, pct_start=0.25
    )
    # about 1.6 times as fast on a CPU that has it, equally accurate
    bf16 = choose_precision("auto", device) is torch.bfloat16
    for step in track(range(epochs * steps_per_epoch)):
        position = step % steps_per_epoch
        if position == 0:
            order = torch.randperm(len(images), generator=rng).to(images.device)
        chosen = order[position * batch_size : (position + 1) * batch_size]
        x = augment(network.normalise(images[chosen].to(device)), rng)  # (B, C, H, W)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            _, logits = network.classify(x)
        loss = F.cross_entropy(logits.float(), labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of uint8 images (N, C, H, W) whose most probable class is their label (N,)."""
    device = next(network.parameters()).device
    correct = sum(
        (network(x.to(device))[1].argmax(dim=1).cpu() == y.cpu()).sum().item()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    return correct / len(images)


def cached_classifier(
    dataset: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    cache_dir: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> SmallCNN:
    """The classifier of a labelled dataset, from the cache or trained now; `.test_accuracy` is its accuracy on `test`.

    Args: `train` and `test` are pairs of uint8 images (N, C, H, W), preprocessed as the diffusion model sees them, and
    labels (N,) from 0 up. The file name carries a hash of the pixels, the labels, the seed and the recipe, so that a
    change of any trains anew.
    """
    num_classes = int(train[1].max()) + 1
    network = new_classifier(f"fd_{dataset}", train[0].shape[1], num_classes, seed)
    identity = {
        "dataset": dataset,
        "seed": seed,
        "recipe": RECIPE,
        "shape": list(train[0].shape),
        "train": [checksum(t) for t in train],
        "test": [checksum(t) for t in test],
    }
    path = cache_path(cache_dir, f"classifier-{dataset}", identity)
    cached = read_cache(path, identity)
    if cached is None:
        log(f"training a classifier on {len(train[0])} images of {dataset}, once; it is kept at {path}")
        train_classifier(network, *train, seed, device, track)
        network.test_accuracy = accuracy(network, *test)
        write_cache(path, network.state_dict(), identity, test_accuracy=network.test_accuracy)
    else:
        network.load_state_dict(cached[0])
        network.test_accuracy = cached[1]["test_accuracy"]
    log(f"classifier for {network.name}: test accuracy {network.test_accuracy:.4f}")
    return network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def new_classifier(name: str, channels: int, num_classes: int, seed: int) -> SmallCNN:
    """An untrained network whose weights depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN(name, channels, num_classes)


# -- a cache of tensors that knows what it holds -----------------------------------------------------------------------


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and content."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a value of JSON types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_path(folder: Path, name: str, identity: dict[str, Any]) -> Path:
    """folder/name-<SHA-256 of the identity>.safetensors"""
    return folder / f"{name}-{json_hash(identity)}.safetensors"


def write_cache(path: Path, tensors: dict[str, Tensor], identity: dict[str, Any], **facts: Any) -> None:
    """Write tensors, what they belong to and facts about them into one file, atomically. The header is JSON,
    readable by anyone.
    """
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    export_weights(path, tensors, {"about": json.dumps({"identity": identity, "facts": facts, "checksums": checksums})})


def read_cache(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts) as they were written, or None when the file is absent or damaged; damage is logged once, as a
    warning.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if about["identity"] == identity and about["checksums"] == {
            name: checksum(tensor) for name, tensor in tensors.items()
        }:
            return tensors, about["facts"]
        reason = "its content does not match its checksum"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}"
    logger.warning("cache %s is damaged (%s) and will be made anew", path, reason)
    return None
