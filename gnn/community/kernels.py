"""Compiled inner loops of `louvain_leiden.py`: local moving, Leiden's refinement, aggregation, connected parts.

Legend: n nodes of the current level (a node is a group of original nodes after the first level), e stored entries, k
    communities.

Write w(v, C) for the weight between node v and community C, s_v for the strength of v, S_C for the strength of C, and
g = gamma / 2m. Moving v out of C and into D changes 2m Q / 2 by [w(v, D) - g s_v S_D] - [w(v, C) - g s_v S_C], v itself
counted in neither. All kernels are pure functions of their arguments (random orders and numbers are passed in), and run
in time proportional to n + e for each sweep. They leave self-loops out: the weight inside a merged node counts in its
strength and nowhere else.
"""

from __future__ import annotations

import numpy as np

from gnn.core.compiled import compiled


@compiled()
def _communities(strength, labels):
    """Of each id 0 ... n-1: strength S_C and size; then the stack of unused ids and its height."""
    n = len(labels)
    total, size = np.zeros(n), np.zeros(n, np.int64)
    for v in range(n):
        total[labels[v]] += strength[v]
        size[labels[v]] += 1
    empty = np.empty(n, np.int64)
    num_empty = 0
    for c in range(n):
        if size[c] == 0:
            empty[num_empty] = c
            num_empty += 1
    return total, size, empty, num_empty


@compiled()
def _best_community(graph, strength, g, labels, total, v, scratch, margin):
    """Where v, taken out of its community, gains most: (community or -1 for an empty one). Its own unless another gains
    over `margin`.

    `scratch` is a zeroed array (n,) for w(v, C), left zeroed, and an array (n,) for the communities it was written at.
    """
    indptr, indices, weights = graph
    link, near = scratch
    old = labels[v]
    near[0] = old
    num_near = 1
    for at in range(indptr[v], indptr[v + 1]):
        c = labels[indices[at]]
        if link[c] == 0.0 and c != old:
            near[num_near] = c
            num_near += 1
        link[c] += weights[at]
    stay = link[old] - g * strength[v] * total[old]
    # alone
    best = -1
    best_gain = 0.0
    for i in range(num_near):
        c = near[i]
        gain = link[c] - g * strength[v] * total[c]
        link[c] = 0.0
        if gain > best_gain:
            best = c
            best_gain = gain
    return best if best_gain - stay > margin else old


@compiled()
def local_moving(graph, strength, g, labels, order, margin):
    """Move nodes to the best community among their neighbours' and an empty one until the queue is empty; True if
    anything moved.

    `graph` is (indptr, indices, weights); `labels` int64 (n,) < n is changed in place. The queue starts with all nodes
    in `order` (n,); after a move, only neighbours outside the new community return to it (Traag et al. 2019, Algorithm
    A.2). A move must gain over `margin`. A call that moves nothing has shown that no single move gains.
    """
    indptr, indices, _ = graph
    n = len(labels)
    total, size, empty, num_empty = _communities(strength, labels)
    scratch = (np.zeros(n), np.empty(n, np.int64))
    queue = order.copy()
    waiting = np.ones(n, np.bool_)
    head = 0
    length = n
    moved = False
    while length > 0:
        v = queue[head]
        head, length = (head + 1) % n, length - 1
        waiting[v] = False
        old = labels[v]
        total[old] -= strength[v]
        new = _best_community(graph, strength, g, labels, total, v, scratch, margin)
        if new < 0:
            new = old if size[old] == 1 else empty[num_empty - 1]
        total[new] += strength[v]
        if new == old:
            continue
        moved = True
        num_empty -= 1 if size[new] == 0 else 0
        size[old] -= 1
        size[new] += 1
        if size[old] == 0:
            empty[num_empty] = old
            num_empty += 1
        labels[v] = new
        for at in range(indptr[v], indptr[v + 1]):
            u = indices[at]
            if labels[u] != new and not waiting[u]:
                queue[(head + length) % n] = u
                length += 1
                waiting[u] = True
    return moved


@compiled()
def refine(graph, strength, g, labels, order, uniform, theta):
    """Split each community of `labels` (n,) into well-connected parts; their ids, int64 (n,) < n (Traag et al. 2019,
    Algorithm A.2).

    All nodes start alone. In `order`, a node that is still alone and well connected to its community, w(v, C - v) >= g
    s_v (S_C - s_v), joins a part of the same community that is well connected itself. The part is drawn with
    probability proportional to exp(gain / theta) among those with gain >= 0, staying alone (gain 0) included; `uniform`
    (n,) are the random numbers in [0, 1).
    """
    indptr, indices, weights = graph
    n = len(labels)
    whole, _, _, _ = _communities(strength, labels)  # S_C of the communities that are split
    outward = np.zeros(n)  # w(v, C - v)
    for v in range(n):
        for at in range(indptr[v], indptr[v + 1]):
            if labels[indices[at]] == labels[v]:
                outward[v] += weights[at]
    part = np.arange(n)
    size = np.ones(n, np.int64)
    total, cut = strength.copy(), outward.copy()  # of each part P: S_P and w(P, C - P)
    link = np.zeros(n)
    near = np.empty(n, np.int64)
    gain = np.empty(n)
    for v in order:
        inside = whole[labels[v]]
        if size[part[v]] > 1 or outward[v] < g * strength[v] * (inside - strength[v]):
            continue
        num_near = 0
        for at in range(indptr[v], indptr[v + 1]):
            u = indices[at]
            if labels[u] == labels[v]:
                if link[part[u]] == 0.0:
                    near[num_near] = part[u]
                    num_near += 1
                link[part[u]] += weights[at]
        for j in range(num_near):
            p = near[j]
            connected = cut[p] >= g * total[p] * (inside - total[p])
            gain[j] = link[p] - g * strength[v] * total[p] if connected else -1.0
        j = _draw(gain[:num_near], uniform[v], theta)
        if j >= 0:
            p = near[j]
            cut[p] += outward[v] - 2.0 * link[p]
            total[p] += strength[v]
            size[p] += 1
            part[v] = p  # the part named v is empty from here on, and nobody's neighbour
        for j in range(num_near):
            link[near[j]] = 0.0
    return part


@compiled()
def _draw(gain, uniform, theta):
    """Index drawn with probability proportional to exp(gain / theta) where gain >= 0; -1, staying alone, counts with
    gain 0.
    """
    best = 0.0
    for j in range(len(gain)):
        best = max(best, gain[j])
    alone = np.exp(-best / theta)
    mass = alone
    for j in range(len(gain)):
        if gain[j] >= 0.0:
            mass += np.exp((gain[j] - best) / theta)
    left = uniform * mass - alone
    chosen = -1
    for j in range(len(gain)):
        if left < 0.0:
            break
        if gain[j] >= 0.0:
            chosen = j
            left -= np.exp((gain[j] - best) / theta)
    return chosen


@compiled()
def quality(graph, strength, labels, resolution):
    """Modularity of `labels` (n,) < n: 1 - cut / 2m - gamma sum_C (S_C / 2m)^2, as strengths include what lies
    inside merged nodes.
    """
    indptr, indices, weights = graph
    whole = strength.sum()
    if whole <= 0.0:
        return 0.0
    cut = 0.0
    for v in range(len(labels)):
        for at in range(indptr[v], indptr[v + 1]):
            if labels[indices[at]] != labels[v]:
                cut += weights[at]
    total, _, _, _ = _communities(strength, labels)
    return 1.0 - cut / whole - resolution * ((total / whole) ** 2).sum()


@compiled()
def renumber(labels, bound):
    """Ids 0 ... k-1 in the order of first appearance; (labels int64 (n,), k). `bound` is above every id."""
    new = np.full(bound, -1, np.int64)
    result = np.empty(len(labels), np.int64)
    k = 0
    for v in range(len(labels)):
        if new[labels[v]] < 0:
            new[labels[v]] = k
            k += 1
        result[v] = new[labels[v]]
    return result, k


@compiled()
def aggregate(graph, strength, labels, k):
    """Merge each community of `labels` (n,) into one node: ((indptr, indices, weights) without self-loops, strengths
    (k,)).
    """
    indptr, indices, weights = graph
    n = len(labels)
    start = np.zeros(k + 1, np.int64)  # members of each community, by counting sort
    for v in range(n):
        start[labels[v] + 1] += 1
    start = np.cumsum(start)
    members = np.empty(n, np.int64)
    fill = start[:-1].copy()
    for v in range(n):
        members[fill[labels[v]]] = v
        fill[labels[v]] += 1
    new_indptr = np.zeros(k + 1, np.int64)
    new_indices, new_weights = np.empty(len(indices), np.int32), np.empty(len(indices), np.float64)
    new_strength = np.zeros(k)
    seen = np.full(k, -1, np.int64)
    slot = np.empty(k, np.int64)
    used = 0
    for c in range(k):
        for i in range(start[c], start[c + 1]):
            v = members[i]
            new_strength[c] += strength[v]
            for at in range(indptr[v], indptr[v + 1]):
                d = labels[indices[at]]
                if d == c:
                    continue
                if seen[d] != c:
                    seen[d] = c
                    slot[d] = used
                    new_indices[used] = d
                    new_weights[used] = 0.0
                    used += 1
                new_weights[slot[d]] += weights[at]
        new_indptr[c + 1] = used
    return (new_indptr, new_indices[:used].copy(), new_weights[:used].copy()), new_strength


@compiled()
def connected_parts(graph, labels):
    """Split communities into their connected parts: (ids int64 (n,), number of parts)."""
    indptr, indices, _ = graph
    n = len(labels)
    part = np.full(n, -1, np.int64)
    stack = np.empty(n, np.int64)
    k = 0
    for root in range(n):
        if part[root] >= 0:
            continue
        part[root] = k
        stack[0] = root
        depth = 1
        while depth > 0:
            depth -= 1
            v = stack[depth]
            for at in range(indptr[v], indptr[v + 1]):
                u = indices[at]
                if part[u] < 0 and labels[u] == labels[v]:
                    part[u] = k
                    stack[depth] = u
                    depth += 1
        k += 1
    return part, k
