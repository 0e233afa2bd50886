"""A saved average, put beside a configuration as it is, is a model of transformers."""

from __future__ import annotations

import pytest
import safetensors
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from swa_core.checkpoints import average
from swa_torch import SWA


@pytest.fixture(autouse=True)
def quietly():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def trained(dtype=torch.float32):
    """A model whose output layer is tied to its embedding, and its average."""
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(small).to(dtype)
    optimizer = SWA(
        torch.optim.SGD(model.parameters(), lr=0.1), {"start": "2step", "every": "1step"}
    )
    for _ in range(4):
        words = torch.randint(0, 40, (2, 10))
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def test_from_pretrained_loads_an_average(tmp_path):
    model, optimizer = trained()
    model.config.save_pretrained(tmp_path)
    optimizer.save_average(tmp_path / "model.safetensors", model)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    found, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    words = torch.randint(0, 40, (2, 10))
    with torch.no_grad():
        live = model(input_ids=words).logits
        with optimizer.averaged(model):
            expected = model(input_ids=words).logits
        logits = found.eval()(input_ids=words).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, live)
    assert found.lm_head.weight is found.transformer.wte.weight


def test_from_pretrained_loads_an_average_of_what_save_pretrained_has_saved(tmp_path):
    # Sharded, tied, in bfloat16; the configuration beside it is copied.
    model, _ = trained(torch.bfloat16)
    for place in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(place)
        model.save_pretrained(tmp_path / f"step-{place}", max_shard_size="5KB")
    assert (tmp_path / "step-0" / "model.safetensors.index.json").exists()
    average([tmp_path / "step-0", tmp_path / "step-1"], tmp_path / "out")
    found, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert found.dtype == torch.bfloat16
    one = GPT2LMHeadModel.from_pretrained(tmp_path / "step-0")
    for mean, first, last in zip(
        found.parameters(), one.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(mean, ((first.float() + last.float()) / 2).bfloat16())
