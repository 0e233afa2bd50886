"""Batches of any structure, on their way to the model's device; and the bar that counts them."""

import collections
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from swa_torch import update_bn
from swa_torch.batches import device_of, moved

META = torch.device("meta")  # stands for another device
Pair = collections.namedtuple("Pair", "x y")


def test_tensors_are_moved_wherever_they_are():
    x = torch.ones(2)
    batch = {"x": x, "more": [Pair(x, 3), (x, "text", None)], "n": 3}
    result = moved(batch, META)
    assert result["x"].is_meta
    assert isinstance(result["more"][0], Pair)
    assert (result["more"][0].x.is_meta, result["more"][0].y) == (True, 3)
    assert (result["more"][1][0].is_meta, result["more"][1][1:]) == (True, ("text", None))
    assert batch["x"] is x
    assert batch["more"][0].x is x


@pytest.mark.parametrize("device", [torch.device("cpu"), None])
def test_what_is_there_already_is_handed_on_as_it_is(device):
    class Picky(dict):
        def __init__(self, *, x):  # cannot be made from a dict
            super().__init__(x=x)

    for batch in (torch.ones(2), Pair(torch.ones(2), 1), [torch.ones(1)], Picky(x=torch.ones(1))):
        assert moved(batch, device) is batch


def test_mappings_keep_their_kind_and_what_else_they_hold():
    class Batch(collections.UserDict):
        note = None

    batch = Batch(x=torch.ones(2))
    batch.note = "kept"
    result = moved(batch, META)
    assert isinstance(result, Batch)
    assert (result.note, result["x"].is_meta, batch["x"].is_meta) == ("kept", True, False)
    ordered = moved(collections.OrderedDict(b=torch.ones(1), a=torch.ones(1)), META)
    assert isinstance(ordered, collections.OrderedDict)
    assert [*ordered] == ["b", "a"]
    default = moved(collections.defaultdict(list, x=torch.ones(1)), META)
    assert default.default_factory is list
    frozen = moved(types.MappingProxyType({"x": torch.ones(1)}), META)
    assert frozen["x"].is_meta


def test_packed_sequences_keep_their_lengths_on_the_host():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    (result, number) = moved((packed, 5), META)
    assert isinstance(result, PackedSequence)
    assert result.data.is_meta
    assert not result.batch_sizes.is_meta
    assert number == 5


def test_a_model_on_several_devices_gets_its_batches_as_they_are():
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.Linear(3, 3).to("meta")])
    assert device_of(model) is None
    update_bn(model, [torch.randn(4, 3)], forward=lambda model, batch: model[0](batch))
    assert model[0].num_batches_tracked == 1


@pytest.mark.parametrize("batch", [{1: torch.ones(2, 3)}, (), 5, "text", None])
def test_what_cannot_be_called_with_is_an_error(batch):
    with pytest.raises(TypeError, match=f"type {type(batch).__name__}; say how to call the model"):
        update_bn(nn.Sequential(nn.BatchNorm1d(3)), [batch])


@pytest.mark.parametrize("kind", [list, iter])
def test_a_bar_on_request(kind, capsys):
    data = [torch.randn(4, 3) for _ in range(3)]
    update_bn(nn.Sequential(nn.BatchNorm1d(3)), kind(data))
    assert capsys.readouterr().err == ""
    model = nn.Sequential(nn.BatchNorm1d(3))
    update_bn(model, kind(data), progress=True)
    bar = capsys.readouterr().err
    assert "update_bn" in bar
    assert ("3/3" if kind is list else "3batch") in bar
    assert model[0].num_batches_tracked == 3


def test_without_tqdm_the_bar_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ModuleNotFoundError, match="pip install tqdm"):
        update_bn(model, [torch.randn(4, 3)], progress=True)
    update_bn(model, [torch.randn(4, 3)])
