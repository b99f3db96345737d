"""verl 0.9 on CPUs, a test tool: `VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=engines.verl_platform`.

ray is told of as many "GPUs" as there should be workers; torch sees none. verl's own platforms stay as they are. With
`SRPO_DUMP=FOLDER` the driver writes what the credit stages read and made, one file a step.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import verl.utils.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

import srpo.integrations.verl as stages


class Device(str):
    """`cpu` where torch wants a device, `0` where verl writes `f"{name}:{index}"`."""

    def __format__(self, spec: str) -> str:
        return "0"


def device_module() -> types.ModuleType:
    """Return what stands for `torch.cuda`: a device that is always ready and holds nothing."""
    module = types.ModuleType("cpu_as_accelerator")
    does_nothing = (
        "synchronize empty_cache set_device ipc_collect manual_seed manual_seed_all reset_peak_memory_stats "
        "reset_accumulated_memory_stats set_per_process_memory_fraction set_rng_state"
    )
    is_zero = "memory_allocated memory_reserved max_memory_allocated max_memory_reserved current_device"
    names: dict[str, Any] = {name: lambda *_, **__: None for name in does_nothing.split()}
    names |= {name: lambda *_, **__: 0 for name in is_zero.split()}
    names |= {
        "is_available": lambda: False,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "CPU",
        "mem_get_info": lambda *_: (2**34, 2**34),
        "get_rng_state": torch.get_rng_state,
        "Stream": torch.cpu.Stream,
        "Event": None,
        "stream": torch.cpu.stream,
        "current_stream": torch.cpu.current_stream,
    }
    vars(module).update(names)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    _module = device_module()
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: self._module)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return Device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


# the key of the FSDP engines in verl's registry, and one backend for the one kind of device
os.environ["VERL_ENGINE_DEVICE"], os.environ["VERL_ENGINE_VENDOR"] = "cuda", "nvidia"
verl.utils.distributed.initialize_global_process_group_ray.__defaults__ = (None, "gloo")


def keep_weights(module: Any) -> None:
    """Let vLLM on a CPU keep the weights that it would pack when it loads them: packed, none could be updated."""

    def dispatch(layer: Any, remove_weight: bool = False) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = dispatch


def copy_weights(module: Any) -> None:
    """Copy received weights: on a CPU `tensor.to("cpu")` is a view of the shared buffer, which is about to close."""
    receive = module.BucketedWeightReceiver.receive_weights

    def receive_weights(self: Any, on_bucket_received: Callable[..., Any]) -> Any:
        return receive(self, lambda w, last: on_bucket_received([(name, x.clone()) for name, x in w], last))

    module.BucketedWeightReceiver.receive_weights = receive_weights


AFTER_IMPORT = {
    "vllm.model_executor.layers.utils": keep_weights,
    "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer": copy_weights,
}


class Finder(importlib.abc.MetaPathFinder):
    """Change modules when they are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        change = AFTER_IMPORT.pop(name, None)
        spec = None if change is None else importlib.util.find_spec(name)
        if change is None or spec is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            change(module)

        loader.exec_module = exec_module
        return spec


for name in list(AFTER_IMPORT):
    if name in sys.modules:
        AFTER_IMPORT.pop(name)(sys.modules[name])
sys.meta_path.insert(0, Finder())


def dump_into(folder: str) -> None:
    """Write what `CreditStages.weigh` reads and makes of each step."""
    weigh = stages.CreditStages.weigh
    read = ("input_ids", "position_ids", "responses", "response_mask", "old_log_probs", "advantages")

    def rows(self: Any, batch: Any, names: list[str]) -> dict[str, list[Any]]:
        data = self.queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        pictures = "multi_modal_inputs"
        plain = {name: [x.clone() for x in data[name].unbind()] for name in names if name != pictures}
        return plain | ({pictures: [getattr(x, "data", x) for x in data[pictures]]} if pictures in names else {})

    def dumping(self: Any, batch: Any, step: int) -> Any:
        before = rows(self, batch, [*read, "multi_modal_inputs"])
        batch, metrics = weigh(self, batch, step)
        streams = [f"{name}_log_probs" for name in self.settings.streams_at(step)]
        after = rows(self, batch, ["advantages", *(["role_ids", *streams] if streams else [])])
        torch.save({"before": before, "after": after, "metrics": metrics}, f"{folder}/step{step + 1}.pt")
        return batch, metrics

    stages.CreditStages.weigh = dumping


if "SRPO_DUMP" in os.environ:
    dump_into(os.environ["SRPO_DUMP"])
