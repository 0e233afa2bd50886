"""update_bn on the batches of transformers: what its tokenizers and image processors return."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BatchEncoding,
    BatchFeature,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)

from swa_torch import update_bn
from swa_torch.batches import moved

WORDS = {"[PAD]": 0, "[UNK]": 1, "weights": 2, "are": 3, "averaged": 4, "often": 5}
SENTENCES = ["weights are averaged", "often", "averaged weights", "are weights often averaged"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", return_token_type_ids=False
    )


class Embedded(nn.Module):
    """Normalises the embedded words, and not the padding."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(len(WORDS), 3), nn.BatchNorm1d(3)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        return self.norm(self.embed(input_ids)[attention_mask.bool()])


def test_what_a_tokenizer_returns(tokenizer):
    model = Embedded()
    batches = [
        tokenizer(SENTENCES, padding=True, return_tensors="pt"),
        tokenizer(SENTENCES[:2], padding=True, return_tensors="pt"),
    ]
    assert all(type(batch) is BatchEncoding for batch in batches)
    update_bn(model, batches)
    words = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    embedded = model.embed(words).double()
    torch.testing.assert_close(
        model.norm.running_mean.double(), embedded.mean(0), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(model.norm.running_var.double(), embedded.var(0), rtol=1e-6, atol=0)


def test_a_moved_batch_keeps_its_encodings_and_leaves_the_callers_where_it_is(tokenizer):
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    result = moved(batch, torch.device("meta"))
    assert type(result) is BatchEncoding
    assert all(value.is_meta for value in result.values())
    assert not any(value.is_meta for value in batch.values())
    assert result.word_ids(0) == batch.word_ids(0)


def test_what_an_image_processor_returns():
    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=2,
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).eval()  # as from_pretrained() gives it
    seen = []
    first = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda layer, args: seen.append(args[0].double()))
    batches = [
        BatchFeature(
            {"pixel_values": torch.randn(n, 1, 16, 16) + n, "labels": torch.ones(n).long()}
        )
        for n in (4, 4, 2)
    ]
    update_bn(model, batches)
    channels = torch.cat(seen).movedim(1, 0).flatten(1)
    torch.testing.assert_close(first.running_mean.double(), channels.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first.running_var.double(), channels.var(1), rtol=1e-6, atol=0)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) > 4
    assert all(layer.num_batches_tracked == 3 for layer in layers)
    assert not model.training
