"""The neighbouring methods: golden numbers, float64 oracles on ragged batches, invariants, gradients, bad input."""

import inspect
import math
from dataclasses import dataclass

import method_oracles as oracles
import pytest
import tiny_vlms
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srpo import (
    PRESETS,
    ConfigError,
    ConfigWarning,
    DtypeError,
    NonFiniteError,
    RoleParseError,
    ShapeError,
    checks,
    role_weighted_grpo_loss_from_logps,
    token_weights,
)
from srpo import methods as m
from srpo.credit import as_dtype
from srpo.streams import no_evidence, not_scored

NAN = float("nan")
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
OLD = [[-0.5, -1, -0.2, -0.7, -1.2, -0.1], [-0.9, -0.4, -0.3, -1.5, NAN, NAN]]
CORRUPTED = [[-1.7, -1.1, -0.9, -0.8, -1, -0.1], [-0.8, -2.4, -0.4, -1.4, NAN, NAN]]
TEACHER = [[-0.3, -1.1, -0.2, -0.4, -1.6, -0.1], [-1.2, -0.4, -0.2, -1.6, NAN, NAN]]
COSINE = [[0.1, 0.3, 0.05, 0.2, 0.4, 0.15], [0.25, 0.05, 0.35, 0.1, NAN, NAN]]
ENTROPY = [[0.9, 1.4, 0.2, 1.1, 2, 0.1], [1.3, 0.6, 0.4, 1.8, NAN, NAN]]
A = [1.0, -0.5]


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestGolden:
    """The numbers of the method's section 7, printed to six places."""

    def check(self, got: Tensor, rows) -> None:
        T = max(len(row) for row in rows)
        want = double([row + [0.0] * (T - len(row)) for row in rows])
        torch.testing.assert_close(got, want, atol=6e-7, rtol=1e-6)

    def test_rlsd(self):
        w = m.rlsd_weights(double(OLD), double(TEACHER), double(A), double(MASK))
        rows = [[1.1, 0.952419, 1, 1.1, 0.9, 1], [-0.55, -0.5, -0.476209, -0.526293]]
        self.check(w * double(A)[:, None], rows)

    def test_vppo(self):
        given_ = double(OLD), double(CORRUPTED), double(MASK)
        self.check(m.vppo_trajectory_factors(*given_)[None], [[0.9, 1.1]])
        kept = m.vppo_token_mask(*given_)
        assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 2, 4], [0, 1]]

    def test_pgpo(self):
        rows = [[4.158076, 0.04116, 1.578984, 0.04116, 0.180621, 0], [0.001466, 3.997067, 0, 0.001466]]
        self.check(m.pgpo_weights(double(OLD), double(CORRUPTED), double(MASK)), rows)

    def test_vgpo(self):
        given_, groups = (double(COSINE),), torch.zeros(2, dtype=torch.long)
        rows = [
            [0.73991, 1.188341, 0.627803, 0.964126, 1.627803, 0.852018],
            [1.121622, 0.581081, 1.581081, 0.716216],
        ]
        self.check(m.vgpo_token_factors(*given_, double(MASK)), rows)
        self.check(m.vgpo_trajectory_factors(*given_, groups, double(MASK))[None], [[1.5, 0.9]])
        self.check(
            m.vgpo_weights(*given_, groups, double(MASK)), [[1.5 * x for x in rows[0]], [0.9 * x for x in rows[1]]]
        )

    def test_tor(self):
        w = m.tor_weights(double(OLD), double(CORRUPTED), double(ENTROPY), double(MASK))
        self.check(w, [[0.5, 1, 0.5, 0, 1, 0], [0, 0.5, 0, 1]])

    def test_annealing(self):
        assert [m.linear_strength(step) for step in (0, 25, 50, 80)] == [0.5, 0.25, 0.0, 0.0]
        assert m.linear_strength(30, initial=1.0, steps=40) == 0.25


@dataclass(frozen=True)
class Signals:
    """Everything a method may read, float64; masked cells hold NaN."""

    mask: Tensor
    clean: Tensor
    corrupted: Tensor
    teacher: Tensor
    entropy: Tensor
    similarity: Tensor
    advantages: Tensor
    groups: Tensor

    def rows(self, index) -> "Signals":
        return Signals(*(x[index] for x in vars(self).values()))

    def to(self, dtype: torch.dtype) -> "Signals":
        return Signals(*(as_dtype(x, dtype) if x.is_floating_point() else x for x in vars(self).values()))


def make_signals(seed: int, B: int = 5, T: int = 9, special: bool = False) -> Signals:
    """Draw ragged rows: right padding, holes, an empty row now and then."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(0 if seed % 3 == 0 else 1, T + 1, (B, 1), generator=generator)
    mask = torch.arange(T) < lengths
    if seed % 2:
        mask = mask & (uniform(B, T) > 0.2)
    clean = -3.0 * uniform(B, T)
    corrupted = clean - 2.0 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    if special:
        corrupted = torch.where(uniform(B, T) < 0.2, clean, corrupted)  # equal: ties
        corrupted = torch.where(uniform(B, T) < 0.1, -torch.inf, corrupted)
        clean = torch.where(uniform(B, T) < 0.1, -torch.inf, clean)
    teacher = clean + 0.5 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    similarity = 2.0 * uniform(B, T) - (1.0 if seed % 5 else 0.0)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    advantages[seed % B] = 0.0
    groups = torch.randint(3, (B,), generator=generator) * 7 - 5
    per_token = (clean, corrupted, teacher, 4.0 * uniform(B, T), similarity)
    return Signals(mask, *(torch.where(mask, x, NAN) for x in per_token), advantages, groups)


def both(s: Signals) -> dict[str, tuple[Tensor, Tensor]]:
    """What the library and the oracles make of the same signals, by method."""
    # An empty row counts in its group in the oracle, as in the released code; in the library it does not.
    full = s.rows(s.mask.any(1))
    return {
        "rlsd": (
            m.rlsd_weights(s.clean, s.teacher, s.advantages, s.mask, strength=0.3),
            oracles.rlsd_weights(s.teacher, s.clean, s.advantages, s.mask, strength=0.3),
        ),
        "vppo mask": (
            m.vppo_token_mask(s.clean, s.corrupted, s.mask),
            oracles.vppo_token_mask(s.clean, s.corrupted, s.mask),
        ),
        "vppo factors": (
            m.vppo_trajectory_factors(s.clean, s.corrupted, s.mask),
            oracles.vppo_trajectory_factors(s.clean, s.corrupted, s.mask),
        ),
        "vppo": (m.vppo_weights(s.clean, s.corrupted, s.mask), oracles.vppo_weights(s.clean, s.corrupted, s.mask)),
        "vgpo tokens": (
            m.vgpo_token_factors(s.similarity, s.mask),
            oracles.vgpo_token_factors(s.similarity, s.mask, offset_over="response"),
        ),
        "vgpo": (
            m.vgpo_weights(full.similarity, full.groups, full.mask),
            oracles.vgpo_weights(full.similarity, full.mask, full.groups, offset_over="response"),
        ),
        "pgpo": (m.pgpo_weights(s.clean, s.corrupted, s.mask), oracles.pgpo_weights(s.clean, s.corrupted, s.mask)),
        "tor": (
            m.tor_weights(s.clean, s.corrupted, s.entropy, s.mask),
            oracles.tor_weights(s.clean, s.corrupted, s.entropy, s.mask),
        ),
    }  # fmt: skip


class TestOracles:
    @settings(max_examples=150, deadline=None)
    @given(seed=st.integers(0, 10**6), B=st.integers(1, 7), T=st.integers(1, 17), special=st.booleans())
    def test_float64(self, seed, B, T, special):
        for name, (got, want) in both(make_signals(seed, B, T, special)).items():
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10**6))
    def test_float32_and_bfloat16(self, seed):
        s = make_signals(seed)
        for dtype, allowed in ((torch.float32, 2e-4), (torch.bfloat16, 2e-4)):
            # the oracle is given the rounded inputs: what is compared is arithmetic
            rounded = s.to(dtype)
            for name, (got, _) in both(rounded).items():
                assert got.dtype == torch.float32
                if name not in ("vppo mask", "vppo", "tor", "vgpo tokens", "vgpo"):  # those rank: rounding moves ties
                    want = both(rounded.to(torch.float64))[name][1]
                    torch.testing.assert_close(got.double(), want, rtol=allowed, atol=allowed)

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 10**6), eta=st.sampled_from([0.0, 0.03]), special=st.booleans())
    def test_papo(self, seed, eta, special):
        s = make_signals(seed, special=special and not eta)
        clean = s.clean.clone().requires_grad_()
        corrupted = s.corrupted.clone().requires_grad_()
        options = {"gamma": 0.02, "entropy_weight": eta, "corrupted_entropy_weight": eta}
        got = m.papo_loss_term(clean, corrupted, s.mask, **options)
        want = oracles.papo_term(s.clean, s.corrupted, s.mask, gamma=0.02, entropy_coef=eta, corrupted_entropy_coef=eta)
        assert got.item() == pytest.approx(want, rel=1e-9, abs=1e-12)
        got.backward()
        assert clean.grad.isfinite().all()
        assert corrupted.grad.isfinite().all()
        assert (clean.grad[~s.mask] == 0).all()

    @pytest.mark.parametrize("both_trained", [True, False])
    def test_the_gradient_of_papo_by_finite_differences(self, both_trained):
        s = make_signals(1)
        inputs = (s.clean.nan_to_num().requires_grad_(), s.corrupted.nan_to_num().requires_grad_(both_trained))
        eta = 0.05 if both_trained else 0.0
        term = lambda a, b: m.papo_loss_term(  # noqa: E731
            a, b, s.mask, gamma=0.02, entropy_weight=0.03, corrupted_entropy_weight=eta, num_items_in_batch=11.0
        )
        assert torch.autograd.gradcheck(term, inputs)

    def test_a_similarity_of_hidden_states(self):
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(3, 12, 7, generator=generator, dtype=torch.float64)
        image, mask = torch.rand(3, 12, generator=generator) < 0.4, torch.ones(3, 5)
        image[1] = False  # no image
        states[2, -1] = 0.0
        states[0, ~image[0] & (torch.arange(12) < 7)] = NAN  # neither an image token nor the completion
        got = m.visual_similarity(states, image, 5)
        torch.testing.assert_close(got, oracles.visual_similarity(states, image, mask))
        assert (got[1] == 0).all()
        assert got[2, -1] == 0
        torch.testing.assert_close(m.visual_similarity(states[1:], image[1:])[:, -5:], got[1:])


class TestInvariants:
    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10**6))
    def test_sums_and_means(self, seed):
        s = make_signals(seed)
        n = s.mask.sum(1)
        torch.testing.assert_close(m.pgpo_weights(s.clean, s.corrupted, s.mask).sum(1), n.double())
        factors = m.vppo_trajectory_factors(s.clean, s.corrupted, s.mask)
        assert factors[n > 0].mean().item() == pytest.approx(1.0, abs=1e-6) or not n.any()
        kept = m.vppo_token_mask(s.clean, s.corrupted, s.mask)
        assert kept.sum(1).tolist() == [math.ceil(0.4 * k - 1e-9) for k in n.tolist()]
        tokens = m.vgpo_token_factors(s.similarity, s.mask)
        clipped = (tokens <= 0.1 + 1e-9) | (tokens >= 2 - 1e-9)
        plain = (n > 0) & ~(clipped & s.mask).any(1)
        torch.testing.assert_close((tokens.sum(1) / n.clamp(min=1))[plain], torch.ones(int(plain.sum())).double())

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10**6))
    def test_order_of_rows_and_padding(self, seed):
        s = make_signals(seed, B=6)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        wider = Signals(
            *(torch.nn.functional.pad(x, (0, 3), value=NAN if x.is_floating_point() else 0) if x.dim() == 2 else x
              for x in vars(s).values())
        )  # fmt: skip
        plain, shuffled, padded = both(s), both(s.rows(order)), both(wider)
        nonempty = s.mask.any(1)
        for name, (got, _) in plain.items():
            moved = order if name != "vgpo" else order[nonempty[order]]
            kept = got if name != "vgpo" else torch.zeros(6, 9).double().masked_scatter(nonempty[:, None], got)
            torch.testing.assert_close(shuffled[name][0], kept[moved], rtol=1e-12, atol=1e-12)
            if got.dim() == 2:
                torch.testing.assert_close(padded[name][0][:, :9], got, rtol=1e-12, atol=1e-12)
                assert (padded[name][0][:, 9:] == 0).all()

    def test_groups_are_ids_and_not_neighbours(self):
        s = make_signals(4, B=6)
        groups = torch.tensor([9, -1, 9, -1, 9, -1])
        mixed = m.vgpo_trajectory_factors(s.similarity, groups, s.mask)
        for group in (9, -1):
            rows = groups == group
            alone = m.vgpo_trajectory_factors(s.similarity[rows], groups[rows], s.mask[rows])
            torch.testing.assert_close(mixed[rows], alone)
        assert not torch.allclose(mixed, m.vgpo_trajectory_factors(s.similarity, groups.sort().values, s.mask))

    def test_degenerate_ranges(self):
        mask, equal = torch.ones(2, 5), torch.full((2, 5), -0.7)
        assert (m.pgpo_weights(equal, equal - 0.3, mask) == 1).all()
        assert (m.vppo_trajectory_factors(equal, equal - 0.3, mask) == 1).all()
        assert (m.vppo_trajectory_factors(equal[:1], equal[:1] - torch.rand(1, 5), mask[:1]) == 1).all()
        assert (m.vgpo_weights(-equal * 0, torch.tensor([1, 1]), mask) == 1).all()
        one = m.vgpo_weights(torch.rand(2, 1), torch.tensor([1, 2]), torch.ones(2, 1))
        assert (one == 1).all()
        alone = m.vgpo_trajectory_factors(torch.rand(2, 5), torch.tensor([1, 2]), mask)
        assert (alone == 1).all()

    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
    def test_empty(self, shape):
        x, mask, groups = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long)
        results = [
            m.rlsd_weights(x, x, torch.zeros(shape[0]), mask), m.vppo_weights(x, x, mask), m.pgpo_weights(x, x, mask),
            m.tor_weights(x, x, x, mask), m.vgpo_weights(x, groups, mask),
        ]  # fmt: skip
        assert all(result.shape == shape for result in results)
        assert m.papo_loss_term(x.requires_grad_(), x, mask) == 0

    def test_an_empty_row_is_no_part_of_its_group(self):
        similarity, groups = torch.rand(4, 6), torch.zeros(4, dtype=torch.long)
        mask = torch.ones(4, 6)
        mask[2] = 0
        factors = m.vgpo_trajectory_factors(similarity, groups, mask)
        rest = [0, 1, 3]
        torch.testing.assert_close(factors[rest], m.vgpo_trajectory_factors(similarity[rest], groups[rest]))
        assert factors[2] == 1

    def test_a_tie_to_rounding_goes_to_the_earlier_token(self):
        clean = torch.tensor([[-0.3, -1.5, -0.9]], dtype=torch.float64)
        corrupted = torch.tensor([[-0.2, -1.4, -0.8]], dtype=torch.float64)  # all differences are -0.1 up to rounding
        assert m.vppo_token_mask(clean, corrupted).tolist() == [[1, 1, 0]]


class TestMethods:
    def signals(self, B: int = 4, T: int = 12) -> dict[str, Tensor | int]:
        s = make_signals(7, B, T)
        roles = (1 + (torch.arange(T) >= T // 2).long()).expand(B, T)
        ablated = s.clean - torch.rand(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {
            "logps": s.clean, "completion_mask": s.mask, "corrupted_logps": s.corrupted, "ablated_logps": ablated,
            "teacher_logps": s.teacher, "entropy": s.entropy, "similarity": s.similarity, "advantages": s.advantages,
            "group_ids": s.groups, "role_ids": roles, "step": 10, "corrupted_kl": (s.clean - s.corrupted).abs(),
            "completion_ids": torch.randint(9, (B, T), generator=torch.Generator().manual_seed(2)),
        }  # fmt: skip

    @pytest.mark.parametrize("name", m.METHODS)
    def test_one_call_site(self, name):
        signals = self.signals()
        weights = m.METHODS[name](**signals)
        mask = signals["completion_mask"]
        assert weights.shape == mask.shape
        assert weights.isfinite().all()
        assert (weights[~mask] == 0).all()
        assert (weights >= 0).all()
        assert not weights.requires_grad
        current = (signals["logps"] + 0.1).requires_grad_()
        out = role_weighted_grpo_loss_from_logps(
            current, signals["advantages"], weights=weights, old_logps=signals["logps"], completion_mask=mask
        )
        (out.loss + m.METHODS[name].loss_term(current, **signals)).backward()
        assert current.grad.isfinite().all()
        assert current.grad.any()

    def test_the_mapping_is_the_functions(self):
        s = self.signals()
        mask = s["completion_mask"]
        pair = (s["logps"], s["corrupted_logps"])
        assert m.METHODS["vppo"](**s).equal(m.vppo_weights(*pair, mask))
        assert m.METHODS["pgpo"](**s).equal(m.pgpo_weights(*pair, mask))
        assert m.METHODS["tor"](**s).equal(m.tor_weights(*pair, s["entropy"], mask))
        assert m.METHODS["vgpo"](**s).equal(m.vgpo_weights(s["similarity"], s["group_ids"], mask))
        annealed = m.rlsd_weights(s["logps"], s["teacher_logps"], s["advantages"], mask, strength=0.4)
        assert m.METHODS["rlsd"](**s).equal(annealed)
        assert m.METHODS["papo"](**s).equal(mask.float())
        current = s["logps"].clone().requires_grad_()
        assert m.METHODS["papo"].loss_term(current, **s).equal(m.papo_loss_term(current, s["corrupted_logps"], mask))
        assert m.METHODS["vppo"].loss_term(current, **s) == 0

    @pytest.mark.parametrize("name", m.METHODS)
    def test_a_missing_signal_is_named(self, name):
        signals = self.signals()
        for needed in ("logps", *m.METHODS[name].needs):
            with pytest.raises(ConfigError, match=rf"{name}.*{needed} got None.*pass "):
                m.METHODS[name](**{**signals, needed: None})

    def test_signals_that_are_not_read_may_be_missing(self):
        signals = self.signals()
        for name, method in m.METHODS.items():
            few = {key: x for key, x in signals.items() if key in ("logps", "completion_mask", *method.needs)}
            assert method(**few).equal(method(**signals)), name

    def test_an_unknown_signal(self):
        with pytest.raises(ConfigError, match="'corrupted'"):
            m.METHODS["vppo"](**self.signals(), corrupted=1)

    def test_every_method_says_where_it_comes_from(self):
        for name, method in m.METHODS.items():
            assert method.name == name
            assert method.source[-10:-5].isdigit() or method.source[-10:].replace(".", "").isdigit()
            assert set(method.needs) <= set(m.SIGNALS)


class NoSync(TorchDispatchMode):
    """Refuse what makes a GPU wait: reading a value, sizes that depend on values, copies to the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        banned = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero", "item")
        name = func.overloadpacket.__name__
        assert not any(name.startswith(word) for word in banned), name
        if name == "index":
            assert not any(x is not None and x.dtype == torch.bool for x in args[1]), "boolean index"
        return func(*args, **(kwargs or {}))


class TestDevice:
    @pytest.mark.parametrize("name", [name for name in m.METHODS if not name.startswith(("srpo", "grpo"))])
    def test_nothing_waits_for_a_gpu(self, name, monkeypatch):
        signals = TestMethods().signals()
        current = signals["logps"].clone().requires_grad_()
        monkeypatch.setattr(checks.Call, "finite", lambda *_: None)  # values of CPU tensors are checked, a GPU's not
        monkeypatch.setattr(checks, "scored", lambda *_: None)
        plain = checks.mask_of
        monkeypatch.setattr(checks, "mask_of", lambda call, mask, layout: plain(call, mask.bool(), layout))
        with NoSync():
            m.METHODS[name](**signals)
            m.METHODS[name].loss_term(current, **signals)

    def test_a_similarity_does_not_wait(self):
        with NoSync():
            m.visual_similarity(torch.randn(2, 9, 4), torch.ones(2, 9), 3)

    def test_the_guard_sees_a_wait(self):
        with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
            torch.ones(1).sum().item()

    def test_no_source_moves_to_the_cpu(self):
        for module in (m.papo, m.pgpo, m.rlsd, m.signals, m.table, m.tor, m.vgpo, m.vppo):
            source = inspect.getsource(module)
            for word in (".cpu()", ".item()", ".tolist()", ".numpy()", "for row", "for t in"):
                assert word not in source, f"{module.__name__}: {word}"


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_vgpo_on_a_model(family):
    model, processor = tiny_vlms.build(family)
    pictures = [[tiny_vlms.picture(n, seed=n)] for n in range(3)]
    inputs = processor(text=[tiny_vlms.PROMPTS[family]] * 3, images=pictures, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    image = inputs["input_ids"] == model.config.image_token_id
    T = 6
    similarity = m.visual_similarity(outputs, image, T)
    torch.testing.assert_close(
        similarity.double(),
        oracles.visual_similarity(outputs.hidden_states[-1], image, torch.ones(3, T)),
        atol=1e-6,
        rtol=0,
    )
    weights = m.vgpo_weights(similarity, torch.zeros(3, dtype=torch.long))
    assert weights.std() > 0


class TestBadInput:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)

    @pytest.mark.parametrize(
        ("error", "name", "call"),
        [
            (ShapeError, "corrupted_logps", lambda x, k: m.vppo_weights(x, x[:, :2], k)),
            (ShapeError, "completion_mask", lambda x, k: m.pgpo_weights(x, x, k[:1])),
            (ShapeError, "logps", lambda x, k: m.pgpo_weights(x[0], x[0])),
            (DtypeError, "logps", lambda x, k: m.tor_weights(x.long(), x, x, k)),
            (DtypeError, "teacher_logps", lambda x, k: m.rlsd_weights(x, None, x[:, 0], k)),
            (ShapeError, "group_ids", lambda x, k: m.vgpo_weights(x, torch.zeros(3, dtype=torch.long), k)),
            (DtypeError, "group_ids", lambda x, k: m.vgpo_weights(x, torch.zeros(2), k)),
            (ConfigError, "keep", lambda x, k: m.vppo_weights(x, x, k, keep=1.5)),
            (ConfigError, "strength", lambda x, k: m.rlsd_weights(x, x, x[:, 0], k, strength=2)),
            (ConfigError, "threshold", lambda x, k: m.pgpo_weights(x, x, k, threshold=0.0)),
            (ConfigError, "share", lambda x, k: m.tor_weights(x, x, x, k, share=True)),
            (ConfigError, "gamma", lambda x, k: m.papo_loss_term(x.clone().requires_grad_(), x, k, gamma=-1)),
            (ConfigError, "step", lambda x, k: m.linear_strength(-1)),
            (ShapeError, "outputs", m.visual_similarity),
            (DtypeError, "outputs", lambda x, k: m.visual_similarity(object(), k)),
            (ShapeError, "image_token_mask", lambda x, k: m.visual_similarity(torch.zeros(2, 4, 5), k)),
            (ConfigError, "logits_to_keep", lambda x, k: m.visual_similarity(torch.zeros(2, 3, 5), k, 4)),
        ],
    )
    def test_typed_errors(self, error, name, call):
        with pytest.raises(error, match=name):
            call(self.x, self.mask)

    def test_papo_without_a_gradient(self):
        with pytest.raises(ConfigError, match="selected_logps"):
            m.papo_loss_term(self.x, self.x, self.mask)
        with torch.no_grad():  # an evaluation
            assert m.papo_loss_term(self.x, self.x, self.mask) == 0

    def test_a_second_entropy_that_trains_nothing(self):
        with pytest.warns(ConfigWarning, match="trains nothing"):
            m.papo_loss_term(self.x.clone().requires_grad_(), self.x, self.mask, corrupted_entropy_weight=0.03)


class TestSiblings:
    """Two prompts of two and three rollouts; perception in the first four columns, reasoning in the others."""

    ids = torch.tensor([
        [5, 3, 7, 2, 9, 9], [5, 4, 7, 2, 9, 9], [5, 6, 7, 8, 9, 9], [5, 1, 7, 8, 9, 9], [6, 6, 7, 8, 9, 9],
    ])  # fmt: skip
    roles = torch.tensor([[1, 1, 1, 1, 2, 2]] * 5)
    groups, advantages = torch.tensor([4, 4, 2, 2, 2]), torch.tensor([-1.0, 1.0, 0.0, -0.5, 1.0])

    def signals(self, **changed) -> dict:
        generator = torch.Generator().manual_seed(0)
        logps = -torch.rand(5, 6, generator=generator)
        own = {
            "logps": logps, "corrupted_logps": logps - torch.rand(5, 6, generator=generator),
            "ablated_logps": logps - torch.rand(5, 6, generator=generator),
            "corrupted_kl": torch.rand(5, 6, generator=generator), "role_ids": self.roles, "completion_ids": self.ids,
            "advantages": self.advantages, "group_ids": self.groups,
        }  # fmt: skip
        return own | changed

    def test_marks(self):
        """The failing rows 0 and 3 are compared with 1 and 4; the others are not marked."""
        found = m.contradicted_by_sibling(self.ids, self.roles, self.advantages, self.groups)
        assert found.nonzero().tolist() == [[0, 1], [3, 0], [3, 1]]
        masked = torch.ones_like(self.ids)
        masked[0, 1] = 0
        assert m.contradicted_by_sibling(self.ids, self.roles, self.advantages, self.groups, masked)[0].sum() == 0

    def test_weights_are_those_of_the_contrasts_of_the_equations(self):
        s = self.signals()
        evidence = s["logps"] - torch.where(self.roles == 1, s["corrupted_logps"], s["ablated_logps"])
        marked = m.contradicted_by_sibling(self.ids, self.roles, self.advantages, self.groups)
        blame = torch.where(self.roles == 1, torch.where(marked, 1, -1) * s["corrupted_kl"], -evidence)
        contrast = torch.where((self.advantages < 0)[:, None], blame, evidence)
        expected = token_weights(contrast, self.roles, credit=PRESETS["srpo_wide"])
        torch.testing.assert_close(m.METHODS["srpo_sibling"](**s), expected)
        torch.testing.assert_close(m.METHODS["srpo_sibling"](**s)[[1, 2, 4]], m.METHODS["srpo_wide"](**s)[[1, 2, 4]])

    def test_nobody_to_compare_with(self):
        alone = m.METHODS["srpo_sibling"](**self.signals(group_ids=torch.arange(5)))
        assert (alone[[0, 3]] == 1).all()
        assert (alone[1] != 1).any()
        blind = self.roles.clone()
        blind[1, :4] = 0  # the better rollout says nothing that it saw
        weights = m.METHODS["srpo_sibling"](**self.signals(role_ids=blind))
        assert (weights[0] == 1).all()

    def test_a_row_without_a_picture_keeps_its_weights(self):
        """Its perception has no evidence, so a role is missing, as for srpo."""
        s = self.signals()
        for name in ("corrupted_logps", "corrupted_kl"):
            s[name] = s[name].clone()
            s[name][0] = no_evidence(s[name])
        weights = m.METHODS["srpo_sibling"](**s)
        assert (weights[0] == 1).all()
        assert weights.isfinite().all()

    @pytest.mark.parametrize(
        ("changed", "error", "said"),
        [
            ({"completion_ids": ids[:, :5]}, ShapeError, "completion_ids"),
            ({"completion_ids": ids.float()}, DtypeError, "completion_ids"),
            ({"advantages": torch.ones(5, 6)}, ShapeError, r"advantages.*\[B\]"),
            ({"advantages": torch.full((5,), torch.nan)}, NonFiniteError, "advantages"),
            ({"group_ids": groups.float()}, DtypeError, "group_ids"),
            ({"corrupted_kl": torch.full((5, 6), -1.0)}, NonFiniteError, "corrupted_kl"),
            ({"corrupted_kl": not_scored(torch.zeros(1)).expand(5, 6)}, ConfigError, "corrupted_kl.*not scored"),
            ({"role_ids": roles + 2}, RoleParseError, "role_ids"),
        ],
    )
    def test_bad_input(self, changed, error, said):
        with pytest.raises(error, match=said):
            m.METHODS["srpo_sibling"](**self.signals(**changed))

    def test_one_scoring_gives_all_streams(self):
        method = m.METHODS["srpo_sibling"]
        assert method.streams == ("corrupted", "ablated")
        assert method.reads_kl
        with pytest.raises(ConfigError, match=r"kl got .k3.*leave it out"):
            method.with_kl("k3")
