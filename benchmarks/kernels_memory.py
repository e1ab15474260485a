"""Memory of a training step with the kernel layer and without it: on this machine's CPU, and of an 8B model on fake
tensors.

    python benchmarks/kernels_memory.py cpu                peak RSS of one step of SmolLM2-135M, each way in a process
    of its own python benchmarks/kernels_memory.py fake [--layers 32] a Llama-3-8B-shaped step, counted storage by
    storage; no GPU, no 16 GB

cpu: LoRA r 16 on all linear layers, bf16 base, 2 x 2,048 tokens, no activation checkpointing. "transformers" is the
model with its own loss (labels in, logits whole); "chunked loss" is the same model with the loss as liger-kernel
computes it, written in torch; "layer" is the patched model. Peak RSS is the kernel's figure for the process; below it,
the same less what the process held before the step.

fake: bf16 weights, LoRA r 16 in bf16 ("lora fp32": PEFT's default), 2 x 2,048 tokens, AdamW; "full" has fp32 weights
under autocast. GiB above the weights, as an ideal allocator would hold them: see `strategies/fake_memory.py`. The
published figures to compare with (transformers 5.23, PEFT 0.21): 7.10 GiB with full checkpointing and 30.57 without.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

MODEL = Path("~/.cache/trebuchet/models/SmolLM2-135M-Instruct").expanduser()
ROWS, TOKENS, RANK = 2, 2048, 16
WAYS = ("transformers", "chunked loss", "layer")
MIB, GIB = 2**20, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cpu", "fake"])
    parser.add_argument("--layers", type=int, default=32, help="of the 8B shape; fewer is faster")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_step(options.way)))
    elif options.what == "cpu":
        cpu()
    else:
        fake(options.layers)


# --- measured on this machine -----------------------------------------------------------------------------------------


def cpu() -> None:
    # The allocator as it comes keeps freed memory in ways that differ from run to run; returning large blocks at once
    # does not.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, "cpu", "--way", way], env=environment, capture_output=True, text=True, check=True
        )
        found[way] = json.loads(done.stdout.splitlines()[-1])
        r = found[way]
        print(
            f"{way:<14} peak RSS {r['peak_mib']:7.0f} MiB   above the loaded model {r['step_mib']:7.0f} MiB   "
            f"{r['seconds']:5.1f} CPU-s   loss {r['loss']:.4f}",
            flush=True,
        )
    for way in WAYS[:2]:
        whole, step = (found[way][k] / found["layer"][k] for k in ("peak_mib", "step_mib"))
        print(f"{way} / layer: {whole:.2f} x peak RSS, {step:.2f} x above the loaded model")


def one_step(way: str) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trebuchet.kernels.patch import patch

    torch.manual_seed(0)
    net: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, attn_implementation="sdpa")
    net = get_peft_model(net, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    if way == "layer":
        patch(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, net.config.vocab_size, (ROWS, TOKENS + 1))
    ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    before, start = _rss(), time.process_time()
    loss = _loss(net, way, ids, labels)
    loss.backward()
    optimizer.step()
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_mib": peak / MIB, "step_mib": (peak - before) / MIB, "seconds": seconds, "loss": loss.item()}


def _loss(net: Any, way: str, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if way == "layer":
        return -net(input_ids=ids, use_cache=False, token_labels=labels).token_loss.logp.mean()
    if way == "transformers":
        logits = net(input_ids=ids, use_cache=False).logits
        return net.base_model.model.loss_function(logits, None, net.config.vocab_size, shift_labels=labels)
    causal = net.base_model.model
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
    return ChunkedLoss.apply(hidden.flatten(0, 1), causal.lm_head.weight, labels.flatten())


class ChunkedLoss(torch.autograd.Function):
    """Mean loss with the gradient computed in the forward pass, a few tokens at a time: Hsu et al., arXiv 2410.10989,
    section 3.2.

    Chunk size by their rule: next_pow2(ceil(N / ceil(V / H))). The head is frozen here, so its gradient is left out, as
    they do.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens, parts = len(hidden), -(-weight.shape[0] // weight.shape[1])
        chunk = 1 << (-(-tokens // parts) - 1).bit_length()
        gradient, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for at in range(0, tokens, chunk):
            rows, y = hidden[at : at + chunk], labels[at : at + chunk, None]
            logp = torch.log_softmax((rows @ weight.t()).float(), -1)
            total -= logp.gather(1, y).sum()
            d = logp.exp_().scatter_add_(1, y, logp.new_full((len(y), 1), -1.0)).div_(tokens)
            gradient[at : at + chunk] = d.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None, None


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- counted on fake tensors ------------------------------------------------------------------------------------------


def fake(layers: int) -> None:
    from trebuchet.strategies.fake_memory import step_memory

    print(f"Llama-3-8B shape, {layers} layers, {ROWS} x {TOKENS} tokens, GiB above the weights")
    print(f"{'':<38}weights  peak  kept by forward  gradients  optimizer   s")
    for method in ("lora", "lora fp32", "qlora", "full"):
        for checkpointed in (True, False):
            for patched in (False, True):
                start = time.perf_counter()
                m = step_memory(
                    lambda m=method, c=checkpointed, p=patched: shape_8b(m, layers, checkpointed=c, patched=p),
                    lambda net, m=method, p=patched: shape_loss(net, m, patched=p),
                )
                name = f"{method:<10}{'checkpointed' if checkpointed else '':<13}{'layer' if patched else 'transformers':<15}"
                values = [m.weights_bytes, m.peak_bytes, m.kept_by_forward_bytes, m.gradients_bytes]
                text = "  ".join(f"{v / GIB:6.2f}" for v in (*values, m.optimizer_state_bytes))
                print(f"{name}{text}  {time.perf_counter() - start:4.0f}", flush=True)


def shape_8b(method: str, layers: int, *, checkpointed: bool, patched: bool) -> Any:
    """The model on the meta device, adapted and patched, ready for `step_memory`."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trebuchet.kernels.patch import patch
    from trebuchet.strategies.fake_memory import fake_nf4

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, attn_implementation="sdpa",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if method == "full" else torch.bfloat16)
    try:
        net: Any = LlamaForCausalLM(config)
        if method == "qlora":
            fake_nf4(net)
        if method != "full":
            # PEFT would make the adapters fp32, and with them a copy of each adapted layer's input: "lora fp32".
            options = {"autocast_adapter_dtype": method == "lora fp32"}
            net = get_peft_model(net, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"), **options)
    finally:
        torch.set_default_dtype(default)
    if patched:
        patch(net)
    if checkpointed:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        net.enable_input_require_grads()
    return net.train()


def shape_loss(net: Any, method: str, *, patched: bool) -> torch.Tensor:
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=method == "full"):
        if patched:
            return -net(input_ids=ids, use_cache=False, token_labels=ids).token_loss.logp.sum()
        return net(input_ids=ids, use_cache=False, labels=ids).loss


if __name__ == "__main__":
    main()
