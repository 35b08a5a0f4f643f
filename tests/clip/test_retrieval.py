"""Recall@K against its definition, written as loops over sorted lists."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from clip.retrieval import rank_all, recalls, retrieve


def brute_force(x: Tensor, y: Tensor, owner: Tensor) -> dict[str, float]:
    """Sort all candidates by similarity; among equals, those that are right come last."""
    similarity = (y.double() @ x.double().T).tolist()
    own = owner.tolist()
    to_image, to_text = [], []
    for j, row in enumerate(similarity):
        order = sorted(range(len(x)), key=lambda i: (-row[i], i == own[j]))
        to_image.append(order.index(own[j]) + 1)
    for i in range(len(x)):
        if i not in own:
            continue
        order = sorted(range(len(y)), key=lambda j: (-similarity[j][i], own[j] == i))
        # captions of the same image before it are no mistakes: only the first of them counts
        to_text.append(next(place for place, j in enumerate(order, start=1) if own[j] == i))
    found = {}
    for name, ranks in (("t2i", to_image), ("i2t", to_text)):
        found |= {f"r{k}_{name}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        found[f"median_rank_{name}"] = statistics.median(ranks)
    return found


def ranks_of_whole_numbers(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of small whole numbers: similarities are exact, and many are equal. Owners in any order, some images
    with many captions and some with none.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (n, 6), generator=rng).float()
    owner = torch.randint(0, n, (m,), generator=rng)
    y = x[owner] + torch.randint(-1, 2, (m, 6), generator=rng)
    return x, y, owner


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_equals_brute_force_with_ties_and_unequal_counts(seed: int, block: int) -> None:
    x, y, owner = ranks_of_whole_numbers(seed, 40, 90)
    counts = owner.bincount(minlength=40)
    assert counts.min() == 0 and counts.max() >= 4, "unequal numbers of captions"
    assert retrieve(x, y, owner, block=block) == pytest.approx(brute_force(x, y, owner))


def test_equals_brute_force_without_ties() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(60, 32), dim=1)
    owner = torch.arange(60).repeat_interleave(5)
    y = torch.nn.functional.normalize(x[owner] + 0.25 * torch.randn(300, 32), dim=1)
    found = retrieve(x, y, owner)
    assert found == pytest.approx(brute_force(x, y, owner))
    assert 0.2 < found["r1_t2i"] < 0.98


def test_a_collapsed_model_has_no_score() -> None:
    """All embeddings equal: every candidate ties with the right one, and comes before it."""
    x = torch.nn.functional.normalize(torch.ones(50, 33), dim=1)
    y = x.repeat_interleave(5, dim=0)
    found = retrieve(x, y, torch.arange(50).repeat_interleave(5))
    assert found["r10_t2i"] == found["r10_i2t"] == 0
    assert found["median_rank_t2i"] == 50 and found["median_rank_i2t"] == 246


def test_equal_images_tie_however_the_product_is_computed() -> None:
    """A duplicate in the gallery lies in another column, and a matrix product may round it otherwise."""
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(501, 515), dim=1)
    x = torch.cat([x, x])
    ranks = rank_all(x, x[:501], torch.arange(501))
    assert (ranks.text_to_image == 2).all()


def test_any_of_its_captions_counts_and_the_others_are_no_mistakes() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # image 0 has a good and a bad caption; image 1 has three good ones
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.1, 0.9], [0.2, 0.8]])
    ranks = rank_all(x, y, torch.tensor([0, 0, 1, 1, 1]))
    assert ranks.image_to_text.tolist() == [1, 1]
    assert ranks.text_to_image.tolist() == [1, 2, 1, 1, 1]


def test_images_without_captions_stand_in_the_way_but_do_not_count() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    ranks = rank_all(x, torch.tensor([[0.9, 0.2], [0.0, 1.0]]), torch.tensor([1, 2]))
    assert ranks.image_to_text.tolist() == [0, 1, 1]
    assert ranks.text_to_image.tolist() == [2, 1]
    assert recalls(ranks)["r1_i2t"] == 1


def test_folds_are_the_mean_of_galleries() -> None:
    x, y, owner = ranks_of_whole_numbers(1, 30, 300)
    parts = []
    for start in (0, 10, 20):
        inside = (owner >= start) & (owner < start + 10)
        parts.append(brute_force(x[start : start + 10], y[inside], owner[inside] - start))
    found = retrieve(x, y, owner, fold=10)
    assert found == pytest.approx({name: sum(part[name] for part in parts) / 3 for name in found})
    assert retrieve(x, y, owner, fold=14) == pytest.approx(retrieve(x[:28], y[owner < 28], owner[owner < 28], fold=14))
    with pytest.raises(ValueError, match=r"lower eval\.fold"):
        retrieve(x, y, owner, fold=31)


def test_memory_is_that_of_a_block(monkeypatch) -> None:
    """No product with more rows than a block is ever made."""
    sizes = []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append(len(a)) or multiply(a, b))
    rank_all(*ranks_of_whole_numbers(0, 50, 70), block=16)
    assert max(sizes) == 16


def test_what_is_not_finite_or_has_no_owner_is_refused() -> None:
    x, y, owner = ranks_of_whole_numbers(0, 10, 20)
    broken = y.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="a text embedding"):
        rank_all(x, broken, owner)
    with pytest.raises(ValueError, match="from 0 to 9"):
        rank_all(x, y, owner + 1)
    with pytest.raises(ValueError, match="20 captions, but 19 owners"):
        rank_all(x, y, owner[:-1])
    with pytest.raises(ValueError, match="there must be captions"):
        rank_all(x, y[:0], owner[:0])
