"""Every kernel's machine code, run and compared with float64; faults in it are found.

The conftest puts this process in the interpreter, so processes of their own emulate; here their results are checked.
"""

import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from compiled.emulator.faults import FAULTS
from compiled.emulator.launcher import EMULATED_TARGETS
from compiled.emulator.scenarios import scenarios

ROOT = pathlib.Path(__file__).parents[3]


def python(cache, *arguments, codes=(0,)):
    """Run Python outside the interpreter of kernels; return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "EMULATED_"))}
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests")]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert done.returncode in codes, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A compile cache with nothing from an older compiler."""
    return tmp_path_factory.mktemp("triton_cache")


@pytest.fixture(scope="session")
def emulation(cache):
    """The quick table, what is found of each fault, and layouts, on two cores."""
    file = cache / "table.json"
    with ThreadPoolExecutor(2) as pool:
        command = ("-m", "compiled.emulator.compare", "--targets", "sm_90", "--quick", "--json", file)
        table = pool.submit(python, cache, *command, codes=(0, 1))  # 1: the rows say what failed
        faults = pool.submit(python, cache, "-m", "compiled.emulator.faults")
        layouts = pool.submit(python, cache, "-m", "compiled.emulator.layouts", "--quick")
        found = {(kernel, name): text for kernel, name, text in json.loads(faults.result())}
        table.result()
    return {"found": found, "layouts": json.loads(layouts.result())} | json.loads(file.read_text())


@pytest.mark.parametrize("name", scenarios(quick=True))
def test_machine_code_meets_the_floors(emulation, name):
    (row,) = (row for row in emulation["rows"] if row["scenario"] == name)
    assert row["well"], row
    assert row["rough_error"] <= 1, row  # approximate instructions off by 2 ulp, as the ISA allows


def test_the_quick_table_reaches_the_machine_code(emulation):
    assert emulation["reached"] >= 0.95


@pytest.mark.parametrize("name", FAULTS, ids=" ".join)
def test_a_fault_in_a_real_kernel_is_found(emulation, name):
    kernel, wanted, found = name[0], FAULTS[name].found, emulation["found"][name]
    assert wanted in found
    assert wanted in ("wrong", "right") or kernel in found


def test_no_layout_moves_a_bit(emulation):
    check_layouts(emulation["layouts"])


@pytest.mark.slow
def test_no_layout_of_all_moves_a_bit(cache):
    check_layouts(json.loads(python(cache, "-m", "compiled.emulator.layouts")))


def check_layouts(compared):
    """Alignment, strides, other streams, entropies, splitting: on-policy the ratio is exactly 1."""
    assert compared
    for name, result in compared.items():
        assert result["compared"] >= 20
        assert not result["moved"] + result["races"], f"{name}: {result}"


@pytest.mark.slow
@pytest.mark.parametrize("target", EMULATED_TARGETS)
def test_all_of_the_table(cache, target):
    assert f"\n{target} " in python(cache, "-m", "compiled.emulator.compare", "--targets", target)


@pytest.mark.slow
def test_the_suite_passes_on_machine_code(cache):
    """The project's own tests of kernels, every launch of them compiled for sm_90 and emulated."""
    plugin = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "compiled.emulator.plugin", "-k", "triton")
    with ThreadPoolExecutor() as pool:
        for printed in pool.map(lambda folder: python(cache, *plugin, folder), ("tests/kernels", "tests/api")):
            assert "emulated 0 launches" not in printed
