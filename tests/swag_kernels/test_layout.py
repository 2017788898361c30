import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swag_kernels import BLOCK, arena_size, segment_table
from swag_kernels.layout import check_layout


@given(st.lists(st.integers(0, 5000), max_size=8))
def test_segments_are_aligned_and_disjoint(numels):
    layout = segment_table(numels)
    assert layout.shape == (len(numels), 3)
    assert (layout[:, 0] % BLOCK == 0).all()
    assert layout[:, 1].tolist() == numels
    ends = layout[:, 0] + layout[:, 1]
    assert (layout[1:, 0] >= ends[:-1]).all()
    assert arena_size(layout) % BLOCK == 0
    check_layout(layout, arena_size(layout))


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[0, 10, 0], [512, 10, 0]], "row 1"),
        ([[0, 1025, 0], [1024, 10, 0]], "row 1"),
        ([[1024, 10, 0], [0, 10, 0]], "row 1"),
        ([[0, 10, 2]], "multiple of 4"),
        ([[0, -1, 0]], "row 0"),
        ([[0, 5000, 0]], "arena of 5000"),
    ],
)
def test_broken_layouts_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        check_layout(torch.tensor(rows), 4096)


def test_layout_must_be_a_table_on_the_cpu():
    for wrong in (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="int64 tensor"):
            check_layout(wrong, 4096)
