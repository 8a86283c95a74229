"""What is shaped like a parameter is cut like it, so that training goes on as that of a network built small."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from impact_optim import Impact, ImpactAdamW, ImpactSGD
from impact_optim.pruning.pruner import ActivationPruner
from impact_optim.pruning.repair import repair, select, with_state
from impact_optim.pruning.surgery import PruneRecord

KEPT = torch.tensor([0, 1, 3, 6])  # of the 8 hidden units of a network()
RECORDS = [PruneRecord(name, dim, KEPT, 8) for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))]

# Every optimizer of torch.optim, with options that give it all the state it may have.
OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.05},
    "Adadelta": {"lr": 0.5},
    "Adamax": {"lr": 0.02},
    "ASGD": {"lr": 0.05, "t0": 2},
    "Muon": {"lr": 0.02},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.02},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Rprop": {"lr": 0.02},
}
# The step of one weight depends on no other, so that weights which never move are as good as absent.
ELEMENTWISE = sorted(OPTIMIZERS.keys() - {"Adafactor", "Muon"})


def network(hidden=8):
    return nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()


def shrink(model, records=RECORDS):
    """Cuts by hand: the parameters stay the same objects."""
    for name, dim, kept, _ in records:
        param = model.get_parameter(name)
        grad = None if param.grad is None else param.grad.index_select(dim, kept)
        param.grad = None
        param.data = param.data.index_select(dim, kept)
        param.grad = grad
    return model


def small_copy(model):
    """A network built small, with the weights of a cut one."""
    small = network(len(KEPT))
    small.load_state_dict(model.state_dict())
    return small


def build(name, model, **options):
    params = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
    return getattr(torch.optim, name)(params, **{**OPTIMIZERS[name], **options})


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 5, generator=generator).double(), torch.randn(16, 3, generator=generator).double()
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def cut_by_hand(name, key, value):
    """What becomes of a state entry, told by its name and not by its shape."""
    dim = {"0.weight": 0, "0.bias": 0, "2.weight": 1}.get(name)
    if dim is None or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if key in ("row_var", "col_var") and value.shape[dim] == 1:
        return value
    return value.index_select(dim, KEPT)


def test_every_optimizer_of_torch_is_tested_here():
    public = {name for name in dir(torch.optim) if name[0].isupper() and name[:2] != "_"} - {"Optimizer"}
    assert public <= OPTIMIZERS.keys() | {"LBFGS", "SparseAdam"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_that_of_a_network_built_small(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    model = network()
    optimizer = build(name, model)
    for seed in range(4):
        step(model, optimizer, seed)
    names = {param: key for key, param in model.named_parameters()}
    entries = [
        {key: cut_by_hand(names[p], key, copy.deepcopy(v)) for key, v in optimizer.state[p].items()}
        for p in optimizer.param_groups[0]["params"]
    ]

    shrink(model)
    repair(RECORDS, model, optimizers=optimizer)

    small = small_copy(model)
    reference = build(name, small)
    for p, entry in zip(reference.param_groups[0]["params"], entries, strict=True):
        reference.state[p] = entry  # load_state_dict would change the dtype of NAdam's mu_product
    for seed in range(4, 12):
        assert step(model, optimizer, seed) == step(small, reference, seed)
        for a, b in zip(model.parameters(), small.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_units_that_never_lived_leave_no_trace(name):
    """The small network is trained from the start, beside one that has dead units until they are cut."""
    model, small = network(), network(len(KEPT))
    with torch.no_grad():
        for (key, big), (_, little) in zip(model.named_parameters(), small.named_parameters(), strict=True):
            dim = {"0.weight": 0, "0.bias": 0, "2.weight": 1}.get(key)
            big.copy_(little) if dim is None else big.zero_().index_copy_(dim, KEPT, little)
    optimizer, reference = build(name, model), build(name, small)
    for seed in range(12):
        if seed == 5:
            shrink(model)
            repair(RECORDS, model, optimizers=optimizer)
        step(model, optimizer, seed)
        step(small, reference, seed)
    for a, b in zip(model.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_adam():
    def build_embedding(width):
        model = nn.Sequential(nn.Embedding(10, width, sparse=True), nn.Flatten(), nn.Linear(2 * width, 3)).double()
        model[2].weight.requires_grad_(False)
        return model, torch.optim.SparseAdam([model[0].weight], lr=0.1)

    def walk(model, optimizer, seed):
        x = torch.randint(10, (6, 2), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    model, optimizer = build_embedding(4)
    for seed in range(3):
        walk(model, optimizer, seed)
    kept, twice = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3, 4, 6, 7])
    state = copy.deepcopy(optimizer.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][0][key] = state["state"][0][key][:, kept]
    records = [PruneRecord("0.weight", 1, kept, 4), PruneRecord("2.weight", 1, twice, 8)]
    model.zero_grad()
    shrink(model, records)
    repair(records, model, optimizers=optimizer)
    small, reference = build_embedding(3)
    small.load_state_dict(model.state_dict())
    reference.load_state_dict(state)
    for seed in range(3, 6):
        walk(model, optimizer, seed)
        walk(small, reference, seed)
        assert torch.equal(model[0].weight, small[0].weight)


def test_lbfgs_is_refused_once_it_has_a_history():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5).double()).square().sum()
        loss.backward()
        return loss

    repair(RECORDS, shrink(network()), optimizers=[])
    optimizer.step(closure)
    shrink(model)
    with pytest.raises(TypeError, match=r"LBFGS keeps one flat history"):
        repair(RECORDS, model, optimizers=optimizer)


# ------------------------------------------------------------------------------- importances, masks and zeros


def around(kind, model, **options):
    base = kind(model.parameters(), lr=0.02)
    return Impact(model, base, **options), base


class Both:
    """Muon for matrices and AdamW for the rest, as one optimizer, with an engine around them."""

    def __init__(self, model, lr=0.02, **options):
        muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=lr)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=lr)
        self.optimizers = [muon, adamw]
        self.impact = Impact(model, self.optimizers, **options)

    def __iter__(self):
        return iter(self.optimizers)

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states):
        for optimizer, state in zip(self, states, strict=True):
            optimizer.load_state_dict(state)

    @property
    def state(self):
        return {p: state for optimizer in self for p, state in optimizer.state.items()}


def around_both(model, **options):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    both = Both(model, **options)
    return both.impact, both


IMPACTS = {
    "ImpactSGD": lambda model, **options: (ImpactSGD(model, lr=0.05, momentum=0.9, **options),) * 2,
    "ImpactAdamW": lambda model, **options: (ImpactAdamW(model, lr=0.02, **options),) * 2,
    "Impact(RMSprop)": lambda model, **options: around(torch.optim.RMSprop, model, **options),
    "Impact(Muon, AdamW)": around_both,
}


@pytest.fixture(params=IMPACTS)
def impact_on(request):
    """Builds the engine and the optimizer that takes the steps, which may be one and the same."""
    return IMPACTS[request.param]


@pytest.mark.parametrize("handed_in", [0, 1], ids=["engine", "optimizer"])
@pytest.mark.parametrize("importance", ["saliency", "hypergradient"])
def test_importances_keep_their_ratios_and_their_mean(impact_on, handed_in, importance):
    model = network()
    both = impact_on(model, drop_rate=0.3, importance_lr=0.3, kl_weight=0.1, importance=importance)
    impact, optimizer = both
    for seed in range(6):
        step(model, optimizer, seed)
    before = {name: impact.importance(p) for name, p in model.named_parameters()}
    assert before["0.weight"].max() > 1.2 * before["0.weight"].min()
    names = {p: name for name, p in model.named_parameters()}
    entries = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    assert ("last_step" in entries["0.weight"]) == (importance == "hypergradient")

    shrink(model)
    repair(RECORDS, model, optimizers=both[handed_in])

    kept = {"0.weight": before["0.weight"][KEPT], "2.weight": before["2.weight"][:, KEPT]}
    mean = torch.cat([w.flatten() for w in kept.values()]).mean()
    for name, w in kept.items():
        torch.testing.assert_close(impact.importance(model.get_parameter(name)), w / mean)
    for p, state in optimizer.state.items():
        assert state.keys() == entries[names[p]].keys()
        for key, value in state.items():
            assert torch.equal(value, cut_by_hand(names[p], key, entries[names[p]][key]))
    for seed in range(6, 9):
        step(model, optimizer, seed)
    rows = impact.importance_summary()
    dropped = sum(row.numel * row.drop_rate for row in rows) / sum(row.numel for row in rows)
    assert dropped == pytest.approx(0.3, abs=1e-4)
    w = torch.cat([impact.importance(p).flatten() for p in model.parameters() if p.dim() == 2])
    assert w.mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_masks_drawn_before_the_cut_are_cut(impact_on, is_fresh):
    """A forward pass without a step leaves masks of the old shape behind; a gradient is of the mask that it saw."""
    model = network()
    impact, optimizer = impact_on(model, drop_rate=0.3)
    if not is_fresh:
        step(model, optimizer, 0)
    optimizer.zero_grad()
    model(torch.ones(2, 5).double()).square().sum().backward()
    with impact.masked():
        kept = model[0].weight[KEPT] != 0
    shrink(model)
    repair(RECORDS, model, optimizers=optimizer)
    with impact.masked():
        assert torch.equal(model[0].weight != 0, kept)
    optimizer.step()  # with the gradient of before the cut
    step(model, optimizer, 1)
    assert model[0].weight.shape == (4, 5)


def test_zeros_that_are_held_stay_zero(impact_on):
    model = network()
    impact, optimizer = impact_on(model, drop_rate=0.0)
    for seed in range(3):
        step(model, optimizer, seed)
    impact.sparsify(0.5)
    step(model, optimizer, 3)
    zero = {"0.weight": (model[0].weight == 0)[KEPT], "2.weight": (model[2].weight == 0)[:, KEPT]}
    assert all(0 < mask.sum() < mask.numel() for mask in zero.values())
    shrink(model)
    repair(RECORDS, model, optimizers=impact)
    for seed in range(4, 7):
        step(model, optimizer, seed)
        for name, mask in zero.items():
            p = model.get_parameter(name)
            assert torch.equal(p == 0, mask)
            assert torch.equal(impact.importance(p) == 0, mask)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_impact_around_two_optimizers_stands_for_both():
    model, x = network(), torch.ones(2, 5).double()
    both = Both(model, drop_rate=0.3)
    step(model, both, 0)
    muon, adamw = both
    with pytest.raises(ValueError, match=r"AdamW trains this Sequential with masks.*hand it in, as optimizer="):
        ActivationPruner(model, x[:1], {1: 0.5}, optimizer=muon)
    assert ActivationPruner(model, x[:1], {1: 0.5}, optimizer=both.impact).optimizers == [muon, adamw]
    shrink(model)
    repair(RECORDS, model, optimizers=both.impact)
    assert all(v.shape == p.shape for p, state in both.state.items() for v in state.values() if v.dim())
    step(model, both, 1)


# ------------------------------------------------------------------------------- groups, copies, several


def test_groups_objects_and_options_stay():
    model = network()
    groups = [{"params": [model[2].weight], "lr": 0.3, "mine": "x"}, {"params": [model[0].bias, model[0].weight]}]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    other = torch.optim.SGD([model[2].bias], lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    other.step()
    params = list(model.parameters())
    kept_groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]

    shrink(model)
    repair(RECORDS, model, optimizers=[optimizer, other])

    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    for group, old in zip(optimizer.param_groups, kept_groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], old["params"], strict=True))
        assert {**group, "params": 0} == {**old, "params": 0}
    step(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.05]
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


@pytest.mark.parametrize("wrapped", [True, False])
def test_averaged_copies_follow(wrapped):
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if wrapped else copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    if wrapped:
        average.update_parameters(model)
    module = average.module if wrapped else average
    expected = shrink(copy.deepcopy(module))
    model[0].out_features = model[2].in_features = len(KEPT)
    objects = list(average.parameters())

    shrink(model)
    repair(RECORDS, model, optimizers=optimizer, averaged=average)

    assert all(a is b for a, b in zip(average.parameters(), objects, strict=True))
    x = torch.randn(4, 5).double()
    assert torch.equal(average(x), expected(x))
    assert (module[0].out_features, module[2].in_features, module[2].out_features) == (4, 4, 3)
    if wrapped:
        step(model, optimizer, 1)
        average.update_parameters(model)
        assert average.n_averaged == 2


# ------------------------------------------------------------------------------- what does not fit


class Custom(torch.optim.SGD):
    """Keeps the state that it is given."""


def holding(**entries):
    model = network()
    optimizer = Custom(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    optimizer.state[model[0].weight].update(entries)
    return shrink(model), optimizer


@pytest.mark.parametrize(
    ("entries", "error", "names"),
    [
        ({"odd": torch.zeros(7, 5)}, ValueError, ["'odd' of 0.weight in Custom", r"\(7, 5\)"]),
        ({"flat": torch.zeros(40)}, ValueError, ["'flat' of 0.weight in Custom", r"\(40,\)"]),
        ({"deep": torch.zeros(8, 5, 2)}, ValueError, ["'deep' of 0.weight in Custom"]),
        ({"history": [torch.zeros(8, 5)]}, TypeError, ["list", "'history' of 0.weight"]),
        ({"pair": (1, {"x": torch.zeros(8)})}, TypeError, ["tuple", "'pair' of 0.weight"]),
        ({"momentum_buffer": torch.zeros(4, 5)}, ValueError, ["'momentum_buffer' of 0.weight", r"\(4, 5\)"]),
    ],
)
def test_state_that_does_not_fit_is_named_and_nothing_changes(entries, error, names):
    model, optimizer = holding(**entries)
    plain = torch.optim.Adam(model.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error) as info:
        repair(RECORDS, model, optimizers=[plain, optimizer])
    assert all(info.match(name) for name in names)
    for entry, old in zip(optimizer.state_dict()["state"].values(), before["state"].values(), strict=True):
        assert entry.keys() == old.keys()
        torch.testing.assert_close(list(entry.values()), list(old.values()), rtol=0, atol=0)


def test_a_square_parameter_makes_its_row_statistics_ambiguous():
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = Custom(model.parameters(), lr=0.1)
    kept = torch.tensor([0, 2, 3])
    row = torch.arange(6.0)
    optimizer.state[model[0].weight]["row"] = row
    records = [PruneRecord("0.weight", 0, kept, 6), PruneRecord("0.bias", 0, kept, 6)]
    shrink(model, records)
    with pytest.raises(ValueError, match=r"'row' of 0.weight in Custom .* does not tell"):
        repair(records, model, optimizers=optimizer)

    # Cut alike in both dimensions, it does not matter which one it is.
    both = nn.Sequential(nn.Linear(6, 6))
    optimizer = Custom(both.parameters(), lr=0.1)
    optimizer.state[both[0].weight]["row"] = row
    records.append(PruneRecord("0.weight", 1, kept, 6))
    shrink(both, records)
    repair(records, both, optimizers=optimizer)
    assert torch.equal(optimizer.state[both[0].weight]["row"], row[kept])


def test_reduced_state_is_cut_along_the_dimensions_it_has():
    model, optimizer = holding(row=torch.arange(8.0), column=torch.arange(5.0), rows=torch.arange(8.0)[:, None])
    repair(RECORDS, model, optimizers=optimizer)
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["row"], KEPT.float())
    assert torch.equal(state["rows"], KEPT.float()[:, None])
    assert torch.equal(state["column"], torch.arange(5.0))


def test_what_belongs_to_another_model_is_refused():
    model, other = shrink(network()), network()
    with pytest.raises(ValueError, match=r"SGD has no parameter of this Sequential"):
        repair(RECORDS, model, optimizers=torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"ReLU has not the parameters and buffers of Sequential"):
        repair(RECORDS, model, averaged=nn.ReLU())
    with pytest.raises(ValueError, match=r"0.weight has the shape \(4, 5\) in Sequential"):
        repair(RECORDS, model, averaged=copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"0.weight has 8 indices in dimension 0, but the records keep 4"):
        repair(RECORDS, other)
    with pytest.raises(ValueError, match=r"'1.weight', which Sequential does not have"):
        repair([PruneRecord("1.weight", 0, KEPT, 8)], model)


def test_a_copy_that_does_not_fit_leaves_the_optimizer_alone():
    model = network()
    optimizer = build("Adam", model)
    step(model, optimizer, 0)
    shrink(model)
    with pytest.raises(ValueError, match="hand in a copy"):
        repair(RECORDS, model, optimizers=optimizer, averaged=nn.Linear(2, 2))
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (8, 5)


class Stubborn(torch.optim.SGD):
    def __setstate__(self, state):
        if self.__dict__.get("refuses"):
            raise RuntimeError("no")
        super().__setstate__(state)


def test_an_optimizer_that_refuses_its_new_state_leaves_the_others_alone():
    model = network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = Stubborn(model[2].parameters(), lr=0.1, momentum=0.9)
    step(model, first, 0)
    second.step()
    shrink(model)
    second.refuses = True
    with pytest.raises(RuntimeError, match="no"):
        repair(RECORDS, model, optimizers=[first, second])
    assert first.state[model[0].weight]["momentum_buffer"].shape == (8, 5)
    assert second.state[model[2].weight]["momentum_buffer"].shape == (3, 8)


# ------------------------------------------------------------------------------- optimizers around others


class Shows(torch.optim.Optimizer):
    """Shows the state of the optimizer inside, as accelerate's does."""

    state = property(lambda self: self.inside["one"][0].state)
    param_groups = property(lambda self: self.inside["one"][0].param_groups)
    defaults = property(lambda self: self.inside["one"][0].defaults)

    def __init__(self, optimizer):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}  # as torch looks for them
        self.inside = {"one": [optimizer]}

    def step(self):
        self.inside["one"][0].step()


class Averages(torch.optim.Optimizer):
    """Has state of its own beside that of the optimizer inside, as SAM and Lookahead do."""

    def __init__(self, optimizer):
        self.base = optimizer
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    def step(self):
        self.base.step()
        for group in self.param_groups:
            for param in group["params"]:
                slow = self.state[param].setdefault("slow", torch.zeros_like(param))
                slow.lerp_(param.detach(), 0.5)


class Copies(Shows):
    """Shows what no optimizer inside keeps."""

    state = property(lambda self: dict(self.inside["one"][0].state))


@pytest.mark.parametrize("wrap", [Shows, Averages, lambda o: Shows(Averages(o)), lambda o: Averages(Shows(o))])
def test_the_optimizer_inside_another_is_cut(wrap):
    model = network()
    inside = build("Adam", model)
    optimizer = wrap(inside)
    step(model, optimizer, 0)
    shrink(model)
    repair(RECORDS, model, optimizers=optimizer)
    assert inside.state[model[0].weight]["exp_avg"].shape == (4, 5)
    for keeps in with_state(optimizer):
        assert all(v.shape == p.shape for p, s in keeps.state.items() for v in s.values() if v.dim())
    step(model, optimizer, 1)
    repair([], model, optimizers=[optimizer, inside])
    assert sum(keeps is inside for keeps in with_state([optimizer, inside])) == 1


def test_a_wrapper_that_hides_its_state_is_refused_at_once():
    model = network()
    optimizer = Copies(build("Adam", model))
    with pytest.raises(TypeError, match=r"Copies shows the state .* hand in the optimizers inside"):
        ActivationPruner(model, torch.zeros(1, 5), {1: 0.5}, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"ReLU is no torch.optim.Optimizer"):
        ActivationPruner(model, torch.zeros(1, 5), {1: 0.5}, optimizer=[nn.ReLU()])


# ------------------------------------------------------------------------------- several cuts, memory


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_records_of_several_cuts_compose(data):
    model = network()
    optimizer = build("Adam", model)
    step(model, optimizer, 0)
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    records, alive = [], torch.arange(8)
    for _ in range(data.draw(st.integers(1, 3))):
        kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(alive) - 1), min_size=1))))
        axes = ("0.weight", 0), ("0.bias", 0), ("2.weight", 1)
        cut = [PruneRecord(name, dim, kept, len(alive)) for name, dim in axes]
        shrink(model, cut)
        records += cut
        alive = alive[kept]
    repair(records, model, optimizers=optimizer)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment[alive])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_select_keeps_values_and_order_of_memory(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(sizes))))
    tensor = torch.empty_permuted(sizes, order).copy_(torch.randn(sizes))
    kept = {
        dim: torch.tensor(sorted(data.draw(st.sets(st.integers(0, sizes[dim] - 1), min_size=1))))
        for dim in data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    }
    selected = select(tensor, kept)
    index = [kept.get(dim, torch.arange(size)).tolist() for dim, size in enumerate(sizes)]
    assert selected.flatten().tolist() == [tensor[place].item() for place in itertools.product(*index)]
    dense = torch.empty_permuted(selected.shape, order)
    large = [dim for dim in range(len(sizes)) if selected.shape[dim] > 1]
    assert [selected.stride(dim) for dim in large] == [dense.stride(dim) for dim in large]


def test_state_stays_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    records = [PruneRecord("0.weight", 0, KEPT, 8), PruneRecord("0.bias", 0, KEPT, 8)]
    shrink(model, records)
    repair(records, model, optimizers=optimizer)
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    assert buffer.shape == (4, 3, 3, 3)
    assert buffer.is_contiguous(memory_format=torch.channels_last)
