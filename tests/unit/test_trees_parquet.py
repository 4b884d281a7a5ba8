from dataclasses import fields, replace

import numpy as np
import pytest

from rlzoo.credit.base import Credit, path_rows
from rlzoo.store.trees import StoredTree, TreeRecord, read_trees, write_trees
from rlzoo.tree import Role, Segment, Stop, Tree


def small(**meta) -> Tree:
    segments = [
        Segment(0, [4, 5], [-0.5, float("nan")]),
        Segment(1, [6], [-1e-30], Stop.EOS),
        Segment(1, [], [], Stop.LENGTH),
        Segment(0, [7, 8, 9], None, Stop.ANSWER),
        Segment(4, [2], [-0.25], role=Role.PROBE),
    ]
    return Tree.from_segments([1, 2, 3], segments, {2: 1.0, 3: 0.0}, meta=meta)


def assert_same(a, b):
    assert type(a) is type(b)
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape, field.name
            assert x.tobytes() == y.tobytes(), field.name  # NaN included, bit for bit
        else:
            assert x == y, field.name


def random_tree(rng: np.random.Generator) -> Tree:
    segments = []
    for node in range(1, int(rng.integers(2, 12))):
        n = int(rng.integers(0, 6))
        segments.append(
            Segment(int(rng.integers(0, node)), rng.integers(0, 99, n).tolist(), rng.normal(size=n).tolist(), Stop(rng.integers(7)))
        )
    tree = Tree.from_segments(rng.integers(0, 99, int(rng.integers(0, 5))).tolist(), segments)
    return tree.with_rewards({int(leaf): float(rng.random()) for leaf in tree.leaves if rng.random() < 0.7})


def test_round_trip(tmp_path):
    tree = small(step=3, note="π", nested={"x": [1, 2.5, None, True]}, nan=float("inf"))
    full = replace(tree, ref_logprobs=np.linspace(-1, 0, len(tree.tokens), dtype=np.float32), entropy=tree.logprobs * 2)
    credit = path_rows(tree, [0, 1], [0.1, -1 / 3])
    masked = replace(credit, token_mask=np.arange(len(tree.tokens)) % 2 == 0)
    record = TreeRecord("p-1", "1+1?\n", "2", ("right", "wrong", "failed"), ("a", "", "ü"), {"seed": 7})
    write_trees(tmp_path / "t.parquet", [tree, full, tree], [credit, masked, None], [record, TreeRecord(), record])
    back = read_trees(tmp_path / "t.parquet")
    for stored, (t, c, r) in zip(back, [(tree, credit, record), (full, masked, TreeRecord()), (tree, None, record)], strict=True):
        assert_same(t, stored.tree)
        assert stored.record == r
        if c is None:
            assert stored.credit is None
        else:
            assert_same(c, stored.credit)
            assert isinstance(stored.credit, Credit)
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_round_trip_of_random_trees(tmp_path):
    rng = np.random.default_rng(0)
    trees = [random_tree(rng) for _ in range(50)]
    write_trees(tmp_path / "t.parquet", trees, [Credit.empty(t) for t in trees])
    back = read_trees(tmp_path / "t.parquet")
    for tree, stored in zip(trees, back, strict=True):
        assert_same(tree, stored.tree)
        assert_same(Credit.empty(tree), stored.credit)


def test_nothing_to_store(tmp_path):
    write_trees(tmp_path / "t.parquet", [])
    assert read_trees(tmp_path / "t.parquet") == []
    bare = Tree.from_segments([1, 2], [])
    write_trees(tmp_path / "t.parquet", [bare])
    assert_same(bare, read_trees(tmp_path / "t.parquet")[0].tree)
    assert read_trees(tmp_path / "t.parquet")[0].record == StoredTree(bare).record


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="1 trees but 2 credits"):
        write_trees(tmp_path / "t.parquet", [small()], [None, None])
    with pytest.raises(ValueError, match="the meta of a tree must be plain data"):
        write_trees(tmp_path / "t.parquet", [small(x=object())])
    with pytest.raises(ValueError, match="no stored trees at"):
        read_trees(tmp_path / "missing.parquet")
    (tmp_path / "junk.parquet").write_text("junk")
    with pytest.raises(ValueError, match="not a Parquet file of trees"):
        read_trees(tmp_path / "junk.parquet")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"parent": [[-1]]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="holds no trees: it lacks the columns offsets"):
        read_trees(tmp_path / "other.parquet")
