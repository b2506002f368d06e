"""Masks: a function of seed, source, tensor and element index, and random enough."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging import random
from automerge.merging.random import keep_mask, lanes, mask_key

MASK = 2**64 - 1


def reference_lane(key, index):
    word = (key + (index // 4 + 1) * 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    word ^= word >> 31
    return word >> (16 * (index % 4)) & 0xFFFF


@given(st.integers(0, MASK), st.integers(0, 2**40), st.integers(0, 70))
@settings(deadline=None)
def test_bits_equal_the_definition(key, start, count):
    assert lanes(key, start, start + count).tolist() == [reference_lane(key, i) for i in range(start, start + count)]


def test_the_generator_is_splitmix64():
    """The published sequence of splitmix64 from seed 1234567, as 64-bit words."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    bits = lanes(1234567, 0, 20).reshape(5, 4).tolist()
    assert [sum(lane << (16 * at) for at, lane in enumerate(word)) for word in bits] == words


def test_the_key_is_the_start_of_a_sha256():
    digest = hashlib.sha256(b"7\0high\0layer.weight").digest()
    assert mask_key(7, "high", "layer.weight") == int.from_bytes(digest[:8], "little")


@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_chunks_have_no_effect(monkeypatch, chunk):
    whole = keep_mask(99, 5003, 0.4)
    monkeypatch.setattr(random, "CHUNK", chunk)
    assert torch.equal(keep_mask(99, 5003, 0.4), whole)
    assert torch.equal(keep_mask(99, 17, 0.4), whole[:17])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.65, 0.9])
def test_the_density_is_met_in_every_lane(density):
    count = 1 << 18
    mask = keep_mask(mask_key(0, "a", "t"), count, density).reshape(-1, 4).double()
    sigma = math.sqrt(density * (1 - density) / (count / 4))
    assert ((mask.mean(0) - density).abs() < 5 * sigma).all()


def test_lanes_neighbours_sources_and_seeds_are_independent():
    count = 1 << 16
    mask = keep_mask(mask_key(0, "a", "t"), count, 0.5).double()
    others = [keep_mask(mask_key(*of), count, 0.5).double() for of in [(0, "b", "t"), (1, "a", "t"), (0, "a", "u")]]
    others += [mask.roll(by) for by in (1, 2, 3, 4, 5)]
    for other in others:
        correlation = float(torch.corrcoef(torch.stack([mask, other]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(count)


def test_density_one_keeps_everything_and_a_lower_density_keeps_a_subset():
    assert keep_mask(5, 1001, 1.0).all()
    half, third = keep_mask(5, 1001, 0.5), keep_mask(5, 1001, 1 / 3)
    assert (half | ~third).all()
    assert keep_mask(5, 0, 0.5).shape == (0,)
