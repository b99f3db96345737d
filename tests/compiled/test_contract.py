"""The compiled-kernel contract: machine code for four targets, checked on a machine that has none of them.

The conftest puts this process in the interpreter, so a process of its own compiles; here its rows are checked.
"""

import ast
import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from compiled import mutants
from compiled.cases import CASES, RUNS
from conftest import INTERPRETED
from processes import run_python

from srpo import role_weighted_grpo_loss

ROOT = pathlib.Path(__file__).parents[2]
# Two processes for two cores: a half of the cases each, and one the mutants, the other the variants.
NAMES = list(CASES)
PROCESSES = (["sm_90", "--mutants", "--cases", *NAMES[::2]], ["sm_90", "--runs", "--cases", *NAMES[1::2]])
SLOW_TARGETS = ("gfx942", "sm_100", "sm_80")
TARGETS = ("sm_90", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_TARGETS))


@pytest.fixture(scope="session")
def survey(request, tmp_path_factory):
    """All rows, variants and mutants; for the targets of slow tests too where such a test runs.

    The compile cache is new, so nothing comes from an older compiler.
    """
    wanted = {item.callspec.params.get("target") for item in request.session.items if hasattr(item, "callspec")}
    processes = [*PROCESSES, *([x] for x in SLOW_TARGETS if x in wanted)]
    cache = tmp_path_factory.mktemp("triton_cache")
    environment = {name: None for name in os.environ if name.startswith("TRITON_")} | {"TRITON_CACHE_DIR": str(cache)}

    def run(options):
        done = run_python("-m", "compiled.survey", "--targets", *options, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run, processes))
    joined = {key: [x for part in parts for x in part[key]] for key in ("rows", "failures")}
    return {key: x for part in parts for key, x in part.items()} | joined


def rows_of(survey, **wanted):
    return [row for row in survey["rows"] if all(row[key] == value for key, value in wanted.items())]


# triton 3.6 asserts in TritonAMDGPUConvertToBufferOps where a pointer is chosen among tensors of at most 2 GiB.
NOT_BY_TRITON_3_6 = {(case, "gfx942") for case in ("live", "live V=152064", "one pass", "few rows, live")}


def marked(case, target):
    broken = (case, target) in NOT_BY_TRITON_3_6 and triton.__version__.startswith("3.6.")
    marks = [pytest.mark.xfail(reason="triton 3.6 cannot compile it for AMD")] if broken else []
    marks += [pytest.mark.slow] if target in SLOW_TARGETS else []
    return pytest.param(case, target, marks=marks, id=f"{case}-{target}")


@pytest.mark.parametrize(
    ("case", "target"), [marked(case, target) for case in CASES for target in ("sm_90", *SLOW_TARGETS)]
)
def test_machine_code_keeps_the_contract(survey, case, target):
    assert not [f["error"] for f in survey["failures"] if (f["case"], f["target"]) == (case, target)]
    rows = rows_of(survey, case=case, target=target)
    assert rows
    for row in rows:
        assert row["instructions"] > 0
        assert not row["broken"], f"{row['kernel']} {row['flags']}: {row['broken']}"


def test_every_kernel_has_a_case(survey):
    """A kernel that no case launches is a kernel that nobody has compiled."""
    written = set()
    for path in (ROOT / "srpo_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                written.add(node.name)
    for target in {row["target"] for row in survey["rows"]}:
        assert {row["kernel"] for row in rows_of(survey, target=target)} == written


@pytest.mark.parametrize("target", [x for x in TARGETS if "gfx942" not in getattr(x, "values", (x,))])
def test_an_element_of_logits_is_moved_once(survey, target):
    """Forward reads an element and takes one exponential, backward writes it too; a thread loads 8 scalars at most."""
    for row in rows_of(survey, target=target):
        path = row["hot_path"]
        if CASES[row["case"]].streams and row["kernel"] in (
            "_row_statistics_fwd_kernel",
            "_logits_gradient_bwd_kernel",
        ):
            due = CASES[row["case"]].bytes_moved["gradient" in row["kernel"]]
            columns = row["flags"]["BLOCK_V"] / row["threads"]
            assert due <= path["bytes_per_element"] <= due + 32 / columns
            assert 1 <= path["exp2_per_element"] <= 1.1


@pytest.mark.parametrize("target", TARGETS)
def test_an_odd_row_stride_is_the_documented_slow_path(survey, target):
    """Rows that start anywhere are loaded element by element: that is what `selected_logps` says."""
    assert "128-bit accesses need the row strides to be multiples of 16 elements" in (
        ROOT / "srpo_kernels/row_statistics.py"
    ).read_text().replace("\n", " ")
    for row in rows_of(survey, case="odd V", target=target):
        if "logits" in row["kernel"] or "row_statistics" in row["kernel"]:
            assert max(map(int, row["hot_path"]["loads"])) < 128
            assert row["hot_path"]["loads"]["16"] > 0


@pytest.mark.parametrize("run", RUNS)
def test_twenty_shapes_compile_once(survey, run):
    """B, T, temperature, epsilon, a T + 1st row, and slices at odd offsets are no reasons to compile again."""
    assert survey["variants"][run]
    again = {kernel: count for kernel, count in survey["variants"][run].items() if count != 1}
    assert not again


def test_both_vocabularies_share_their_machine_code(survey):
    def variants(case):
        return {row["variant"] for row in rows_of(survey, case=case, target="sm_90")}

    assert variants("live") == variants("live V=152064")


@pytest.mark.parametrize("name", mutants.COMPILED)
def test_the_contract_bites(survey, name):
    broken = survey["mutants"][name]
    for rule in mutants.COMPILED[name].breaks:
        assert any(found.startswith(rule) for found in broken), f"expected {rule!r}, found {broken}"


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's guard exists under the interpreter only")
@pytest.mark.parametrize("name", mutants.INTERPRETED)
def test_the_interpreter_bites(name, tmp_path):
    """What machine code cannot show: a lane outside the tensor, an int32 that wraps, bf16 arithmetic."""
    mutant = mutants.INTERPRETED[name]
    call = far_rows if name == "rows in int32" else near_rows
    with mutants.installed(mutant, tmp_path), pytest.raises(Exception) as caught:  # noqa: PT011 - the text is checked
        call()
    message = f"{caught.type.__name__}: {caught.value}"
    assert all(rule in message for rule in mutant.breaks), message


@pytest.mark.parametrize("name", mutants.UNWRITTEN)
def test_poisoned_memory_bites(name, tmp_path, device):
    """A cell that nobody wrote is NaN in what a call returns."""
    assert masked_rows(device).isfinite().all()
    with mutants.installed(mutants.UNWRITTEN[name], tmp_path):
        assert masked_rows(device).isnan().any()


@pytest.mark.skipif(not INTERPRETED, reason="on CPU tensors")
@pytest.mark.parametrize("call", ["near_rows", "far_rows"])
def test_the_real_kernels_pass_what_the_mutants_fail(call):
    globals()[call]()


def near_rows():
    zeros, roles = torch.zeros(2, 5), torch.tensor([[1, 1, 2, 2, 0]] * 2)
    role_weighted_grpo_loss(
        torch.full((2, 6, 130), 0.5, dtype=torch.bfloat16, requires_grad=True), torch.zeros(2, 5).long(), torch.ones(2),
        role_ids=roles, corrupted_logps=zeros, ablated_logps=zeros, backend="triton",
    ).loss.backward()  # fmt: skip


def masked_rows(device):
    """Return the loss and the gradient of a batch with a masked token, as one vector."""
    logits = torch.full((2, 6, 130), 0.5, device=device, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]], device=device)
    ids, advantages = torch.zeros(2, 5, dtype=torch.long, device=device), torch.ones(2, device=device)
    loss = role_weighted_grpo_loss(logits, ids, advantages, completion_mask=mask, backend="triton").loss
    return torch.cat([loss.detach()[None], *torch.autograd.grad(loss, logits)[0].flatten(0, 1)])


def far_rows():
    stride = 2**30 + 16  # twice this is no int32
    storage = torch.empty(2 * stride + 130, dtype=torch.bfloat16)  # virtual memory; three rows are touched
    far = storage.as_strided((1, 3, 130), (0, stride, 1))
    far.zero_()
    role_weighted_grpo_loss(far, torch.zeros(1, 3).long(), torch.ones(1), backend="triton")
