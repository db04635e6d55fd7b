"""Bandwidths between ranks, on the CPU: what is timed, and what of it the planner is told."""

from __future__ import annotations

import re

import pytest
import torch
from torch import distributed

from sparsetrain.cli.plan_grid import parse_bandwidth
from sparsetrain.parallel.network import Link, Measured, measure_network
from tests.parallel.ranks import assert_on_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
SIZES = (4096, 65536)


def two_nodes_of_two() -> None:
    found = measure_network(2, torch.device("cpu"), SIZES, rounds=2)
    assert (found.nodes, found.devices_per_node) == (2, 2) and found.latency_s > 0
    for link, shared in ((found.node, 1), (found.inter, 2)):
        assert link is not None and link.ranks == 2 and link.shared_by == shared
        for found_s in (link.seconds, link.gathers):
            assert tuple(found_s) == SIZES and all(seconds > 0 for seconds in found_s.values())
    speeds = parse_bandwidth(found.flag)
    assert found.node is not None and speeds["node"] == pytest.approx(found.node.bytes_per_s(), rel=0.01)
    alone = measure_network(4, torch.device("cpu"), SIZES, rounds=2)
    assert alone.inter is None and re.fullmatch(r"node=[\d.e-]+GB/s", alone.flag)
    with pytest.raises(ValueError, match="4 ranks are not nodes of 3"):
        measure_network(3, torch.device("cpu"))


def test_two_nodes_of_two_ranks_are_told_apart() -> None:
    """Four processes, some eight seconds: imports."""
    assert_on_ranks(two_nodes_of_two, 4)


def test_a_rank_s_bandwidth_is_what_passes_its_link() -> None:
    link = Link(ranks=4, seconds={1000: 0.5, 8000: 2.0}, gathers={}, shared_by=3)
    assert link.bytes_per_s(1000) == 3 * 1.5 * 1000 / 0.5
    assert link.bytes_per_s() == 3 * 1.5 * 8000 / 2.0
    speed, hop_s = link.line()  # of one group: 6 hops and 3/2 of the bytes
    for size, seconds in link.seconds.items():
        assert 6 * hop_s + 1.5 * size / speed == pytest.approx(seconds)
    found = Measured(nodes=1, devices_per_node=4, latency_s=1e-6, node=link, inter=None)
    assert found.flag == "node=1.8e-05GB/s"


def test_one_process_has_no_network() -> None:
    with pytest.raises(ValueError, match="torchrun"):
        measure_network(1, torch.device("cpu"))


def test_a_disturbed_message_does_not_make_the_line() -> None:
    """A slow shortest message once read as 33 GB/s: as much time as the longest, so no slope at all."""
    true_speed, hop_s = 1e9, 1e-3
    seconds = {size: 6 * hop_s + 1.5 * size / true_speed for size in (4096, 2**16, 2**20, 2**24)}
    exact = Link(ranks=4, seconds=seconds, gathers={}).line()
    assert exact == pytest.approx((true_speed, hop_s))
    disturbed = Link(ranks=4, seconds=seconds | {4096: 3 * seconds[4096]}, gathers={}).line()
    assert disturbed[0] == pytest.approx(true_speed, rel=0.3)
    flat = Link(ranks=4, seconds={1000: 2.0, 8000: 1.0}, gathers={}).line()
    assert flat[1] == 0 and flat[0] > 0
