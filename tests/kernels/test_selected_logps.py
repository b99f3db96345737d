"""The row kernels against their float64 twins, and the traps that rows of logits set."""

import interpreter_guard
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close_to_truth

from srpo import ConfigError, role_weighted_grpo_loss, selected_logps
from srpo_kernels import launch, ops, reference

VOCABULARIES = (7, 1000, 151665, 151936, 152064)  # Qwen2.5-VL's heads among them; none but two a multiple of a block


@pytest.fixture
def big_blocks(monkeypatch):
    """Few, large blocks: the interpreter pays per block, not per element."""
    monkeypatch.setattr(launch, "row_block", lambda V: (32768, 8))
    monkeypatch.setattr(launch, "gradient_block", lambda V: (32768, 8))


def peaked_logits(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Random logits with one tall peak a row, as a trained model gives them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator) * 3
    peak = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    logits.scatter_(-1, peak[..., None], 18.0)
    ids = torch.where(torch.rand(shape[:-1], generator=generator) < 0.5, peak, (peak * 7 + 3) % shape[-1])
    return logits.to(dtype).to(device), ids.to(device)


def truth_of(logits, ids, temperature=1.0):
    log_probs = torch.log_softmax(logits.double() / temperature, -1)
    return log_probs.gather(-1, ids[..., None]).squeeze(-1), -(log_probs.exp() * log_probs).nansum(-1)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_trap_1_a_vocabulary_that_is_no_multiple_of_the_block(V, backend, device, big_blocks):
    logits, ids = peaked_logits(1, 2, V, device=device)
    ids[0, 0] = V - 1
    leaf = logits.clone().requires_grad_()
    logps, entropy = selected_logps(leaf, ids, return_entropy=True, backend=backend)
    truth, true_entropy = truth_of(logits, ids)
    eager = torch.log_softmax(logits, -1)
    picked = eager.gather(-1, ids[..., None]).squeeze(-1)
    assert_close_to_truth("logps", logps, truth, picked, precision=torch.float32)
    assert_close_to_truth("entropy", entropy, true_entropy, -(eager.exp() * eager).sum(-1), precision=torch.float32)
    logps.sum().backward()
    onehot = torch.nn.functional.one_hot(ids, V)
    assert_close_to_truth("gradient", leaf.grad, onehot - torch.softmax(logits.double(), -1), precision=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trap_2_a_log_prob_is_never_positive(dtype, backend, device):
    logits, ids = peaked_logits(4, 64, 130, dtype=dtype, device=device)
    logits.scatter_(-1, ids[..., None], 60.0)  # so sure that rounding apart would show
    assert (selected_logps(logits, ids, backend=backend) <= 0).all()


def test_trap_3_log_probs_are_fp32_and_the_temperature_is_applied_in_fp32(backend, device):
    logits, ids = peaked_logits(2, 8, 130, dtype=torch.bfloat16, device=device)
    logps = selected_logps(logits, ids, temperature=0.7, backend=backend)
    assert logps.dtype == torch.float32
    assert_close_to_truth("logps", logps, truth_of(logits, ids, 0.7)[0], precision=torch.float32)


def test_trap_6_banned_tokens(backend, device):
    V = 300
    logits, _ = peaked_logits(1, 3, V, device=device)
    logits[0, 0, :160] = -torch.inf  # the whole first block, and more
    logits[0, 1, 5] = -torch.inf  # the target itself
    logits[0, 2, 10:20] = -torch.inf
    ids = torch.tensor([[200, 5, 100]], device=device)
    leaf = logits.clone().requires_grad_()
    logps, entropy = selected_logps(leaf, ids, return_entropy=True, backend=backend)
    truth, true_entropy = truth_of(logits, ids)
    assert logps[0, 1] == -torch.inf
    assert_close_to_truth("logps", logps, truth, precision=torch.float32)
    assert_close_to_truth("entropy", entropy, true_entropy, precision=torch.float32)
    (logps.nan_to_num(neginf=0.0).sum() + entropy.sum()).backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[logits == -torch.inf][:170] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_is_nan_and_stays_alone(bad, backend, device):
    logits, ids = peaked_logits(1, 3, 130, device=device)
    clean = selected_logps(logits, ids, backend=backend)
    logits[0, 1, 77] = bad
    logps = selected_logps(logits, ids, backend=backend)
    assert logps[0, 1].isnan()
    assert torch.equal(logps[0, ::2], clean[0, ::2])


def test_trap_7_masked_rows_are_not_read(backend, device):
    logits, ids = peaked_logits(2, 4, 130, device=device)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]], device=device)
    poisoned = logits.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    ids[mask == 0] = -100
    logps, entropy = selected_logps(poisoned, ids, mask=mask, return_entropy=True, backend=backend)
    assert (logps[mask == 0] == 0).all()
    assert (entropy[mask == 0] == 0).all()
    (logps * torch.where(mask == 1, 1.0, torch.nan)).nansum().backward()
    assert (poisoned.grad[mask == 0] == 0).all()
    assert poisoned.grad.isfinite().all()


def test_trap_8_row_offsets_pass_two_to_the_31(backend, device):
    V, stride = 130, 2**30 + 16  # the third row starts where an int32 has wrapped
    storage = torch.empty(2 * stride + V, dtype=torch.bfloat16, device=device)  # virtual memory; three rows are touched
    far = storage.as_strided((1, 3, V), (0, stride, 1))
    logits, ids = peaked_logits(1, 3, V, dtype=torch.bfloat16, device=device)
    far.copy_(logits)
    assert torch.equal(selected_logps(far, ids, backend=backend), selected_logps(logits, ids, backend=backend))


def test_trap_10_id_slices_may_start_anywhere(backend, device):
    logits, ids = peaked_logits(2, 5, 130, device=device)
    padded = torch.cat([torch.full((2, 3), -100, device=device), ids], 1)
    assert torch.equal(
        selected_logps(logits, padded[:, 3:], backend=backend), selected_logps(logits, ids, backend=backend)
    )


def test_an_unvalidated_id_outside_the_vocabulary_forms_no_address(backend, device):
    if backend == "torch":
        pytest.skip("torch.gather raises on its own")
    logits, _ = peaked_logits(1, 3, 130, device=device)
    ids = torch.tensor([[-100, 130, 129]], device=device)
    logps = selected_logps(logits, ids, backend=backend, validate_values=False)
    assert logps[0, :2].isnan().all()
    assert logps[0, 2].isfinite()


def test_trap_17_bits_do_not_depend_on_the_number_of_rows_or_on_splitting(backend, device, monkeypatch):
    logits, ids = peaked_logits(3, 5, 20005, device=device)  # two chunks and an edge
    whole = selected_logps(logits, ids, return_entropy=True, backend=backend)
    alone = selected_logps(logits[1:2, 2:3], ids[1:2, 2:3], return_entropy=True, backend=backend)
    monkeypatch.setattr(launch, "split_rows", lambda n_rows, device: True)
    split = selected_logps(logits, ids, return_entropy=True, backend=backend)
    for a, b, c in zip(whole, alone, split, strict=True):
        assert torch.equal(a[1:2, 2:3], b)
        assert torch.equal(a, c)


def test_the_split_path_masks_rows_and_handles_streams(device, monkeypatch):
    logits, ids = peaked_logits(2, 3, 20005, device=device)
    corrupted, _ = peaked_logits(2, 3, 20005, seed=1, device=device)
    row_mask = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(3)).to(device) < 0.6
    arguments = {"corrupted_logits": corrupted, "return_entropy": True, "backend": "triton"}
    whole = ops.row_statistics(logits, ids, row_mask, **arguments)
    monkeypatch.setattr(launch, "split_rows", lambda n_rows, device: True)
    split = ops.row_statistics(logits, ids, row_mask, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))
    assert (split[0][~row_mask] == 0).all()


@given(
    V=st.sampled_from([1, 2, 127, 128, 129, 4096, 4097]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    extra_row=st.booleans(),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "flipped_batch"]),
    seed=st.integers(0, 99),
)
def test_kernels_match_the_reference_on_any_strides(V, temperature, dtype, extra_row, layout, seed):
    T = 3
    logits, ids = peaked_logits(2, T + extra_row, V, seed=seed, dtype=dtype)
    ids = ids[:, :T]
    if layout == "sliced":
        logits = torch.nn.functional.pad(logits, (1, 2))[..., 1:-2]
    elif layout == "transposed":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "flipped_batch":
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    results = {}
    for backend in ("torch", "triton"):
        leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        logps, entropy = selected_logps(leaf, ids, temperature=temperature, return_entropy=True, backend=backend)
        (logps * 0.7 + entropy * 0.3).sum().backward()
        results[backend] = logps, entropy, leaf.grad
    wide = logits.detach().double().requires_grad_()
    truth = selected_logps(wide, ids, temperature=temperature, return_entropy=True, backend="torch")
    (truth.logps * 0.7 + truth.entropy * 0.3).sum().backward()
    for logps, entropy, gradient in results.values():
        assert_close_to_truth("logps", logps, truth.logps, precision=torch.float32)
        assert_close_to_truth("entropy", entropy, truth.entropy, precision=torch.float32)
        assert_close_to_truth("gradient", gradient, wide.grad, precision=dtype)


def test_the_reference_gradient_passes_gradcheck():
    logits, ids = peaked_logits(2, 3, 9, dtype=torch.float64)
    logits = (logits * 0.2).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda x: selected_logps(x, ids, temperature=0.7, mask=mask, return_entropy=True, backend="torch"), logits
    )


def test_k3_keeps_its_digits_near_zero(device):
    """Trap 4: exp(-d) + d - 1 in fp32 has no correct digit at 1e-4."""
    d = torch.tensor([1e-8, 1e-6, 1e-4, -1e-4, 1e-2, 0.49, 0.51, -0.51, 3.0, -3.0])
    truth = torch.expm1(-d.double()) + d.double()
    truth = torch.where(d.abs() < 1e-3, d.double() ** 2 / 2 - d.double() ** 3 / 6, truth)
    assert ((reference.k3(d).double() - truth).abs() <= 1e-6 * truth).all()


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted by the interpreter")
class TestOnePass:
    """Each needed row of each stream is read once in forward; backward reads it once more and writes it once."""

    def setup_method(self):
        self.logits, self.ids = peaked_logits(2, 5, 300)  # [B, T + 1, V] with T = 4
        self.ids = self.ids[:, :4]
        self.streams = [peaked_logits(2, 5, 300, seed=s)[0] for s in (1, 2)]
        self.mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        self.roles = torch.tensor([[1, 2, 0, 1], [1, 1, 2, 2]])
        self.row_bytes = 300 * 4

    def run(self, **arguments):
        return role_weighted_grpo_loss(
            self.logits.requires_grad_(), self.ids, torch.tensor([1.0, -0.5]), role_ids=self.roles,
            completion_mask=self.mask, backend="triton", **arguments,
        )  # fmt: skip

    def test_live_streams(self):
        corrupted, ablated = self.streams
        with (
            interpreter_guard.count_bytes(self.logits) as clean,
            interpreter_guard.count_bytes(corrupted) as of_corrupted,
            interpreter_guard.count_bytes(ablated) as of_ablated,
        ):
            self.run(corrupted_logits=corrupted, ablated_logits=ablated)
        assert clean.loaded_bytes == 7 * self.row_bytes  # valid rows; the T + 1st is not read
        assert of_corrupted.loaded_bytes == 3 * self.row_bytes  # valid perception rows
        assert of_ablated.loaded_bytes == 3 * self.row_bytes  # valid reasoning rows
        assert clean.stored_bytes == of_corrupted.stored_bytes == of_ablated.stored_bytes == 0

    def test_backward(self):
        given = {"corrupted_logps": torch.zeros(2, 4), "ablated_logps": torch.zeros(2, 4)}
        loss = self.run(**given).loss
        with interpreter_guard.count_bytes(self.logits) as clean:
            loss.backward()
        assert clean.loaded_bytes == 7 * self.row_bytes
        assert clean.stored_bytes == 0

    def test_rows_without_gradient_are_not_read(self):
        loss = role_weighted_grpo_loss(
            self.logits.requires_grad_(), self.ids, torch.tensor([0.0, -0.5]), backend="triton"
        ).loss
        with interpreter_guard.count_bytes(self.logits) as clean:
            loss.backward()
        assert clean.loaded_bytes == 4 * self.row_bytes

    def test_in_place_backward_writes_every_row_once(self):
        hidden = self.logits.detach().clone().requires_grad_()
        logits = hidden * 1.0
        loss = role_weighted_grpo_loss(
            logits, self.ids, torch.tensor([1.0, -0.5]), inplace_backward=True, backend="triton"
        ).loss
        with interpreter_guard.count_bytes(logits) as clean:
            loss.backward()
        assert clean.loaded_bytes == 8 * self.row_bytes
        assert clean.stored_bytes == 10 * self.row_bytes


class TestInPlace:
    """Trap 14: the gradient in the memory of the logits, and never a silent corruption."""

    def arguments(self, device):
        hidden, ids = peaked_logits(2, 4, 130, device=device)
        return hidden.requires_grad_(), ids, torch.tensor([1.0, -0.5], device=device)

    def test_same_gradient_no_second_buffer(self, backend, device):
        hidden, ids, advantages = self.arguments(device)
        role_weighted_grpo_loss(hidden * 1.5, ids, advantages, backend=backend).loss.backward()
        expected, hidden.grad = hidden.grad, None
        logits = hidden * 1.5
        role_weighted_grpo_loss(logits, ids, advantages, inplace_backward=True, backend=backend).loss.backward()
        assert torch.equal(hidden.grad, expected)
        assert torch.equal(logits.detach() * 1.5, expected)

    def test_a_second_backward_raises(self, backend, device):
        hidden, ids, advantages = self.arguments(device)
        loss = role_weighted_grpo_loss(hidden * 1.5, ids, advantages, inplace_backward=True, backend=backend).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_another_user_of_the_logits_raises(self, backend, device):
        hidden, ids, advantages = self.arguments(device)
        logits = hidden * 1.5
        squared = (logits**2).sum()
        loss = role_weighted_grpo_loss(logits, ids, advantages, inplace_backward=True, backend=backend).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.backward()

    def test_leaf_and_expanded_logits_are_refused(self, backend, device):
        hidden, ids, advantages = self.arguments(device)
        with pytest.raises(ConfigError, match="inplace_backward"):
            role_weighted_grpo_loss(hidden, ids, advantages, inplace_backward=True, backend=backend)
        expanded = (hidden[:1] * 1.0).expand(2, -1, -1)
        with pytest.raises(ConfigError, match="inplace_backward"):
            role_weighted_grpo_loss(expanded, ids, advantages, inplace_backward=True, backend=backend)


def test_without_in_place_the_graph_can_be_walked_twice(backend, device):
    logits, ids = peaked_logits(1, 3, 130, device=device)
    logits.requires_grad_()
    loss = role_weighted_grpo_loss(logits, ids, torch.ones(1, device=device), backend=backend).loss
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, once * 2)


def test_the_caller_keeps_its_thread_count(device):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        logits, ids = peaked_logits(1, 64, 70000)
        assert selected_logps(logits, ids, backend="torch").isfinite().all()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
