import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slablm.runtime.narrow import NarrowEmbedding, NarrowLinear, narrow_matrices


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.other = nn.Linear(8, 8)
        for matrix in (self.embedding.weight, self.other.weight):
            matrix.data = matrix.data.half().float()
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.other(self.embedding(tokens)))


TOKENS = torch.arange(12).view(2, 6)


@torch.no_grad()
def test_the_model_computes_the_same_with_half_the_memory():
    model = Small()
    before, state = model(TOKENS), dict(model.state_dict())
    narrow_matrices(model, torch.float16)
    assert torch.allclose(model(TOKENS), before, rtol=1e-5, atol=1e-6)
    assert isinstance(model.embedding, NarrowEmbedding)
    assert isinstance(model.other, NarrowLinear)
    assert model.embedding.weight is model.head.weight
    assert (model.embedding.num_embeddings, model.embedding.embedding_dim) == (20, 8)
    assert (model.head.in_features, model.head.out_features) == (8, 20)
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float16 if tensor.ndim == 2 else torch.float32)
        assert torch.equal(tensor.float(), state[name])


def test_what_would_lose_digits_stays():
    model = Small()
    with torch.no_grad():
        model.other.weight[0, 0] = 1 / 3
        model.embedding.weight[3, 3] = 1e6
    narrow_matrices(model, torch.float16)
    assert type(model.other) is nn.Linear
    assert type(model.embedding) is nn.Embedding


@torch.no_grad()
def test_a_transposed_matrix_is_narrowed_to_rows():
    model = nn.Sequential(nn.Linear(8, 20))
    model[0].weight.data = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).half().float().T
    inputs = torch.ones(1, 8)
    before = model(inputs)
    narrow_matrices(model, torch.float16)
    assert model[0].weight.is_contiguous()
    torch.testing.assert_close(model(inputs), before)


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return 3 * super().forward(tokens)


@pytest.mark.parametrize("odd", [Scaled(20, 8), nn.Embedding(20, 8, max_norm=0.1)])
def test_embeddings_that_do_more_stay_and_so_does_what_is_tied_to_them(odd):
    model = Small()
    odd.weight = model.embedding.weight
    model.embedding = odd
    narrow_matrices(model, torch.float16)
    assert model.embedding is odd
    assert type(model.head) is nn.Linear
    assert isinstance(model.other, NarrowLinear)


@torch.no_grad()
def test_casting_changes_the_computation_and_not_the_weight():
    model = Small()
    narrow_matrices(model, torch.float16)
    stored = model.embedding.weight
    assert model.to(torch.bfloat16)(TOKENS).dtype == torch.bfloat16
    assert model.embedding.weight is model.head.weight is stored
    assert model.float()(TOKENS).dtype == torch.float32
    assert stored.dtype == torch.float16


def test_a_loaded_model_keeps_its_embedding_as_it_is_stored(compressed_folder):
    model = AutoModelForCausalLM.from_pretrained(compressed_folder)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float16
    assert model.get_output_embeddings().weight.dtype == torch.float16
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    model.tie_weights()
    assert model(TOKENS).logits.dtype == torch.float32
