"""What bad input must meet: one typed error that says where and what, nothing computed, nothing modified."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srpo import SRPOError


class ComputationSpy(TorchDispatchMode):
    """Record the operations that compute something of the loss; checks of shapes and value ranges are none of them."""

    MATHS = (
        *("mm", "addmm", "bmm", "exp", "exp2", "expm1", "log", "logsumexp"),
        *("_log_softmax", "_softmax", "softmax", "gather", "_to_copy"),
    )

    def __init__(self):
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
        if namespace != "aten" or (name.split(".")[0] in self.MATHS and floats):
            self.computed.append(name)
        return function(*args, **(kwargs or {}))


def assert_refused(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], argument: str
) -> str:
    """Call and expect `error` about `argument` (`a|b`: either), inputs as they were, nothing computed; the message."""
    tensors = {
        k: x
        for k, x in arguments.items()
        if isinstance(x, Tensor) and x.device.type != "meta" and x.layout == torch.strided
    }
    before = {k: (x.detach().clone(), x._version) for k, x in tensors.items()}
    with ComputationSpy() as spy, pytest.raises(error) as raised:
        function(**arguments)
    message = str(raised.value)
    assert isinstance(raised.value, SRPOError)
    assert re.match(rf"{function.__name__}\(\): ({argument}) got ", message), message
    assert spy.computed == []
    for name, (value, version) in before.items():
        torch.testing.assert_close(tensors[name].detach(), value, rtol=0, atol=0, equal_nan=True)
        assert tensors[name]._version == version
        assert tensors[name].grad is None
    return message
