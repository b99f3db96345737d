"""DDP and FSDP2 on two processes: the gradients of one process, with the number of tokens of all ranks."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_in_group
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from srpo import role_weighted_grpo_loss, role_weighted_grpo_loss_from_hidden

B, T, V, H = 4, 7, 33, 12
CASES = ("ragged", "empty rank")
LEVELS = ("logits", "hidden")
ENGINES = ("ddp", "fsdp")


class Policy(nn.Module):
    """A backbone, a head, and the loss inside of the forward, where an engine shows whole parameters."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.level = level
        self.backbone = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.Tanh())
        self.lm_head = nn.Linear(H, V, bias=False)

    def forward(self, ids: Tensor, completion_ids: Tensor, advantages: Tensor, **inputs: Any) -> Tensor:
        hidden = self.backbone(ids)
        if self.level == "logits":
            return role_weighted_grpo_loss(self.lm_head(hidden), completion_ids, advantages, **inputs).loss
        return role_weighted_grpo_loss_from_hidden(
            hidden, self.lm_head.weight, completion_ids, advantages, **inputs
        ).loss


def batch(case: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (B, T + 1), generator=generator)
    lengths = {"ragged": (7, 2, 5, 1), "empty rank": (4, 6, 0, 0)}[case]
    old = -3 * torch.rand(B, T, generator=generator)
    return {
        "ids": ids, "completion_ids": ids[:, 1:], "advantages": torch.randn(B, generator=generator),
        "completion_mask": (torch.arange(T) < torch.tensor(lengths)[:, None]).long(),
        "role_ids": (1 + torch.arange(T) % 2).expand(B, T).contiguous(), "old_logps": old,
        "corrupted_logps": old - torch.rand(B, T, generator=generator),
        "ablated_logps": old - torch.rand(B, T, generator=generator),
    }  # fmt: skip


def policy(level: str) -> Policy:
    torch.manual_seed(1)
    return Policy(level)


def step(model: Any, inputs: dict[str, Tensor], items: Tensor, scale: int) -> Tensor:
    """Back-propagate; the engine averages over ranks, so each loss is scaled by their number."""
    loss = model(**inputs, num_items_in_batch=items)
    (loss * scale).backward()
    return loss.detach()


def on_two_ranks() -> Iterator[tuple[str, Any]]:
    from torch.distributed.fsdp import fully_shard

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for level in LEVELS:
        for case in CASES:
            inputs = batch(case)
            items = inputs["completion_mask"].sum()
            own = {name: x[2 * rank : 2 * rank + 2] for name, x in inputs.items()}
            for engine in ENGINES:
                inner = policy(level)
                if engine == "ddp":
                    model = nn.parallel.DistributedDataParallel(inner)
                else:
                    fully_shard(inner.backbone, mesh=mesh)
                    model = fully_shard(inner, mesh=mesh)
                loss = step(model, own, items, dist.get_world_size())
                dist.all_reduce(loss)
                gradients = [x.grad.full_tensor() if engine == "fsdp" else x.grad for x in inner.parameters()]
                yield f"{engine} {level} {case}", [loss, *gradients]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Any:
    folder: pathlib.Path = tmp_path_factory.mktemp("ranks")
    return run_in_group(on_two_ranks, 2, folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_are_one_process(results, engine, level, case):
    inputs, model = batch(case), policy(level)
    loss = step(model, inputs, inputs["completion_mask"].sum(), 1)
    want = [loss, *(x.grad for x in model.parameters())]
    for rank in results[f"{engine} {level} {case}"]:
        for got, true in zip(rank, want, strict=True):
            torch.testing.assert_close(got, true, atol=1e-6, rtol=1e-5)
    assert max(x.abs().max() for x in want[1:]) > 1e-3
