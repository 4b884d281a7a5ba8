import io

import numpy as np
import pytest
from rich.console import Console

from rlzoo.credit.base import Credit, node_rows, path_rows
from rlzoo.report.treeview import header, list_trees, mean_of_leaves, node_advantages, render_tree
from rlzoo.store.trees import StoredTree, TreeRecord
from rlzoo.tree import Role, Segment, Stop, Tree


def two_level() -> Tree:
    """A, B below node 1, C below node 2 beside an early leaf: rewards 1, 0, 0 | 1; and a probe."""
    segments = [
        Segment(0, [65]),
        Segment(0, [66, 10]),
        Segment(1, [67], stop=Stop.EOS),
        Segment(1, [68], stop=Stop.LENGTH),
        Segment(2, [69], stop=Stop.ANSWER),
        Segment(2, [70], stop=Stop.EOS),
        Segment(2, [71], role=Role.PROBE),
        Segment(0, [72], stop=Stop.EOS),
    ]
    return Tree.from_segments([80, 80], segments, {3: 1.0, 4: 0.0, 5: 0.0, 8: 1.0})


def shown(stored, **options) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160)
    console.print(header(stored))
    console.print(render_tree(stored, lambda ids: "".join(map(chr, ids)), **options))
    return out.getvalue()


RECORD = TreeRecord("id-7", "What is\n1+1?", "2", ("right", "wrong", "unparsable", "failed", "right"))


def test_every_node_with_its_figures():
    tree = two_level()
    text = shown(StoredTree(tree, node_rows(tree, [1, 2, 3, 4], [0.577, -0.577, 1, -1]), RECORD))
    lines = {line.split("#")[1].split()[0]: line for line in text.splitlines() if "#" in line}
    assert set(lines) == {str(n) for n in range(1, 9)}
    assert "value 0.500" in lines["1"] and "adv +0.577" in lines["1"] and "OPEN" in lines["1"] and "1 tok" in lines["1"]
    assert "value 0.000" in lines["2"] and "adv -0.577" in lines["2"] and "2 tok" in lines["2"]
    assert "reward 1 (right)" in lines["3"] and "adv +1.000" in lines["3"] and "EOS" in lines["3"]
    assert "reward 0 (wrong)" in lines["4"] and "LENGTH" in lines["4"]
    assert "reward 0 (unparsable)" in lines["5"] and "no term" in lines["5"]
    assert "reward - (failed)" in lines["6"]
    assert "probe" in lines["7"] and "adv" not in lines["7"]
    head = text.split("prompt  2 tokens")[0]
    for expected in ("id-7", "What is⏎1+1?", "2 right, 2 wrong, 1 not graded", "9 sampled", "11 if unrolled"):
        assert expected in " ".join(head.split())


def test_value_of_children_and_of_leaves():
    tree = Tree.from_segments(
        [1], [Segment(0, [2]), Segment(0, [3]), Segment(1, [4]), Segment(1, [5]), Segment(1, [6])], {2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0}
    )
    assert mean_of_leaves(tree).tolist() == pytest.approx([0.5, 1 / 3, 1, 1, 0, 0])
    assert "value 0.667 (leaves 0.500)" in shown(StoredTree(tree))
    ungraded = Tree.from_segments([1], [Segment(0, [2]), Segment(0, [3])], {1: 1.0})
    assert mean_of_leaves(ungraded)[0] == 1 and np.isnan(mean_of_leaves(ungraded)[2])


def test_advantages_in_words():
    tree = two_level()
    paths = path_rows(tree, [0, 1, 2, 3, 4], [0.5, -0.5, 0.25, 0.25, 0])
    assert node_advantages(paths, 1) == "+0.500 / -0.500"
    assert node_advantages(paths, 2) == "+0.250 x2"
    assert node_advantages(paths, 8) == "+0.000"
    assert node_advantages(node_rows(tree, [1], [1.0]), 2) == "no term"
    part = Credit(*(np.array(x) for x in ([0, 1], [1, 1], [0, 2], [2, 5], [1.0, -1.0], [0, 0], [1.0, 1.0])), shape=(5, 9))
    assert node_advantages(part, 1) == "+1.000 [0:2] / -1.000 [2:5]"
    many = path_rows(tree, [0, 1, 0, 1, 0, 1], [1, 2, 3, 4, 5, 6])
    assert node_advantages(many, 1) == "+1.000 to +6.000 in 6 terms"


def test_text_is_clipped_and_cannot_drive_the_terminal():
    tree = Tree.from_segments([1], [Segment(0, [ord(c) for c in "ab\x1b[31m[bold]" + "x" * 500 + "end"])], {1: 1.0})
    text = shown(StoredTree(tree), clip=60)
    assert "\x1b" not in text and r"\x1b[31m[bold]" in text and "…" in text and "end" in text and "x" * 60 not in text
    assert "[bold]" not in shown(StoredTree(tree), clip=0)


def test_a_tree_that_was_not_trained_on_says_so():
    tree = two_level()
    assert "not trained on" in shown(StoredTree(tree))
    assert "not trained on" in shown(StoredTree(tree, Credit.empty(tree)))
    assert "not trained on" not in shown(StoredTree(tree, path_rows(tree, [0], [1.0])))


def test_large_and_empty_trees():
    wide = Tree.from_segments([1], [Segment(0, [2])] * 40)
    text = shown(StoredTree(wide), max_nodes=10)
    assert text.count("#") == 10 and "30 more nodes, not drawn" in text
    assert "0 leaves" in shown(StoredTree(Tree.from_segments([1], [])))


def test_list_of_trees():
    out = io.StringIO()
    tree = two_level()
    Console(file=out, width=200).print(list_trees([StoredTree(tree, path_rows(tree, [0], [1.0]), RECORD), StoredTree(tree)]))
    first, second = out.getvalue().splitlines()[1:3]
    assert first.split()[:8] == ["0", "id-7", "2", "2", "2", "8", "9", "yes"]
    assert "no" in second.split()
