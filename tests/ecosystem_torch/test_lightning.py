"""Inside Lightning's Trainer: the plain loop's run, checkpoints, validation on the average."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings

import lightning
import pytest
import torch
from adapter_torch.training import batches, network, same, sgd, values
from ecosystem_torch.comparing import close, means
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import mse_loss

from swa_torch import SWA, update_bn

pytestmark = [
    # Lightning's copy of torch's tree_flatten asks torch for a class under its former name.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning:lightning"),
    # It advises more worker processes; these batches lie in memory.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # ModelCheckpoint says so of every folder that is there, pytest's temporary ones too.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

EPOCHS, LENGTH = 3, 8
CONFIG = {"start": "4step", "every": "2step"}
DATA = [*batches(LENGTH)]


class Batches:
    """One epoch's batches after the other; a checkpoint holds the place within the epoch."""

    def __init__(self):
        self.place = 0

    def __len__(self):
        return LENGTH

    def __iter__(self):
        self.place %= LENGTH
        while self.place < LENGTH:
            self.place += 1
            yield DATA[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Module(lightning.LightningModule):
    """What a user writes; ``configure`` makes what ``configure_optimizers`` returns."""

    def __init__(self, configure=lambda module: module.averaging()):
        super().__init__()
        self.network = network()
        self.configure = configure

    def averaging(self, **options):
        return SWA(sgd(self), CONFIG, **options)

    def configure_optimizers(self):
        return self.configure(self)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, number):
        x, y = batch
        return mse_loss(self(x), y)


class Validated(Module):
    """Keeps the loss of each validation."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def validation_step(self, batch, number):
        x, y = batch
        self.log("loss", mse_loss(self(x), y))

    def on_validation_epoch_end(self):
        self.losses.append(float(self.trainer.callback_metrics["loss"]))


class Manual(Module):
    """Steps by itself, every second batch."""

    automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        x, y = batch
        self.manual_backward(mse_loss(self(x), y) / 2)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def cosine(module):
    optimizer = module.averaging()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, folder, *callbacks, data=None, ckpt_path=None, validation=None, **options):
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[*callbacks],
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, data or Batches(), validation, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def plain_loop(accumulate=1, clip=None, autocast=False, scheduled=False, dtype=torch.float32):
    """The same training without Lightning and, besides, without averaging: the snapshots."""
    model = network().to(dtype)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30) if scheduled else None
    snapshots = []
    for number, (x, y) in enumerate(DATA * EPOCHS, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = mse_loss(model(x.to(dtype)), y.to(dtype)) / accumulate
        loss.backward()
        if number % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        update = number // accumulate
        if update >= 4 and update % 2 == 0:
            snapshots.append(values(model.parameters()))
    return model, snapshots


# How the module is made, what the Trainer is told, and the same for the plain loop.
RUNS = {
    "the wrapper alone": (Module, {}, {}),
    "with a scheduler": (lambda: Module(cosine), {}, {"scheduled": True}),
    "in lists": (lambda: Module(lambda module: ([module.averaging()], [])), {}, {}),
    "gradient accumulation": (Module, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "gradient clipping": (Module, {"gradient_clip_val": 0.5}, {"clip": 0.5}),
    "autocast": (Module, {"precision": "bf16-mixed"}, {"autocast": True}),
    "half precision": (Module, {"precision": "bf16-true"}, {"dtype": torch.bfloat16}),
    "manual optimization": (Manual, {}, {"accumulate": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_and_averages_as_the_plain_loop_does(name, tmp_path):
    make, options, plainly = RUNS[name]
    module = make()
    trainer = fit(module, tmp_path, **options)
    model, snapshots = plain_loop(**plainly)
    (optimizer,) = trainer.optimizers
    accumulate = plainly.get("accumulate", 1)
    assert optimizer.updates == trainer.global_step == EPOCHS * LENGTH // accumulate
    assert optimizer.n_averaged == len(snapshots) >= 4
    assert same(module.network.state_dict().values(), model.state_dict().values())
    assert close(optimizer.averaged_parameters, means(snapshots))


def test_finalize_at_the_end_keeps_the_average_and_its_statistics(tmp_path):
    class Keep(lightning.Callback):
        def on_train_end(self, trainer, module):
            self.average = trainer.optimizers[0].averaged_parameters
            trainer.optimizers[0].finalize(module, bn_data=DATA)

    module, keep = Module(), Keep()
    fit(module, tmp_path, keep)
    assert same(module.parameters(), keep.average)
    twin = copy.deepcopy(module.network)
    update_bn(twin, DATA)
    assert same(module.network.state_dict().values(), twin.state_dict().values())


def test_the_trainer_knows_the_length_that_a_configuration_asks_for(tmp_path):
    def configure(module):
        total = int(module.trainer.estimated_stepping_batches)
        return SWA(
            sgd(module),
            {"start": "50%", "every": "1ep"},
            steps_per_epoch=total // module.trainer.max_epochs,
            total_steps=total,
        )

    trainer = fit(Module(configure), tmp_path, accumulate_grad_batches=2)
    assert trainer.optimizers[0].schedule == (8, 4, None)
    assert (trainer.optimizers[0].updates, trainer.optimizers[0].n_averaged) == (12, 2)


class ValidateAverage(lightning.Callback):
    """Validates on the averaged weights and their batch-norm statistics."""

    def __init__(self, bn_data=None):
        self.bn_data = bn_data
        self.block = contextlib.ExitStack()

    def on_validation_start(self, trainer, module):
        (optimizer,) = trainer.optimizers
        if optimizer.n_averaged:
            self.block.enter_context(optimizer.averaged(module, bn_data=self.bn_data))

    def on_validation_end(self, trainer, module):
        self.block.close()

    def on_exception(self, trainer, module, exception):
        self.block.close()


def whole_loss(model):
    model.eval()
    with torch.no_grad():
        losses = [float(mse_loss(model(x), y)) for x, y in DATA]
    model.train()
    return pytest.approx(sum(losses) / LENGTH, rel=1e-6)


def test_a_callback_validates_on_the_average(tmp_path):
    module = Validated()
    trainer = fit(module, tmp_path, ValidateAverage(DATA), validation=Batches())
    model, _ = plain_loop()
    assert same(module.network.state_dict().values(), model.state_dict().values())
    twin, optimizer = network(), None
    optimizer = SWA(sgd(twin), CONFIG)
    wanted = []
    for _ in range(EPOCHS):
        for x, y in DATA:
            optimizer.zero_grad()
            mse_loss(twin(x), y).backward()
            optimizer.step()
        with optimizer.averaged(twin, bn_data=DATA):
            wanted.append(whole_loss(twin))
    assert module.losses == wanted
    assert same(trainer.optimizers[0].averaged_parameters, optimizer.averaged_parameters)


def test_the_live_weights_return_if_validation_fails(tmp_path):
    class Fails(Validated):
        def validation_step(self, batch, number):
            if self.trainer.current_epoch == 1:
                raise ArithmeticError
            super().validation_step(batch, number)

    class Watch(lightning.Callback):
        def on_validation_start(self, trainer, module):
            self.live = values(module.network.state_dict().values())

    module, watch = Fails(), Watch()
    with pytest.raises(ArithmeticError):
        fit(module, tmp_path, watch, ValidateAverage(DATA), validation=Batches())
    assert same(module.network.state_dict().values(), watch.live)


def end(trainer, module):
    (optimizer,) = trainer.optimizers
    return (
        values([*module.network.state_dict().values(), *optimizer.averaged_parameters]),
        (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped, trainer.global_step),
    )


def same_end(one, other):
    return same(one[0], other[0]) and one[1] == other[1]


def every_update(folder):
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)


# It would rather have the weights before the update that it is called after.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
# It cannot tell that these batches go on in the middle of an epoch.
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before")
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-true"}], ids=["", "half precision"])
@pytest.mark.parametrize("make", [Module, Manual, lambda: Module(cosine)])
def test_resumed_from_any_of_its_checkpoints_it_ends_the_same(make, options, tmp_path):
    module = make()
    whole = end(fit(module, tmp_path, every_update(tmp_path), **options), module)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(saved) == whole[1][0] == len(DATA) * EPOCHS // (2 if make is Manual else 1)
    # Before and after the first snapshot, within an epoch and between epochs.
    for path in saved[1:-1:6]:
        module = make()
        trainer = fit(module, tmp_path, every_update(tmp_path), ckpt_path=path, **options)
        assert same_end(end(trainer, module), whole)
        averages = trainer.optimizers[0].averaged_parameters
        assert all(average.dtype == torch.float32 for average in averages)


def test_a_checkpoint_taken_while_validating_on_the_average_resumes_on_the_live_weights(tmp_path):
    class Save(lightning.Callback):
        def on_validation_epoch_end(self, trainer, module):  # after the swap, before its end
            epoch = trainer.current_epoch
            module.seen.append(values(module.network.parameters()))
            trainer.save_checkpoint(tmp_path / f"{epoch}.ckpt")

    def run(**options):
        module = Validated()
        module.seen = []
        trainer = fit(module, tmp_path, ValidateAverage(), Save(), validation=Batches(), **options)
        return end(trainer, module), module.seen

    whole, seen = run()
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    names = [f"network.{name}" for name, _ in network().named_parameters()]
    # In the file the average is the model's weights.
    assert same([saved["state_dict"][name] for name in names], seen[1])
    resumed, _ = run(ckpt_path=tmp_path / "1.ckpt")
    assert same_end(resumed, whole)


def test_the_optimizer_that_a_module_asks_for_is_the_wrapper_too(tmp_path):
    """``self.optimizers()`` is Lightning's subclass of ours, made without our ``__init__``."""
    module = Module()
    trainer = fit(module, tmp_path)
    (optimizer,), theirs = trainer.optimizers, module.optimizers()
    assert theirs is not optimizer
    assert isinstance(theirs, SWA)
    assert (theirs.updates, theirs.n_averaged) == (optimizer.updates, optimizer.n_averaged)
    assert theirs.schedule == optimizer.schedule
    assert same(theirs.averaged_parameters, optimizer.averaged_parameters)
    live = values(module.parameters())
    with theirs.averaged(module, bn_data=DATA):
        assert same(module.parameters(), optimizer.averaged_parameters)
    assert same(module.parameters(), live)
    state = theirs.state_dict()
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data.zero_()
    average = optimizer.averaged_parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs.load_state_dict(state)
    assert optimizer.updates == EPOCHS * LENGTH
    assert same(optimizer.averaged_parameters, average)
    theirs.finalize()
    assert same(module.parameters(), average)


def test_two_optimizers_have_two_averages(tmp_path):
    class Two(Manual):
        def configure_optimizers(self):
            first, second = (
                SWA(torch.optim.SGD(part.parameters(), lr=0.05), {"start": start, "every": "2step"})
                for part, start in ((self.network[:2], "4step"), (self.network[2:], "5step"))
            )
            return [first, second]

        def training_step(self, batch, number):
            x, y = batch
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(mse_loss(self(x), y))
                optimizer.step()

    def run(**options):
        module = Two()
        trainer = fit(module, tmp_path, every_epoch, **options)
        averages = [o.averaged_parameters for o in trainer.optimizers]
        counts = [(o.updates, o.n_averaged) for o in trainer.optimizers]
        return values([*module.parameters(), *itertools.chain(*averages)]), counts

    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    weights, counts = run()
    assert counts == [(24, 11), (24, 10)]
    resumed, recounts = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(resumed, weights)
    assert recounts == counts
