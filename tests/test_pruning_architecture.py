"""A pruned network comes back from its two files as it was, and files that do not fit change nothing."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import slow
from torch import nn

from impact_optim.pruning import open_heads, trace
from impact_optim.pruning.architecture import _digest, load_pruned, save_pruned
from impact_optim.pruning.surgery import cut

NETWORK = """
import torch
from torch import nn

class Attention(nn.Module):
    '''Heads as attributes of its own, a buffer that no state dict has, an output layer tied to the embedding.'''

    def __init__(self, heads=4, width=8):
        super().__init__()
        self.heads, self.width, self.sizes = heads, width, (heads * width,) * 3
        self.embedding = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 3 * heads * width)
        self.out = nn.Linear(heads * width, 16)
        self.register_buffer("slope", 2.0 ** -torch.arange(1.0, heads + 1), persistent=False)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = (t.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
                   for t in self.qkv(self.norm(x)).split(self.sizes, -1))
        distance = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
        bias = -distance.abs() * self.slope[:, None, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))

def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4), nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )
"""
exec(NETWORK, globals())


def keep(model, kept, **attributes):
    """Cuts by hand: {(parameter or buffer, dim): kept indices}, then what is written as an attribute."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for (name, dim), indices in kept.items():
        tensors[name].data = tensors[name].data.index_select(dim, torch.tensor(indices))
    for path, value in attributes.items():
        name, _, attribute = path.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(name.removeprefix("m")), attribute, value)
    return model


def pruned_attention():
    """Without the second head."""
    rows = [i for i in range(32) if i // 8 != 1]
    thrice = [part * 32 + i for part in range(3) for i in rows]
    kept = {("qkv.weight", 0): thrice, ("qkv.bias", 0): thrice, ("out.weight", 1): rows, ("slope", 0): [0, 2, 3]}
    sizes = {"heads": 3, "sizes": (24, 24, 24), "qkv__out_features": 72, "out__in_features": 24}
    return keep(Attention(), kept, **sizes)  # noqa: F821


def pruned_convolutional():
    first, second = [0, 1, 4, 5], [0, 1, 4, 5]  # two of the four groups
    kept = {(f"1.{name}", 0): first for name in ("weight", "bias", "running_mean", "running_var")}
    kept |= {("0.weight", 0): first, ("3.weight", 0): second, ("3.bias", 0): second, ("4.weight", 0): second}
    kept |= {("7.weight", 1): second}
    sizes = {"m0__out_channels": 4, "m1__num_features": 4, "m3__in_channels": 4, "m3__out_channels": 4, "m3__groups": 2}
    model = keep(convolutional(), kept, **sizes, m4__num_parameters=4, m7__in_features=4)  # noqa: F821
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))  # the statistics are no longer those of a new network
    return model.eval()


CASES = {
    "attention": (pruned_attention, "Attention()", torch.arange(10).reshape(2, 5)),
    "convolutional": (pruned_convolutional, "convolutional()", torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)),
}


def fresh(case):
    return eval(CASES[case][1])


def assert_untouched(model, before):
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case", CASES)
def test_loads_into_a_new_network_in_a_new_process(case, tmp_path):
    build, code, x = CASES[case]
    model = build()
    save_pruned(model, tmp_path / "deep" / "folder")
    torch.save(x, tmp_path / "x.pt")
    script = f"""{NETWORK}
import sys
from impact_optim.pruning.architecture import load_pruned
torch.set_num_threads(1)
model = load_pruned({code}, sys.argv[1] + "/deep/folder").eval()
torch.save(model(torch.load(sys.argv[1] + "/x.pt")).detach(), sys.argv[1] + "/y.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model.eval()(x))
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "architecture.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("case", CASES)
def test_everything_comes_back(case, tmp_path):
    model, loaded = CASES[case][0](), fresh(case)
    params = dict(loaded.named_parameters())
    first = next(iter(params.values()))
    first.requires_grad_(False)
    save_pruned(model, tmp_path)
    assert load_pruned(loaded, tmp_path) is loaded
    for a, b in zip(model.modules(), loaded.modules(), strict=True):
        assert repr(a) == repr(b)
        for key, value in vars(a).items():
            if isinstance(value, int | tuple) and key != "training":
                assert vars(b)[key] == value
                assert type(vars(b)[key]) is type(value)
    for (name, a), b in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(param is params[name] for name, param in loaded.named_parameters())
    assert [p.requires_grad for p in loaded.parameters()] == [p is not first for p in loaded.parameters()]


def test_tied_weights_are_kept_once_and_stay_tied(tmp_path):
    from safetensors import safe_open

    save_pruned(pruned_attention(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118
        assert "head.weight" not in file.keys()  # noqa: SIM118
    loaded = load_pruned(fresh("attention"), tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    untied = fresh("attention")
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"there is a tensor 'head.weight' only here"):
        load_pruned(untied, tmp_path)


def test_open_heads_are_kept_and_asked_for(tmp_path):
    def build():
        return nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)

    x = torch.randn(2, 5, 12)
    model = open_heads(build()).eval()
    graph = trace(model, x)
    cut(model, graph, {"self_attn": [1], "linear1": [0, 3]})
    save_pruned(model, tmp_path)
    assert torch.equal(load_pruned(open_heads(build()).eval(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="'self_attn' is MultiheadAttention here, OpenMultiheadAttention there"):
        load_pruned(build(), tmp_path)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, 8, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def test_recurrent_layers_are_kept_and_train_on(tmp_path):
    x, model = torch.randn(2, 4, 5), Reader()
    graph = trace(model, x)
    cut(model, graph, {"rnn": [0, 3, 4]})
    save_pruned(model, tmp_path)
    loaded = load_pruned(Reader(), tmp_path)
    assert loaded.rnn.hidden_size == 5
    assert torch.equal(loaded(x), model(x))
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(loaded(x), model(x))
    assert copy.deepcopy(loaded)(x).equal(loaded(x))


def test_a_loaded_network_can_be_saved_again(tmp_path):
    save_pruned(pruned_convolutional(), tmp_path / "a")
    save_pruned(load_pruned(fresh("convolutional"), tmp_path / "a"), tmp_path / "b")
    for name in ("architecture.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_memory_format_is_that_of_the_new_network(tmp_path):
    model = pruned_convolutional()
    save_pruned(model, tmp_path)
    loaded = load_pruned(fresh("convolutional").to(memory_format=torch.channels_last), tmp_path)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_training_goes_on_with_gradients_of_the_new_shape(tmp_path):
    save_pruned(pruned_convolutional(), tmp_path)
    loaded = fresh("convolutional")
    loaded(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    load_pruned(loaded, tmp_path)
    assert all(param.grad is None for param in loaded.parameters())
    loaded(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert loaded[0].weight.grad.shape == (4, 3, 3, 3)


# ------------------------------------------------------------------------------- networks that surgery has cut


def transformer():
    vit = pytest.importorskip("timm.models.vision_transformer")
    return vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)


def residual():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def mobile():
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=5)


@pytest.fixture(params=[transformer, residual, slow(mobile)], scope="module")
def cut_network(request):
    """How it is built, cut by a third at random, and an input."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = request.param()
    graph = trace(model, (x,))
    units = {name: torch.randperm(group.size)[: group.size // 3] for name, group in graph.groups.items()}
    assert cut(model, graph, units)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in request.param().parameters())
    return request.param, model.eval(), x


def test_a_cut_network_comes_back(cut_network, tmp_path):
    build, model, x = cut_network
    save_pruned(model, tmp_path)
    assert torch.equal(load_pruned(build(), tmp_path).eval()(x), model(x))


def test_a_cut_network_is_exported(cut_network):
    _, model, x = cut_network
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_cut_network_goes_to_onnx(cut_network, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, model, x = cut_network
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- what does not fit


def narrower():
    return nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), *list(fresh("convolutional"))[1:])


def biased():
    return nn.Sequential(nn.Conv2d(3, 8, 3), *list(fresh("convolutional"))[1:])


def gelu():
    return nn.Sequential(*list(fresh("convolutional"))[:2], nn.GELU(), *list(fresh("convolutional"))[3:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fresh("attention"), r"Attention is not the model of .*: 'the model' is Attention here, Sequential"),
        (narrower, r"0.weight has the shape \(2, 3, 3, 3\) here, which no cut brings to \(4, 3, 3, 3\)"),
        (biased, r"there is a tensor '0.bias' only here"),
        (gelu, r"'2' is GELU here, ReLU there"),
        (lambda: fresh("convolutional").double(), r"0.weight was saved as torch.float32 and is torch.float64 here"),
        (lambda: fresh("convolutional").to("meta"), r"0.weight is on the meta device"),
    ],
)
def test_another_model_is_refused_and_left_alone(build, message, tmp_path):
    save_pruned(pruned_convolutional(), tmp_path)
    model = build()
    before, looks = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match=message):
        load_pruned(model, tmp_path)
    assert repr(model) == looks
    if not any(tensor.is_meta for tensor in before.values()):
        assert_untouched(model, before)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


def edited(**changes):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def signed(change):
    """Damage whose checksum has been made anew."""

    def edit(path):
        text = json.loads(path.read_text())
        change(text["architecture"])
        text["sha256"]["architecture"] = _digest(text["architecture"])
        path.write_text(json.dumps(text))

    return edit


def with_attribute(layer, **attributes):
    return signed(lambda architecture: architecture["sizes"][layer].update(attributes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (signed(lambda a: a["sizes"].update({"3": 3})), "its sizes are not what save_pruned"),
        (signed(lambda a: a.pop("sizes")), "its sizes are not what"),
        (signed(lambda a: a.update(types=[])), "its types are not what"),
        (signed(lambda a: a["shapes"].update({"0.weight": None})), "its shapes are not what"),
        (signed(lambda a: a["sizes"].pop("0")), "which no cut brings to None"),
        (signed(lambda a: a["sizes"].update(nothing={"out_channels": 2})), "of 'nothing' is None here"),
        (with_attribute("0", stride=[3, 3]), r"stride of '0' is \(1, 1\) here, which no cut brings to \[3, 3\]"),
        (with_attribute("0", padding=[10**6] * 2), "padding of '0'"),
        (with_attribute("0", out_channels=float("nan")), "its sizes are not what"),
        (with_attribute("0", out_channels=True), "its sizes are not what"),
        (with_attribute("0", out_channels=-4), "out_channels of '0' is 8 here, which no cut brings to -4"),
        (with_attribute("0", out_channels=16), "out_channels of '0' is 8 here, which no cut brings to 16"),
        (lambda path: path.write_text("[" * 200000 + "]" * 200000), "damaged"),
    ],
)
def test_what_no_cut_makes_is_refused_and_the_model_left_alone(damage, message, tmp_path):
    save_pruned(pruned_convolutional(), tmp_path)
    damage(tmp_path / "architecture.json")
    model = fresh("convolutional")
    before, looks = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match=message):
        load_pruned(model, tmp_path)
    assert repr(model) == looks
    assert_untouched(model, before)


def test_what_a_module_counts_is_not_of_the_network(tmp_path):
    model, other = fresh("attention"), fresh("attention")
    model.calls = 7
    save_pruned(model, tmp_path)
    other.calls = 0
    assert load_pruned(other, tmp_path).calls == 0


def resized(path):
    text = json.loads(path.read_text())
    text["architecture"]["sizes"]["3"]["groups"] = 4
    path.write_text(json.dumps(text))


def exchanged(path):
    """The weights of another network."""
    save_pruned(nn.Linear(2, 2), path.parent / "other")
    (path.parent / "other" / path.name).replace(path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", truncated, "model.safetensors is damaged"),
        ("model.safetensors", flipped, "model.safetensors is damaged"),
        ("model.safetensors", emptied, "model.safetensors is damaged"),
        ("model.safetensors", exchanged, "was not saved together with architecture.json"),
        ("architecture.json", truncated, "architecture.json is damaged"),
        ("architecture.json", emptied, "architecture.json is damaged"),
        ("architecture.json", resized, "architecture.json is damaged: its checksum differs"),
        ("architecture.json", exchanged, "checksum differs"),
        ("architecture.json", edited(version=2), "of version 2, and this package reads version 1"),
        ("architecture.json", edited(format="x"), "of the format 'x'"),
        ("architecture.json", edited(sha256=None), "architecture.json is damaged"),
        ("architecture.json", lambda path: path.write_text("[]"), "architecture.json is damaged"),
    ],
)
def test_damaged_files_are_refused_and_the_model_left_alone(file, damage, message, tmp_path):
    save_pruned(pruned_convolutional(), tmp_path)
    damage(tmp_path / file)
    model = fresh("convolutional")
    before, looks = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match=message):
        load_pruned(model, tmp_path)
    assert repr(model) == looks
    assert_untouched(model, before)


@pytest.mark.parametrize("file", ["model.safetensors", "architecture.json"])
def test_a_missing_file_is_named(file, tmp_path):
    save_pruned(pruned_convolutional(), tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_pruned(fresh("convolutional"), tmp_path)


def test_extra_state_is_refused_before_anything_is_written(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return 1

    with pytest.raises(ValueError, match=r"1 \(Extra\) has extra state"):
        save_pruned(nn.Sequential(nn.ReLU(), Extra(2, 2)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
