"""Step memory on fake tensors: against bytes counted by hand, against a real run's live storages, and against published
figures.
"""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trebuchet.strategies.fake_memory import fake_nf4, step_memory

GIB = 2**30


def test_bytes_counted_by_hand():
    """x [8, 16] -> ReLU(x W^T + b) [8, 32] -> sum, fp32, SGD: 16 x 32 weights, 32 biases."""

    def loss(net):
        return net(torch.zeros(8, 16)).sum()

    m = step_memory(
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU()), loss, lambda p: torch.optim.SGD(p, 0.1, foreach=False)
    )
    weights, x, y = 4 * (16 * 32 + 32), 4 * 8 * 16, 4 * 8 * 32
    assert m.weights_bytes == weights
    assert m.kept_by_forward_bytes == x + y + 4  # the input of the product, the output of the ReLU, the loss
    assert m.forward_peak_bytes == x + 2 * y  # the product's output is still there while the ReLU's is made
    assert m.gradients_bytes == weights and m.optimizer_state_bytes == 0


def test_adamw_holds_two_moments_and_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    m = step_memory(Tied, lambda net: net(torch.zeros(4, dtype=torch.long)).sum())
    assert m.weights_bytes == 4 * 50 * 8 == m.gradients_bytes
    assert m.optimizer_state_bytes == pytest.approx(2 * m.weights_bytes, abs=16)  # and the step counter
    assert m.peak_bytes >= 3 * m.weights_bytes


class RealStorages(TorchDispatchMode):
    """Live bytes of real storages, as the operating system would have to hold them."""

    def __init__(self, net):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {p.untyped_storage()._cdata for p in net.parameters()}  # views of weights are no new bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, size):
        self.seen.discard(key)
        self.live -= size


def test_a_fake_run_holds_what_a_real_run_holds():
    def build():
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        return nn.Sequential(layer, nn.Linear(64, 300))

    def loss(net):
        return nn.functional.cross_entropy(
            net(torch.zeros(3, 40, 64)).flatten(0, 1), torch.zeros(120, dtype=torch.long)
        )

    fake = step_memory(build, loss)
    net = build()
    with RealStorages(net) as real:
        value = loss(net)
        forward = real.peak
        value.backward()
    assert fake.forward_peak_bytes == pytest.approx(forward, rel=0.01)
    assert max(fake.forward_peak_bytes, fake.backward_peak_bytes) == pytest.approx(real.peak, rel=0.01)


@pytest.mark.slow
def test_the_published_peaks_of_an_8b_lora_step():
    """transformers 5.23 and PEFT 0.21, 2 x 2,048 tokens: 7.10 GiB above the weights checkpointed, 30.57 without; 15.04
    of weights.
    """
    for checkpointed, published in ((True, 7.10), (False, 30.57)):
        few, more = (_llama(layers, checkpointed) for layers in (2, 4))
        whole = few.peak_bytes + 15 * (more.peak_bytes - few.peak_bytes)  # 2 layers are 1/15 of the 30 that are missing
        assert whole / GIB == pytest.approx(published, rel=0.03)
        assert (few.weights_bytes + 15 * (more.weights_bytes - few.weights_bytes)) / GIB == pytest.approx(
            15.04, abs=0.01
        )


def test_nf4_layers_weigh_what_bitsandbytes_packs():
    def build():
        net = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)).bfloat16()
        fake_nf4(net)
        return net

    def loss(net):
        return net(torch.zeros(4, 256, dtype=torch.bfloat16, requires_grad=True)).float().sum()

    m = step_memory(build, loss, lambda p: torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    numel = 2 * 256 * 512
    packed, scales, second = numel // 2, numel // 64, 4 * numel // 64 // 256
    assert m.weights_bytes == packed + scales + second + 2 * (4 * 16 + 4 * 256 + 4)  # and the code tables of each layer


def _llama(layers, checkpointed):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def build():
        config = LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, attn_implementation="sdpa",
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        try:
            net = LlamaForCausalLM(config)
            net = get_peft_model(net, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
        finally:
            torch.set_default_dtype(torch.float32)
        if checkpointed:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            net.enable_input_require_grads()
        return net.train()

    def loss(net):
        ids = torch.zeros(2, 2048, dtype=torch.long)
        return net(input_ids=ids, use_cache=False, labels=ids).loss

    return step_memory(build, loss)
