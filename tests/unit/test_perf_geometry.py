"""The arithmetic of trees whose paths all run to the limit: what they save against independent responses."""

from __future__ import annotations

from typing import Any

import pytest
from rlzoo.benchmarks.perf.geometry import SHAPES, full_length

from rlzoo.sampling.segments import Segments

PERCENT = {(4, 2): 53, (5, 2): 42, (6, 2): 35, (7, 2): 30, (14, 2): 15, (28, 2): 8, (14, 4): 10, (14, 8): 6}


@pytest.mark.parametrize(("depth", "branching"), SHAPES)
def test_full_paths_save_what_their_shape_says(tiny_tokenizer: Any, depth: int, branching: int) -> None:
    tree = Segments(width=16, depth=depth, segment_tokens=3, branching=(branching,), initial=(2,))
    segments = sum(min(16, 2 * branching**level) for level in range(depth))
    saved = full_length(tree, tiny_tokenizer)
    assert saved == pytest.approx(1 - segments / (16 * depth), abs=1e-12)
    assert abs(100 * saved - PERCENT[depth, branching]) <= 0.5 + 1e-9
