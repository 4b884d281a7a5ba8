"""TreePO's advantages written straight from the released code's description: id strings, dictionaries, one token at a time.

Nothing here comes from rlzoo. A leaf is `(id, reward)`, its id "query#segment#...#segment"; a batch is a list of leaves.
"""

from __future__ import annotations

import statistics
from collections import defaultdict


def prefix(leaf_id, depth):
    return "#".join(leaf_id.split("#")[: depth + 1])


def groups_at(batch, depth):
    groups = defaultdict(list)
    for leaf_id, reward in batch:
        groups[prefix(leaf_id, depth)].append(reward)
    return groups


def leaf_advantages(batch, *, weighting, repeat=True, reject=False, root=True):
    """Per leaf, before whitening. `repeat=False` and `root=False` are not in the released code."""
    depths = max(leaf_id.count("#") for leaf_id, _ in batch)
    found = defaultdict(list)  # id -> [(advantage, group size)]
    seen = defaultdict(set)
    for depth in range(depths):
        groups = groups_at(batch, depth)
        for leaf_id, reward in batch:
            group = groups[prefix(leaf_id, depth)]
            members = frozenset(other for other, _ in batch if prefix(other, depth) == prefix(leaf_id, depth))
            known = members in seen[leaf_id]
            seen[leaf_id].add(members)
            if depth == 0:
                mean = 0.0 if len(group) == 1 else statistics.fmean(group)
                if root:
                    found[leaf_id].append((reward - mean, len(group)))
            elif len(group) > 1 and not (reject and statistics.stdev(group) == 0) and (repeat or not known):
                found[leaf_id].append((reward - statistics.fmean(group), len(group)))
    advantages = []
    for leaf_id, _ in batch:
        terms = [(a, size if weighting == "group_size" else 1) for a, size in found[leaf_id]]
        advantages.append(sum(a * w for a, w in terms) / sum(w for _, w in terms) if terms else 0.0)
    return advantages


def segment_advantages(batch, *, eta=0.0, siblings=False):
    """Per leaf the advantages of its segments, before whitening (`tree_segment_reinforce_plus_plus_baseline`), or by the
    estimator `spo`: raw rewards, values standardised among siblings."""
    sizes = defaultdict(list)
    for leaf_id, reward in batch:
        for depth in range(leaf_id.count("#") + 1):
            sizes[prefix(leaf_id, depth)].append(reward)
    values = {}
    for leaf_id, reward in batch:
        above = [sizes[prefix(leaf_id, depth)] for depth in range(leaf_id.count("#") + 1)]
        against = sum(len(g) * (reward - sum(g) / len(g)) for g in above) / sum(len(g) for g in above)
        values[leaf_id] = reward if siblings else against
    for depth in range(max(leaf_id.count("#") for leaf_id, _ in batch), 1, -1):
        children = defaultdict(list)
        for node, value in list(values.items()):
            if node.count("#") == depth:
                children[prefix(node, depth - 1)].append(value)
        values.update({node: sum(v) / len(v) for node, v in children.items()})
    if siblings:
        families = defaultdict(list)
        for node in values:
            families[node.rpartition("#")[0]].append(node)
        raw = dict(values)
        for family in families.values():
            own = [raw[node] for node in family]
            spread = statistics.pstdev(own)
            for node in family if len(family) > 1 else ():
                values[node] = 0.0 if spread < 1e-8 else (raw[node] - statistics.fmean(own)) / spread
    for leaf_id, _ in batch:
        values[prefix(leaf_id, 0)] = 0.0
    advantages = []
    for leaf_id, _ in batch:
        parts = leaf_id.count("#") + 1
        path = [(values[prefix(leaf_id, i)], values[prefix(leaf_id, i - 1)], parts - i) for i in range(1, parts)]
        advantages.append([own - (eta**left if eta > 0 else 1.0) * parent for own, parent, left in path])
    return advantages


def whitened(tokens):
    """`masked_whiten` over a flat list of token values."""
    if len(tokens) == 1:
        return [0.0]
    mean = statistics.fmean(tokens)
    scale = (statistics.variance(tokens) + 1e-8) ** 0.5
    return [(t - mean) / scale for t in tokens]
