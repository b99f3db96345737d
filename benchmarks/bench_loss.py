"""Compare the loss with plain PyTorch, TRL and Liger, forward and backward, from logits and from hidden states.

    python benchmarks/bench_loss.py [--level logits hidden] [--shape B T V H] [--dtype float32] [--repeats 15]

Every provider must first agree with the float64 loss and gradients; one that does not is reported, not timed.
"""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial

import hidden_level
import logits_level
import torch
from measure import copy_bandwidth, measure
from tabulate import tabulate

PACKAGES = {"trl": "trl", "liger": "liger_kernel"}
LEVELS = {"logits": logits_level, "hidden": hidden_level}
SHAPES = {"logits": (2, 256, 32768, 0), "hidden": (8, 256, 32768, 896)}
REPEATS = {"logits": 15, "hidden": 3}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def disagreement(level, provider: Callable, inputs, dtype: torch.dtype) -> str | None:
    """Compare loss and gradients with eager fp64; return what is wrong, or None."""
    truth, true_gradients = inputs.double().loss_and_gradients(level.eager)
    loss, gradients = inputs.loss_and_gradients(provider)
    for got, true in zip(gradients, true_gradients, strict=True):
        error = (got.double() - true).norm() / true.norm()
        if not error <= ALLOWED[dtype]:
            return f"gradient is {error:.1e} off, {ALLOWED[dtype]:.0e} allowed"
    off = (
        loss.double() - truth
    ).abs() / inputs.rollout.advantages.abs().mean()  # the loss itself is a difference near 0
    return None if off <= ALLOWED[dtype] else f"loss is {off:.1e} mean advantages off, {ALLOWED[dtype]:.0e} allowed"


def checked_providers(level, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """Return the providers that are installed and right on a small batch."""
    _, _, V, H = shape
    small = level.make_inputs(2, 8, V, H, dtype, device)
    right = {}
    for name, provider in level.PROVIDERS.items():
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            print(f"{name}: skipped, not installed")
        elif wrong := disagreement(level, provider, small, dtype):
            print(f"{dtype} {name}: not timed, {wrong}")
        else:
            right[name] = provider
    return right


def run(level, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int, bandwidth: float):
    """Time one level in one dtype, and print its table."""
    inputs = level.make_inputs(*shape, dtype, device)
    providers = checked_providers(level, shape, dtype, device)
    functions = {name: partial(inputs.loss_and_gradients, provider) for name, provider in providers.items()}
    results = measure(functions | level.extra_cases(inputs), device, repeats)
    eager, rows = results.get("eager"), []
    for name, r in results.items():
        floor = level.floor(name, inputs, results, bandwidth)
        ratio = eager.median / r.median if eager and name in functions else None
        rows.append([str(dtype).removeprefix("torch."), name, r.median, r.p20, r.p80, ratio, floor / r.median, r.peak])
    headers = ["dtype", "provider", "ms", "p20", "p80", "x eager", "of floor", "peak MiB"]
    print(tabulate(rows, headers, floatfmt=(".0f", "", ".1f", ".1f", ".1f", ".2f", ".2f", ".0f"), missingval=""))


def main() -> None:
    """Parse the command line, check the providers, time them, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "V", "H"))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = copy_bandwidth(device)
    print(f"{name} | torch {torch.__version__} | copy {bandwidth:.0f} GB/s")
    for level in options.level:
        shape = tuple(options.shape or SHAPES[level])
        print(f"\n{level}, forward + backward, B={shape[0]} T={shape[1]} V={shape[2]} H={shape[3] or '-'}")
        print(f"of floor: {LEVELS[level].FLOOR}")
        for dtype in options.dtype:
            repeats = options.repeats or REPEATS[level]
            run(LEVELS[level], shape, getattr(torch, dtype), device, repeats, bandwidth)


if __name__ == "__main__":
    main()
