"""The study's program: its peers are what they are said to be, and the page of results says what the runs say."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

STUDY = Path(__file__).parent.parent / "benchmarks" / "study"
pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def study():
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))
    torch.set_flush_denormal(False)  # a run sets it, for its process


def test_the_control_has_the_signals_values_on_other_weights():
    from peers import shuffled_fisher

    from impact_optim.signals import fisher

    grad = torch.randn(4, 6)
    h, control = fisher(grad, grad, None), shuffled_fisher(grad, grad, None)
    assert torch.equal(control.flatten().sort().values, h.flatten().sort().values)
    assert not torch.equal(control, h)


def test_a_cell_is_tuned_on_validation_and_tested_with_fresh_seeds():
    import plan
    import run

    task = replace(plan.DIGITS, epochs=1, lrs=(0.05, 0.1), drop_rates=(0.1,), tuning_seeds=(0,))
    arm = plan.BEST[0]
    results = {}
    for lr, accuracy in ((0.05, 0.4), (0.1, 0.6)):
        assert run.tuned(task, arm, results) is None
        settings = run.settings_of(task, arm, lr, 0.1, "validation", 0)
        results[run.key(settings)] = {"settings": settings, "accuracy": [accuracy]}
    assert run.tuned(task, arm, results) == (0.1, 0.1)
    assert not set(plan.TEST_SEEDS) & set(plan.TUNING_SEEDS)


def test_a_run_says_all_that_it_depends_on_and_repeats():
    import plan
    import run

    task = replace(plan.DIGITS, epochs=2, subset=200)
    settings = run.settings_of(task, plan.sparse(0.9)[1], 0.1, 0.0, "validation", 0)
    lines = [run.run(settings) for _ in range(2)]
    for line in lines:
        assert json.loads(json.dumps(line)) == line
        line.pop("seconds")
    assert lines[0] == lines[1]
    assert lines[0]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert len(lines[0]["accuracy"]) == 2


def test_a_network_that_would_be_dead_counts_as_chance():
    import plan
    import run

    task = replace(plan.DIGITS, epochs=3, subset=200)
    arm = replace(plan.sparse(0.9)[1], sparsity=0.9999)
    line = run.run(run.settings_of(task, arm, 0.1, 0.0, "validation", 0))
    assert line["accuracy"][-1] == 0.1
    assert "would leave nothing of" in line["note"]


def test_the_page_has_the_tables_that_the_runs_make():
    import report

    assert report.RESULTS, "benchmarks/study/results.jsonl is missing"
    page = report.PAGE.read_text()
    assert page.count("<!-- table ") >= 7
    assert report.filled(page) == page


def test_lamp_scores_are_those_of_the_paper():
    from peers import lamp

    scores = lamp(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
    assert torch.allclose(scores, torch.tensor([[1 / 14, 1.0], [4 / 13, 0.0]], dtype=torch.float64))


def test_lamp_removes_the_smallest_of_each_layer_and_leaves_none_empty():
    from peers import GradualLAMP

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # by magnitude all of it would go
    optimizer = GradualLAMP(model, lr=0.1, importance="uniform", drop_rate=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    report = optimizer.sparsify(0.9, by="magnitude")
    assert report.sparsity == pytest.approx(0.9)
    for tensor, weight in zip(report.tensors, before[::2], strict=True):
        assert tensor.kept > 0
        assert weight[tensor.mask].abs().min() >= weight[~tensor.mask].abs().max()
