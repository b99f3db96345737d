"""Memory that nobody has written is poisoned where `srpo` allocates it, and nowhere else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = (
    "torch.empty(2, 3, dtype=dtype)",
    "torch.empty_like(like)",
    "torch.empty_strided((2, 3), (3, 1), dtype=dtype)",
    "like.new_empty(2, 3)",
    "[torch.empty(2, 3, dtype=dtype) for _ in range(2)][1]",
)


class Fills(TorchDispatchMode):
    """Count the operations that write a value into memory."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "fill" in function.name()
        return function(*args, **(kwargs or {}))


def allocated(code: str, module: str, dtype: torch.dtype) -> torch.Tensor:
    """Run an allocation as a line of a module."""
    return eval(code, {"__name__": module, "torch": torch, "dtype": dtype, "like": torch.zeros(2, 3, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", ALLOCATIONS)
@pytest.mark.parametrize("module", ["srpo.credit", "srpo_kernels.policy_loss"])
def test_unwritten_floats_are_nan(module, code, dtype):
    out = allocated(code, module, dtype)
    assert (out.shape, out.dtype) == ((2, 3), dtype)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("code", ALLOCATIONS)
def test_unwritten_integers_are_the_largest(code, dtype):
    assert (allocated(code, "srpo_kernels.device", dtype) == torch.iinfo(dtype).max).all()


@pytest.mark.parametrize("code", ALLOCATIONS)
def test_nothing_else_is_touched(code):
    written = {}
    for module in ("torch.nn.modules.linear", "transformers.models.srpo", "srpo_kernels"):
        with Fills() as fills:
            allocated(code, module, torch.float32)
        written[module] = fills.count
    assert written["torch.nn.modules.linear"] == written["transformers.models.srpo"] == 0
    assert written["srpo_kernels"] > 0


def test_a_default_device_still_redirects():
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert allocated("torch.empty(2)", "srpo", torch.float32).is_meta
