"""The comparison of uncertainties: its measures are right, and the page says what the runs say."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def u():
    sys.path.insert(0, str(folder := Path(__file__).parent.parent / "benchmarks"))
    import uncertainty

    yield uncertainty
    sys.path.remove(str(folder))


def test_the_calibration_error_is_what_one_counts_by_hand(u):
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 1.0], dtype=torch.float64)
    correct = torch.tensor([1, 1, 1, 0, 1, 1, 1]).bool()
    bins = u.calibration_bins(confidence, correct)
    assert bins == [[2, 0.5, 1.0], [4, 0.9, 0.75], [1, 1.0, 1.0]]
    assert u.calibration_error(bins) == pytest.approx((4 * 0.15 + 2 * 0.5) / 7)


def test_confidence_that_is_earned_has_no_calibration_error(u):
    confidence = torch.rand(200_000, dtype=torch.float64)
    correct = torch.rand(200_000) < confidence
    assert u.calibration_error(u.calibration_bins(confidence, correct)) < 0.01
    assert u.calibration_error(u.calibration_bins(confidence, ~correct)) > 0.4


def test_measures_of_predictions_made_by_hand(u):
    p = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]], dtype=torch.float64)
    outside = torch.tensor([[0.4, 0.3, 0.3], [0.55, 0.45, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    found = u.measures(torch.cat([p, outside]), y)
    assert found["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.5) + math.log(0.2)) / 3, abs=1e-6)
    assert found["ece"] == pytest.approx((0.2 + 0.5 + 0.6) / 3, abs=1e-6)
    # Of the six pairs of one inside and one outside, the outside one is the less confident in 5; by entropy in 3.
    assert found["auroc_confidence"] == pytest.approx(5 / 6, abs=1e-6)
    entropy = -torch.xlogy(torch.cat([p, outside]), torch.cat([p, outside])).sum(1)
    pairs = [float(o > i) for i in entropy[:3] for o in entropy[3:]]
    assert found["auroc_entropy"] == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert "auroc_confidence" not in u.measures(p, y)
    assert u.measures(p * math.nan, y) == {"nll": None}


def test_an_arm_is_tuned_by_the_loss_of_the_way_it_predicts(u):
    results = {}
    for i, settings in enumerate(u.tuning_grid("uniform")):
        assert u.tuned("uniform, sampled", results) is None
        found = {"dense": {"nll": 1.0 - 0.1 * (i == 2)}, "sampled": {"nll": None if i == 2 else 0.5 + 0.01 * i}}
        results[u.key(settings)] = {"settings": settings, "measures": found}
    assert u.tuned("uniform, dense", results) == (0.02, 0.3, "dense")
    assert u.tuned("uniform, sampled", results) == (0.02, 0.1, "sampled")
    for settings in u.tuning_grid("sgd"):
        ways = {"softmax": 0.4, "ensemble": 0.3, "T=1": 0.4, "T=1.2": 0.37 + settings["lr"]}
        line = {"settings": settings, "measures": {way: {"nll": nll} for way, nll in ways.items()}}
        results[u.key(settings)] = line
    assert u.tuned("softmax, tempered", results) == (0.02, 0.0, "T=1.2")
    assert u.TUNING_SEED not in {seed + 1000 * i for seed in u.TEST_SEEDS for i in range(u.MEMBERS)}


def test_what_the_lines_say_fits_together(u):
    tests = [line for line in u.finished().values() if line["settings"]["heldout"] == "test"]
    assert {line["settings"]["seed"] for line in tests} == set(u.TEST_SEEDS)
    for line in tests:
        for found in line["measures"].values():
            bins = found["bins"]
            assert sum(n for n, *_ in bins) == 10_000
            assert found["ece"] == pytest.approx(u.calibration_error(bins), abs=1e-5)
            assert found["accuracy"] == pytest.approx(sum(n * accuracy for n, _, accuracy in bins) / 10_000, abs=1e-5)


def test_a_difference_is_paired_and_corrected_for_how_many_there_are(u, monkeypatch):
    made = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [0.0, 2.0, 2.0, 4.0, 4.0]}
    monkeypatch.setattr(u, "values", lambda name, measure: made[name])
    mean, half = u.difference_of("a", "b", "nll", 1)
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(2.776 * math.sqrt(0.3 / 5), rel=1e-3)
    assert u.difference_of("a", "b", "nll", 10)[1] == pytest.approx(5.598 * math.sqrt(0.3 / 5), rel=1e-3)  # t of 0.9975


def test_the_page_has_the_tables_that_the_runs_make(u):
    page = u.PAGE.read_text()
    assert page.count("<!-- table ") == len(u.TABLES)
    assert u.filled(page, u.TABLES) == page
