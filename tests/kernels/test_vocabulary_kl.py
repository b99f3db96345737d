"""KL over the whole vocabulary: both entries and both backends against float64, what is read, and whose bits move."""

import math

import interpreter_guard
import oracles
import pytest
import torch
from conftest import INTERPRETED
from op_checks import opcheck
from tolerances import assert_close_to_truth

import srpo
from srpo import CreditConfig, LossConfig, NonFiniteError
from srpo_kernels import launch

KL = CreditConfig(contrast_kind="kl")
ONE_PASS = CreditConfig(contrast_kind="kl", reasoning_signal="image_independence")


@pytest.fixture(params=["whole rows", "split rows"])
def split(request, monkeypatch):
    monkeypatch.setattr(launch, "split_rows", lambda n_rows, device: request.param == "split rows")
    monkeypatch.setattr(launch, "BLOCKS_PER_CHUNK", 2)
    monkeypatch.setattr(launch, "row_block", lambda vocabulary: (128, 1))


def truth(logits, against, temperature=1.0):
    return oracles.kl(logits.double(), against.double(), temperature)


def eager(logits, against, temperature=1.0):
    return oracles.kl(logits.float(), against.float(), temperature)


def pair(V=331, dtype=torch.float32, B=2, T=4, offset=0.0, width=None, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shape = (B, T + 1, width or V)
    x = 3 * torch.randn(shape, generator=generator)
    y = x + torch.rand(B, T + 1, 1, generator=generator) ** 4 * torch.randn(shape, generator=generator) + offset
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.8
    mask[0, 0] = True
    return (x.to(dtype)[..., :V].to(device), y.to(dtype)[..., :V].to(device)), ids.to(device), mask.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 7, 128, 331, 1024])
def test_value(backend, device, split, V, dtype):
    (x, y), ids, mask = pair(V, dtype, device=device)
    out = srpo.vocabulary_kl(x, y, ids, mask=mask, temperature=0.8, backend=backend)
    x, y = x[:, :-1], y[:, :-1]
    expected, plain = (torch.where(mask, f(x, y, 0.8), 0.0) for f in (truth, eager))
    assert out.kl.dtype == torch.float32
    assert (out.kl >= 0).all()
    assert_close_to_truth("kl", out.kl, expected, plain, precision=torch.float32)
    logps = srpo.selected_logps(y, ids, mask=mask, temperature=0.8, backend=backend)
    assert torch.equal(out.logps, logps)


@pytest.mark.parametrize("of_contrast", [torch.bfloat16, torch.float32])
def test_strides_and_dtypes(backend, device, split, of_contrast):
    (x, y), ids, mask = pair(200, torch.bfloat16, width=208, device=device)
    expected = torch.where(mask, truth(x[:, :-1], y[:, :-1]), 0.0)
    strided = y.to(of_contrast).movedim(-1, 1).contiguous().movedim(1, -1)
    for contrast in (y.to(of_contrast), strided):
        out = srpo.vocabulary_kl(x, contrast, ids, mask=mask, backend=backend)
        assert_close_to_truth("kl", out.kl, expected, precision=torch.float32)
    packed = srpo.vocabulary_kl(
        x[:, :-1].flatten(0, 1), y[:, :-1].flatten(0, 1), ids.flatten(), mask=mask.flatten(), backend=backend
    )
    assert_close_to_truth("kl", packed.kl, expected.flatten(), precision=torch.float32)


@pytest.mark.parametrize("first", [300.0, -300.0])
def test_banned_tokens_and_far_offsets(backend, device, split, first):
    (x, y), ids, _ = pair(517, offset=first, T=6, B=1, device=device)
    x[0, 0, 100:400], y[0, 0, 100:400] = -torch.inf, -torch.inf  # in both: 0
    x[0, 1, :300] = -torch.inf  # in the clean context alone: finite
    y[0, 2, 5] = -torch.inf  # in the contrast alone: infinite,
    x[0, 3, 7], y[0, 3, 7] = -1e4, -torch.inf  # however small its probability
    x[0, 4, :-1], y[0, 4, 1:] = -torch.inf, -torch.inf  # nothing in common
    out = srpo.vocabulary_kl(x, y, ids, backend=backend)
    expected = truth(x[:, :-1], y[:, :-1])
    assert expected.isinf().tolist() == [[False, False, True, True, True, False]]
    assert_close_to_truth("kl", out.kl, expected, eager(x[:, :-1], y[:, :-1]), precision=torch.float32)


def test_float64(device):
    (x, y), ids, mask = pair(100, torch.float64, device=device)
    out = srpo.vocabulary_kl(x, y, ids, mask=mask)
    assert_close_to_truth("kl", out.kl, torch.where(mask, truth(x, y)[:, :-1], 0.0), precision=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [None, 3 * 97 * 4])
def test_from_hidden(backend, device, dtype, workspace_bytes):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, 8, generator=generator).to(device, dtype)
    against = (hidden + 0.3 * torch.randn(3, 6, 8, generator=generator).to(device)).to(dtype)
    weight, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((97, 8), (97,)))
    ids, mask = torch.randint(0, 97, (3, 5), generator=generator).to(device), torch.ones(3, 5, device=device)
    mask[1, 2:] = 0
    out = srpo.vocabulary_kl_from_hidden(
        hidden, against, weight, ids, bias=bias, mask=mask, temperature=1.3, workspace_bytes=workspace_bytes,
        backend=backend,
    )  # fmt: skip
    x, y = ((s @ weight.t() + bias)[:, :-1] for s in (hidden, against))
    wide = [(s.double() @ weight.double().t() + bias.double())[:, :-1] for s in (hidden, against)]
    expected, plain = (torch.where(mask.bool(), f(*z, 1.3), 0.0) for f, z in ((truth, wide), (eager, (x, y))))
    slack = 0.0 if dtype == torch.float32 else 0.02  # of the products, in 16 bits
    assert ((out.kl - expected).abs() <= (plain - expected).abs() + slack + 1e-5).all()
    again = srpo.vocabulary_kl_from_hidden(hidden, against, weight, ids, bias=bias, mask=mask, temperature=1.3)
    assert out.logps.shape == again.kl.shape == ids.shape


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
def test_each_row_is_read_once_and_no_other(split):
    (x, y), ids, mask = pair(331)
    z = y.clone() * 0.9
    roles = torch.tensor([[1, 2, 0, 1], [2, 2, 1, 0]])
    roles = torch.where(mask, roles, 0)
    streams = {"clean": x, "corrupted": y, "ablated": z}
    counts = {name: interpreter_guard.count_bytes(s) for name, s in streams.items()}
    found = {name: c.__enter__() for name, c in counts.items()}
    srpo.role_weighted_grpo_loss(
        x, ids, torch.ones(2), role_ids=roles, completion_mask=mask, corrupted_logits=y, ablated_logits=z, credit=KL,
        backend="triton",
    )  # fmt: skip
    for c in counts.values():
        c.__exit__(None, None, None)
    for name, rows in {"clean": mask, "corrupted": roles == 1, "ablated": roles == 2}.items():
        reads = found[name].loads_per_element
        assert torch.equal(reads[:, :-1].amax(-1), rows.long()), name
        assert torch.equal(reads[:, :-1].amin(-1), rows.long()), name
        assert not reads[:, -1].any(), name


@pytest.mark.parametrize("credit", [KL, ONE_PASS], ids=["two streams", "one pass"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_weighs_by_it(backend, device, split, credit, packed):
    (x, y), ids, mask = pair(331, torch.bfloat16, T=8, B=3, device=device)
    z = (0.8 * y.float()).to(y.dtype)
    x, y, z = (s[:, :-1] for s in (x, y, z))
    roles = torch.randint(0, 3, ids.shape, generator=torch.Generator().manual_seed(0)).to(device)
    live = {"corrupted_logits": y} | ({} if credit is ONE_PASS else {"ablated_logits": z})
    advantages = torch.tensor([1.0, -1.0, 0.5], device=device)
    settings = {"credit": credit, "loss": LossConfig(temperature=0.9)}
    tensors = {"role_ids": roles, "completion_mask": mask}
    leaf = x.detach().requires_grad_()
    flat = {k: v.flatten(0, 1) for k, v in ({"logits": leaf, "completion_ids": ids} | tensors | live).items()}
    cu = torch.arange(4, device=device) * 8
    if packed:
        out = srpo.role_weighted_grpo_loss(advantages=advantages, **flat, cu_seqlens=cu, **settings, backend=backend)
    else:
        out = srpo.role_weighted_grpo_loss(leaf, ids, advantages, **tensors, **live, **settings, backend=backend)
    out.loss.backward()
    weights = out.weights.view(ids.shape)

    dark, blind = truth(x, y, 0.9), truth(x, z, 0.9)
    reasoned = -dark if credit is ONE_PASS else blind
    contrast = torch.where(roles == 1, dark, torch.where(roles == 2, reasoned, 0.0)).clamp(-20, 20)
    expected = srpo.token_weights(torch.where(mask, contrast, 0.0), roles, mask, credit=CreditConfig(), backend="torch")
    assert_close_to_truth("weights", weights, expected, precision=torch.float32)
    assert (weights[mask] != 1).sum() > 0

    plain = x.detach().requires_grad_()
    given = srpo.role_weighted_grpo_loss(
        plain, ids, advantages, completion_mask=mask, weights=weights, loss=settings["loss"], backend=backend
    )
    given.loss.backward()
    assert torch.equal(plain.grad, leaf.grad)
    assert torch.equal(given.logps.flatten(), out.logps.flatten())  # no bit of them depends on a contrast
    assert torch.equal(given.entropy.flatten(), out.entropy.flatten())


@pytest.mark.parametrize("credit", [KL, ONE_PASS], ids=["two streams", "one pass"])
def test_every_entry_gives_the_same_weights(backend, device, credit):
    generator = torch.Generator().manual_seed(2)
    states = [torch.randn(2, 6, 8, generator=generator).to(device) for _ in range(3)]
    weight = torch.randn(40, 8, generator=generator).to(device)
    ids, roles = (torch.randint(0, n, (2, 6), generator=generator).to(device) for n in (40, 3))
    advantages, names = torch.tensor([1.0, -2.0], device=device), ["corrupted", "ablated"]
    logits = [s @ weight.t() for s in states]
    common = {"role_ids": roles, "credit": credit, "backend": backend}
    live = srpo.role_weighted_grpo_loss(
        logits[0], ids, advantages, **dict(zip([f"{n}_logits" for n in names], logits[1:], strict=True)), **common
    )
    hidden = srpo.role_weighted_grpo_loss_from_hidden(
        states[0], weight, ids, advantages, **dict(zip([f"{n}_hidden" for n in names], states[1:], strict=True)),
        **common,
    )  # fmt: skip
    kl = [srpo.vocabulary_kl(logits[0], s, ids, backend=backend).kl for s in logits[1:]]
    given = {"corrupted_kl": kl[0], "ablated_kl": kl[1]}
    logps = srpo.selected_logps(logits[0], ids, backend=backend)
    of_logps = srpo.role_weighted_grpo_loss_from_logps(logps, advantages, **given, **common)
    of_hidden = srpo.role_weighted_grpo_loss_from_hidden(states[0], weight, ids, advantages, **given, **common)
    contrast = srpo.role_contrast(logps, **given, **common)
    alone = srpo.token_weights(contrast, roles, credit=credit, backend=backend)
    for other in (hidden.weights, of_logps.weights, of_hidden.weights, alone):
        torch.testing.assert_close(other, live.weights, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(of_hidden.loss, live.loss, rtol=2e-5, atol=2e-6)


def test_an_infinite_divergence_is_clamped_and_counted(backend, device):
    logps = torch.full((1, 4), -1.0, device=device)
    roles = torch.tensor([[1, 1, 2, 2]], device=device)
    kl = torch.tensor([[math.inf, 0.1, 0.2, 0.3]], device=device)
    contrast = srpo.role_contrast(logps, corrupted_kl=kl, ablated_kl=kl, role_ids=roles, credit=KL, backend=backend)
    torch.testing.assert_close(contrast, torch.tensor([[20.0, 0.1, 0.2, 0.3]], device=device))
    out = srpo.role_weighted_grpo_loss_from_logps(
        logps, torch.ones(1, device=device), role_ids=roles, corrupted_kl=kl, ablated_kl=kl, credit=KL, backend=backend
    )
    assert out.metrics.floats()["srpo/infinite_divergences"] == 1.0
    assert out.weights.isfinite().all()


def test_what_is_refused(device):
    logps, roles = torch.full((1, 4), -1.0, device=device), torch.tensor([[1, 1, 2, 2]], device=device)
    call = {"logps": logps, "advantages": torch.ones(1, device=device), "role_ids": roles}
    loss = srpo.role_weighted_grpo_loss_from_logps
    with pytest.raises(srpo.ConfigError, match=r"corrupted_kl got None.*divergences.*score_streams"):
        loss(**call, corrupted_logps=logps, ablated_logps=logps, credit=KL)
    with pytest.raises(srpo.ConfigError, match=r"corrupted_kl got divergences with contrast_kind='logratio'.*'kl'"):
        loss(**call, corrupted_kl=-logps, corrupted_logps=logps, ablated_logps=logps)
    with pytest.raises(NonFiniteError, match=r"ablated_kl got values such as -1.*at least 0"):
        loss(**call, corrupted_kl=-logps, ablated_kl=logps, credit=KL)
    with pytest.raises(srpo.ConfigError, match=r"corrupted_kl.*weights"):
        loss(logps=logps, advantages=torch.ones(1, device=device), weights=-logps, corrupted_kl=-logps, credit=KL)
    (x, y), ids, _ = pair(20, device=device)
    with pytest.raises(srpo.ShapeError, match="contrast_logits"):
        srpo.vocabulary_kl(x, y[..., :-1], ids)


def test_opcheck(backend):
    (x, y), ids, mask = pair(130)
    masks = torch.stack([mask, mask & (ids % 2 == 0), mask & (ids % 2 == 1)])
    x.requires_grad_()
    opcheck(torch.ops.srpo.row_statistics.default, (x, y, y * 0.5, ids, masks, 0.9, True, True, False, backend))
    states = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(30, 8), None
    opcheck(torch.ops.srpo.linear_head_pairs.default, (*states, ids % 30, mask, 0.9, 0, "", backend))
