"""Our towers and losses against `transformers`: CLIPModel and SiglipModel with random weights, copied by name. Equal in
logits, loss and every gradient.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from clip.config import HeadConfig, ImageConfig, ModelConfig, TextConfig
from clip.contrastive import contrastive_loss
from clip.model import CLIP
from clip.model.pretrained import translate

transformers = pytest.importorskip("transformers")

VOCAB, CONTEXT, SIZE, PATCH = 50, 12, 32, 8
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TEXT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": VOCAB}
TEXT |= {"intermediate_size": 96, "max_position_embeddings": CONTEXT, "eos_token_id": VOCAB - 1, "pad_token_id": 0}
VISION = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
VISION |= {"intermediate_size": 96, "image_size": SIZE, "patch_size": PATCH}
OURS = ModelConfig(
    embed_dim=24,
    image=ImageConfig(image_size=SIZE, width=48, heads=6, patch=PATCH, layers=3, mlp_ratio=2),
    text=TextConfig(vocab_size=VOCAB, context=CONTEXT, width=32, heads=4, layers=3, mlp_ratio=3),
)


def randomise(model: torch.nn.Module) -> None:
    """No gain stays one and no bias zero: a mistake in either would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def inputs(pad: int) -> tuple[Tensor, Tensor]:
    """Six images, and texts of different lengths padded with `pad`."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB - 2, (6, CONTEXT))
    for row, length in zip(ids, (3, 5, 12, 2, 9, 12), strict=True):
        row[length - 1] = VOCAB - 1
        row[length:] = pad
    return torch.randn(6, 3, SIZE, SIZE), ids


def logits_of(output) -> Tensor:
    logits = output.log_scale.exp() * output.image @ output.text.T
    return logits if output.bias is None else logits + output.bias


def assert_equal(ours: CLIP, peer: torch.nn.Module, images: Tensor, ids: Tensor) -> None:
    """Logits, loss and the gradient of every parameter."""
    ours.load_state_dict(translate(peer.state_dict()))
    output = ours(images, ids)
    expected = peer(pixel_values=images, input_ids=ids, return_loss=True)
    torch.testing.assert_close(logits_of(output), expected.logits_per_image, **TOLERANCE)
    loss = contrastive_loss(output)
    torch.testing.assert_close(loss, expected.loss, **TOLERANCE)

    loss.backward()
    expected.loss.backward()
    # mapping the names of weights is linear, so gradients can be mapped as well
    gradients = translate({name: parameter.grad for name, parameter in peer.named_parameters()})
    named = dict(ours.named_parameters())
    assert gradients.keys() == named.keys()
    for name, parameter in named.items():
        torch.testing.assert_close(
            parameter.grad, gradients[name], msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE
        )
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("pad", [0, VOCAB - 1])
def test_clip(activation: str, pad: int) -> None:
    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_act": activation},
        vision_config=VISION | {"hidden_act": activation},
        projection_dim=24,
    )
    peer = transformers.CLIPModel(config)
    randomise(peer)
    image = dataclasses.replace(OURS.image, activation=activation)
    text = dataclasses.replace(OURS.text, activation=activation)
    assert_equal(CLIP(dataclasses.replace(OURS, image=image, text=text)), peer, *inputs(pad))


def test_siglip() -> None:
    config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 48}, vision_config=VISION)
    peer = transformers.SiglipModel(config)
    randomise(peer)
    image = dataclasses.replace(OURS.image, activation="gelu_tanh", pool="attention", pre_norm=False, norm_eps=1e-6)
    text = dataclasses.replace(OURS.text, activation="gelu_tanh", causal=False, pool="last", norm_eps=1e-6)
    ours = ModelConfig(
        embed_dim=48,
        loss="sigmoid",
        image=image,
        text=text,
        image_head=HeadConfig(kind="none"),
        text_head=HeadConfig(bias=True),
    )
    assert_equal(CLIP(ours), peer, *inputs(0))
