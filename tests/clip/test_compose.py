"""What is counted as telling two scenes apart, and what intervals and neighbours are made of."""

from __future__ import annotations

import itertools

import pytest
import torch

from clip.compose import all_four, hard_gallery, pair_scores
from clip.embed import Embedded, owners
from clip.eval import intervals, nearest
from clip.retrieval import Ranks, rank_all
from common.config import ConfigError
from tests.clip.tiny import tiny


def sphere(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_all_four_comparisons_count():
    x, y = sphere(400, 64).chunk(2)
    pairs = list(itertools.combinations(range(200), 2))
    a, b = torch.tensor(pairs).T
    found = all_four(x, y, a, b).tolist()
    s = (x @ y.T).tolist()
    by_hand = [s[i][i] > s[i][j] and s[j][j] > s[j][i] and s[i][i] > s[j][i] and s[j][j] > s[i][j] for i, j in pairs]
    assert found == by_hand
    assert sum(found) / len(found) == pytest.approx(1 / 6, abs=0.05)  # guessing, as Winoground says
    assert not all_four(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0]), torch.tensor([1])).any()  # a tie


def test_scores_of_a_perfect_and_of_a_blind_model(tmp_path):
    config = tiny(tmp_path, "data.groups=3")
    _, variants = hard_gallery(config, "val", 40)
    one = torch.eye(40)
    perfect = pair_scores(Embedded(one, one, torch.arange(40), list(range(40)), [""] * 40), variants)
    assert perfect == {"pairs_relation": 1.0, "pairs_count": 1.0, "pairs_binding": 1.0}
    # a bag of words: all of a family alike
    bag = torch.eye(40)[[variant.family for variant in variants]]
    blind = pair_scores(Embedded(bag, bag, torch.arange(40), list(range(40)), [""] * 40), variants)
    assert set(blind.values()) == {0.0}
    with pytest.raises(ConfigError, match=r"data.groups"):
        hard_gallery(tiny(tmp_path, "data.groups=1"), "val", 40)


def test_neighbours_and_intervals():
    x, y = sphere(12, 4), sphere(25, 4)[1:]
    owner = owners([2] * 12, torch.device("cpu"))
    assert owner.tolist() == sorted([*range(12), *range(12)])
    assert nearest(y, x, 3, 5).tolist() == (y @ x.T).argsort(dim=1, descending=True)[:, :3].tolist()
    ranks = rank_all(x, y, owner)
    found = intervals(ranks, owner, 0)
    for name, rank in (("t2i", ranks.text_to_image), ("i2t", ranks.image_to_text)):
        low, high = found[f"r5_{name}"]
        assert 0 <= low <= float((rank <= 5).float().mean()) <= high <= 1 and low < high
    # captions of one image are drawn together: with equal captions they say no more than one of them
    twice = Ranks(ranks.text_to_image[::2].repeat_interleave(2), ranks.image_to_text)
    once = Ranks(ranks.text_to_image[::2], ranks.image_to_text)
    assert intervals(twice, owner, 0)["r5_t2i"] == intervals(once, torch.arange(12), 0)["r5_t2i"]
    assert intervals(ranks, owner, 5) == {}
