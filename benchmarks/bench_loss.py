"""Compare the loss with plain PyTorch and TRL, forward and backward, from logits.

    python benchmarks/bench_loss.py [--shape B T V] [--dtype float32] [--repeats 15]

Every provider must first agree with the float64 loss and gradient; one that does not is reported, not timed.
"""

import argparse
import importlib.util
from functools import partial

import torch
from measure import copy_bandwidth, measure
from providers import PROVIDERS, Inputs, eager, make_inputs
from tabulate import tabulate


def step(provider, inputs: Inputs) -> None:
    """Run one forward and backward."""
    provider(inputs.logits.detach().requires_grad_(), inputs).backward()


def disagreement(provider, inputs: Inputs) -> str | None:
    """Compare loss and gradient with eager fp64; return what is wrong, or None."""
    wide = inputs.logits.double().requires_grad_()
    truth = _wide_loss(wide, inputs)
    truth.backward()
    leaf = inputs.logits.detach().requires_grad_()
    loss = provider(leaf, inputs)
    loss.backward()
    allowed = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[inputs.logits.dtype]
    error = (leaf.grad.double() - wide.grad).norm() / wide.grad.norm()
    if not error <= allowed:
        return f"gradient is {error:.1e} off, {allowed:.0e} allowed"
    off = (loss.double() - truth).abs() / inputs.advantages.abs().mean()  # the loss itself is a difference near 0
    return None if off <= allowed else f"loss is {off:.1e} mean advantages off, {allowed:.0e} allowed"


def _wide_loss(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    logps = logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    ratio = (logps - inputs.old_logps.double()).exp()
    advantages = (inputs.advantages[:, None] * inputs.weights).double()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / inputs.weights.numel()


def main() -> None:
    """Parse the command line, check the providers, time them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "T", "V"), default=(2, 256, 32768))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = copy_bandwidth(device)
    B, T, V = options.shape
    print(f"{name} | torch {torch.__version__} | copy {bandwidth:.0f} GB/s | B={B} T={T} V={V}, forward + backward")
    for dtype_name in options.dtype:
        dtype = getattr(torch, dtype_name)
        small = make_inputs(2, 8, V, dtype, device)
        functions = {}
        inputs = make_inputs(B, T, V, dtype, device)
        for provider_name, provider in PROVIDERS.items():
            if provider_name == "trl" and importlib.util.find_spec("trl") is None:
                print("trl: skipped, not installed")
                continue
            wrong = disagreement(provider, small)
            if wrong:
                print(f"{dtype_name} {provider_name}: not timed, {wrong}")
                continue
            functions[provider_name] = partial(step, provider, inputs)
        results = measure(functions, device, options.repeats)
        floor = 3 * inputs.logits.nbytes / bandwidth / 1e6  # two reads, one write
        reference = results.get(eager.__name__)
        rows = [
            [
                dtype_name, key, r.median, r.p20, r.p80, reference.median / r.median if reference else None,
                floor / r.median, r.peak, r.peak / (inputs.logits.nbytes / 2**20),
            ]
            for key, r in results.items()
        ]  # fmt: skip
        headers = ["dtype", "provider", "ms", "p20", "p80", "x eager", "of floor", "peak MiB", "peak / logits"]
        print(tabulate(rows, headers, floatfmt=(".0f", "", ".1f", ".1f", ".1f", ".2f", ".2f", ".0f", ".2f")))


if __name__ == "__main__":
    main()
