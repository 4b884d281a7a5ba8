"""A stored tree to look at: what each branch was worth, what training made of it, and why it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Branches

from ..credit.base import Credit
from ..credit.values import mean_of_children
from ..escape import visible
from ..store.trees import StoredTree
from ..tree import ROOT, Float64, Int32, Role, Stop, Tree
from .text import count

Decode = Callable[[Sequence[int]], str]
"""Token ids in, text out, e.g. `tokenizer.decode`."""


def render_tree(stored: StoredTree, decode: Decode, *, clip: int = 100, max_nodes: int = 500) -> RenderableType:
    """The tree with, per node: tokens, value (mean over children, and over leaves where that differs), advantage, stop reason and
    text clipped to `clip` characters (0: no text); leaves with reward and verdict. At most `max_nodes` nodes are drawn. What the
    tree is about stands in `header`."""
    tree = stored.tree
    values, leaf_means = mean_of_children(tree), mean_of_leaves(tree)
    root = Branches(_prompt_line(tree, values, leaf_means), guide_style="dim")
    drawn, stack = 0, [(ROOT, root)]
    while stack:
        node, branch = stack.pop()
        below = []
        for child in tree.children(node, probes=True):
            if drawn >= max_nodes:
                branch.add(Text(f"... {tree.nodes - 1 - drawn} more nodes, not drawn", style="dim"))
                return root
            drawn += 1
            below.append((child, branch.add(_node_line(stored, child, values, leaf_means, decode, clip))))
        stack.extend(reversed(below))
    return root


def header(stored: StoredTree) -> RenderableType:
    """Problem, gold answer, leaves right and wrong, tokens sampled and what independent responses would have cost."""
    tree, record = stored.tree, stored.record
    right, wrong = int((tree.correct == 1).sum()), int((tree.correct == 0).sum())
    leaves = Text(f"{len(tree.leaves)} leaves: ")
    leaves.append(f"{right} right", style="green").append(", ").append(f"{wrong} wrong", style="red")
    if len(tree.leaves) > right + wrong:
        leaves.append(f", {len(tree.leaves) - right - wrong} not graded", style="yellow")
    saved = tree.unrolled_tokens / tree.sampled_tokens if tree.sampled_tokens else 1.0
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("problem", style="dim"), Text(_one_line(record.problem, 400) or str(tree.meta.get("problem", "?"))))
    if record.problem_id:
        grid.add_row(Text("id", style="dim"), Text(record.problem_id))
    grid.add_row(Text("gold", style="dim"), Text(record.gold or "?"))
    grid.add_row(Text("verdicts", style="dim"), leaves)
    tokens = f"{count(tree.sampled_tokens)} sampled, {count(tree.unrolled_tokens)} if unrolled into responses ({saved:.2f} x)"
    grid.add_row(Text("tokens", style="dim"), Text(tokens))
    if stored.credit is None or len(stored.credit.row) == 0:
        grid.add_row(Text("training", style="dim"), Text("not trained on", style="yellow"))
    return grid


def mean_of_leaves(tree: Tree) -> Float64:
    """Mean reward of the leaves at or below each node, float64 [nodes]; ungraded leaves left out, NaN where none is left."""
    total, graded = np.zeros(tree.nodes), np.zeros(tree.nodes)
    known = ~np.isnan(tree.reward)
    total[tree.leaves[known]] = tree.reward[known]
    graded[tree.leaves[known]] = 1
    for node in range(tree.nodes - 1, ROOT, -1):
        total[tree.parent[node]] += total[node]
        graded[tree.parent[node]] += graded[node]
    return np.where(graded > 0, total / np.maximum(graded, 1), np.nan)


def node_advantages(credit: Credit, node: int) -> str:
    """The advantages of a node's terms in words: `+0.577`, `+1.000 x4` for as many rows, `-0.5 / +0.5` where rows differ,
    `-0.50 [3:7]` for part of the node; `no term` where it is not trained on."""
    terms = np.flatnonzero(credit.node == node)
    if len(terms) == 0:
        return "no term"
    found: dict[tuple[float, int, int], int] = {}
    longest = int(credit.stop[terms].max())
    for t in terms:
        key = (float(credit.advantage[t]), int(credit.start[t]), int(credit.stop[t]))
        found[key] = found.get(key, 0) + 1
    if len(found) > 4:
        low, high = float(credit.advantage[terms].min()), float(credit.advantage[terms].max())
        return f"{low:+.3f} to {high:+.3f} in {len(terms)} terms"
    parts = []
    for (advantage, start, stop), times in found.items():
        part = "" if start == 0 and stop == longest else f" [{start}:{stop}]"
        parts.append(f"{advantage:+.3f}{part}" + (f" x{times}" if times > 1 else ""))
    return " / ".join(parts)


def _prompt_line(tree: Tree, values: Float64, leaf_means: Float64) -> Text:
    line = Text(f"prompt  {len(tree.prompt)} tokens  ", style="bold")
    return line.append_text(_value(values[ROOT], leaf_means[ROOT]))


def _node_line(stored: StoredTree, node: int, values: Float64, leaf_means: Float64, decode: Decode, clip: int) -> Text:
    tree = stored.tree
    line = Text()
    line.append(f"#{node}", style="bold").append(f"  {int(tree.lengths[node])} tok  ")
    at = np.flatnonzero(tree.leaves == node)
    if tree.role[node] == Role.PROBE:
        line.append("probe  ", style="magenta")
    elif len(at):
        line.append_text(_leaf(stored, int(at[0])))
    else:
        line.append_text(_value(values[node], leaf_means[node]))
    if stored.credit is not None and tree.role[node] != Role.PROBE:
        line.append("adv ", style="dim").append(f"{node_advantages(stored.credit, node)}  ", style="cyan")
    line.append(Stop(int(tree.stop[node])).name, style=_stop_style(Stop(int(tree.stop[node]))))
    text = _text(tree.node_tokens(node), decode, clip)
    return line.append(f"\n{text}", style="dim") if text else line


def _leaf(stored: StoredTree, index: int) -> Text:
    reward, correct = float(stored.tree.reward[index]), float(stored.tree.correct[index])
    style = "yellow" if np.isnan(correct) else ("green" if correct > 0 else "red")
    kinds = stored.record.kinds
    kind = kinds[index] if index < len(kinds) else ("not graded" if np.isnan(correct) else ("right" if correct > 0 else "wrong"))
    return Text(f"reward {'-' if np.isnan(reward) else f'{reward:g}'} ({kind})  ", style=style)


def _value(value: float, leaf_mean: float) -> Text:
    if np.isnan(value):
        return Text("value -  ", style="dim")
    told = f"value {value:.3f}"
    if abs(value - leaf_mean) > 5e-4:
        told += f" (leaves {leaf_mean:.3f})"
    return Text(f"{told}  ")


def _stop_style(stop: Stop) -> str:
    return "red" if stop in (Stop.LENGTH, Stop.DEPTH, Stop.REPETITION) else "dim"


def _text(tokens: Int32, decode: Decode, clip: int) -> str:
    return _one_line(decode([int(t) for t in tokens]), clip) if clip > 0 else ""


def _one_line(text: str, clip: int) -> str:
    """Line breaks shown, control characters (which could drive the terminal) made visible; beginning and end of a long text."""
    flat = visible(text.replace("\n", "⏎"))
    return flat if len(flat) <= clip else f"{flat[: clip * 2 // 3]} … {flat[len(flat) - clip // 3 :]}"


def list_trees(stored: Sequence[StoredTree]) -> RenderableType:
    """One row per stored tree: what `--tree K` can choose from."""
    table = Table(box=None, header_style="dim")
    for name in ("tree", "problem", "gold", "right", "wrong", "nodes", "tokens", "trained", "text"):
        table.add_column(name, justify="right" if name not in ("problem", "gold", "trained", "text") else "left", no_wrap=True)
    for i, s in enumerate(stored):
        tree, trained = s.tree, s.credit is not None and len(s.credit.row) > 0
        right, wrong = int((tree.correct == 1).sum()), int((tree.correct == 0).sum())
        cells = [str(i), s.record.problem_id, s.record.gold, str(right), str(wrong), str(tree.nodes - 1), str(tree.sampled_tokens)]
        table.add_row(*[Text(visible(c)) for c in [*cells, "yes" if trained else "no", _one_line(s.record.problem, 60)]])
    return table
