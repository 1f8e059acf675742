"""Packed documents are computed as each alone is with transformers' attention, and without a tensor of N * N."""

import pytest
import torch
from harness import llamas, tiny
from harness.checkout import training_example
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = (1, 5, 16, 17, 40, 48)  # of documents; W is 16


@pytest.fixture(scope="module", autouse=True)
def packed_attention():
    with training_example("packed_attention") as module:
        yield module


def packed(lengths, vocab_size):
    """Inputs of documents in one row, and each document's tokens."""
    torch.manual_seed(0)
    documents = [torch.randint(0, vocab_size, (length,)) for length in lengths]
    inputs = dict(
        input_ids=torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0),
    )
    return inputs, documents


@pytest.mark.parametrize("kind", ["YOCO-U", "the authors'", "Llama"])
def test_documents_do_not_see_each_other(kind, tmp_path):
    """Logits and gradients, of windows that end within, at and after a document's end."""
    if kind == "Llama":
        model = llamas.save_llama(tmp_path)
    else:
        switches = dict(differential_attention="v2") if kind == "the authors'" else {}
        model = tiny.model(tiny.config(**switches))
    inputs, documents = packed(LENGTHS, model.config.vocab_size)
    apart = torch.cat([model(document[None], use_cache=False).logits for document in documents], dim=1)
    weights = torch.randn_like(apart)
    (apart * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("packed")
    together = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
    (together * weights).sum().backward()
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4 * largest, rtol=1e-4, msg=name)


def test_several_rows_of_a_batch():
    model = tiny.model(tiny.config())
    ids = torch.randint(0, model.config.vocab_size, (3, 37), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation("packed")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple) else (result,)
        self.numbers = max([self.numbers, *(each.numel() for each in found if isinstance(each, torch.Tensor))])
        return result


@pytest.mark.parametrize("attention, squares", [("packed", False), ("sdpa", True)])
def test_no_tensor_has_a_number_for_each_pair_of_tokens(attention, squares):
    N = 1000
    model = tiny.model(tiny.config(vocab_size=64, max_position_embeddings=N))
    model.set_attn_implementation(attention)
    with Largest() as largest:
        model(torch.arange(N)[None] % 64, use_cache=False).logits.sum().backward()
    assert (largest.numbers >= N * N) == squares
