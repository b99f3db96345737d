"""The argument checks of one call of a public function: its name, its device, and whether values are looked at."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from srpo.errors import (
    DeviceError,
    DtypeError,
    NonFiniteError,
    RoleParseError,
    ShapeError,
    SRPOError,
    describe,
    refuse,
)

# Where the tensor is in what people pass for one: a RoleParse, a head, the output of a model, SelectedLogps.
_PARTS = ("role_ids", "weight", "logits", "last_hidden_state", "logps")


class Call:
    """Check the arguments of one call of a public function.

    Args:
        function: name of the public function, for messages.
        device_of: the tensor whose device all others must share.
        validate_values: True checks values everywhere, False nowhere, None where it needs no sync (CPU tensors) or
            when the environment has `SRPO_VALIDATE=1`.
        names: what the function calls its arguments where the checks have another name for them.
    """

    def __init__(
        self,
        function: str,
        device_of: Any,
        argument: str,
        validate_values: bool | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.function, self.names = function, names or {}
        if not isinstance(device_of, Tensor):
            self.fail(DtypeError, argument, describe(device_of), "a torch.Tensor", "convert it with torch.as_tensor")
        self.device = device_of.device
        self.argument = argument
        if validate_values is None:
            validate_values = self.device.type == "cpu" or os.environ.get("SRPO_VALIDATE") == "1"
        self.validates = validate_values and not torch.compiler.is_compiling()

    def fail(self, error: type[SRPOError], argument: str, got: str, expected: str, fix: str) -> NoReturn:
        """Raise `error` with the house message, in the caller's names."""
        argument, expected, fix = (re.sub(r"\w+", self._renamed, text) for text in (argument, expected, fix))
        refuse(error, self.function, argument, got, expected, fix)

    def _renamed(self, word: re.Match[str]) -> str:
        return self.names.get(word[0], word[0])

    def tensor(self, name: str, x: Any, shapes: list[tuple[int, ...]], layout: str, kind: str) -> None:
        """Check type, sharding, rank, size, dtype kind (`"float"`, `"int"`, `"mask"`) and device of one tensor."""
        if not isinstance(x, Tensor):
            inside = next((part for part in _PARTS if isinstance(getattr(x, part, None), Tensor)), None)
            fix = f"pass its .{inside}" if inside else "convert it with torch.as_tensor"
            self.fail(DtypeError, name, describe(x), f"a torch.Tensor {layout}", fix)
        if type(x).__name__ == "DTensor":
            fix = f"pass {name}.full_tensor()"
            if name in ("lm_head_weight", "bias"):  # a bare full_tensor() drops the gradients of the other ranks
                fix = (
                    "call this inside the forward of the sharded module, or pass "
                    f'{name}.full_tensor(grad_placements=[torch.distributed.tensor.Partial("avg")])'
                )
            self.fail(DeviceError, name, "a DTensor", "a plain local tensor", fix)
        if not any(_same_shape(x.shape, shape) for shape in shapes):
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            fix = f"check how {name} was sliced against the other arguments"
            self.fail(ShapeError, name, describe(x), f"{layout} = {expected}", fix)
        floating = x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        integral = not x.dtype.is_floating_point and not x.dtype.is_complex
        if kind == "float" and not floating:
            self.fail(DtypeError, name, describe(x), "float32, bfloat16, float16 or float64", f"pass {name}.float()")
        if kind == "int" and (not integral or x.dtype == torch.bool):
            self.fail(DtypeError, name, describe(x), "an integer dtype", f"pass {name}.long()")
        if kind == "mask" and not (floating or integral):
            self.fail(DtypeError, name, describe(x), "bool, integer or float 0/1", f"pass {name}.bool()")
        if x.device != self.device:
            fix = f"move it with {name}.to({str(self.device)!r})"
            self.fail(DeviceError, name, str(x.device), f"{self.device}, the device of {self.argument}", fix)

    def finite(self, name: str, x: Tensor, where: Tensor) -> None:
        """Check that `x` is finite on the valid tokens."""
        if self.validates and bool((~torch.isfinite(x) & where).sum()):
            n = int((~torch.isfinite(x) & where).sum())
            fix = "look for a division by zero or an overflow upstream"
            self.fail(NonFiniteError, name, f"{n} NaN or infinite values on valid tokens", "finite values", fix)

    def log_probs(self, name: str, x: Tensor, where: Tensor, *, of_stream: bool = False) -> None:
        """Check that `x` can be log-probs on some tokens: not above 0, and not NaN unless they are `of_stream`.

        A single value above 0 is rounding, or a difference that is bounded anyway; where all of them are, they are
        probabilities, or losses.
        """
        if not self.validates or are_log_probs(x):
            return
        values = x[where]
        if values.numel() >= (8 if of_stream else 5) and bool((values > 0).all()):
            got = f"values up to {float(values.nan_to_num(0.0).max()):.4g}"
            fix = "pass natural logs: x.log() where x are probabilities, -x where x are losses"
            self.fail(NonFiniteError, name, got, "log-probs, which are at most 0", fix)
        lost = 0 if of_stream else int(values.isnan().sum())
        if lost:
            fix = "look at the forward that scored them, or mask these tokens"
            self.fail(NonFiniteError, name, f"{lost} NaN on valid tokens", "log-probs", fix)

    def divergences(self, name: str, x: Tensor, where: Tensor) -> None:
        """Check that `x` can be divergences on some tokens: not below 0. NaN has no value."""
        if self.validates and bool(((x < 0) & where).any()):
            got, fix = f"values such as {float(x[(x < 0) & where][0]):.4g}", f"pass {name} of score_streams as it is"
            self.fail(NonFiniteError, name, got, "divergences, which are at least 0", fix)

    def within(self, name: str, x: Tensor, lowest: int, highest: int, where: Tensor, meaning: str, fix: str) -> None:
        """Check that integers lie in `[lowest, highest]` on the valid tokens."""
        if self.validates and x.numel() and not lowest <= int(x.amin()) <= int(x.amax()) <= highest:
            outside = ((x < lowest) | (x > highest)) & where
            if bool(outside.any()):
                got = f"{int(outside.sum())} values such as {x[outside][0].item()}"
                self.fail(RoleParseError, name, got, f"{meaning} in [{lowest}, {highest}] on valid tokens", fix)


def are_log_probs(x: Tensor) -> bool:
    """Say whether all of `x` is at most 0 and none of it NaN, in one quick pass: then nothing is left to look for."""
    return not x.numel() or bool(x.detach().amax() <= 0)


def _same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    # Element by element: under torch.compile a tuple of symbols is not found in a list, equal or not.
    return len(a) == len(b) and all(p == q for p, q in zip(a, b, strict=True))
