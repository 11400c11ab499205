"""Weights are moved into huge pages under their own addresses, and nothing else is."""

import sys

import pytest
import torch

from flashnorm.kernels.cpu import pages


def test_only_whole_pages_of_the_tensors_are_asked_for():
    class Storage:
        def __init__(self, place, size):
            self.place, self.size = place, size

        def untyped_storage(self):
            return self

        def data_ptr(self):
            return self.place

        def nbytes(self):
            return self.size

    near, far = Storage(1000, 5000), Storage(10_000_000, 10)
    spans = list(pages._spans([far, near, Storage(6000 + pages.GAP, 7), near]))
    assert spans[-2:] == [(1000, 6007 + pages.GAP), (10_000_000, 10_000_010)]
    assert all(begin == end for begin, end in spans[:-2])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux moves the pages")
def test_values_and_addresses_stay():
    weight = torch.arange(6 << 20, dtype=torch.int32)
    place, expected = weight.data_ptr(), weight.clone()
    moved = pages.collapse([weight])
    assert moved % pages.HUGE == 0
    assert 0 <= moved <= weight.nbytes
    assert weight.data_ptr() == place
    assert torch.equal(weight, expected)


def test_small_tensors_are_left_alone():
    assert pages.collapse([torch.ones(1000)]) == 0
