"""The same bits: on repeated runs, on permuted batches, and between scoring and training, whatever the batch is."""

import pytest
import torch

from srpo import CreditConfig, LossConfig, role_weighted_grpo_loss, selected_logps
from srpo_kernels import launch

V = 200
SIZES = ((1, 1), (1, 7), (2, 16), (3, 5))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and chunks a row: a fixed order of sums is only worth something where there is more than one."""
    monkeypatch.setattr(launch, "BLOCKS_PER_CHUNK", 1)
    monkeypatch.setattr(launch, "row_block", lambda vocabulary: (128, 1))
    monkeypatch.setattr(launch, "gradient_block", lambda vocabulary: (128, 1))


@pytest.fixture(params=["torch", "triton", "triton, split rows"])
def backend(request, monkeypatch):
    """The backends, and both ways in which the kernels go over a row."""
    monkeypatch.setattr(launch, "split_rows", lambda n_rows, device: "split" in request.param)
    return request.param.split(",")[0]


def batch(B, T, device, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    mask = torch.rand(B, T, generator=generator) < 0.9
    mask[:, 0] = True
    return {
        "logits": (3 * normal(B, T + 1, V)).to(dtype),
        "completion_ids": torch.randint(0, V, (B, T), generator=generator).to(device),
        "advantages": normal(B),
        "role_ids": torch.randint(0, 3, (B, T), generator=generator).to(device),
        "completion_mask": mask.to(device),
        "corrupted_logps": -normal(B, T).abs(),
        "ablated_logps": -normal(B, T).abs(),
        "old_logps": -normal(B, T).abs() - 4,
        "ref_logps": -normal(B, T).abs() - 4,
    }


def step(inputs, backend, **options):
    """Return the output of a call and the gradient of its logits."""
    leaf = inputs["logits"].clone().requires_grad_()
    options = {"loss": LossConfig(loss_type="grpo", beta=0.04)} | options
    out = role_weighted_grpo_loss(**{**inputs, "logits": leaf}, backend=backend, **options)
    out.loss.backward()
    assert leaf.grad.any()
    return out, leaf.grad


def bits(out, gradient):
    return [out.loss.detach(), out.logps, out.weights, out.entropy, gradient, *out.metrics.floats().values()]


def same(left, right):
    """Compare bits: NaN equals NaN, and 0 does not equal -0."""
    if isinstance(left, float):
        return torch.tensor(left).view(torch.int32).equal(torch.tensor(right).view(torch.int32))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(integers), right.contiguous().view(integers))


@pytest.mark.parametrize("normalize", ["mean", "solve"])
def test_repeated_runs(backend, device, normalize):
    inputs = batch(3, 9, device)
    credit = CreditConfig(normalize=normalize)
    first, again = (bits(*step(inputs, backend, credit=credit)) for _ in range(2))
    assert all(map(same, first, again))


def test_a_permuted_batch_is_the_permuted_result(backend, device):
    inputs = batch(5, 9, device)
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    out, gradient = step(inputs, backend)
    moved, moved_gradient = step({name: x[order] for name, x in inputs.items()}, backend)
    for name in ("logps", "weights", "entropy"):
        assert same(getattr(out, name)[order], getattr(moved, name)), name
    assert same(gradient[order], moved_gradient)


def test_a_trajectory_does_not_see_its_neighbours(backend, device):
    """Alone, in a batch, or behind more padding: its log-probs, weights and gradient keep their bits."""
    inputs = batch(4, 9, device)
    inputs["completion_mask"][2, 6:] = False

    def config(length):  # dr_grpo divides by batch size and length
        return LossConfig(loss_type="dr_grpo", beta=0.04, max_completion_length=length)

    out, gradient = step(inputs, backend, loss=config(8))
    lone = {name: x[2:3] if x.dim() == 1 else x[2:3, :6] for name, x in inputs.items()}
    lone["logits"] = inputs["logits"][2:3, :7]
    alone, alone_gradient = step(lone, backend, loss=config(4 * 8))
    for name in ("logps", "weights", "entropy"):
        assert same(getattr(out, name)[2:3, :6], getattr(alone, name)), name
    assert same(gradient[2:3, :6], alone_gradient[:, :6])


def test_packed_and_padded_agree(backend, device):
    inputs = batch(4, 9, device)
    inputs["completion_mask"][:] = True
    inputs["logits"] = inputs["logits"][:, :-1]
    flat = {name: x.flatten(0, 1) for name, x in inputs.items() if x.dim() > 1}
    flat["advantages"] = inputs["advantages"].repeat_interleave(9)
    out, gradient = step(inputs, backend)
    packed, packed_gradient = step(flat, backend, cu_seqlens=torch.arange(5, device=device) * 9)
    for name in ("logps", "weights", "entropy"):
        assert same(getattr(out, name).flatten(), getattr(packed, name)), name
    assert same(gradient.flatten(0, 1), packed_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_scoring_and_training_give_a_ratio_of_exactly_one(backend, device, size, dtype):
    """Scored in one batch size and trained in another, on-policy is on-policy: nothing clips, no bit moves."""
    inputs = batch(*size, device, dtype)
    inputs["old_logps"] = selected_logps(inputs["logits"], inputs["completion_ids"], backend=backend)
    one_by_one = [
        selected_logps(inputs["logits"][b : b + 1], inputs["completion_ids"][b : b + 1], backend=backend)
        for b in range(size[0])
    ]
    assert same(torch.cat(one_by_one), inputs["old_logps"])
    # no room at all: a ratio that is off by one unit in the last place clips
    config = LossConfig(epsilon_low=0.0, epsilon_high=0.0)
    out, _ = step(inputs, backend, loss=config)
    on_policy, _ = step(inputs | {"old_logps": None}, backend, loss=config)
    metrics = out.metrics.floats()
    assert [value for name, value in metrics.items() if "clip" in name and "ratio" in name]
    assert all(value == 0.0 for name, value in metrics.items() if "clip_ratio" in name), metrics
    assert same(out.loss.detach(), on_policy.loss.detach())
    assert same(out.weights, on_policy.weights)


def test_the_gradient_at_a_ratio_of_one_is_that_of_no_old_log_probs(backend, device):
    inputs = batch(3, 9, device)
    inputs["old_logps"] = selected_logps(inputs["logits"], inputs["completion_ids"], backend=backend)
    out, gradient = step(inputs, backend)
    on_policy, on_policy_gradient = step(inputs | {"old_logps": None}, backend)
    assert same(out.loss.detach(), on_policy.loss.detach())
    assert same(gradient, on_policy_gradient)
