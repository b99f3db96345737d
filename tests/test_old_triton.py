"""The kernels on other versions of Triton: a GPU image's Python 3.12, torch 2.11, triton 3.6 (5 GB), and newer ones."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PINS = ("torch==2.11.0", "triton==3.6.0", "numpy==2.5.2")
SUITES = ("tests/kernels", "tests/api", "tests/compiled")
# The emulator reads the PTX of Triton 3.7 and later; the faults that it must find are put into that of 3.7.
NO_EMULATOR = ("--ignore", "tests/compiled/emulator")
NO_FAULTS = ("-k", "not a_fault_in_a_real_kernel")
AMD = ("-m", "slow", "-k", "gfx942", "tests/compiled/test_contract.py")
IS_3_12 = "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))"


def python_3_12() -> str | None:
    """Find a CPython 3.12 that can make environments, also behind a pyenv shim while another version is set."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates = [
        shutil.which("python3.12"),
        *sorted(pyenv.glob("versions/3.12*/bin/python3.12")),
        shutil.which("python3"),
    ]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", IS_3_12], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    return None


def run(*command: object, **options) -> str:
    """Run a command; fail with the end of what it said, without the addresses of registries."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    said = re.sub(r"\b(?:\w+\+)?\w+://\S+|host='[^']*'", "<address>", done.stdout + done.stderr)
    assert done.returncode == 0, said[-4000:]
    return said


@pytest.mark.slow
def test_the_suite_passes_on_torch_2_11_and_triton_3_6(tmp_path):
    python = python_3_12()
    if python is None:
        pytest.skip("no Python 3.12 with venv and pip on this machine")
    run(python, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    try:
        run(python, "-m", "pip", "install", "--quiet", *PINS, f"{ROOT}[test]")
    except AssertionError as error:
        pytest.skip(f"these versions cannot be installed here: {str(error)[-300:]}")
    versions = "import torch, triton, numpy; print(torch.__version__, triton.__version__, numpy.__version__)"
    found = run(python, "-c", versions).split()
    assert [v.split("+")[0] for v in found] == [pin.split("==")[1] for pin in PINS]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") and k != "PYTHONPATH"}
    for chosen in ((*SUITES, *NO_EMULATOR), AMD):
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, cwd=ROOT, env=inherited)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.8.0", "3.9.0"])
def test_machine_code_and_interpreter_of_a_newer_triton(tmp_path, version):
    """Triton alone is newer: users upgrade it under their torch."""
    try:
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, f"triton=={version}")
    except AssertionError as error:
        pytest.skip(f"this version cannot be installed here: {str(error)[-300:]}")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"
    }
    assert run(sys.executable, "-c", "import triton; print(triton.__version__)", env=inherited).strip() == version
    for chosen in ((*SUITES[::2], *NO_FAULTS), AMD):
        run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, cwd=ROOT, env=inherited)
