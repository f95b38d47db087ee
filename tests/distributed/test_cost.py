"""The cost on paper, against values worked by hand."""

import json
import sys

import pytest

from tests.benchmarks import cost

MACHINE = cost.Machine(gpus_per_node=8, in_node=100.0, networks=(("slow", 10.0),), peak=100.0, memory=20.0)


@pytest.mark.parametrize(("members", "seconds"), [(1, 0.0), (2, 8.0), (8, 14.0)])
def test_a_ring_sends_each_byte_almost_twice(members, seconds):
    assert cost.ring_seconds(800, members, 100.0) == pytest.approx(seconds)


@pytest.mark.parametrize(("gpus", "seconds"), [(8, 14.0), (16, 14.0 + 80.0), (32, 14.0 + 120.0)])
def test_nodes_reduce_within_and_then_between_them(gpus, seconds):
    assert cost.reduction_seconds(800, gpus, 10.0, MACHINE) == pytest.approx(seconds)


@pytest.mark.parametrize(("size", "seconds"), [(40, 2.4), (60, 3.0)])
def test_a_step_is_six_forward_passes_or_what_it_moves(size, seconds):
    assert cost.step_seconds(cost.step_flops(10, 4), size, MACHINE) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("reduction", "is_global", "exposed"), [(3.0, False, 0.0), (5.0, False, 1.0), (3.0, True, 3.0), (5.0, True, 6.0)]
)
def test_a_third_of_the_step_hides_the_last_reduction_and_nothing_hides_that_of_pass_1(reduction, is_global, exposed):
    assert cost.exposed_seconds(reduction, 12.0, is_global=is_global) == pytest.approx(exposed)
    assert cost.efficiency(reduction, 12.0, is_global=is_global) == pytest.approx(12 / (12 + exposed))


def test_b7_has_the_published_size():
    """Tan and Le 2019, table 2: 66 M parameters, 37 G multiply-adds."""
    parameters, operations = cost.counts("efficientnet_b7", 600)
    assert parameters == 66_347_960
    assert operations / 2 == pytest.approx(37e9, rel=0.03)


def test_it_says_that_nothing_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(cost, "CASES", (("resnet10t", 64, 16),))
    monkeypatch.setattr(sys, "argv", ["cost"])
    cost.main()
    assert capsys.readouterr().out.startswith("computed, not measured\n")
    monkeypatch.setattr(sys, "argv", ["cost", "--json"])
    cost.main()
    told = json.loads(capsys.readouterr().out)
    assert told["measured"] is False
    assert [row["gpus"] for row in told["rows"]] == [8, 16, 32, 64]
    for row in told["rows"]:
        assert row["step_ms"] == max(row["compute_ms"], row["memory_ms"])
        assert row["bytes_global"] - row["bytes_device"] == 4 * row["parameters"]
        for over in row["over"].values():
            assert 0 < over["efficiency_global"] < over["efficiency_device"] <= 1
