"""DistributedDataParallel around a Keras model, in a loop of one's own, as Keras' guide has it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from adapter_keras.distributed.training import (
    BATCH,
    CONFIG,
    X,
    Y,
    network,
    numpys_statistics,
    of_every_update,
    statistics_are_those_of,
)
from adapter_keras.small_models import array, close, same, weights
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import swa_core
from swa_core import BatchNormError, SWAWarning
from swa_keras import SWA, update_bn

UPDATES = 12


class Rank(NamedTuple):
    """A training on this process."""

    model: Any
    wrapped: Any
    optimizer: Any
    swa: SWA
    recorded: dict[int, list[np.ndarray]]


def loader() -> Any:
    sampler = DistributedSampler(TensorDataset(*map(torch.tensor, (X, Y))), shuffle=False)
    return DataLoader(sampler.dataset, batch_size=BATCH // dist.get_world_size(), sampler=sampler)


def share() -> list[Any]:
    """What this process sees, in batches as large as in its training."""
    return [(x.numpy(),) for x, _ in loader()]


def begun() -> Rank:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    swa = SWA(CONFIG, bn_data=share())
    return Rank(model, DistributedDataParallel(model), optimizer, swa, {})


def train(rank: Rank, begin: int, end: int, *, training: bool = True, average: bool = True) -> Rank:
    batches = [*loader()]
    for update in range(begin, end):
        x, y = batches[update % len(batches)]
        rank.optimizer.zero_grad()
        torch.nn.functional.mse_loss(rank.wrapped(x, training=training), y).backward()
        rank.optimizer.step()
        if average:
            rank.swa.update(rank.model)
        rank.recorded[update + 1] = weights(rank.model)
    return rank


@cache
def run() -> Rank:
    return train(begun(), 0, UPDATES)


def told_alike(arrays: Any) -> None:
    """That all processes hold the same, to the last bit."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, arrays)
    for others in found:
        same(arrays, others)


def own(model: Any) -> list[np.ndarray]:
    return [array(variable) for variable in model.variables]


def check_averages_are_the_cores_and_the_same_on_all_ranks() -> None:
    rank = run()
    state = swa_core.init(rank.recorded[1])
    for recorded in rank.recorded.values():
        state = swa_core.update(state, recorded, rank.swa.schedule, swa_core.Uniform())
    assert rank.swa.n_averaged == state.n_averaged == 3
    close(rank.swa.averaged_weights, state.average, rtol=2e-6)
    told_alike(rank.swa.averaged_weights)


def check_averages_are_those_of_one_process_with_all_the_data() -> None:
    """Batch norm at rest, for each process would normalise by its own half of a batch."""
    rank = train(begun(), 0, UPDATES, training=False)
    model, swa = network(), SWA(CONFIG, bn_data=(X,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    for update in range(UPDATES):
        rows = slice(BATCH * (update % 4), BATCH * (update % 4 + 1))
        optimizer.zero_grad()
        outputs = model(torch.tensor(X[rows]), training=False)
        torch.nn.functional.mse_loss(outputs, torch.tensor(Y[rows])).backward()
        optimizer.step()
        swa.update(model)
    close(rank.swa.averaged_weights, swa.averaged_weights, rtol=1e-5)


def check_the_training_is_bit_identical_to_one_without() -> None:
    plain, averaged = train(begun(), 0, UPDATES, average=False), begun()
    train(averaged, 0, 8)
    with averaged.swa.averaged(averaged.wrapped):
        averaged.wrapped(torch.tensor(X), training=True)
    train(averaged, 8, UPDATES)
    same(own(averaged.model), own(plain.model))


def check_the_wrapper_computes_with_the_average() -> None:
    rank = run()
    before = own(rank.model)
    with rank.swa.averaged(rank.wrapped) as lent:
        assert lent is rank.wrapped
        same(weights(rank.model), rank.swa.averaged_weights)
        statistics_are_those_of(rank.model, X)
        told_alike(own(rank.model))
        inside = rank.wrapped(torch.tensor(X)).detach().numpy()
    same(own(rank.model), before)
    twin = network()
    for variable, average in zip(twin.trainable_variables, rank.swa.averaged_weights, strict=True):
        variable.assign(average)
    update_bn(DistributedDataParallel(twin), share())
    np.testing.assert_allclose(inside, twin(torch.tensor(X)).detach().numpy(), rtol=1e-5, atol=1e-6)


def check_the_wrapper_may_be_passed_everywhere() -> None:
    model = network()
    wrapped, swa = DistributedDataParallel(model), SWA({"start": "1step", "every": "1step"})
    with pytest.warns(SWAWarning, match="batch norm"):
        swa.begin(wrapped)
    swa.update(wrapped)
    swa.update(model)
    assert swa.n_averaged == 2
    swa.finalize(wrapped, bn_data=share())
    statistics_are_those_of(model, X)
    same(weights(model), swa.averaged_weights)


def check_update_bn_pools_uneven_shares_of_the_data() -> None:
    model = network()
    first = dist.get_rank() == 0
    mine = X[:20] if first else X[20:29]
    update_bn(DistributedDataParallel(model), mine, batch_size=6 if first else 4)
    statistics_are_those_of(model, X[:29])
    told_alike(own(model))


def check_a_model_that_is_not_wrapped_is_told_that_its_data_is_not_all() -> None:
    model = network()
    mine = np.concatenate([x for (x,) in share()])
    with pytest.warns(SWAWarning, match="of this process alone, and the 2 processes"):
        update_bn(model, share())
    mean, _ = numpys_statistics(model, mine)
    np.testing.assert_allclose(array(model.get_layer("norm").moving_mean), mean, rtol=1e-5)


def check_who_fails_to_read_its_data_tells_the_others() -> None:
    model = network()
    before = own(model)
    is_second = dist.get_rank() == 1
    match = "^the data held no batch" if is_second else "process 1 of 2 failed .* held no batch"
    with pytest.raises(BatchNormError, match=match):
        update_bn(DistributedDataParallel(model), X[:0] if is_second else X)
    same(own(model), before)


def check_bad_data_of_one_rank_is_refused_by_all() -> None:
    model = network()
    before, data = own(model), X.copy()
    if dist.get_rank() == 1:
        data[3] = np.nan
    with pytest.raises(BatchNormError, match="norm would hold NaN"):
        update_bn(DistributedDataParallel(model), data)
    same(own(model), before)


def check_ranks_that_freeze_differently_are_refused() -> None:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.BatchNormalization(), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    wrapped = DistributedDataParallel(model)
    layers[1].trainable = dist.get_rank() == 0
    with pytest.raises(BatchNormError, match=r"process \d would update the layers"):
        update_bn(wrapped, X)


def check_a_resumed_training_is_bit_identical() -> None:
    whole, first = run(), begun()
    train(first, 0, 7)
    values, momenta = own(first.model), first.optimizer.state_dict()
    state = first.swa.state_dict()
    second = begun()
    for variable, value in zip(second.model.variables, values, strict=True):
        variable.assign(value)
    second.optimizer.load_state_dict(momenta)
    second.swa.load_state_dict(state)
    train(second, 7, UPDATES)
    assert second.swa.n_averaged == whole.swa.n_averaged
    same(second.swa.averaged_weights, whole.swa.averaged_weights)
    same(own(second.model), own(whole.model))


def check_nan_from_the_data_of_one_rank_is_left_out_by_all() -> None:
    rank, swa = begun(), of_every_update()
    swa.update(rank.model)
    first = swa.averaged_weights
    x, y = next(iter(loader()))
    if dist.get_rank() == 1:
        x[0, 0] = float("nan")
    torch.nn.functional.mse_loss(rank.wrapped(x), y).backward()
    rank.optimizer.step()
    swa.update(rank.model)
    assert (swa.n_averaged, swa.n_skipped) == (1, 1)
    same(swa.averaged_weights, first)


def check_averages_follow_a_model_that_moves() -> None:
    """To the only other device there is everywhere, which keeps no values; ``model.to`` would give
    it other parameters there, unlike on a GPU, so this is done by hand."""
    model = network()
    swa = SWA({"start": "1step", "every": "1step", "nonfinite": "keep"}, bn_data=(X,))
    swa.update(model)
    assert {average.device.type for average in swa._average._tensors} == {"cpu"}
    for variable in model.trainable_variables:
        variable._value = torch.nn.Parameter(variable.value.to("meta"))
    swa.update(model)
    assert {average.device.type for average in swa._average._tensors} == {"meta"}


def check_a_finalized_model_is_the_same_on_all_ranks() -> None:
    rank = run()
    rank.swa.finalize(rank.wrapped)
    same(weights(rank.model), rank.swa.averaged_weights)
    statistics_are_those_of(rank.model, X)
    told_alike(own(rank.model))


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
