"""The losses: many positives by their definition, blocks, and the gradient cache against the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.contrastive import RandomState, cached_backward, contrastive_loss
from clip.model import Output
from tests.clip import small

EXACT = {"atol": 1e-12, "rtol": 1e-9}


def embeddings(n: int, m: int, kind: str = "info_nce") -> Output:
    torch.manual_seed(3)
    x = F.normalize(torch.randn(n, 16, dtype=torch.float64), dim=1).requires_grad_()
    y = F.normalize(torch.randn(m, 16, dtype=torch.float64), dim=1).requires_grad_()
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True) if kind == "sigmoid" else None
    return Output(x, y, log_scale, bias)


def gradients(output: Output) -> list[Tensor]:
    return [tensor.grad for tensor in output if tensor is not None]


def test_info_nce_of_many_positives_by_its_definition() -> None:
    """Three images with 2, 1 and 3 captions: each probability written out."""
    image_ids, text_ids = torch.tensor([7, 4, 9]), torch.tensor([9, 7, 4, 9, 7, 9])
    output = embeddings(3, 6)
    z = (output.log_scale.exp() * output.image @ output.text.T).exp().tolist()
    to_text, to_image = [], []
    for i in range(3):
        own = [j for j in range(6) if text_ids[j] == image_ids[i]]
        to_text.append(sum(-torch.tensor(z[i][j] / sum(z[i])).log().item() for j in own) / len(own))
    for j in range(6):
        (i,) = [i for i in range(3) if text_ids[j] == image_ids[i]]
        to_image.append(-torch.tensor(z[i][j] / sum(row[j] for row in z)).log().item())
    expected = (sum(to_text) / 3 + sum(to_image) / 6) / 2
    assert contrastive_loss(output, image_ids, text_ids).item() == pytest.approx(expected, abs=1e-6)


def test_sigmoid_of_many_positives_by_its_definition() -> None:
    image_ids, text_ids = torch.tensor([7, 4, 9]), torch.tensor([9, 7, 4, 9, 7, 9])
    output = embeddings(3, 6, "sigmoid")
    total = 0.0
    for i in range(3):
        for j in range(6):
            sign = 1 if image_ids[i] == text_ids[j] else -1
            z = output.log_scale.exp() * output.image[i] @ output.text[j] + output.bias
            total += torch.log1p(torch.exp(-sign * z)).item()
    assert contrastive_loss(output, image_ids, text_ids).item() == pytest.approx(total / 3, abs=1e-9)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_change_nothing(kind: str, block: int) -> None:
    image_ids, text_ids = torch.arange(5), torch.arange(5).repeat_interleave(2)
    whole = embeddings(5, 10, kind)
    contrastive_loss(whole, image_ids, text_ids).backward()
    parts = embeddings(5, 10, kind)
    loss = contrastive_loss(parts, image_ids, text_ids, block)
    loss.backward()
    torch.testing.assert_close(loss, contrastive_loss(whole, image_ids, text_ids), **EXACT)
    torch.testing.assert_close(gradients(parts), gradients(whole), **EXACT)


def test_an_image_is_no_mistake_for_its_other_captions() -> None:
    """Two pairs of the same photograph: with ids, no gradient drives them apart."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    ids = torch.tensor([5, 5])
    loss = contrastive_loss(Output(x, y, torch.tensor(2.0), torch.tensor(0.0)), ids, ids)
    wrong = contrastive_loss(Output(x, y, torch.tensor(2.0), torch.tensor(0.0)))
    assert loss < 0.01 and wrong > 5


def test_pairs_must_be_said() -> None:
    with pytest.raises(ValueError, match="5 images and 10 texts"):
        contrastive_loss(embeddings(5, 10))


def test_losses_leave_autocast() -> None:
    """In bf16 the logits would be rounded to steps of a third."""
    output = Output(*(None if t is None else t.detach().float() for t in embeddings(6, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(output)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(output), rtol=0, atol=0)


# -- the gradient cache ------------------------------------------------------------------------------------------------


def whole_batch(model, images, ids, objective, microbatch) -> Tensor:
    """What the cache must equal: all parts in memory at once, with the same dropout."""
    num_parts = -(-len(images) // microbatch)
    parts = [model(*part) for part in zip(images.tensor_split(num_parts), ids.tensor_split(num_parts), strict=True)]
    image = torch.cat([part.image for part in parts])
    text = torch.cat([part.text for part in parts])
    loss = objective(Output(image, text, *parts[0][2:]))
    loss.backward()
    return loss


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize(("microbatch", "captions"), [(1, 1), (3, 1), (3, 5), (8, 1), (50, 2)])
def test_cache_equals_the_whole_batch_with_dropout(loss: str, microbatch: int, captions: int) -> None:
    images, ids, image_ids, text_ids = small.batch(8, captions)

    def objective(output: Output) -> Tensor:
        return contrastive_loss(output, image_ids, text_ids)

    results = []
    for step in (whole_batch, cached_backward):
        model = small.build(small.with_dropout(), loss=loss).train()
        torch.manual_seed(5)
        value = step(model, images, ids, objective, microbatch)
        results.append((value.detach(), small.gradients(model), torch.rand(3)))
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-6)


def test_cache_equals_one_forward_pass_without_dropout() -> None:
    images, ids, *_ = small.batch(8)
    model = small.build()
    loss = contrastive_loss(model(images, ids))
    loss.backward()
    other = small.build()
    value = cached_backward(other, images, ids, contrastive_loss, 3)
    torch.testing.assert_close((value, small.gradients(other)), (loss.detach(), small.gradients(model)), **EXACT)


def test_cache_scales_the_loss_and_adds_to_gradients() -> None:
    images, ids, *_ = small.batch(8)
    model, other = small.build(), small.build()
    first = cached_backward(model, images, ids, contrastive_loss, 4)
    cached_backward(model, images, ids, contrastive_loss, 4)
    second = cached_backward(other, images, ids, contrastive_loss, 4, loss_scale=2.0)
    assert first == second
    torch.testing.assert_close(small.gradients(model), small.gradients(other), **EXACT)


def test_cache_moves_running_averages_once() -> None:
    images, ids, *_ = small.batch(8, side=32)
    results = []
    for step in (whole_batch, cached_backward):
        model = small.build(image=small.RESNET).train()
        step(model, images, ids, contrastive_loss, 4)
        results.append((small.gradients(model), {name: b.double() for name, b in model.named_buffers()}))
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-6)
    assert results[1][1]["image_encoder.norm1.num_batches_tracked"] == 2


def test_cache_with_a_locked_tower() -> None:
    images, ids, *_ = small.batch(8)
    results = []
    for step in (whole_batch, cached_backward):
        model = small.build()
        model.image_encoder.requires_grad_(False)
        model.image_head.requires_grad_(False)
        step(model, images, ids, contrastive_loss, 3)
        assert model.image_head.weight.grad is None
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_cache_in_autocast() -> None:
    """Weights cast to bf16 without a graph must not be used again with one: every parameter gets its gradient."""
    images, ids, *_ = small.batch(4)
    model = small.build().float()
    cached_backward(
        model, images.float(), ids, contrastive_loss, 2, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_random_state_is_replayed() -> None:
    state = RandomState(torch.device("cpu"))
    first = torch.rand(4)
    state.restore()
    assert torch.equal(torch.rand(4), first)


def test_patch_dropout_is_drawn_anew() -> None:
    model = small.build(small.with_dropout()).train()
    images, *_ = small.batch(2)
    assert not torch.equal(model.encode_image(images), model.encode_image(images))
