"""Callbacks and recipes with the real packages: Lightning, Hugging Face's Trainer, Accelerate, timm."""

import ast
import copy
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import timm.optim
import timm.utils
import torch
from accelerate import Accelerator
from helpers import assert_same
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from impact_optim import ActivationPruner, DropRateScheduler, Impact, ImpactAdamW, ImpactSGD
from impact_optim.integrations import lightning, transformers
from impact_optim.integrations.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = torch.randn(96, 20, generator=torch.Generator().manual_seed(0))
LABELS = INPUTS[:, :3].argmax(1)
STEPS = 3  # of an epoch


def loader():
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=32)


class Classifier(pl.LightningModule):
    """A network as people write it for Lightning; notes what its passes have seen."""

    def __init__(self, build=lambda module: ImpactSGD(module, lr=0.1, momentum=0.9, drop_rate=0.3)):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
        self.build = build
        self.is_masked, self.validated = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        output = self(batch[0])
        self.is_masked.append(
            not torch.equal(output, torch.func.functional_call(copy.deepcopy(self.net), {}, batch[0]))
        )
        return nn.functional.cross_entropy(output, batch[1])

    def validation_step(self, batch, index):
        self.validated.append(torch.equal(self(batch[0]), copy.deepcopy(self.net).eval()(batch[0])))

    def configure_optimizers(self):
        return self.build(self)


def trainer(tmp_path, epochs, *callbacks):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        callbacks=list(callbacks),
    )


def ramp(optimizer):
    return DropRateScheduler(optimizer, 0.6, 4, start=0.2)


def whole(module, optimizer=()):
    return ActivationPruner(module.net, INPUTS[:2], {1: 0.25, 3: 0.5}, optimizer=optimizer, every=1)


PLANS = {
    "masks": {},
    "ramp": {"drop_rate": ramp},
    "zeros": {"drop_rate": ramp, "sparsify": {2 * STEPS + 1: 0.7}},
    "cuts": {"drop_rate": ramp, "pruner": whole},
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


# ------------------------------------------------------------------------------- Lightning


def test_lightning_trains_masked_and_evaluates_and_saves_dense(tmp_path):
    module, keep = Classifier(), ModelCheckpoint(tmp_path, every_n_epochs=1)
    trainer(tmp_path, 2, lightning.ImpactCallback(), keep).fit(module, loader(), loader())
    assert module.is_masked == [True] * 2 * STEPS
    assert all(module.validated)
    assert_same(torch.load(keep.best_model_path, weights_only=True)["state_dict"], module.state_dict())


def test_lightning_attaches_an_optimizer_of_groups(tmp_path):
    module = Classifier(lambda module: ImpactAdamW([{"params": [p]} for p in module.parameters()], drop_rate=0.3))
    trainer(tmp_path, 1, lightning.ImpactCallback()).fit(module, loader())
    assert all(module.is_masked)


@every_plan
@pytest.mark.parametrize("after_validation", [False, True], ids=["after the epoch", "after validation"])
def test_lightning_resumes_to_the_bit(plan, after_validation, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not after_validation)
    through, callback = Classifier(), lightning.ImpactCallback(**plan)
    trainer(tmp_path, 4, callback, keep).fit(through, loader(), loader())
    checkpoint = tmp_path / f"epoch={0 if after_validation else 1}.ckpt"
    resumed, fresh = Classifier(), lightning.ImpactCallback(**plan)
    trainer(tmp_path, 4, fresh).fit(resumed, loader(), loader(), ckpt_path=checkpoint)
    assert_same(resumed, through)
    assert_same(fresh.plan.metrics(), callback.plan.metrics())
    assert fresh.plan.epoch == callback.plan.epoch == 4


def test_lightning_cuts_makes_sparse_and_logs(tmp_path):
    module = Classifier()
    plan = {"sparsify": {2 * STEPS: 0.5}, "by": "magnitude", "pruner": whole}
    run = trainer(tmp_path, 4, lightning.ImpactCallback(**plan))
    run.fit(module, loader())
    assert module.net[0].out_features == 32
    metrics = run.callback_metrics
    assert metrics["impact/sparsity"] == pytest.approx(0.5, abs=0.2)
    assert metrics["impact/units_left"] == 0.5
    assert 0 < metrics["impact/effective_share/net.0.weight"] <= 1
    assert metrics["impact/drop_rate"] == 0


def test_what_lightning_makes_of_an_optimizer_is_scheduled_and_cut():
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = ImpactSGD(net, lr=0.1, momentum=0.9, drop_rate=0.5)
    wrapped = LightningOptimizer(optimizer)
    schedule = DropRateScheduler(wrapped, 0.1, 1)
    pruner = ActivationPruner(net, INPUTS[:2], {1: 0.5}, optimizer=wrapped, every=1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(INPUTS), LABELS).backward()
        optimizer.step()
        schedule.step()
        pruner.step()
    assert optimizer.param_groups[0]["drop_rate"] == 0.1
    assert optimizer.state[net[0].weight]["momentum_buffer"].shape == (32, 20)


def test_an_optimizer_without_importances_is_refused(tmp_path):
    module = Classifier(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="SGD keeps no importances"):
        trainer(tmp_path, 1, lightning.ImpactCallback()).fit(module, loader())


def test_a_pruner_alone_takes_any_optimizer(tmp_path):
    module = Classifier(lambda module: torch.optim.Adam(module.parameters(), lr=0.01))
    trainer(tmp_path, 2, lightning.ImpactCallback(pruner=whole)).fit(module, loader())
    assert module.net[0].out_features == 48


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}")
    trainer(tmp_path, 1, lightning.ImpactCallback(), keep).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="resume it with the same callback"):
        trainer(tmp_path, 2, lightning.ImpactCallback(pruner=whole)).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt"
        )


def test_cuts_are_refused_where_several_processes_train(monkeypatch, tmp_path):
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="prune in one process"):
        lightning.ImpactCallback(pruner=whole).setup(trainer(tmp_path, 1), Classifier(), "fit")
    callback = transformers.ImpactCallback(pruner=heads_and_hidden)
    run = hugging_face(tmp_path, 1, callback)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="prune in one process"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model, optimizer=run.create_optimizer())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsify": {0: 0.5}}, "it must map steps"),
        ({"sparsify": {1.5: 0.5}}, "it must map steps"),
        ({"sparsify": {5: 1.5}}, r"Invalid sparsity: 1\.5; it must lie in \[0, 1\)"),
        ({"sparsify": {5: "2/4"}}, "a pattern such as '2:4'"),
        ({"by": "size"}, "Invalid by: 'size'"),
        ({"floor": 2}, "Invalid floor: 2; it must lie in"),
    ],
)
def test_what_would_fail_after_hours_of_training_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(**arguments)


def test_lightnings_weight_averaging_renews_batch_norm_of_the_dense_network(tmp_path):
    module = Classifier()
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    trainer(tmp_path, 3, averaging).fit(module, loader())
    assert module.is_masked == [True] * 3 * STEPS + [False] * STEPS
    # Lightning ends that pass with a step on the gradients of the last one, which would move the averaged weights.
    for found, averaged in zip(module.parameters(), averaging._average_model.parameters(), strict=True):
        assert torch.equal(found, averaged)
    variance = module.net[1].running_var.clone()
    update_bn(loader(), module.net)
    torch.testing.assert_close(module.net[1].running_var, variance)


RANKS = """
import lightning, torch
from test_integrations import Classifier, loader, ramp
from impact_optim.integrations.lightning import ImpactCallback

class Ranks(Classifier):
    def on_train_end(self):
        weights = torch.cat([p.detach().double().flatten() for p in self.parameters()])
        lines = [None, None]
        mine = (float(weights.sum()), int((weights == 0).sum()), self.is_masked[:6])
        torch.distributed.all_gather_object(lines, mine)
        if self.global_rank == 0:
            print("ranks", *lines, sep="|")

if __name__ == "__main__":
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[ImpactCallback(drop_rate=ramp, sparsify={7: 0.5})],
    )
    trainer.fit(Ranks(), loader())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_lightning_trains_on_several_processes(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ranks.py")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ranks|")]
    first, second = map(ast.literal_eval, line.split("|")[1:])
    assert first == second
    assert first[1] >= round(0.5 * (64 * 20 + 3 * 64))
    assert all(first[2])


# ------------------------------------------------------------------------------- Hugging Face


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


WORDS = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(1))
SENTENCES = [{"input_ids": words, "labels": int(words[0] > 15)} for words in WORDS]


def hugging_face(folder, epochs, callback, model=None, **options):
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        save_strategy="steps",
        save_steps=options.pop("save_steps", STEPS),
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        **options,
    )
    run = Trainer(
        model or bert(),
        arguments,
        train_dataset=SENTENCES,
        eval_dataset=SENTENCES,
        optimizer_cls_and_kwargs=(ImpactAdamW, {"lr": 1e-3, "drop_rate": 0.3}),
    )
    if callback is not None:
        run.add_callback(callback)
    return run


def heads_and_hidden(model, optimizer):
    return ActivationPruner(model, {"input_ids": WORDS[:2]}, {1: 0.25}, optimizer=optimizer, criterion="l1", round_to=1)


@pytest.mark.parametrize(
    ("plan", "checkpoint"),
    [
        (PLANS["masks"], 4),
        (PLANS["ramp"], STEPS),  # written before the epoch is over
        ({**PLANS["zeros"], "floor": 0.1}, 2 * STEPS),
        ({**PLANS["zeros"], "floor": 0.1}, 8),
        ({"pruner": heads_and_hidden}, 4),
    ],
    ids=["masks", "ramp", "before zeros", "after zeros", "cuts"],
)
def test_hugging_face_resumes_to_the_bit(plan, checkpoint, tmp_path):
    through = hugging_face(tmp_path, 4, transformers.ImpactCallback(**plan), save_steps=checkpoint)
    through.train()
    checkpoint = tmp_path / f"checkpoint-{checkpoint}"
    callback = transformers.ImpactCallback(**plan)
    resumed = hugging_face(tmp_path, 4, callback)
    if "pruner" in plan:
        callback.resume(resumed.model, checkpoint)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed.model, through.model)
    assert callback.plan.epoch == 4


def test_hugging_face_trains_masked_evaluates_dense_and_logs(tmp_path):
    log, model = [], bert()
    callback = transformers.ImpactCallback(sparsify={5: 0.6}, floor=0.1, log=log.append)
    run = hugging_face(tmp_path, 2, callback, model)
    run.train()
    assert log[0]["impact/drop_rate"] == pytest.approx(0.3, abs=0.02)
    assert log[1]["impact/drop_rate"] == 0
    assert log[1]["impact/sparsity"] == pytest.approx(0.6, abs=0.02)
    assert "impact/effective_share/classifier.weight" in log[1]
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert_same(saved, model)
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


def test_hugging_face_takes_an_optimizer_that_was_made_before(tmp_path):
    model, log = bert(), []
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)
    Impact(model, optimizer, drop_rate=0.3)
    run = hugging_face(tmp_path, 1, None, model)
    run = Trainer(model, run.args, train_dataset=SENTENCES, optimizers=(optimizer, None))
    run.add_callback(transformers.ImpactCallback(sparsify={2: 0.5}, floor=0.1, log=log.append))
    run.train()
    assert log[0]["impact/sparsity"] == pytest.approx(0.5, abs=0.02)


def test_hugging_face_builds_the_model_anew_for_every_run(tmp_path):
    log = []
    arguments = hugging_face(tmp_path, 1, None).args
    factory = (ImpactAdamW, {"lr": 1e-3, "drop_rate": 0.3})
    run = Trainer(None, arguments, train_dataset=SENTENCES, model_init=bert, optimizer_cls_and_kwargs=factory)
    run.add_callback(transformers.ImpactCallback(sparsify={2: 0.5}, floor=0.1, log=log.append))
    run.train()
    run.train()
    assert [line["impact/sparsity"] for line in log] == pytest.approx([0.5, 0.5], abs=0.02)


def test_what_would_undo_zeros_is_refused(tmp_path):
    callback = transformers.ImpactCallback(sparsify={5: 0.6})
    run = hugging_face(tmp_path, 1, callback, load_best_model_at_end=True, eval_strategy="steps", eval_steps=STEPS)
    with pytest.raises(ValueError, match="load_best_model_at_end may bring back"):
        run.train()


def test_a_checkpoint_that_was_moved_is_resumed_by_its_folder(tmp_path):
    hugging_face(tmp_path / "a", 1, transformers.ImpactCallback()).train()
    run = hugging_face(tmp_path / "b", 2, transformers.ImpactCallback())
    with pytest.raises(ValueError, match=r"call resume\(trainer.model, checkpoint\)"):
        run.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{STEPS}"))


# ------------------------------------------------------------------------------- Accelerate, timm


def accelerated(pruned):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    accelerator = Accelerator(cpu=True)
    optimizer = ImpactAdamW(net, lr=1e-2, drop_rate=0.3)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    schedule = DropRateScheduler(optimizer, 0.0, 4)
    pruner = ActivationPruner(net, INPUTS[:2], {1: 0.25, 3: 0.5}, optimizer=optimizer, every=1) if pruned else None
    accelerator.register_for_checkpointing(schedule, *([pruner] if pruned else []))
    return accelerator, net, optimizer, batches, schedule, pruner


def run_epoch(accelerator, net, optimizer, batches, schedule, pruner):
    net.train()
    for x, y in batches:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(net(x), y))
        optimizer.step()
    schedule.step()
    if pruner is not None:
        pruner.step()


@pytest.mark.parametrize("pruned", [False, True], ids=["ramp", "cuts"])
def test_accelerate_resumes_to_the_bit(pruned, tmp_path):
    run = accelerated(pruned)
    for epoch in range(4):
        if epoch == 2:
            run[0].save_state(tmp_path)
        run_epoch(*run)
    accelerator, net, optimizer, _, _, pruner = resumed = accelerated(pruned)
    if pruned:  # first of all: it gives the network its shape
        pruner.load_state_dict(torch.load(tmp_path / "custom_checkpoint_1.pkl", weights_only=True))
    accelerator.load_state(tmp_path)
    for _ in range(2):
        run_epoch(*resumed)
    assert_same(net, run[1])
    assert optimizer.param_groups[0]["drop_rate"] == 0.0
    assert net[0].out_features == (32 if pruned else 64)


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lamb", "lion"])
def test_timms_optimizers(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = timm.optim.create_optimizer_v2(net, opt=name, lr=1e-3, weight_decay=0.05)
    impact = Impact(net, optimizer, drop_rate=0.3)
    pruner = ActivationPruner(net, INPUTS[:2], {1: 0.5}, optimizer=optimizer, every=1, criterion="importance")

    def run_epoch():
        net.train()
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    run_epoch()
    assert impact.importance(net[0].weight).std() > 0
    average = timm.utils.ModelEmaV3(net, decay=0.0)
    average.update(net)
    assert_same(average.module, copy.deepcopy(net))
    net.eval()
    assert torch.equal(net(INPUTS), copy.deepcopy(net)(INPUTS))
    impact.sparsify(0.5)
    run_epoch()
    weights = torch.cat([p.flatten() for p in (net[0].weight, net[3].weight)])
    assert (weights == 0).double().mean() == pytest.approx(0.5, abs=0.01)
    assert pruner.step().records
    run_epoch()
    assert net[0].out_features == 32


def test_adapters_of_peft_are_masked_and_merge_dense():
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0))
    optimizer = ImpactAdamW(model, lr=1e-2, drop_rate=0.5)
    batch = {"input_ids": WORDS, "labels": torch.tensor([each["labels"] for each in SENTENCES])}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    dense = copy.deepcopy(model)
    assert not torch.equal(model(**batch).logits, dense(**batch).logits)
    assert all("lora" in row.name for row in optimizer.importance_summary())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    model.eval(), dense.eval()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, dense(**batch).logits)
