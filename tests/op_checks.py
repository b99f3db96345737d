"""`torch.library.opcheck` on a registered op: its schema, its fake kernel, autograd and AOT dispatch."""

import warnings
from typing import Any

import torch


def opcheck(op: Any, arguments: tuple) -> None:
    """Run every check of PyTorch on one call, without its warnings about its own test utilities."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(op, arguments)
