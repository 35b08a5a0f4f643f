"""Our towers and losses against OpenCLIP: weights through `pretrained.build`, the architecture inferred from their
shapes. Equal in embeddings, loss and every gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clip.contrastive import contrastive_loss
from clip.model import CLIP, Output
from clip.model.pretrained import build, infer_config, translate

open_clip = pytest.importorskip("open_clip")

VOCAB, CONTEXT, SIZE = 60, 11, 64
TEXT = {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 64, "heads": 1, "layers": 2}
VIT = {"image_size": SIZE, "layers": 2, "width": 128, "patch_size": 16}
RN50 = {"image_size": SIZE, "layers": [3, 4, 6, 3], "width": 8, "patch_size": None}  # an eighth of its width
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def peer_of(vision: dict, quick_gelu: bool = False, **options: float) -> torch.nn.Module:
    """An OpenCLIP model in which no gain is one, no bias zero and no running average fresh."""
    torch.manual_seed(0)
    peer = open_clip.model.CLIP(32, vision, TEXT, quick_gelu=quick_gelu, **options)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in peer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return peer


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB - 2, (5, CONTEXT))
    for row, length in zip(ids, (3, 5, 11, 2, 9), strict=True):
        row[length - 1] = VOCAB - 1
        row[length:] = 0
    return torch.randn(5, 3, SIZE, SIZE), ids


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("vision", "quick_gelu"), [(VIT, False), (VIT, True), (RN50, False)], ids=["vit", "quick", "rn50"]
)
def test_model(vision: dict, quick_gelu: bool, training: bool) -> None:
    peer = peer_of(vision, quick_gelu)
    ours = build(peer.state_dict(), "quick_gelu" if quick_gelu else "gelu").double().train(training)
    peer.double().train(training)
    images, ids = inputs()

    output = ours(images.double(), ids)
    image, text, scale = peer(images.double(), ids)
    torch.testing.assert_close(output.image, image, **TOLERANCE)
    torch.testing.assert_close(output.text, text, **TOLERANCE)
    torch.testing.assert_close(output.log_scale.exp(), scale, **TOLERANCE)
    loss = contrastive_loss(output)
    expected = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(loss, expected, **TOLERANCE)

    loss.backward()
    expected.backward()
    gradients = translate({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad.float(), gradients[name], msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE
        )
    averages = translate(dict(peer.named_buffers()))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer.to(averages[name].dtype), averages[name], **TOLERANCE)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50"])
def test_published_architectures(name: str) -> None:
    """At full size, on a device that holds shapes only: every weight has a place, and no other."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        peer = open_clip.model.CLIP(**config)
        weights = translate(peer.state_dict())
        ours = CLIP(infer_config(weights, "quick_gelu"))
        ours.load_state_dict(weights, assign=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    image = ours.config.image
    assert image.image_size == 224
    heads = {"ViT-B-32": 12, "ViT-L-14": 16, "RN50": 32}[name]
    assert image.heads == heads
    assert ours.config.text.heads == config["text_cfg"]["heads"]
    assert ours.config.embed_dim == config["embed_dim"]


def embeddings(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(7, 16, dtype=dtype), dim=1)
    y = torch.nn.functional.normalize(torch.randn(7, 16, dtype=dtype), dim=1)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_losses(kind: str) -> None:
    results = []
    for ours in (True, False):
        x, y = embeddings()
        log_scale = torch.tensor(2.0, requires_grad=True)
        bias = torch.tensor(-3.0, requires_grad=True) if kind == "sigmoid" else None
        if ours:
            loss = contrastive_loss(Output(x, y, log_scale, bias))
        elif bias is None:
            loss = open_clip.ClipLoss()(x, y, log_scale.exp())
        else:
            loss = open_clip.loss.SigLipLoss()(x, y, log_scale.exp(), bias)
        loss.backward()
        results.append([loss, x.grad, y.grad, log_scale.grad] + ([] if bias is None else [bias.grad]))
    torch.testing.assert_close(results[0], results[1], **TOLERANCE)
