"""Imports go one way, and `import srpo` stays light."""

import ast
import pathlib
import sys

import pytest
from processes import run_python

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = ("triton", "transformers", "trl", "matplotlib", "liger_kernel", "rich", "sklearn", "PIL")
KERNEL_FILES = ("row_statistics", "row_pairs", "token_credit", "policy_loss", "row_training", "device")


def imported_modules(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files_of("srpo_kernels"), ids=lambda p: p.stem)
def test_kernel_room_imports_torch_and_triton_only(path):
    outside = {module.split(".")[0] for module in imported_modules(path)} - sys.stdlib_module_names
    assert outside <= {"torch", "triton", "srpo_kernels"}


def test_reference_and_kernels_never_import_each_other():
    kernels = {f"srpo_kernels.{name}" for name in KERNEL_FILES}
    assert not imported_modules(ROOT / "srpo_kernels/reference.py") & kernels
    for name in KERNEL_FILES:
        assert "srpo_kernels.reference" not in imported_modules(ROOT / f"srpo_kernels/{name}.py")


def room_of(module: str) -> int:
    """Return how far from the kernels a module stands; one may import its own room and those before it."""
    rooms = (
        ("srpo.integrations", "srpo.demo", "srpo.check", "srpo.recipes", "srpo.__main__"),
        ("srpo.viz",),
        ("srpo.rollout", "srpo.settings"),
        ("srpo.vision",),
        ("srpo",),
        ("srpo_kernels",),
    )
    for room, prefixes in zip(range(len(rooms) - 1, -1, -1), rooms, strict=True):
        if any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes):
            return room
    return len(rooms) if module.split(".")[0] in ("tests", "benchmarks") else -1


@pytest.mark.parametrize("path", files_of("srpo"), ids=lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts))
def test_imports_go_one_way(path):
    """`srpo/__init__.py` is the one door that collects names from several rooms."""
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if own == "srpo.__init__":
        return
    room = room_of(own.removesuffix(".__init__"))
    names = {m for m in imported_modules(path) if m.split(".")[0] in ("srpo", "srpo_kernels", "tests", "benchmarks")}
    assert not {m for m in names if room_of(m) > room}


@pytest.mark.parametrize("modules", ["srpo", "srpo.viz, srpo.viz.report"])
def test_importing_srpo_loads_nothing_heavy(modules):
    code = f"import sys, {modules}; print([m for m in {HEAVY} if m in sys.modules])"
    run = run_python("-c", code)
    assert run.stdout.strip() == "[]", run.stderr


def test_importing_srpo_leaves_the_pictures_alone():
    run = run_python("-c", "import sys, srpo; print([m for m in sys.modules if m.startswith('srpo.viz')])")
    assert run.stdout.strip() == "[]", run.stderr


def test_the_torch_backend_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, srpo\n"
        "logits = torch.zeros(1, 2, 3, requires_grad=True)\n"
        "out = srpo.role_weighted_grpo_loss(logits, torch.zeros(1, 2).long(), torch.ones(1))\n"
        "out.loss.backward()\n"
        "try: srpo.selected_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), backend='triton')\n"
        "except srpo.KernelUnavailableError as error: print(error)\n"
    )
    run = run_python("-c", code)
    assert "Triton is not installed" in run.stdout, run.stderr
