"""The kernels on an older GPU image's versions: Python 3.12, torch 2.11, triton 3.6, numpy 2.5. Needs 5 GB."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PINS = ("torch==2.11.0", "triton==3.6.0", "numpy==2.5.2")
SUITES = ("tests/kernels", "tests/api", "tests/compiled")
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
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES, cwd=ROOT, env=inherited)
