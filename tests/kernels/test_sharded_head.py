"""A vocabulary head that is spread over processes: shards of the vocabulary, and parameters sharded by FSDP2."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import run_in_group
from tolerances import assert_close_to_truth
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint

from srpo import (
    DeviceError,
    LossConfig,
    role_weighted_grpo_loss,
    role_weighted_grpo_loss_from_hidden,
    role_weighted_grpo_loss_from_logps,
    selected_logps,
    selected_logps_from_hidden,
)
from srpo_kernels import linear_head, reference

B, T, H, V = 3, 6, 16, 130
SHARDS = {1: (V,), 2: (93, 37), 3: (50, 37, 43)}
WORLDS = (2, 3)
STREAMS = ("corrupted", "ablated")


@dataclass(frozen=True)
class Case:
    """One call. `logps` calls `selected_logps_from_hidden` with upstream gradients on log-probs and entropy."""

    entry: str = "loss"
    dtype: torch.dtype = torch.float64
    backend: str = "torch"
    workspace_bytes: int | None = None
    loss: LossConfig = dataclasses.field(default_factory=lambda: LossConfig(beta=0.04))
    old_logps: bool = True
    live_contrasts: bool = False
    packed: bool = False
    bias: str = "random"  # "none", "offset": 1e4 more on every entry, "first"/"last": that shard is -inf
    advantages: tuple[float, ...] = (1.0, -0.5, 0.7)
    frozen_head: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments of a whole vocabulary, in float64 but exact in the tested dtype."""
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            x = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (8 * x).round() / 8 if self.bias == "offset" else x  # every logit is then exact, offset included

        def drift():
            return 0.6 * torch.rand(B, T, generator=generator, dtype=torch.float64) - 0.3

        x = {"hidden": normal(B, T + 1, H), "weight": normal(V, H) / 2, "bias": normal(V)}
        x |= {f"{stream}_hidden": x["hidden"] + normal(B, T + 1, H) / 4 for stream in STREAMS}
        x["bias"] += 1e4 if self.bias == "offset" else 0.0
        x = {name: value.to(self.dtype).double() for name, value in x.items()}
        if self.bias == "none":
            del x["bias"]
        lowest = max(SHARDS[world][0] for world in WORLDS) if self.bias == "first" else 0
        highest = V - max(SHARDS[world][-1] for world in WORLDS) if self.bias == "last" else V
        x["ids"] = torch.randint(lowest, highest, (B, T), generator=generator)
        if (lowest, highest) == (0, V):
            x["ids"][0, :4] = torch.tensor([0, 49, 50, 129])  # the ends of shards
        x["mask"] = torch.arange(T) < torch.tensor([[6], [4], [5]])
        x["roles"] = torch.tensor([[1, 1, 0, 2, 2, 2], [1, 2, 2, 1, 0, 0], [2, 2, 1, 1, 1, 0]])
        logps = logits_of(x["hidden"], x["weight"], x.get("bias"))[:, :T]
        logps = (logps / self.loss.temperature).log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for name in ("old", "ref", *STREAMS):
            x[f"{name}_logps"] = (logps - drift()).to(self.dtype).double()
        x["upstream_logps"], x["upstream_entropy"] = normal(B, T), normal(B, T)
        x["upstream_logps"][0, 1] = x["upstream_entropy"][0, 1] = x["upstream_entropy"][1, 2] = 0.0
        x["ids"] = torch.where(x["mask"], x["ids"], -100)
        return x

    def with_banned_shard(self, x: dict[str, Tensor], world: int) -> dict[str, Tensor]:
        sizes = SHARDS[world]
        if self.bias == "first":
            x["bias"][: sizes[0]] = -torch.inf
        elif self.bias == "last":
            x["bias"][-sizes[-1] :] = -torch.inf
        return x


CASES = {
    "old_logps": Case(),
    "old_logps_fp32": Case(dtype=torch.float32),
    "no_bias": Case(dtype=torch.float32, bias="none"),
    "temperature": Case(loss=LossConfig(temperature=0.7)),
    "temperature_fp32": Case(dtype=torch.float32, loss=LossConfig(temperature=1.7)),
    "live_base": Case(old_logps=False),
    "live_base_fp32": Case(old_logps=False, dtype=torch.float32),
    "live_contrasts": Case(live_contrasts=True),
    "sequence_token": Case(loss=LossConfig(importance_sampling_level="sequence_token")),
    "packed": Case(packed=True, old_logps=False),
    "frozen_head": Case(frozen_head=True),
    "nothing_to_learn": Case(advantages=(0.0, 0.0, 0.0), loss=LossConfig()),
    "one_trajectory_learns": Case(advantages=(0.0, 0.5, 0.0), loss=LossConfig()),
    "offset": Case(bias="offset"),
    "offset_fp32": Case(bias="offset", dtype=torch.float32),
    "first_shard_banned": Case(bias="first", dtype=torch.float32),
    "last_shard_banned": Case(bias="last", dtype=torch.float32),
    "logps": Case("logps"),
    "logps_fp32": Case("logps", dtype=torch.float32, loss=LossConfig(temperature=0.7)),
    "logps_offset": Case("logps", bias="offset", dtype=torch.float32),
    "logps_first_shard_banned": Case("logps", bias="first"),
    "logps_last_shard_banned": Case("logps", bias="last", dtype=torch.float32),
    "rows_one_by_one": Case(workspace_bytes=1, old_logps=False),
}
if os.environ.get("TRITON_INTERPRET") == "1":
    CASES["triton"] = Case(backend="triton", dtype=torch.float32, loss=LossConfig(temperature=0.7))
    CASES["triton_logps"] = Case("logps", backend="triton", dtype=torch.float32)
    CASES["triton_last_shard_banned"] = Case("logps", backend="triton", dtype=torch.float32, bias="last")
# shards are uneven, so that each could hold another number of rows: they must agree on one
CASES |= {
    "chunks": Case(workspace_bytes=1600),
    "chunks_of_trajectories": Case(workspace_bytes=2400, old_logps=False, dtype=torch.float32),
    "chunks_logps": Case("logps", workspace_bytes=1600),
}


def logits_of(hidden, weight, bias):
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias


def run(case: Case, x: dict[str, Tensor], dtype, *, shard=slice(None), group=None, plain=False) -> dict[str, Tensor]:
    """Return results and gradients of one call; `plain` lets the logits exist and autograd differentiate them."""

    def cast(name):
        return None if name not in x else x[name].to(dtype) if x[name].is_floating_point() else x[name]

    leaves = {"hidden": cast("hidden").clone(), "weight": cast("weight")[shard].clone()}
    if "bias" in x:
        leaves["bias"] = cast("bias")[shard].clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == "hidden" or not case.frozen_head)
    bias = leaves.get("bias")
    head = {"bias": bias, "process_group": group, "workspace_bytes": case.workspace_bytes}
    backend = {"backend": "torch" if plain or dtype == torch.float64 else case.backend}
    if case.entry == "logps":
        options = {"temperature": case.loss.temperature, "mask": x["mask"], "return_entropy": True} | backend
        if plain:
            got = selected_logps(logits_of(leaves["hidden"], leaves["weight"], bias), x["ids"], **options)
        else:
            got = selected_logps_from_hidden(leaves["hidden"], leaves["weight"], x["ids"], **head, **options)
        total = (got.logps * cast("upstream_logps")).sum() + (got.entropy * cast("upstream_entropy")).sum()
        results = {"loss": total, "logps": got.logps, "entropy": got.entropy}
    else:
        arguments = {"ids": x["ids"], "role_ids": x["roles"], "completion_mask": x["mask"]}
        arguments |= {f"{s}_logps": cast(f"{s}_logps") for s in STREAMS}
        arguments |= {name: cast(name) for name in ("old_logps", "ref_logps")}
        hidden, advantages = leaves["hidden"], torch.tensor(case.advantages, dtype=dtype)
        if case.packed:
            valid, counts = x["mask"], x["mask"].sum(1)
            arguments = {name: value[valid] for name, value in arguments.items()}
            arguments["cu_seqlens"] = nn.functional.pad(counts.cumsum(0), (1, 0))
            hidden, advantages = hidden[:, :T][valid], advantages.repeat_interleave(counts)
        if not case.old_logps:
            del arguments["old_logps"]
        if case.live_contrasts:
            for s in STREAMS:
                del arguments[f"{s}_logps"]
                states = cast(f"{s}_hidden")
                live = {f"{s}_logits": logits_of(states, leaves["weight"], bias)} if plain else {f"{s}_hidden": states}
                arguments |= live
        ids = arguments.pop("ids")
        if plain:
            got = role_weighted_grpo_loss(
                logits_of(hidden, leaves["weight"], bias), ids, advantages, loss=case.loss, **arguments, **backend
            )
        else:
            got = role_weighted_grpo_loss_from_hidden(
                hidden, leaves["weight"], ids, advantages, loss=case.loss, **arguments, **head, **backend
            )
        total = got.loss
        results = {"loss": got.loss, "logps": got.logps, "weights": got.weights, "entropy": got.entropy}
        results["metrics"] = torch.stack(list(got.metrics.values()))
    (total * 1.7).backward()
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {name: value.detach() for name, value in (results | gradients).items()}


def shard_of(rank: int, world: int) -> slice:
    first = sum(SHARDS[world][:rank])
    return slice(first, first + SHARDS[world][rank])


def run_shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the results of every case on this rank's shard."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard, group = shard_of(rank, world), dist.group.WORLD
    for name, make in ODD_IDS.items():
        x = make(world)
        yield name, selected_logps_from_hidden(
            x["hidden"], x["weight"][shard], x["ids"], bias=x["bias"][shard], process_group=group, return_entropy=True,
            validate_values=False,
        )._asdict()  # fmt: skip
    others, case = dist.new_group(range(1, world)), CASES["old_logps"]
    part = shard_of(rank - 1, world - 1) if rank else None
    yield "all_but_the_first", run(case, case.tensors, case.dtype, shard=part, group=others) if rank else {}
    for name, case in CASES.items():
        x = case.with_banned_shard(case.tensors, world)
        yield name, run(case, x, case.dtype, shard=shard, group=group)


def ids_of_no_shard(_world: int) -> dict[str, Tensor]:
    x = CASES["logps"].tensors
    x["ids"] = torch.where(x["mask"], x["ids"], 0)
    x["ids"][0, 0], x["ids"][1, 1] = V, -1
    return x


def ids_of_a_banned_shard(world: int) -> dict[str, Tensor]:
    x = CASES["logps"].tensors
    x["ids"] = torch.where(x["mask"], x["ids"], 0)
    x["bias"][shard_of(0, world)] = -torch.inf
    return x


ODD_IDS = {"ids_of_no_shard": ids_of_no_shard, "ids_of_a_banned_shard": ids_of_a_banned_shard}


@pytest.fixture(scope="module", params=WORLDS)
def sharded(request, tmp_path_factory):
    """The results of every rank."""
    return run_in_group(run_shards, request.param, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_one_process_gives(sharded, name):
    case, ranks = CASES[name], sharded[name]
    x = case.with_banned_shard(case.tensors, len(ranks))
    truth, eager = run(case, x, torch.float64), run(case, x, case.dtype, plain=True)
    learns = truth["logps"] != 0  # what is skipped is 0, but not in the plain computation
    for rank, got in enumerate(ranks):
        assert got.keys() == truth.keys()
        for quantity in got.keys() - {"d_weight", "d_bias"}:
            assert torch.equal(got[quantity].nan_to_num(9.0), ranks[0][quantity].nan_to_num(9.0)), quantity
        for quantity, value in got.items():
            expected, plain = truth[quantity], eager[quantity]
            if quantity in ("d_weight", "d_bias"):
                expected, plain = (x[shard_of(rank, len(ranks))] for x in (expected, plain))
            elif quantity in ("logps", "entropy"):
                plain = torch.where(learns, plain, 0.0)
            kind = "gradient" if quantity.startswith("d_") else quantity.replace("metrics", "metric")
            plain = None if quantity == "metrics" else plain
            what = f"{quantity} rank {rank}"
            assert_close_to_truth(kind, value, expected, plain, precision=case.dtype, what=what)
    if "nothing" not in name:
        assert all((got["d_hidden"] != 0).any() for got in ranks)


def test_the_group_may_be_some_of_the_ranks(sharded):
    truth = run(CASES["old_logps"], CASES["old_logps"].tensors, torch.float64)
    for rank, got in enumerate(sharded["all_but_the_first"][1:]):
        part = shard_of(rank, sharded.world - 1)
        assert_close_to_truth("loss", got["loss"], truth["loss"], precision=torch.float64)
        for quantity in ("d_hidden", "d_weight", "d_bias"):
            expected = truth[quantity] if quantity == "d_hidden" else truth[quantity][part]
            assert_close_to_truth("gradient", got[quantity], expected, precision=torch.float64, what=quantity)


def test_an_id_that_no_shard_holds_has_no_log_prob(sharded):
    x = ids_of_no_shard(sharded.world)
    owned = (x["ids"] >= 0) & (x["ids"] < V)
    ids = torch.where(owned, x["ids"], 0)
    expected = selected_logps_from_hidden(x["hidden"], x["weight"], ids, bias=x["bias"], return_entropy=True)
    for got in sharded["ids_of_no_shard"]:
        logps = torch.where(owned, expected.logps, torch.nan)
        assert_close_to_truth("logps", got["logps"], logps, precision=torch.float64)
        assert_close_to_truth("entropy", got["entropy"], expected.entropy, precision=torch.float64)


def test_an_id_in_a_banned_shard_has_probability_0(sharded):
    x = ids_of_a_banned_shard(sharded.world)
    expected = selected_logps_from_hidden(x["hidden"], x["weight"], x["ids"], bias=x["bias"])
    assert (expected == -torch.inf).any()
    for got in sharded["ids_of_a_banned_shard"]:
        assert_close_to_truth("logps", got["logps"], expected, precision=torch.float64)


def merged(parts: list[Tensor], ids: Tensor, temperature: float, return_entropy: bool) -> list[linear_head.Statistics]:
    """Return what `merge_shards` gives on every rank, with ranks played one after the other."""
    group = mock.Mock(size=lambda: len(parts))
    sent: list[Tensor] = []
    arguments, first = [], 0
    for part in parts:
        local = ids - first
        owned = (local >= 0) & (local < part.shape[1])
        sums = reference.row_sums(part.clone(), local.where(owned, 0), temperature, return_entropy)
        logps, row_max, log_sum, entropy = reference.finish_statistics(*sums)
        entropy = logps.new_empty(0) if entropy is None else entropy
        arguments.append((linear_head.Statistics(logps, row_max, log_sum, entropy), owned, temperature, group))
        first += part.shape[1]

    def send(_shards, mine, group):
        sent.append(mine)

    def receive(shards, _mine, group):
        for shard, values in zip(shards, sent, strict=True):
            shard.copy_(values)

    with mock.patch.object(dist, "all_gather", send):
        for of_rank in arguments:
            linear_head.merge_shards(*of_rank)
    with mock.patch.object(dist, "all_gather", receive):
        return [linear_head.merge_shards(*of_rank) for of_rank in arguments]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    spread=st.sampled_from([0.0, 3.0, 200.0]),
    offset=st.sampled_from([0.0, 1e4, -3e38]),
    banned=st.sampled_from([0.0, 0.3, 0.95]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    return_entropy=st.booleans(),
)
def test_merged_statistics_are_those_of_the_whole_row(
    sizes, seed, temperature, spread, offset, banned, dtype, return_entropy
):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(6, sum(sizes), generator=generator) + offset
    logits[torch.rand(logits.shape, generator=generator) < banned] = -torch.inf
    logits[:, int(torch.randint(0, sum(sizes), (), generator=generator))] = offset  # no row is banned as a whole
    ids = torch.randint(0, sum(sizes), (6,), generator=generator)
    log_probs = ((logits.double() - logits.double().amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    x = logits.to(dtype)
    eager_log_probs = ((x - x.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    ranks = merged(list(x.split(sizes, 1)), ids, temperature, return_entropy)
    for got in ranks:
        for quantity in ("logps", "row_max", "log_sum", "entropy"):
            assert torch.equal(getattr(got, quantity).nan_to_num(9.0), getattr(ranks[0], quantity).nan_to_num(9.0))
    got = ranks[0]
    assert torch.equal(got.row_max, logits.amax(-1).to(dtype))
    truth, eager = (x.gather(-1, ids[:, None])[:, 0] for x in (log_probs, eager_log_probs))
    assert_close_to_truth("logps", got.logps, truth, eager, precision=dtype)
    assert_close_to_truth("logps", got.log_sum, -log_probs.amax(-1), precision=dtype, what="log_sum")
    if return_entropy:
        entropy = -torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * log_probs).sum(-1)
        assert_close_to_truth("entropy", got.entropy, entropy, precision=dtype)
    else:
        assert not got.entropy.numel()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Policy(nn.Module):
    """A language model whose forward ends in the loss, where FSDP2 lends it whole parameters."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.lm_head = Backbone(), nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.backbone.embedding.weight
        self.to(dtype)

    def forward(self, input_ids: Tensor, checkpointed: bool = False, **arguments: Tensor):
        def loss_of(states):
            return role_weighted_grpo_loss_from_hidden(
                states, self.lm_head.weight, input_ids[:, 1:], loss=LossConfig(beta=0.04), **arguments
            )

        self.dtype_of_old_logps = arguments["old_logps"].dtype
        states = self.backbone(input_ids)
        return checkpoint(loss_of, states, use_reentrant=False) if checkpointed else loss_of(states)


class Scorer(Policy):
    """A language model whose forward ends in log-probs: their backward needs the head again."""

    def forward(self, input_ids: Tensor, **arguments: Tensor):
        states = self.backbone(input_ids)
        logps = selected_logps_from_hidden(
            states, self.lm_head.weight, input_ids[:, 1:], mask=arguments["completion_mask"]
        )
        return role_weighted_grpo_loss_from_logps(logps, loss=LossConfig(beta=0.04), **arguments)


FSDP_WORLD = 2
FSDP_BATCH = 4


def fsdp_batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    """Trajectories of different lengths; their tokens are counted over all ranks."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(T) < torch.tensor([[6], [2], [5], [4]])
    logps = [-5.0 + 0.3 * torch.randn(FSDP_BATCH, T, generator=generator, dtype=torch.float64) for _ in range(4)]
    per_row = {"input_ids": torch.randint(0, V, (FSDP_BATCH, T + 1), generator=generator), "completion_mask": mask}
    per_row["role_ids"] = torch.tensor([[1, 1, 2, 2, 0, 2]]).expand(FSDP_BATCH, T)
    per_row["advantages"] = torch.tensor([1.0, -0.5, 0.25, -1.0])
    per_row |= dict(zip(("old_logps", "ref_logps", "corrupted_logps", "ablated_logps"), logps, strict=True))
    return {name: x[rows] for name, x in per_row.items()} | {"num_items_in_batch": mask.sum()}


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad) for name, p in model.named_parameters()
    }


def run_fsdp() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield loss and gradients of this rank's trajectories, whose gradients FSDP2 averages over the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    batch = fsdp_batch(slice(rank, None, world))

    def shard(model: Policy, reshard: bool | None = None, **policy) -> Policy:
        for layer in model.backbone.layers:
            fully_shard(layer, mesh=mesh, **policy)
        return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **policy)

    def trained(model: nn.Module, **options) -> dict[str, Tensor]:
        loss = model(**batch, **options).loss
        (loss * world).backward()
        return {"loss": loss.detach()} | whole_gradients(model)

    yield "inside", trained(shard(Policy()))
    yield "tied", trained(shard(Policy(tied=True)))
    yield "resharded", trained(shard(Policy(), True))
    yield "resharded_tied_logps", trained(shard(Scorer(tied=True), True))
    yield "checkpointed", trained(shard(Policy(), True), checkpointed=True)

    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    model = shard(Policy(dtype=torch.float32), mp_policy=mixed)
    yield "bf16", trained(model) | {"old_logps": torch.empty(0, dtype=model.dtype_of_old_logps)}

    model = Policy()
    fully_shard(model.backbone, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    states, sharded = model.backbone(batch["input_ids"]), model.lm_head.weight
    ids, rest = batch["input_ids"][:, 1:], {k: v for k, v in batch.items() if k != "input_ids"}
    messages = []
    for call in (
        lambda: role_weighted_grpo_loss_from_hidden(states, sharded, ids, batch["advantages"]),
        lambda: selected_logps_from_hidden(states, sharded, ids),
    ):
        try:
            call()
        except DeviceError as error:
            messages.append(str(error))
    yield "refusals", messages
    weight = sharded.full_tensor(grad_placements=[Partial("avg")])
    loss = role_weighted_grpo_loss_from_hidden(states, weight, ids, loss=LossConfig(beta=0.04), **rest).loss
    (loss * world).backward()
    yield "gathered", {"loss": loss.detach()} | whole_gradients(model)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """The results of every rank."""
    return run_in_group(run_fsdp, FSDP_WORLD, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", ["inside", "tied", "resharded", "resharded_tied_logps", "checkpointed", "gathered"])
def test_fsdp_gives_what_one_process_gives(fsdp, name):
    whole = Policy(tied="tied" in name)
    loss = whole(**fsdp_batch()).loss
    loss.backward()
    ranks = fsdp[name]
    assert_close_to_truth("loss", sum(got["loss"] for got in ranks), loss, precision=torch.float64)
    for got in ranks:
        for parameter, gradient in whole_gradients(whole).items():
            assert_close_to_truth("gradient", got[parameter], gradient, precision=torch.float64, what=parameter)


def test_fsdp_in_mixed_precision_leaves_log_probs_alone(fsdp):
    whole = Policy()
    loss = whole(**fsdp_batch()).loss
    loss.backward()
    for got in fsdp["bf16"]:
        assert got["old_logps"].dtype == torch.float64
        for parameter, gradient in whole_gradients(whole).items():
            assert got[parameter].dtype == torch.float32
            assert (got[parameter] - gradient).norm() < 0.05 * gradient.norm(), parameter
    assert float(sum(got["loss"] for got in fsdp["bf16"])) == pytest.approx(loss.item(), rel=0.05)


def test_a_sharded_head_is_refused_by_name(fsdp):
    for messages in fsdp["refusals"]:
        assert len(messages) == 2
        for function, message in zip(("role_weighted_grpo_loss_", "selected_logps_"), messages, strict=True):
            assert message.startswith(f"{function}from_hidden(): lm_head_weight got a DTensor")
            assert "lm_head_weight.full_tensor(" in message
