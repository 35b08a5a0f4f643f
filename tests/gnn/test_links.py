"""Edge splits, negatives, heuristics and metrics of link prediction, against networkx, scikit-learn and brute force."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from gnn.link.heuristics import KATZ_BETA, KATZ_LENGTH, Heuristics
from gnn.link.metrics import auc, average_precision, hits_at, mean_reciprocal_rank, pair_metrics, ranks
from gnn.link.negatives import NegativeSampler, competition_rank, corrupt_hard, corrupt_uniformly, pair_at, pair_index
from gnn.link.splits import canonical, split_edges

N = 60
RANKING = ("resource_allocation", "ppr", "features")


def edges_of(graph: nx.Graph) -> torch.Tensor:
    return torch.tensor(list(graph.edges)).T.reshape(2, -1)


def social() -> nx.Graph:
    """60 nodes: a clustered graph, one isolated pair and two nodes without edges."""
    graph = nx.powerlaw_cluster_graph(N - 4, 3, 0.6, seed=1)
    graph.add_nodes_from(range(N))
    graph.add_edge(N - 4, N - 3)
    return graph


def as_set(pairs: torch.Tensor) -> set[tuple[int, int]]:
    return {tuple(sorted(pair)) for pair in pairs.reshape(2, -1).T.tolist()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Metrics


@pytest.mark.parametrize("levels", [3, 20, 10**6])  # many ties, some, hardly any
def test_auc_and_average_precision_match_scikit_learn(levels):
    positive = torch.randint(levels, (70,), generator=generator()).double() + levels // 4
    negative = torch.randint(levels, (200,), generator=generator(1)).double()
    y, score = np.r_[np.ones(70), np.zeros(200)], torch.cat([positive, negative]).numpy()
    assert auc(positive, negative) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
    assert average_precision(positive, negative) == pytest.approx(average_precision_score(y, score), abs=1e-12)
    weight = np.r_[np.ones(70), np.full(200, 0.35)]
    assert average_precision(positive, negative, 0.35) == pytest.approx(
        average_precision_score(y, score, sample_weight=weight), abs=1e-12
    )


def test_ranks_are_the_mean_over_all_orders_of_the_ties():
    positive, negative = (
        torch.tensor([2.0, 5.0, 0.0]),
        torch.tensor([[2.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]),
    )
    expected = []
    for p, row in zip(positive.tolist(), negative.tolist()):
        items = [(p, True), *((value, False) for value in row)]
        orders = [
            order for order in itertools.permutations(items) if list(order) == sorted(order, key=lambda item: -item[0])
        ]
        expected.append(np.mean([1 + [item[1] for item in order].index(True) for order in orders]))
    rank = ranks(positive, negative)
    assert rank.tolist() == expected == [3.0, 1.0, 5.0]
    assert mean_reciprocal_rank(rank) == pytest.approx((1 / 3 + 1 + 1 / 5) / 3)
    assert [hits_at(rank, k) for k in (1, 3, 4, 5)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_a_constant_and_a_random_scorer_are_at_chance():
    constant = pair_metrics(torch.zeros(50), torch.zeros(50, 9), torch.zeros(50, 9), (1, 5, 10))
    # no hits_at_10: there are 10 places
    expected = {"auc": 0.5, "ap": 0.5, "mrr": 1 / 5.5, "hits_at_1": 0, "hits_at_5": 0}
    assert constant == pytest.approx(expected)
    positive, negative = torch.rand(4000, generator=generator()), torch.rand(4000, 9, generator=generator(1))
    chance = pair_metrics(positive, negative, negative, (1, 5), "_x")
    assert chance["auc_x"] == pytest.approx(0.5, abs=0.02)
    assert chance["ap_x"] == pytest.approx(0.5, abs=0.02)
    assert chance["mrr_x"] == pytest.approx(sum(1 / r for r in range(1, 11)) / 10, abs=0.02)
    assert (chance["hits_at_1_x"], chance["hits_at_5_x"]) == pytest.approx((0.1, 0.5), abs=0.03)


def test_scores_that_cannot_be_ranked_are_refused():
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="no negative pairs"):
        auc(ones, torch.empty(0))
    with pytest.raises(ValueError, match="no positive pairs"):
        average_precision(torch.empty(0), ones)
    with pytest.raises(ValueError, match="1 of 3 negative scores"):
        auc(ones, torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="one row of negatives"):
        ranks(ones, torch.ones(2, 4))
    with pytest.raises(ValueError, match="negative_weight"):
        average_precision(ones, ones, 0.0)


# Splits


def test_split_parts_are_disjoint_canonical_pairs():
    graph = social()
    edges = edges_of(graph)
    both = torch.cat([edges, edges.flip(0), torch.tensor([[7], [7]])], 1)  # both directions and a self-loop
    split = split_edges(both, N, 0.05, 0.1, seed=3)
    count = graph.number_of_edges()
    assert (split.val.shape[1], split.test.shape[1]) == (int(0.05 * count), int(0.1 * count))
    parts = [as_set(part) for part in (split.train, split.val, split.test)]
    for part in (split.train, split.val, split.test, split.all):
        assert bool((part[0] < part[1]).all())
        assert len(as_set(part)) == part.shape[1]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert set.union(*parts) == as_set(split.all) == as_set(edges)
    again, other = split_edges(edges.flip(0), N, 0.05, 0.1, seed=3), split_edges(edges, N, 0.05, 0.1, seed=4)
    assert torch.equal(again.test, split.test) and not torch.equal(other.test, split.test)


def test_messages_pass_along_training_edges_only_and_both_ways():
    split = split_edges(edges_of(social()), N)
    dense = torch.zeros(N, N)
    dense[tuple(split.message_edges)] += 1
    assert torch.equal(dense, dense.T) and dense.sum() == 2 * split.train.shape[1]
    for hidden in (split.val, split.test):
        assert dense[tuple(hidden)].sum() == dense[tuple(hidden.flip(0))].sum() == 0


def test_split_of_what_cannot_be_split():
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    empty = split_edges(edges, 4, 0.0, 0.0)
    assert empty.train.shape[1] == 3 and empty.val.shape == empty.test.shape == (2, 0)
    assert split_edges(edges, 4, 0.05, 0.1).test.shape[1] == 0  # rounded down
    with pytest.raises(ValueError, match="no edges to split"):
        split_edges(torch.empty(2, 0), 4)
    for shares in ((-0.1, 0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match="val_share"):
            split_edges(edges, 4, *shares)
    with pytest.raises(ValueError, match="nodes 0 to 3"):
        split_edges(edges, 3)
    with pytest.raises(ValueError, match="shape"):
        canonical(edges.T, 4)


# Negatives


def test_pair_numbers_are_a_bijection():
    for n in (2, 3, 17):
        pairs = torch.tensor(list(itertools.combinations(range(n), 2))).T
        index = torch.arange(pairs.shape[1])
        assert torch.equal(pair_index(pairs, n), index) and torch.equal(pair_at(index, n), pairs)
    n = 50_000_000  # 10^15 pairs: the square root in double precision rounds
    u = torch.randint(n - 1, (20_000,), generator=generator())
    pairs = torch.cat(
        [
            torch.stack([u, u + 1]),
            torch.stack([u, torch.full_like(u, n - 1)]),
            torch.tensor([[0, n - 2], [n - 1, n - 1]]),
        ],
        1,
    )
    assert torch.equal(pair_at(pair_index(pairs, n), n), pairs)


def test_negatives_are_uniform_over_all_pairs_that_are_not_excluded():
    excluded = edges_of(nx.path_graph(8))
    sampler = NegativeSampler(excluded, 8)
    free = set(itertools.combinations(range(8), 2)) - as_set(excluded)
    assert sampler.total == len(free) == 21
    drawn = sampler.draw(21_000, generator())
    pairs, counts = np.unique(drawn.numpy(), axis=1, return_counts=True)
    assert set(map(tuple, pairs.T.tolist())) == free
    assert ((counts - 1000) ** 2 / 1000).sum() < 45.3  # chi square with 20 degrees of freedom, p = 0.001
    distinct = sampler.draw_distinct(21, generator())
    assert as_set(distinct) == free and distinct.shape == (2, 21)
    first = np.unique([pair_index(sampler.draw_distinct(1, generator(s)), 8).item() for s in range(300)])
    assert len(first) == 21  # in random order, or taking some of them would favour low pairs


def test_negatives_of_training_and_of_evaluation_avoid_what_they_must():
    split = split_edges(edges_of(social()), N, 0.2, 0.2)
    training = as_set(NegativeSampler(split.train, N).draw(60_000, generator()))
    assert not training & as_set(split.train)
    assert as_set(split.test) <= training and as_set(split.val) <= training  # knowing those would be a leak
    evaluation = NegativeSampler(split.all, N).draw_distinct(500, generator())
    assert not as_set(evaluation) & as_set(split.all)
    assert len(as_set(evaluation)) == 500 and bool((evaluation[0] < evaluation[1]).all())
    assert torch.equal(evaluation, NegativeSampler(split.all, N).draw_distinct(500, generator()))


def test_dense_graphs_say_that_there_are_no_negatives():
    almost = edges_of(nx.complete_graph(5))[:, 1:]
    sampler = NegativeSampler(almost, 5)
    assert as_set(sampler.draw(9, generator())) == {(0, 1)}
    with pytest.raises(ValueError, match="only 1 pairs of the 5 nodes"):
        sampler.draw_distinct(2)
    with pytest.raises(ValueError, match="no negatives"):
        NegativeSampler(edges_of(nx.complete_graph(5)), 5)
    for corrupt in (corrupt_uniformly, lambda *a: corrupt_hard(*a, [])):
        with pytest.raises(ValueError, match=r"link\.num_negatives to at most 0"):
            corrupt(almost[:, :2], almost, 5, 4, 0)
        with pytest.raises(ValueError, match="even"):
            corrupt(almost[:, :2], almost, 5, 3, 0)


def corrupted(kind: str, split, count: int = 20, seed: int = 5) -> torch.Tensor:
    if kind == "uniform":
        return corrupt_uniformly(split.test, split.all, N, count, seed)
    features = np.random.default_rng(0).random((N, 7))
    known = Heuristics(split.train, N, features)
    return corrupt_hard(split.test, split.all, N, count, seed, [known.rows(name) for name in RANKING])


@pytest.mark.parametrize("kind", ["uniform", "hard"])
def test_corruptions_keep_one_end_and_are_never_links(kind):
    split = split_edges(edges_of(social()), N, 0.1, 0.3)
    negatives = corrupted(kind, split)
    assert negatives.shape == (2, split.test.shape[1], 20) and negatives.dtype == torch.int64
    known = as_set(split.all)
    for (u, v), row in zip(split.test.T.tolist(), negatives.permute(1, 2, 0).tolist()):
        pairs = {tuple(sorted(pair)) for pair in row}
        assert len(pairs) == 20 and not pairs & known  # no duplicates, no positive of any part
        assert all(a != b for a, b in pairs)
        assert [a for a, _ in row] == [u] * 10 + [v] * 10
    assert torch.equal(negatives, corrupted(kind, split))
    assert not torch.equal(negatives, corrupted(kind, split, seed=6))
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert (
        corrupt_uniformly(empty, split.all, N, 4, 0).shape
        == corrupt_hard(empty, split.all, N, 4, 0, []).shape
        == (2, 0, 4)
    )


def test_uniform_corruptions_reach_every_stranger():
    split = split_edges(edges_of(social()), N, 0.1, 0.1)
    node = int(split.test[0, 0])
    seen = {pair for seed in range(60) for pair in as_set(corrupted("uniform", split, seed=seed)[:, 0, :10])}
    friends = {b if a == node else a for a, b in as_set(split.all) if node in (a, b)}
    assert seen == {tuple(sorted((node, other))) for other in range(N) if other != node and other not in friends}


def test_hard_negatives_are_the_strangers_with_the_best_mean_rank():
    split = split_edges(edges_of(social()), N, 0.1, 0.3)
    known = Heuristics(split.train, N, np.random.default_rng(0).random((N, 7)))
    negatives = corrupted("hard", split)
    for p, (u, v) in enumerate(split.test.T.tolist()):
        for kept, chosen in ((u, negatives[1, p, :10]), (v, negatives[1, p, 10:])):
            friends = {b if a == kept else a for a, b in as_set(split.all) if kept in (a, b)}
            strangers = [w for w in range(N) if w != kept and w not in friends]
            total = np.zeros(len(strangers))
            for name in RANKING:
                score = known.rows(name)(np.array([kept]))[0][strangers]
                total += [1 + (score > s).sum() for s in score]
            best = dict(zip(strangers, total))
            assert max(best[w] for w in chosen.tolist()) <= min(
                (t for w, t in best.items() if w not in chosen), default=np.inf
            )
    assert competition_rank(np.array([3.0, 0.0, 5.0, 3.0, 0.0])).tolist() == [2, 4, 1, 2, 4]


def test_hard_negatives_are_harder():
    graph = nx.relaxed_caveman_graph(12, 8, 0.1, seed=0)
    n = graph.number_of_nodes()
    split = split_edges(edges_of(graph), n, 0.0, 0.2)
    known = Heuristics(split.train, n)
    easy = corrupt_uniformly(split.test, split.all, n, 20, 0)
    hard = corrupt_hard(split.test, split.all, n, 20, 0, [known.rows(name) for name in RANKING[:2]])
    for name in ("common_neighbours", "adamic_adar", "resource_allocation", "katz", "ppr"):
        positive = known.score(name, split.test)
        found = [mean_reciprocal_rank(ranks(positive, known.score(name, negatives))) for negatives in (easy, hard)]
        assert found[1] < found[0] - 0.05, (name, found)
        assert auc(positive, known.score(name, hard)) < auc(positive, known.score(name, easy))


# Heuristics


@pytest.fixture(scope="module")
def scored():
    graph = social()
    features = np.random.default_rng(0).random((N, 7)) * (np.arange(N) % 5 > 0)[:, None]  # some rows are zero
    pairs = torch.tensor(list(itertools.combinations(range(N), 2))).T
    return graph, features, Heuristics(edges_of(graph), N, features), pairs


def assert_matches(known: Heuristics, name: str, pairs: torch.Tensor, expected) -> None:
    expected = torch.as_tensor(np.array(expected), dtype=torch.float64)
    for asked in (pairs, pairs.flip(0)):  # the order of the ends says nothing
        torch.testing.assert_close(known.score(name, asked), expected, rtol=0, atol=5e-9)
    if name != "ppr":  # whose rows are one-sided
        matrix = known.rows(name)(np.arange(N))
        np.testing.assert_allclose(matrix[tuple(pairs.numpy())], expected, rtol=0, atol=5e-9)


def test_neighbourhood_heuristics_match_networkx(scored):
    graph, _, known, pairs = scored
    wanted = pairs.T.tolist()
    assert_matches(known, "common_neighbours", pairs, [len(list(nx.common_neighbors(graph, u, v))) for u, v in wanted])
    assert_matches(known, "adamic_adar", pairs, [s for _, _, s in nx.adamic_adar_index(graph, wanted)])
    assert_matches(known, "resource_allocation", pairs, [s for _, _, s in nx.resource_allocation_index(graph, wanted)])
    assert_matches(
        known, "preferential_attachment", pairs, [s for _, _, s in nx.preferential_attachment(graph, wanted)]
    )


def test_path_heuristics_match_networkx_and_powers_of_the_matrix(scored):
    graph, _, known, pairs = scored
    dense = nx.to_numpy_array(graph, nodelist=range(N))
    power, katz = np.eye(N), np.zeros((N, N))
    for _ in range(KATZ_LENGTH):
        power = KATZ_BETA * power @ dense
        katz += power
    assert_matches(known, "katz", pairs, katz[tuple(pairs.numpy())])
    walks = [nx.pagerank(graph, alpha=0.85, personalization={u: 1}, tol=1e-14, max_iter=1000) for u in range(N)]
    pi = np.array([[walk[v] for v in range(N)] for walk in walks])
    assert_matches(known, "ppr", pairs, (pi + pi.T)[tuple(pairs.numpy())])
    np.testing.assert_allclose(known.rows("ppr")(np.arange(N)), pi, rtol=0, atol=2e-9)
    assert known.rows("ppr")(np.array([N - 1]))[0, N - 1] == 1  # a node without edges


def test_feature_heuristic_is_the_cosine(scored):
    _, features, known, pairs = scored
    assert_matches(known, "features", pairs, cosine_similarity(features)[tuple(pairs.numpy())])


def test_heuristics_keep_the_shape_and_know_their_names(scored, monkeypatch):
    graph, _, known, pairs = scored
    for name in known.names:
        whole = known.score(name, pairs[:, :60])
        assert torch.equal(known.score(name, pairs[:, :60].view(2, 5, 12)), whole.view(5, 12))
        assert known.score(name, pairs[:, :0]).shape == (0,)
    monkeypatch.setattr("gnn.link.heuristics.ROW_ENTRIES", 7 * N)  # blocks of seven sources
    torch.testing.assert_close(
        known.score("ppr", pairs), Heuristics(edges_of(graph), N).score("ppr", pairs), rtol=0, atol=2e-9
    )
    assert "features" not in Heuristics(edges_of(graph), N).names
    with pytest.raises(ValueError, match="choose one of common_neighbours"):
        known.score("jaccard", pairs)
