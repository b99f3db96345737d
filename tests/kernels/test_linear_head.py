"""The ops of the vocabulary head: schemas, compile, chunks and groups of rows, memory and the number of products."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from srpo import CreditConfig, LossConfig, role_weighted_grpo_loss_from_hidden, selected_logps_from_hidden
from srpo_kernels import linear_head
from srpo_kernels.linear_head import Head
from srpo_kernels.loss_terms import LossTerms
from srpo_kernels.rules import credit_rule, loss_rule

CREDIT, LOSS = CreditConfig().rule, LossConfig(beta=0.04).rule
SEQUENCE = LossConfig(importance_sampling_level="sequence_token")


def head_inputs(B=2, T=3, V=7, H=5, bias=True, dtype=torch.float32, device="cpu"):
    """Return hidden `[B, T + 1, H]`, weight, bias or None, and ids; the first three require a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T + 1, H), (V, H), (V,)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    ids = torch.randint(0, V, (B, T), generator=generator).to(device)
    hidden, weight, shift = (x.requires_grad_() for x in leaves)
    return hidden, weight, shift if bias else None, ids


def ragged(B=2, T=3):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[-1, -1] = False
    return mask


# the registered ops


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_logps(backend, bias, entropy):
    hidden, weight, shift, ids = head_inputs(bias=bias)
    arguments = (hidden, weight, shift, ids, ragged(), 0.9, entropy, 2 * 7 * 4, "", backend)
    opcheck(torch.ops.srpo.linear_head_logps.default, arguments)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_gradient(backend, bias, entropy):
    hidden, weight, shift, ids = (x.detach() if x is not None else None for x in head_inputs(bias=bias))
    _, row_max, log_sum, h = torch.ops.srpo.linear_head_logps(
        hidden, weight, shift, ids, ragged(), 0.9, True, 0, "", backend
    )
    upstream = ragged().float()
    arguments = (hidden, weight, shift, ids, row_max, log_sum, h if entropy else None, upstream,
                 upstream if entropy else None, 0.9, [True, True, bias], 2 * 7 * 4, "", backend)  # fmt: skip
    opcheck(torch.ops.srpo.linear_head_gradient.default, arguments)


@pytest.mark.parametrize("weighs_first", [False, True])
@pytest.mark.parametrize("wants", [[True, True, True], [True, False, False], [False, True, False], [False] * 3])
def test_opcheck_training(monkeypatch, backend, wants, weighs_first):
    """In a graph that is kept: otherwise backward scales the gradients where they lie, and opcheck compares those."""
    monkeypatch.setattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    hidden, weight, shift, ids = head_inputs(bias=wants[2])
    for x, wanted in zip((hidden, weight, shift), wants, strict=True):
        if x is not None:
            x.requires_grad_(wanted)
    mask, vectors = ragged(), torch.full((2, 3), -1.0)
    roles = torch.tensor([[1, 2, 1], [2, 1, 0]], dtype=torch.int8)
    old = None if not weighs_first else vectors
    weights = torch.where(mask, 1.1, 0.0) if weighs_first else None
    streams = (None,) * 3 if weighs_first else (roles, vectors - 0.5, vectors - 0.1)
    arguments = (hidden, weight, shift, ids, mask, old, vectors, None, mask * 0.7, weights, mask,
                 torch.tensor([0.5, 0.25]), *streams, None, None, None, 0.9, wants, 2 * 7 * 4, "", LOSS, CREDIT,
                 backend)  # fmt: skip
    opcheck(torch.ops.srpo.linear_head_training.default, arguments)


# compile


@pytest.fixture(autouse=True)
def no_shapes_of_other_tests():
    torch._dynamo.reset()


def loss_inputs(mode, device):
    hidden, weight, bias, ids = head_inputs(T=4, V=33, device=device)
    streams = [-torch.rand(2, 4, generator=torch.Generator().manual_seed(k)).to(device) * 3 for k in range(3)]
    arguments = {
        "advantages": torch.tensor([1.0, -0.5], device=device),
        "role_ids": torch.tensor([[1, 1, 2, 2], [1, 2, 2, 0]], device=device),
        "completion_mask": ragged(2, 4).to(device),
        "corrupted_logps": streams[0],
        "ablated_logps": streams[1],
    }
    if mode == "weighs first":
        arguments |= {"old_logps": streams[2], "ref_logps": streams[2], "loss": LossConfig(beta=0.04)}
    if mode == "live":
        del arguments["corrupted_logps"]
        arguments["corrupted_hidden"] = hidden.detach() + 1
    if mode == "packed":
        arguments = {k: x.flatten() for k, x in arguments.items()}
        arguments["cu_seqlens"] = torch.tensor([0, 3, 8], device=device)
        hidden, ids = hidden.detach()[:, :4].flatten(0, 1).requires_grad_(), ids.flatten()
    return [hidden, weight, bias], arguments | {"completion_ids": ids}


@pytest.mark.parametrize("mode", ["weighs first", "live base", "live", "packed"])
def test_the_whole_loss_compiles_without_a_graph_break(backend, device, mode):
    leaves, arguments = loss_inputs(mode, device)

    def whole(hidden, weight, bias):
        return role_weighted_grpo_loss_from_hidden(
            hidden, weight, bias=bias, backend=backend, workspace_bytes=3 * 33 * 4, **arguments
        )

    expected = whole(*leaves)
    expected_gradients = torch.autograd.grad(expected.loss * 0.37, leaves)
    got = torch.compile(whole, backend="aot_eager", fullgraph=True)(*leaves)
    gradients = torch.autograd.grad(got.loss * 0.37, leaves)
    assert torch.equal(got.loss, expected.loss)
    for name in ("logps", "weights", "entropy"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    for gradient, of_eager in zip(gradients, expected_gradients, strict=True):
        assert of_eager.any()
        assert torch.equal(gradient, of_eager)
    assert got.metrics.floats() == pytest.approx(expected.metrics.floats(), nan_ok=True)


@pytest.mark.parametrize("packed", [False, True])
def test_selected_logps_compile_without_a_graph_break(backend, device, packed):
    hidden, weight, bias, ids = head_inputs(T=4, V=33, device=device)

    def mixture(hidden, weight, bias):
        x = hidden[:, :4].flatten(0, 1) if packed else hidden
        out = selected_logps_from_hidden(
            x, weight, ids.flatten() if packed else ids, bias=bias, return_entropy=True, backend=backend
        )
        return out.logps, out.entropy, (out.logps * 0.37 + out.entropy.square()).sum()

    expected = mixture(hidden, weight, bias)
    got = torch.compile(mixture, backend="aot_eager", fullgraph=True)(hidden, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    leaves = (hidden, weight, bias)
    of_eager, gradients = (torch.autograd.grad(x[2], leaves) for x in (expected, got))
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_eager, strict=True))


def test_symbolic_sizes_in_front_of_a_parameter(backend, device):
    """Sizes of a parameter stay numbers when those of hidden states are symbols."""
    hidden, weight, _, ids = head_inputs(T=4, V=33, device=device)
    weight = torch.nn.Parameter(weight.detach())

    def loss(hidden, ids):
        return role_weighted_grpo_loss_from_hidden(hidden, weight, ids, ids[:, 0] * 1.0 + 1.0, backend=backend).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(hidden, ids), loss(hidden, ids))
    shorter = hidden.detach()[:, :4].requires_grad_()
    assert torch.equal(compiled(shorter, ids[:, :3]), loss(shorter, ids[:, :3]))


# chunks


@pytest.mark.parametrize(
    ("backend_name", "dtype", "row_bytes"),
    [
        ("torch", torch.float32, 4),
        ("torch", torch.float64, 8),
        ("torch", torch.bfloat16, 2),
        ("triton", torch.float32, 4),
        ("triton", torch.bfloat16, 6),  # fp32 logits, and their gradient in 16 bits
        ("triton", torch.float64, 12),
    ],
)
@pytest.mark.parametrize("trains", [False, True])
def test_rows_of_a_chunk_fill_the_workspace(backend_name, dtype, row_bytes, trains):
    weight = torch.empty(10, 3, dtype=dtype)

    def rows(workspace_bytes):
        return Head(weight, None, 1.0, workspace_bytes, "", backend_name).rows_of_chunk(trains)

    assert rows(100 * row_bytes * 10) == 100
    assert rows(100 * row_bytes * 10 - 1) == 99
    assert rows(1) == 1
    assert rows(0) == 768


def terms_of(mask, cu_seqlens=None, level="sequence_token", weights=None):
    """Terms that say how rows are grouped, and nothing else."""
    loss = loss_rule(LOSS)._replace(importance_sampling_level=level)
    return LossTerms(
        None, None, None, mask * 1.0, weights, mask, mask.new_zeros(0), None, None, None, cu_seqlens, None,
        None, None, loss, credit_rule(CREDIT), "torch",
    )  # fmt: skip


@given(
    lengths=st.lists(st.integers(0, 9), max_size=7),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    packed=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_groups_are_whole_trajectories(lengths, size, seed, packed, share):
    """Every active row once and in order; as many trajectories together as fit, one alone where it does not."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    T = max(lengths, default=0)
    if packed:
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
        mask, cu_seqlens = torch.ones(int(ends[-1]), dtype=torch.bool), ends.int()
        starts = ends.tolist()
    else:
        owner = torch.arange(len(lengths)).repeat_interleave(T)
        mask, cu_seqlens = torch.arange(T) < torch.tensor(lengths, dtype=torch.long)[:, None], None
        starts = [i * T for i in range(len(lengths) + 1)]
    active = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < share)
    cells = active.reshape(-1).nonzero().flatten()
    chunks = cells.split(size) if len(cells) else ()
    groups = list(terms_of(mask, cu_seqlens).groups(chunks, size))

    joined = [torch.cat(group.chunks) for group in groups]
    assert torch.equal(torch.cat([cells[:0], *joined]), cells)
    members = [owner[rows].unique().tolist() for rows in joined]
    everyone = [i for trajectories in members for i in trajectories]
    assert len(everyone) == len(set(everyone))
    for group, rows, trajectories in zip(groups, joined, members, strict=True):
        assert all(0 < len(chunk) <= size for chunk in group.chunks)
        assert len(rows) <= size or len(trajectories) == 1
        assert (len(group.chunks) == 1) == (len(rows) <= size)
        assert group.tokens == slice(starts[group.trajectories.start], starts[group.trajectories.stop])
        assert group.trajectories.start <= trajectories[0] <= trajectories[-1] < group.trajectories.stop
    counts = {i: int((owner[cells] == i).sum()) for i in range(len(lengths))}
    for rows, following in zip(joined, members[1:], strict=False):
        assert len(rows) + counts[following[0]] > size  # or they would have been one group


def test_rows_that_depend_on_themselves_alone_are_not_grouped():
    mask = ragged(3, 4)
    chunks = mask.reshape(-1).nonzero().flatten().split(5)
    weights = mask * 1.0
    groups = list(terms_of(mask, level="token", weights=weights).groups(chunks, 5))
    assert [group.chunks for group in groups] == [(chunk,) for chunk in chunks]
    assert len(list(terms_of(mask, level="token").groups(chunks, 5))) == 3  # weights from the current log-probs
    assert len(list(terms_of(mask, weights=weights).groups(chunks, 5))) == 3


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_a_trajectory_larger_than_the_workspace(level, packed, rows):
    """Trajectories of 3, 11, 0 and 5 tokens, coefficients that depend on all of theirs."""
    lengths = torch.tensor([3, 11, 0, 5])
    inside = torch.arange(11) < lengths[:, None]
    hidden, weight, bias, ids = head_inputs(4, 11, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    roles = torch.randint(0, 3, (4, 11), generator=generator)
    streams = -3 * torch.rand(3, 4, 11, generator=generator, dtype=torch.float64)
    arguments = {"role_ids": roles, "corrupted_logps": streams[0], "ablated_logps": streams[1]}
    if level == "sequence_token":
        arguments["old_logps"] = streams[2]
    if packed:
        hidden = hidden.detach()[:, :11][inside].requires_grad_()
        arguments = {k: x[inside] for k, x in arguments.items()}
        arguments["cu_seqlens"] = torch.tensor([0, 3, 14, 14, 19])
    else:
        arguments["completion_mask"] = inside
    results = []
    for workspace_bytes in (rows * 7 * 8, None):
        out = role_weighted_grpo_loss_from_hidden(
            hidden, weight, ids[inside] if packed else ids, torch.tensor([0.5, -1.0, 0.3, 0.8]), bias=bias,
            loss=LossConfig(importance_sampling_level=level), workspace_bytes=workspace_bytes, **arguments,
        )  # fmt: skip
        results.append((out.loss, out.logps, out.weights, *torch.autograd.grad(out.loss, (hidden, weight, bias))))
    for got, expected in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


# memory and work


class Inside(TorchDispatchMode):
    """See PyTorch operations: new storages, and the matrix products of the head."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []  # elements of each new storage
        self.multiplied = 0  # operations of the matrix products
        self.in_the_head = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)]
        known = {x.data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        known |= {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        for x in tensors:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                self.sizes.append(storage.nbytes() // x.element_size())
        if self.in_the_head and function.name().split("::")[1].split(".")[0] in ("mm", "matmul", "addmm", "addmm_"):
            a, b = args[-2:]
            self.multiplied += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out

    def of_size(self, elements: int) -> int:
        return sum(size >= elements for size in self.sizes)


@contextlib.contextmanager
def watch():
    """Watch the block and, where a dispatch mode does not reach by itself, what the ops of the head run."""
    inside = Inside()

    def watched(function):
        def run(*arguments):
            inside.in_the_head = True
            with inside:
                out = function(*arguments)
            inside.in_the_head = False
            return out

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("score", "gradient", "train"):
            patch.setattr(linear_head, name, watched(getattr(linear_head, name)))
        with inside:
            yield inside


SIZES = {  # V, rows of the workspace, B, T: a workspace that no buffer of the CPU path exceeds
    "torch": (4099, 300, 4, 300),
    "triton": (130, 4, 4, 6),
}


def watched(backend, device, B, T, V, rows, *, entry="loss", frozen=False, **arguments):
    """Run one call and its backward on `[B, T]` tokens with room for some rows of logits."""
    hidden, weight, bias, ids = head_inputs(B, T, V, H=3, device=device)
    if frozen:
        weight.requires_grad_(False)
    arguments |= {"bias": bias, "backend": backend, "workspace_bytes": rows * V * 4, "validate_values": False}
    with watch() as inside:
        if entry == "loss":
            advantages = arguments.pop("advantages", torch.ones(B, device=device))
            out = role_weighted_grpo_loss_from_hidden(hidden, weight, ids, advantages, **arguments)
            out.loss.backward()
        else:
            logps, entropy = selected_logps_from_hidden(hidden, weight, ids, return_entropy=True, **arguments)
            (logps.sum() + entropy.sum()).backward()
    assert hidden.grad.any()
    return inside


def live_base(B, T, device):
    roles = torch.arange(T, device=device).remainder(3).expand(B, T)
    streams = -torch.rand(2, B, T, generator=torch.Generator().manual_seed(2)).to(device)
    return {"role_ids": roles, "corrupted_logps": streams[0], "ablated_logps": streams[1]}


@pytest.mark.parametrize("case", ["rows", "trajectories", "long trajectories", "live", "any loss"])
def test_only_one_workspace_of_logits_exists(backend, device, case):
    """It holds a fixed number of rows; nothing else is as large, however many rows there are."""
    V, rows, B, T = SIZES[backend]
    if case == "long trajectories":
        B, T = B // 2, 2 * T
    counts = []
    for factor in (1, 2):
        arguments = {}
        if case in ("trajectories", "long trajectories"):
            arguments = live_base(B * factor, T, device)
        if case == "live":
            arguments = live_base(B * factor, T, device)
            del arguments["corrupted_logps"]
            arguments["corrupted_hidden"] = torch.randn(B * factor, T, 3, device=device)
        entry = "logps" if case == "any loss" else "loss"
        inside = watched(backend, device, B * factor, T, V, rows, entry=entry, **arguments)
        assert max(inside.sizes) == rows * V
        counts.append(inside.of_size(rows * V))
    expected = 2 if case in ("live", "any loss") else 1  # scoring and training, or forward and backward
    assert counts == [expected] * 2


def test_a_workspace_is_no_larger_than_the_rows_need(backend, device):
    inside = watched(backend, device, 2, 3, 130, rows=1000)
    assert inside.of_size(6 * 130) >= 1
    assert inside.of_size(12 * 130 + 1) == 0


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_number_of_operations(backend, device, frozen):
    """In units of NVH for the N active rows: 6 to train, 4 under a frozen head, 2 + 6 for any loss, 2 to score."""
    B, T, V, H = 3, 4, 33, 3
    unit = V * H
    mask = ragged(B, T).to(device)
    shape = (backend, device, B, T, V)
    training = 4 if frozen else 6
    assert watched(*shape, 5, frozen=frozen, completion_mask=mask).multiplied == training * 11 * unit
    zeros = torch.tensor([1.0, 0.0, -1.0], device=device)
    assert watched(*shape, 5, frozen=frozen, completion_mask=mask, advantages=zeros).multiplied == training * 7 * unit
    any_loss = watched(*shape, 5, entry="logps", frozen=frozen, mask=mask).multiplied
    assert any_loss == (2 + training) * 11 * unit
    with torch.no_grad(), watch() as inside:
        hidden, weight, _, ids = head_inputs(B, T, V, H, device=device)
        role_weighted_grpo_loss_from_hidden(hidden, weight, ids, zeros, backend=backend)
    assert inside.multiplied == 2 * 8 * unit


def test_only_trajectories_that_do_not_fit_are_multiplied_twice(backend, device):
    """Weights from the current log-probs: trajectories of 6, 3 and 2 rows, room for 5."""
    B, T, V, H = 3, 6, 33, 3
    mask = torch.arange(T) < torch.tensor([6, 3, 2])[:, None]
    inside = watched(backend, device, B, T, V, 5, completion_mask=mask.to(device), **live_base(B, T, device))
    assert inside.multiplied == (6 * 11 + 2 * 6) * V * H


def test_contrast_states_cost_the_rows_of_their_role_only(backend, device):
    B, T, V, H = 3, 6, 33, 3
    arguments = live_base(B, T, device)
    del arguments["corrupted_logps"]
    arguments["corrupted_hidden"] = torch.randn(B, T, H, device=device)
    arguments["advantages"] = torch.tensor([1.0, 0.0, -1.0], device=device)
    inside = watched(backend, device, B, T, V, 6, **arguments)
    assert inside.multiplied == (6 * 12 + 2 * 4) * V * H
