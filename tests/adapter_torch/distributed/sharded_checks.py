"""Averages of weights that are sharded over ranks, or replicated."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapter_torch.distributed.training import (
    CONFIG,
    KEEP,
    adam,
    averaging,
    backward,
    batch,
    bits,
    network,
    same,
    same_on_all_ranks,
    sgd,
    sharded,
    train,
    whole,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from swa_core import StructureError, SWAWarning


def mean(snapshots: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(of_one).double().mean(0).float() for of_one in zip(*snapshots, strict=True)]


def check_averages_are_sharded_like_their_parameters(folder: Path) -> None:
    model = sharded()
    optimizer = averaging(model)
    snapshots = []

    def remember() -> None:
        if optimizer.schedule.is_snapshot(optimizer.updates):
            snapshots.append(whole(model.parameters()))

    train(model, optimizer, 0, 7, after=remember)
    assert optimizer.n_averaged == len(snapshots) == 3
    averages = optimizer.averaged_parameters
    for average, parameter in zip(averages, model.parameters(), strict=True):
        assert isinstance(average, DTensor)
        assert average.placements == parameter.placements
        assert average.device_mesh == parameter.device_mesh
        assert average.shape == parameter.shape
        assert average.stride() == parameter.stride()
        assert average.to_local().shape == parameter.to_local().shape
        assert not average.requires_grad
    shards = optimizer._average.cohorts[0].averages
    assert [shard.shape for shard in shards] == [p.to_local().shape for p in model.parameters()]
    for average, expected in zip(whole(averages), mean(snapshots), strict=True):
        torch.testing.assert_close(average, expected, rtol=2e-6, atol=1e-7)


def check_the_first_snapshot_is_a_copy_of_each_shard(folder: Path) -> None:
    model = sharded()
    optimizer = averaging(model)
    train(model, optimizer, 0, 2)
    assert same(whole(optimizer.averaged_parameters), whole(model.parameters()))
    train(model, optimizer, 2, 3)
    assert not same(whole(optimizer.averaged_parameters), whole(model.parameters()))


def collectives(function) -> dict[str, int]:
    with CommDebugMode() as mode:
        function()
    return {str(name): number for name, number in mode.get_comm_counts().items() if number}


def check_collectives_of_sharded_weights(folder: Path) -> None:
    for config, at_a_snapshot in ((KEEP, {}), (CONFIG, {"c10d.allreduce_": 1})):
        for make in (None, adam):
            model = sharded()
            optimizer = averaging(model, *([make] if make else []), config=config)
            for update in range(5):
                backward(model, optimizer, update)
                is_snapshot = optimizer.schedule.is_snapshot(update + 1)
                expected = at_a_snapshot if is_snapshot else {}
                assert collectives(optimizer.step) == expected, (update, config)

            def use(model=model, optimizer=optimizer) -> None:
                with optimizer.averaged(model):
                    pass
                assert optimizer.averaged_parameters
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.finalize(model)

            assert collectives(use) == {}
    # The counting itself: gathering a weight is seen.
    assert collectives(lambda: whole(model.parameters())[0])


def check_shards_are_averaged_on_the_host(folder: Path) -> None:
    last = dist.get_world_size() - 1
    for config, at_a_snapshot in ((KEEP, {}), (CONFIG, {"c10d.allreduce_": 1})):
        came_to = []
        for device in (None, "cpu"):
            model = sharded()
            optimizer = averaging(model, config=config, device=device)
            if device:
                # These weights are on the host already: have them copied aside all the same.
                optimizer._average.host.always = True
            train(model, optimizer, 0, 5)
            if config is CONFIG and dist.get_rank() == last:
                with torch.no_grad():
                    model[0].weight.to_local().view(-1)[-1:] = float("nan")
            backward(model, optimizer, 5)
            assert collectives(optimizer.step) == at_a_snapshot
            counts = (optimizer.n_averaged, optimizer.n_skipped)
            assert counts == ((3, 0) if config is KEEP else (2, 1))
            with optimizer.averaged(model):
                came_to.append([*whole(model.parameters()), *whole(optimizer.averaged_parameters)])
        assert same(*came_to)


def check_collectives_of_replicated_weights(folder: Path) -> None:
    for config in (KEEP, CONFIG):
        model = DistributedDataParallel(network())
        optimizer = averaging(model, config=config)
        for update in range(5):
            backward(model, optimizer, update)
            assert collectives(optimizer.step) == {}


def check_a_nan_in_one_shard_is_left_out_by_all_ranks(folder: Path) -> None:
    last = dist.get_world_size() - 1
    model = sharded()
    optimizer = averaging(model)
    train(model, optimizer, 0, 2)
    before = whole(optimizer.averaged_parameters)
    train(model, optimizer, 2, 3)
    backward(model, optimizer, 3)
    with torch.no_grad():
        weight = model[0].weight.to_local()
        kept = weight.clone()
        if dist.get_rank() == last:
            weight[0, 3] = float("nan")
    optimizer.step()
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (4, 1, 1)
    assert same(whole(optimizer.averaged_parameters), before)
    # And on they go, together.
    with torch.no_grad():
        weight.copy_(kept)
    train(model, optimizer, 4, 6)
    assert (optimizer.n_averaged, optimizer.n_skipped) == (2, 1)


def check_replicated_weights_are_left_out_by_all_ranks(folder: Path) -> None:
    model = DistributedDataParallel(network())
    optimizer = averaging(model)
    train(model, optimizer, 0, 3)
    x, y = batch(3)
    if dist.get_rank() == 0:
        y = y * float("nan")
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert (optimizer.n_averaged, optimizer.n_skipped) == (1, 1)
    assert same_on_all_ranks(bits(optimizer.averaged_parameters))


def check_replicated_weights_have_the_average_on_every_rank(folder: Path) -> None:
    model = DistributedDataParallel(network())
    optimizer = averaging(model)
    snapshots = []
    train(model, optimizer, 0, 6, after=lambda: snapshots.append(whole(model.parameters())))
    for average, expected in zip(optimizer.averaged_parameters, mean(snapshots[1::2]), strict=True):
        torch.testing.assert_close(average, expected, rtol=2e-6, atol=1e-7)
    assert same_on_all_ranks(bits(optimizer.averaged_parameters))


def plain_twin(tensors: list[torch.Tensor]) -> torch.nn.Module:
    twin = network()
    with torch.no_grad():
        for parameter, value in zip(twin.parameters(), whole(tensors), strict=True):
            parameter.copy_(value)
    return twin


def check_the_model_computes_with_the_average_and_then_with_its_weights(folder: Path) -> None:
    x = batch(99, rank=0)[0]
    for reshard in (None, False, True):
        model = sharded(reshard_after_forward=reshard)
        optimizer = averaging(model)
        train(model, optimizer, 0, 5)
        averaged = plain_twin(optimizer.averaged_parameters)
        live = plain_twin([*model.parameters()])
        with torch.no_grad():
            # A forward pass without a backward one may leave whole weights in the model.
            torch.testing.assert_close(model(x), live(x))
            with optimizer.averaged(model):
                torch.testing.assert_close(model(x), averaged(x))
                assert not torch.allclose(model(x), live(x))
            torch.testing.assert_close(model(x), live(x))
            assert not torch.allclose(model(x), averaged(x))
        train(model, optimizer, 5, 6)
        averaged = plain_twin(optimizer.averaged_parameters)
        with torch.no_grad():
            model(x)
            optimizer.finalize(model)
            torch.testing.assert_close(model(x), averaged(x))
        assert same(whole(model.parameters()), [*averaged.parameters()])


def check_training_is_not_disturbed(folder: Path) -> None:
    x = batch(99, rank=0)[0]
    plain, model = sharded(), sharded()
    inner, optimizer = sgd(plain), averaging(model)
    for update in range(6):
        train(plain, inner, update, update + 1)
        train(model, optimizer, update, update + 1)
        if optimizer.n_averaged:
            with torch.no_grad(), optimizer.averaged(model):
                model(x)
            with torch.no_grad():
                optimizer.averaged_state_dict(model)
    assert same(whole(plain.parameters()), whole(model.parameters()))


def check_sharded_weights_without_their_model_are_refused(folder: Path) -> None:
    model = sharded()
    optimizer = averaging(model)
    train(model, optimizer, 0, 2)
    live = whole(model.parameters())
    for use in (lambda: optimizer.averaged().__enter__(), optimizer.finalize):
        with pytest.raises(TypeError, match="model="):
            use()
    assert same(whole(model.parameters()), live)
    train(model, optimizer, 2, 3)


def check_an_error_inside_restores_every_shard(folder: Path) -> None:
    model = sharded()
    optimizer = averaging(model)
    train(model, optimizer, 0, 3)
    live, average = whole(model.parameters()), whole(optimizer.averaged_parameters)
    try:
        with optimizer.averaged(model):
            assert same(whole(model.parameters()), average)
            assert same(whole(optimizer.averaged_parameters), average)
            raise KeyError
    except KeyError:
        pass
    assert same(whole(model.parameters()), live)
    assert same(whole(optimizer.averaged_parameters), average)


def check_who_writes_to_a_shard_inside_is_told_of(folder: Path) -> None:
    model = sharded()
    optimizer = averaging(model)
    train(model, optimizer, 0, 3)
    live = whole(model.parameters())

    def write() -> None:
        with torch.no_grad(), optimizer.averaged(model):
            model[0].weight.add_(1.0)

    with pytest.warns(SWAWarning, match="were written to"):
        write()
    assert same(whole(model.parameters()), live)


def check_what_was_flattened_is_refused(folder: Path) -> None:
    for keeps_names in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is the forerunner, and slow without a GPU
            model = FullyShardedDataParallel(
                network(), use_orig_params=keeps_names, device_id=torch.device("cpu")
            )
            with pytest.raises(StructureError, match="FullyShardedDataParallel has flattened"):
                averaging(model)


def check_half_precision(folder: Path) -> None:
    # Mixed precision: the shards, and so the averages, are float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(policy=policy)
    optimizer = averaging(model)
    train(model, optimizer, 0, 4)
    assert {average.dtype for average in optimizer.averaged_parameters} == {torch.float32}
    average = plain_twin(optimizer.averaged_parameters)
    x = batch(99, rank=0)[0]
    with torch.no_grad(), optimizer.averaged(model):
        assert same(whole(model.parameters()), [*average.parameters()])
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x).float(), average(x), rtol=0.05, atol=0.05)
    # Weights that are bfloat16 themselves still have a float32 average.
    model = sharded().bfloat16()
    optimizer = averaging(model)
    snapshots = []
    for update in range(6):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(update + 1))
        optimizer.step()
        snapshots.append(whole(model.parameters()))
    averages = optimizer.averaged_parameters
    assert {average.dtype for average in averages} == {torch.float32}
    for average, expected in zip(whole(averages), mean(snapshots[1::2]), strict=True):
        torch.testing.assert_close(average, expected, rtol=2e-6, atol=1e-7)
    with optimizer.averaged(model):
        rounded = [average.bfloat16() for average in whole(averages)]
        assert same(whole(model.parameters()), rounded)
    assert same(whole(model.parameters()), snapshots[-1])


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}
