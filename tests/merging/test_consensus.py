"""Sums over sources do not depend on threads, and elect signs as defined."""

import pytest
import torch

from automerge.merging.consensus import sum_of_agreeing, weighted_sum


def test_thread_count_has_no_effect():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(100_003, generator=generator) for _ in range(3)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    weighted_sum(tensors, [0.3, 0.1, 0.7]),
                    sum_of_agreeing(tensors, [0.3, 0.1, 0.7], normalize=True),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_inputs_are_left_alone():
    tensors = [torch.ones(3), torch.full((3,), -2.0)]
    weighted_sum(tensors, [1.0, 1.0])
    sum_of_agreeing(tensors, [1.0, 1.0], normalize=True)
    assert tensors[0].tolist() == [1, 1, 1]
    assert tensors[1].tolist() == [-2, -2, -2]


def test_a_negative_weight_turns_the_vote_of_its_source():
    deltas = [torch.tensor([1.0]), torch.tensor([3.0])]
    # 1 * 1 against -0.5 * 3: negative wins; divided by its weight -0.5.
    assert sum_of_agreeing(deltas, [1.0, -0.5], normalize=False).tolist() == [-1.5]
    assert sum_of_agreeing(deltas, [1.0, -0.5], normalize=True).tolist() == [3.0]


def test_votes_of_their_own_elect_and_the_weights_average():
    deltas = [torch.tensor([1.0]), torch.tensor([-3.0])]
    assert sum_of_agreeing(deltas, [0.5, 0.25], normalize=True).tolist() == [-3.0]
    assert sum_of_agreeing(deltas, [0.5, 0.25], normalize=True, votes=[4.0, 1.0]).tolist() == [1.0]


def test_nothing_agrees_with_zero():
    assert sum_of_agreeing([torch.zeros(2), torch.zeros(2)], [0.5, 0.5], normalize=True).tolist() == [0.0, 0.0]


def test_one_weight_per_tensor():
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([torch.ones(1)], [1.0, 2.0])
    with pytest.raises(ValueError, match="nothing"):
        weighted_sum([], [])


def test_float64_stays_float64_throughout():
    delta = torch.tensor([1.0], dtype=torch.float64)
    assert sum_of_agreeing([delta], [0.1], normalize=True).item() == 1.0
