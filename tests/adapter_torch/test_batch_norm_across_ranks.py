"""update_bn in two processes over gloo: one torchrun, and what each rank saw of each scenario."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_torch import batch_norm_ranks as ranks

from swa_torch import update_bn

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both ranks saw: name of the scenario -> [rank 0, rank 1]."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(HERE / "batch_norm_ranks.py"), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    both = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [told[name] for told in both] for name in ranks.SCENARIOS}


def results(told):
    assert all("result" in one for one in told), told
    return [one["result"] for one in told]


def errors(told):
    assert all("error" in one for one in told), told
    return [one["error"] for one in told]


def alone(data):
    """The statistics that one process gets from all of the data."""
    model = ranks.network()
    update_bn(model, data)
    return [buffer.flatten() for buffer in model.buffers()]


def assert_pooled(told, expected):
    first, second = (result["statistics"] for result in told)
    assert first == second  # to the last bit
    for mine, theirs in zip(first, expected, strict=True):
        values = torch.tensor([float.fromhex(value) for value in mine], dtype=torch.float64)
        torch.testing.assert_close(values, theirs.double(), rtol=1e-12, atol=1e-12)


ALL = ranks.share(0) + ranks.share(1)


@pytest.mark.parametrize("kind", ["wrapped", "named_group", "synchronised_layers"])
def test_ranks_get_the_statistics_of_the_whole_data(seen, kind):
    assert_pooled(results(seen[kind]), alone(ALL))


def test_ranks_are_exact_within_averaged_too(seen):
    # The first layer alone: averaged weights make what reaches the second.
    told = [{"statistics": one["statistics"][:2]} for one in results(seen["averaged"])]
    exact = torch.cat(ALL).double()
    assert_pooled(told, [exact.mean(0), exact.var(0)])


def test_a_rank_without_batches_gets_those_of_the_others(seen):
    assert_pooled(results(seen["a_rank_without_batches"]), alone(ranks.share(1)))


def test_two_collectives_whatever_the_number_of_batches_and_layers(seen):
    for told in ("wrapped", "many_batches_and_layers"):
        for one in results(seen[told]):
            assert one["calls"] == {"c10d.allgather_": 2}
    # What would be called, batch by batch, if nothing were done about it.
    (first, _) = results(seen["many_batches_and_layers"])
    assert first["a training forward"]["c10d.broadcast_"] > 0


def test_the_wrapper_is_as_before(seen):
    for one in results(seen["wrapped"]):
        assert one["wrapper"] == [True, True]
        assert one["training"]
    for one in results(seen["synchronised_layers"]):
        assert one["training"]
        assert one["momentum"] is None


def test_an_error_on_one_rank_is_an_error_on_all(seen):
    first, second = errors(seen["a_failing_rank"])
    assert first.startswith("BatchNormError: update_bn failed on rank 1 of the group.")
    assert second == "ZeroDivisionError: on purpose"
    first, second = errors(seen["a_rank_that_cannot_start"])
    assert first.startswith("BatchNormError: update_bn failed on rank 1 of the group.")
    assert second.startswith("TypeError: data must be an iterable of batches, got one Tensor")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_batches_at_all", "there are no batches"),
        ("different_layers", "the ranks would update different layers"),
        ("unbuilt_layers", "layer '0' is not built yet"),
        ("nan_on_one_rank", "the statistics of module.0, module.2 would hold NaN or Inf"),
        ("sharded_with_different_lengths", "the ranks have [1, 3] batches"),
    ],
)
def test_what_concerns_all_is_said_by_all(seen, kind, message):
    for error in errors(seen[kind]):
        assert error.startswith(f"BatchNormError: {message}") or message in error


def test_a_plain_model_is_updated_alone_and_a_warning_says_so(seen):
    for rank, one in enumerate(results(seen["plain_model"])):
        assert_pooled([one, one], alone(ranks.share(rank)))
        (said,) = one["said"]
        assert "Sequential is not wrapped for training in several processes" in said
        assert "update_bn(..., group=...)" in said


def test_one_process_may_call_it_alone(seen):
    first, _ = results(seen["one_process_alone"])
    assert_pooled([first, first], alone(ranks.share(0)))


def test_a_process_outside_the_group_is_told(seen):
    first, second = seen["a_group_of_others"]
    assert first["result"] is None
    assert second["error"].startswith("BatchNormError: this process is not in the group")


def test_sharded_weights(seen):
    told = results(seen["sharded"])
    assert all(one["gathered"] for one in told)
    assert all(one["sharded again"] for one in told)
    model = ranks.network()
    with torch.no_grad():
        model[1].weight.mul_(-2)
    update_bn(model, ranks.share(0, (2, 2)) + ranks.share(1, (2, 2)))
    assert_pooled(told, [buffer.flatten() for buffer in model.buffers()])


def test_the_first_rank_shows_the_bar(seen):
    assert [one["bars"] for one in results(seen["progress"])] == [1, 0]


def test_a_group_must_be_one():
    with pytest.raises(TypeError, match='group must be a process group, None or "auto", got str'):
        update_bn(ranks.network(), ALL, group="all")
