"""The benchmark of cut networks: its peers are what they are said to be, and its page says what the runs say."""

from dataclasses import replace

import pytest
import torch
from helpers import benchmark
from torch import nn

from impact_optim.experiments.models import build_model
from impact_optim.pruning import ActivationPruner
from impact_optim.pruning.report import model_size

pytest.importorskip("sklearn")
X = torch.zeros(1, 1, 28, 28)


@pytest.fixture(scope="module", autouse=True)
def pruning():
    with benchmark("pruning"):
        yield


def test_torch_prunings_norm_is_that_of_all_weights_that_go_with_a_unit():
    from peers import GroupNorm

    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.uniform_(model[1].weight)
    criterion, sizes = GroupNorm(model, X), []

    def compared(group, context):
        scores = criterion(group, context)
        # A convolution makes the units, a norm scales them, and a convolution reads them.
        parts = model[0].weight, model[1].weight, model[3].weight.transpose(0, 1)
        norm = sum(part.detach().reshape(group.size, -1).square().sum(1) for part in parts)
        assert scores.argsort().tolist() == norm.argsort().tolist()
        sizes.append(group.size)
        return scores

    pruner = ActivationPruner(model, X, {1: 0.3, 2: 0.6}, criterion=compared)
    pruner.step()
    pruner.step()
    assert sizes[0] > sizes[1]  # what it reads is the model as it is, after the first cut as well


def test_the_narrow_network_is_as_small_as_a_cut_one_and_has_fresh_weights():
    from peers import make_narrow

    whole, narrow = (build_model("cnn", (1, 28, 28), 10, 16) for _ in range(2))
    make_narrow(narrow, X, seed=0, remove=0.5)
    macs = [model_size(model, ((X,), {})).macs[""] for model in (whole, narrow)]
    assert macs[1] / macs[0] == pytest.approx(0.5, abs=0.05)
    bound = narrow.conv2.weight[0].numel() ** -0.5  # of what torch draws from, which depends on the width
    assert 0.9 * bound < narrow.conv2.weight.abs().max().item() <= bound


def test_a_run_is_cut_by_its_schedule_and_says_what_is_left():
    from plan import CNN, cut
    from runner import run, settings_of

    task = replace(CNN, data="digits", width=16, epochs=4, subset=500, batch=25)
    whole, half = (
        run(settings_of(task, arm, {"lr": 0.1, "drop_rate": 0.0, "options": {}}, "test", 0))
        for arm in (replace(cut(0.5), prune=None), replace(cut(0.5), prune={"remove": 0.5, "by": 3}))
    )
    assert half["macs"] / whole["macs"] == pytest.approx(0.5, abs=0.1)
    assert half["accuracy"][:3] == [None] * 3
    assert half["accuracy"][3] > 0.3


def test_arms_of_a_table_differ_in_what_is_cut_alone():
    from plan import CNN, PLAN, UNCUT, UNCUT_IMPACT
    from runner import settings_of

    point = {"lr": 0.1, "drop_rate": 0.0, "options": {}}
    for question in PLAN.questions.values():
        for arm in question.arms:
            is_uncut = arm in (UNCUT, UNCUT_IMPACT)
            settings = settings_of(CNN, arm, point, "test", 0)
            assert ("prune" in settings) == (not is_uncut and arm.name != "from scratch")
            tuned_as = ("importance", UNCUT_IMPACT.name) if "importance" in arm.name else ("uncut", UNCUT.name)
            assert arm.tuned_as == (None if is_uncut else tuned_as)
    assert PLAN.questions["macs-0.5"].arms[0].prune == {
        "remove": 0.5, "by": 14, "target": "macs", "criterion": "rademacher", "split": None
    }  # fmt: skip


def test_the_page_has_the_tables_that_the_runs_make():
    import report
    from tables import filled

    page = report.PAGE.read_text()
    assert page.count("<!-- table ") == 7
    assert filled(page, report.TABLES) == page
    for name, table in report.TABLES.items():
        assert table().startswith("| "), name  # also where nothing has been run
