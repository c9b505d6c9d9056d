"""Tensors in pieces: views of all of their elements, which elementwise operations then change as they are changed."""

import pytest
import torch

from curvlib.arrays import in_pieces


@pytest.mark.parametrize("shape", [(), (0,), (7,), (128, 256), (300, 200), (70_001,), (600, 600)])
def test_pieces_are_the_whole(shape):
    whole, other = torch.randn(shape), torch.randn(shape)
    expected = whole + 2 * other
    pieces, addends = in_pieces([whole], [other])
    assert [piece.shape for piece in pieces] == [addend.shape for addend in addends]
    assert sum(piece.numel() for piece in pieces) == whole.numel()
    torch._foreach_add_(pieces, addends, alpha=2)
    torch.testing.assert_close(whole, expected)


def test_only_tensors_of_middle_size_are_cut():
    small, middle, large = torch.zeros(128, 256), torch.zeros(300, 200), torch.zeros(600, 600)
    (pieces,) = in_pieces([small, middle, large])
    assert pieces[0] is small
    assert pieces[-1] is large
    assert len(pieces) == 4
    assert all(piece.numel() <= 1 << 15 for piece in pieces[1:3])


@pytest.mark.parametrize("which", [0, 1])
def test_tensors_whose_elements_do_not_lie_in_a_row_stay_whole(which):
    pair = [torch.zeros(300, 200), torch.zeros(300, 200)]
    pair[which] = torch.zeros(200, 300).T
    assert [one[0] is two for one, two in zip(in_pieces(*([one] for one in pair)), pair, strict=True)] == [True, True]


def test_parameters_change_with_their_pieces():
    parameter = torch.nn.Parameter(torch.zeros(300, 200))
    with torch.no_grad():
        torch._foreach_add_(*in_pieces([parameter], [torch.ones(300, 200)]), alpha=-0.5)
    assert torch.equal(parameter, torch.full((300, 200), -0.5))


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="of 1, 0 tensors"):
        in_pieces([torch.zeros(2)], [])
