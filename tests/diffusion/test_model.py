"""The U-Net: equal to diffusers' UNet2DModel with copied weights, in outputs and in every gradient; and what that
model does not have.
"""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch
import torch.nn.functional as F

from diffusion.config import ModelConfig
from diffusion.model import TimeEmbedding, UNet, Upsample

SMALL = ModelConfig(channels=32, multipliers=(1, 2, 2), groups=8, attention=(8,), dropout=0.0)
SIZE = 16


def randomise(net: UNet) -> UNet:
    """No weight stays zero: behind a zero layer neither outputs nor gradients would tell anything."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return net


def inputs(batch: int = 2, size: int = SIZE, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, channels, size, size), torch.linspace(3, 990, batch)


def build(**changes: object) -> UNet:
    torch.manual_seed(2)
    return randomise(UNet(dataclasses.replace(SMALL, **changes), SIZE))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_channels": 16, "attention": (16, 4)},
        {"head_channels": 16, "attention_kernel": "written"},
        {"num_classes": 5, "scale_shift": True},
    ],
    ids=["plain", "heads", "written attention", "classes and scale_shift"],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_equal_diffusers(changes: dict, memory_format: torch.memory_format) -> None:
    pytest.importorskip("diffusers")
    from bench.diffusion import build_peer, in_peer_names

    net = build(**changes)
    peer = build_peer(net.config, SIZE)
    # strict: every parameter of the peer is given, and no other
    peer.load_state_dict(in_peer_names(net, lambda p: p.detach()))
    net.to(memory_format=memory_format)
    x, t = inputs()
    labels = torch.tensor([1, net.null_label]) if net.config.num_classes else None
    target = torch.randn_like(x)
    x_ours, x_peer = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = net(x_ours, t, labels)
    theirs = peer(x_peer, t, class_labels=labels).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    F.mse_loss(ours, target).backward()
    F.mse_loss(theirs, target).backward()
    expected = {name: p.grad for name, p in peer.named_parameters()} | {"x": x_peer.grad}
    found = in_peer_names(net, lambda p: p.grad) | {"x": x_ours.grad}
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        # Softmax ignores a constant, so a key's bias has gradient zero but for rounding: no scale of its own to be
        # relative to.
        scale = largest if name.endswith("to_k.bias") else grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            found[name], grad, atol=1e-5 * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_default_is_the_cifar_network_of_ho_et_al() -> None:
    pytest.importorskip("diffusers")
    from bench.diffusion import build_peer, in_peer_names

    net = randomise(UNet(ModelConfig(), 32)).eval()
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    peer = build_peer(net.config, 32).eval()
    peer.load_state_dict(in_peer_names(net, lambda p: p.detach()))
    x, t = inputs(batch=1, size=32)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t), peer(x, t).sample, atol=1e-5, rtol=0)


def test_upsample_is_nearest_neighbour_then_a_convolution() -> None:
    torch.manual_seed(0)
    up, x = Upsample(6).double(), torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(x), expected, atol=1e-12, rtol=0)


def test_starts_at_zero_and_blocks_start_at_their_shortcut() -> None:
    net = UNet(dataclasses.replace(SMALL, num_classes=3), SIZE)
    x, t = inputs()
    assert net(x, t).count_nonzero() == 0
    h = torch.randn(2, 32, SIZE, SIZE)
    torch.testing.assert_close(net.down[0].blocks[0](h, torch.randn(2, 32)), h, atol=0, rtol=0)
    h = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(net.middle.attention[0](h), h, atol=0, rtol=0)
    # Each map inside a fused matrix has the scale of a map alone: Xavier's bound sqrt(6 / (fan_in + fan_out)).
    bound = math.sqrt(6 / (64 + 64))
    assert 0.9 * bound < net.middle.attention[0].qkv.weight.abs().max() <= bound
    zero = [name for name, p in net.named_parameters() if p.dim() > 1 and p.count_nonzero() == 0]
    assert all(name.endswith(("conv2.weight", "out.weight")) for name in zero), zero  # conv_out.weight ends so, too


def test_labels() -> None:
    net = build(num_classes=5).eval()
    x, t = inputs()
    assert net.null_label == 5
    nothing = net(x, t)
    torch.testing.assert_close(net(x, t, torch.tensor([5, 5])), nothing, atol=0, rtol=0)
    one, two = net(x, t, torch.tensor([1, 1])), net(x, t, torch.tensor([2, 1]))
    assert (one[0] - two[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], two[1], atol=1e-6, rtol=0)  # an image sees its own label only
    assert (one - nothing).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"scale_shift": True}, {"time_embedding": "fourier"}], ids=str)
def test_time_matters_to_each_image_by_itself(changes: dict) -> None:
    net = build(**changes).eval()
    x, _ = inputs()
    early, mixed = net(x, torch.tensor([10.0, 10.0])), net(x, torch.tensor([10.0, 900.0]))
    torch.testing.assert_close(early[0], mixed[0], atol=1e-6, rtol=0)
    assert (early[1] - mixed[1]).abs().max() > 1e-3


def test_scale_shift_modulates_the_second_norm() -> None:
    block = build(scale_shift=True).down[0].blocks[0].eval()
    x, modulation = torch.randn(2, 32, 8, 8), torch.randn(2, 64)
    h = F.group_norm(block.conv1(F.silu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias, 1e-6))), 8, eps=1e-6)
    weight, bias = block.norm2.weight[:, None, None], block.norm2.bias[:, None, None]
    # Dhariwal & Nichol 2021: y_s GroupNorm(h) + y_b
    scale, shift = modulation[:, :32, None, None], modulation[:, 32:, None, None]
    expected = x + block.conv2(F.silu((h * weight + bias) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, modulation), expected, atol=1e-5, rtol=0)


def test_sinusoidal_time_embedding_is_vaswani_s() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    found = TimeEmbedding(8, "sinusoidal")(t)
    for row, value in zip(found.tolist(), t.tolist(), strict=True):
        angles = [value / 10_000 ** (k / 3) for k in range(4)]
        # float32 angles up to 999
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=2e-4)


def test_fourier_frequencies_are_fixed_and_saved() -> None:
    torch.manual_seed(1)
    first = build(time_embedding="fourier")
    torch.manual_seed(2)
    frequencies = UNet(first.config, SIZE).time_embedding.frequencies
    torch.testing.assert_close(frequencies, first.state_dict()["time_embedding.frequencies"], atol=0, rtol=0)
    deviation = TimeEmbedding(20_000, "fourier").frequencies.std().item() / (2 * math.pi) * 1000
    assert deviation == pytest.approx(16, rel=0.05)
    features = TimeEmbedding(64, "fourier")(torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(features[0], torch.cat([torch.zeros(32), torch.ones(32)]))
    # a sine and a cosine a frequency
    torch.testing.assert_close(features[1].square().view(2, 32).sum(0), torch.ones(32))


@pytest.mark.parametrize("patch", [2, 4])
def test_patch_folds_the_image_without_mixing_pixels(patch: int) -> None:
    config = dataclasses.replace(SMALL, patch=patch, image_channels=1, multipliers=(1, 2))
    net = randomise(UNet(config, SIZE)).eval()
    x, t = inputs(channels=1)
    seen = []
    net.conv_in.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net.conv_out.register_forward_hook(lambda module, args, out: seen.append(out))
    out = net(x, t)
    assert out.shape == x.shape
    for dy in range(patch):
        # channel dy * patch + dx of the folded image holds every patch-th pixel, starting at (dy, dx)
        for dx in range(patch):
            torch.testing.assert_close(seen[0][:, dy * patch + dx], x[:, 0, dy::patch, dx::patch], atol=0, rtol=0)
            torch.testing.assert_close(seen[1][:, dy * patch + dx], out[:, 0, dy::patch, dx::patch], atol=0, rtol=0)


def test_dropout_is_off_in_eval() -> None:
    net = build(dropout=0.5)
    x, t = inputs()
    assert (net(x, t) - net(x, t)).abs().max() > 1e-3
    net.eval()
    torch.testing.assert_close(net(x, t), net(x, t), atol=0, rtol=0)
    torch.testing.assert_close(net(x, t), build().eval()(x, t), atol=0, rtol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bf16_autocast_is_close_to_float32(memory_format: torch.memory_format) -> None:
    net = build(num_classes=5, scale_shift=True).eval().to(memory_format=memory_format)
    x, t = inputs()
    exact = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, t)
    assert exact.dtype == torch.float32 and rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    # bf16 keeps 8 bits, 0.4 percent, a rounding; exactly equal would mean that autocast did nothing
    assert 1e-5 < error < 0.03


@pytest.mark.xdist_group("timing")
def test_tiny_forward_takes_under_a_second() -> None:
    start = time.process_time()
    net = UNet(SMALL, SIZE)
    with torch.no_grad():
        assert net(*inputs()).shape == (2, 3, SIZE, SIZE)
    assert time.process_time() - start < 1


def test_one_level_and_float_times_of_any_dtype() -> None:
    # odd sides need no halving
    net = randomise(UNet(dataclasses.replace(SMALL, multipliers=(2,), blocks=1, attention=()), 5)).eval()
    x, t = inputs(size=5)
    torch.testing.assert_close(net(x, t.double()), net(x, t), atol=0, rtol=0)


def test_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match=r"18.*halved 2 times.*model.multipliers"):
        UNet(SMALL, 18)
    net = UNet(SMALL, SIZE)
    x, t = inputs(size=32)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\), not \(3, 32, 32\).*data.image_size"):
        net(x, t)
    x, t = inputs()
    with pytest.raises(ValueError, match=r"model\.num_classes"):
        net(x, t, torch.tensor([0, 1]))
    with pytest.raises(IndexError):
        build(num_classes=2)(x, t, torch.tensor([0, 3]))
