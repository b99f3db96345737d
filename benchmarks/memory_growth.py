"""Show that memory from hidden states does not grow with the number of rows beyond inputs and gradients.

    python benchmarks/memory_growth.py [--rows 1024 4096 16384] [--shape V H] [--dtype float32] [--eager]

Beyond the inputs a step allocates the gradients of hidden states and head (the head's in fp32), the workspace, and
vectors; "predicted" adds these up, "peak" is measured.
"""

import argparse
import pathlib
import subprocess
import sys

import torch
from hidden_level import ROWS, eager, make_inputs, srpo
from measure import peak_memory
from tabulate import tabulate

T = 256


def predicted(rows: int, V: int, H: int, dtype: torch.dtype) -> float:
    """Return the MiB that one step of this library allocates on a CPU."""
    workspace = ROWS * V * dtype.itemsize
    head = V * H * 4 + (V * H * dtype.itemsize if dtype != torch.float32 else 0)
    return (workspace + head + rows * H * dtype.itemsize) / 2**20


def step(rows: int, V: int, H: int, dtype: torch.dtype, provider) -> float:
    """Return the peak MiB of one forward and backward; a small one goes first, to load what is loaded once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_inputs(1, T, 64, H, dtype, device).loss_and_gradients(provider)
    inputs = make_inputs(rows // T, T, V, H, dtype, device)
    return peak_memory(lambda: inputs.loss_and_gradients(provider), device)


def main() -> None:
    """Parse the command line and measure each size in a process of its own, whose high-water mark is fresh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(1024, 4096, 16384))
    parser.add_argument("--shape", type=int, nargs=2, metavar=("V", "H"), default=(32768, 896))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="also measure the path through logits, where it fits")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    V, H = options.shape
    dtype = getattr(torch, options.dtype)
    if options.one:
        provider = {"eager": eager, "srpo": srpo}[options.one]
        print(step(options.rows[0], V, H, dtype, provider))
        return
    table = []
    for rows in options.rows:
        line = [rows, predicted(rows, V, H, dtype)]
        for name in ("srpo", "eager") if options.eager else ("srpo",):
            command = [sys.executable, str(pathlib.Path(__file__)), "--one", name, "--rows", str(rows)]
            command += ["--shape", str(V), str(H), "--dtype", options.dtype]
            line.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        table.append(line)
    headers = ["rows", "predicted MiB", "peak MiB", "eager MiB"][: len(table[0])]
    print(f"V={V} H={H} {options.dtype}, forward + backward, MiB beyond the inputs")
    print(tabulate(table, headers, floatfmt=".0f"))


if __name__ == "__main__":
    main()
