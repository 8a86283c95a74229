"""The study's program: its peers are what they are said to be, and the page of results says what the runs say."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import benchmark
from torch import nn

pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def study():
    with benchmark("study"):
        yield


def test_the_control_has_the_signals_values_on_other_weights():
    from peers import shuffled_saliency

    from impact_optim.signals import saliency

    weight, grad = torch.randn(2, 4, 6)
    h, control = saliency(weight, grad, None), shuffled_saliency(weight, grad, None)
    assert torch.equal(control.flatten().sort().values, h.flatten().sort().values)
    assert not torch.equal(control, h)


def test_along_the_gradient_or_the_step_is_the_same_without_momentum_and_masks():
    from peers import StepLookahead

    from impact_optim import ImpactSGD

    x, y = torch.randn(16, 6), torch.randint(4, (16,))

    def importances(build, momentum):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
        options = {"importance": "lookahead", "importance_lr": 0.5, "kl_weight": 0.1, "drop_rate": 0.0}
        optimizer = build(model, lr=0.1, momentum=momentum, **options)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        return optimizer.importance(model[0].weight)

    along_step = importances(StepLookahead, 0.0)
    assert (along_step - 1).abs().max() > 0.1
    torch.testing.assert_close(along_step, importances(ImpactSGD, 0.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(importances(StepLookahead, 0.9), importances(ImpactSGD, 0.9), atol=0.1)


def test_dropout_is_in_every_branch_and_only_in_training():
    from peers import add_dropout

    from impact_optim.experiments.models import build_model

    torch.manual_seed(0)
    model = build_model("vit", (1, 8, 8), 10, 32)
    x = torch.randn(2, 1, 8, 8)
    dense = model.eval()(x)
    add_dropout(model, 1.0)  # all of it: only the shortcuts are left
    assert torch.equal(model(x), dense)
    tokens = model.patches(x).flatten(2).transpose(1, 2) + model.positions
    torch.testing.assert_close(model.train()(x), model.head(model.norm(tokens).mean(1)))


@pytest.fixture
def declared(tmp_path):
    """A plan of one task and one arm, with what is tuned."""
    import plan
    from runner import Arm, Plan, Question

    task = replace(plan.DIGITS, epochs=1, subset=200, lrs=(0.05, 0.1), tuning_seeds=(0,), test_seeds=(100, 101))
    arm = Arm("saliency", "saliency", drop_rates=(0.1,), tune={"kl_weight": (1.0, 10.0)})
    other = Arm("again", "saliency", drop_rates=(0.1,), tuned_as=("which", "saliency"))
    return Plan([task], [Question("which", [arm, other], (task.name,))], tmp_path / "results.jsonl"), task, arm, other


def test_a_cell_is_tuned_on_validation_and_tested_with_fresh_seeds(declared):
    import runner

    plan, task, arm, other = declared
    wanted = list(plan.wanted(["which"], [task.name]))
    assert {settings["heldout"] for settings in wanted} == {"validation"}
    assert [(s["lr"], s["options"]["kl_weight"]) for s in wanted] == [(0.05, 1), (0.05, 10), (0.1, 1), (0.1, 10)]
    for settings in wanted:
        assert plan.tuned(task, arm) is None
        good = settings["lr"] == 0.1 and settings["options"]["kl_weight"] == 1
        plan.results[runner.key(settings)] = {"settings": settings, "accuracy": [0.6 if good else 0.4]}
    assert plan.tuned(task, arm) == plan.tuned(task, other)
    assert plan.tuned(task, arm) == {"lr": 0.1, "drop_rate": 0.1, "options": {"kl_weight": 1.0}}
    tests = list(plan.wanted(["which"], [task.name]))
    assert [(s["heldout"], s["lr"], s["seed"]) for s in tests] == [("test", 0.1, 100), ("test", 0.1, 101)]
    assert not plan.tests(task, arm)
    for settings in tests:
        plan.results[runner.key(settings)] = {"settings": settings, "accuracy": [0.5]}
    assert len(plan.tests(task, arm)) == 2
    assert not list(plan.wanted(["which"], [task.name]))
    assert not set(runner.TEST_SEEDS) & set(runner.TUNING_SEEDS)


def test_where_less_is_better_the_least_is_chosen(declared):
    import runner

    plan, task, arm, _ = declared
    task = replace(task, measure="bits")
    for i, point in enumerate(runner.grid(task, arm)):
        settings = runner.settings_of(task, arm, point, "validation", 0)
        plan.results[runner.key(settings)] = {"settings": settings, "loss": [None if i == 3 else 2.0 - i]}
    assert plan.tuned(task, arm) == runner.grid(task, arm)[2]  # not the run that died


def test_a_run_says_all_that_it_depends_on_and_repeats(declared):
    import runner

    _, task, arm, _ = declared
    arm = replace(arm, base="gradual-magnitude", tune={}, drop_rates=(0.0,), sparsity=0.9)
    task = replace(task, epochs=2)
    settings = runner.settings_of(task, arm, runner.grid(task, arm)[0], "validation", 0)
    lines = [runner.run(settings) for _ in range(2)]
    for line in lines:
        assert json.loads(json.dumps(line)) == line
        line.pop("cpu_seconds")
    assert lines[0] == lines[1]
    assert lines[0]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert sum(kept for _, kept in lines[0]["layers"].values()) == pytest.approx(
        0.1 * sum(numel for numel, _ in lines[0]["layers"].values()), abs=2
    )
    assert len(lines[0]["accuracy"]) == 2


def test_a_network_that_would_be_dead_counts_as_chance(declared):
    import runner

    _, task, arm, _ = declared
    arm = replace(arm, base="gradual-magnitude", tune={}, drop_rates=(0.0,), sparsity=0.99999)
    task = replace(task, epochs=3)
    line = runner.run(runner.settings_of(task, arm, runner.grid(task, arm)[0], "validation", 0))
    assert line["accuracy"][-1] == 0.1
    assert "cannot keep a weight each" in line["note"]


def test_the_page_has_the_tables_that_the_runs_make():
    import report
    from tables import filled

    assert report.PLAN.results, "benchmarks/study/results.jsonl is missing"
    page = report.PAGE.read_text()
    assert page.count("<!-- table ") >= 7
    assert filled(page, report.TABLES) == page
