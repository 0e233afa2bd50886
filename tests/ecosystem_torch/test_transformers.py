"""Inside the Trainer of transformers: the plain loop's run, checkpoints, evaluation."""

from __future__ import annotations

import pytest
import schedulefree
import torch
import transformers
from accelerate.state import AcceleratorState
from adapter_torch.training import same, values
from ecosystem_torch.comparing import close, means
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from swa_core import SWAConfig
from swa_torch import SWA

CONFIG = SWAConfig(start="4step", every="2step")
EPOCHS, LENGTH, BATCH = 2, 8, 4


@pytest.fixture(autouse=True, scope="module")
def quietly():
    """No bars on the screen, and nothing remembered by Accelerate's classes."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)


def sentences():
    generator = torch.Generator().manual_seed(3)
    for _ in range(LENGTH * BATCH):
        words = torch.randint(0, 40, (10,), generator=generator)
        yield {"input_ids": words, "labels": words[0] % 3}


DATA = [*sentences()]


def bert(dropout, dtype=torch.float32):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).to(dtype)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def schedule_free(model):
    return schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=3)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class Trainer(transformers.Trainer):
    """Evaluates on the average: what a user adds."""

    def evaluate(self, *args, **kwargs):
        with self.optimizer.optimizer.averaged():
            return super().evaluate(*args, **kwargs)


class OwnOptimizer(transformers.Trainer):
    """Wraps the optimizer that the Trainer makes itself, which has its own scheduler then."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = SWA(super().create_optimizer(model), CONFIG)
        return self.optimizer


def trainer(
    folder,
    *,
    make=adamw,
    schedule=cosine,
    dtype=torch.float32,
    dropout=0.1,
    callbacks=(),
    cls=Trainer,
    **options,
):
    model = bert(dropout, dtype)
    optimizers = (None, None)
    if cls is not OwnOptimizer:
        swa = SWA(make(model), CONFIG)
        optimizers = (swa, schedule(swa))
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **{"save_strategy": "no", **options},
    )
    return cls(
        model,
        arguments,
        train_dataset=DATA,
        eval_dataset=DATA,
        optimizers=optimizers,
        callbacks=[*callbacks],
    )


def swa_of(trainer):
    return trainer.optimizer.optimizer


def plain_loop(make=adamw, schedule=cosine, accumulate=1, clip=1.0, dtype=torch.float32):
    """The same training without the Trainer and, besides, without averaging: the snapshots."""
    model = bert(0.0, dtype)
    optimizer = make(model)
    scheduler = schedule(optimizer)
    snapshots = []
    model.train()
    if make is schedule_free:
        optimizer.train()
    for number in range(LENGTH * EPOCHS):
        rows = DATA[number % LENGTH * BATCH :][:BATCH]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        # The Trainer leaves it to the model to divide an accumulated loss, and this one does not.
        model(**batch).loss.backward()
        if (number + 1) % accumulate:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        update = (number + 1) // accumulate
        if update >= 4 and update % 2 == 0:
            snapshots.append(values(model.parameters()))
    return model, snapshots


# What the Trainer is told, and the same for the plain loop.
RUNS = {
    "as it is": ({}, {}),
    "gradient accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "gradient clipping": ({"max_grad_norm": 0.1}, {"clip": 0.1}),
    "half precision": ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
    "schedule-free": (
        {"make": schedule_free, "schedule": constant},
        {"make": schedule_free, "schedule": constant},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_and_averages_as_the_plain_loop_does(name, tmp_path):
    options, plainly = RUNS[name]
    run = trainer(tmp_path, dropout=0.0, train_sampling_strategy="sequential", **options)
    run.train()
    model, snapshots = plain_loop(**plainly)
    swa = swa_of(run)
    assert isinstance(swa, SWA)
    assert swa.updates == run.state.global_step == LENGTH * EPOCHS // plainly.get("accumulate", 1)
    assert swa.n_averaged == len(snapshots) >= 3
    assert same(run.model.parameters(), model.parameters())
    assert close(swa.averaged_parameters, means(snapshots))


def end(run):
    swa = swa_of(run)
    return (
        values([*run.model.parameters(), *swa.averaged_parameters]),
        (swa.updates, swa.n_averaged, swa.n_skipped, run.state.global_step),
        swa.param_groups[0]["lr"],
    )


def same_end(one, other):
    return same(one[0], other[0]) and one[1:] == other[1:]


RESUMED = {
    "as it is": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "half precision": {"dtype": torch.bfloat16},
    "schedule-free": {"make": schedule_free, "schedule": constant},
    "the Trainer's own optimizer": {"cls": OwnOptimizer},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_from_any_of_its_checkpoints_it_ends_the_same(name, tmp_path):
    options = RESUMED[name]
    run = trainer(tmp_path, save_strategy="steps", save_steps=3, **options)
    run.train()
    whole = end(run)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(checkpoints) == -(-whole[1][0] // 3)  # the end is saved too
    for checkpoint in checkpoints[::2]:
        resumed = trainer(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same_end(end(resumed), whole)
        averages = swa_of(resumed).averaged_parameters
        assert all(average.dtype == torch.float32 for average in averages)


@pytest.mark.parametrize("make", [adamw, schedule_free])
def test_evaluation_is_on_the_average_and_training_goes_on_as_without(make, tmp_path):
    """The Trainer calls ``eval()`` of a schedule-free optimizer while the average stands in."""

    class Look(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_evaluate(self, args, state, control, model, metrics, **kwargs):
            self.seen.append((values(model.parameters()), metrics["eval_loss"]))

    options = {"make": make, "schedule": constant, "eval_strategy": "steps", "eval_steps": 6}
    # Evaluates as often, for what eval() and train() of such an optimizer round.
    plain = trainer(tmp_path, cls=transformers.Trainer, **options)
    plain.train()
    look = Look()
    run = trainer(tmp_path, callbacks=[look], **options)
    run.train()
    assert same_end(end(run), end(plain))
    weights, loss = look.seen[-1]
    assert len(look.seen) == 3
    assert same(weights, swa_of(run).averaged_parameters)
    run.model.eval()
    with swa_of(run).averaged(), torch.no_grad():
        batch = {key: torch.stack([row[key] for row in DATA]) for key in DATA[0]}
        assert float(run.model(**batch).loss) == pytest.approx(loss, rel=1e-5)


def test_a_checkpoint_taken_while_evaluating_on_the_average_resumes_on_the_live_weights(tmp_path):
    class Save(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            if state.global_step == 10:
                run._save_checkpoint(model, trial=None)

    options = {"eval_strategy": "steps", "eval_steps": 5}
    run = trainer(tmp_path, callbacks=[Save()], **options)
    run.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same_end(end(resumed), end(run))


def test_the_average_is_kept_and_saved_as_the_model(tmp_path):
    run = trainer(tmp_path)
    run.train()
    average = swa_of(run).averaged_parameters
    swa_of(run).finalize()
    run.save_model(str(tmp_path / "final"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "final")
    assert same(model.parameters(), average)
