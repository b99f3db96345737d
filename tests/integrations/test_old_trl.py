"""The same tests with an older TRL, and what a TRL that is too old says. Both are installed beside the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from srpo.integrations.trl import TESTED

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def with_trl(version: str, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run Python with another TRL first on its path."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"trl=={version}"]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"trl {version} cannot be installed here: {installed.stderr[-300:]}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.mark.parametrize("version", TESTED[:-1])
def test_older_versions_pass_the_same_tests(version, tmp_path):
    check = f"import trl; assert trl.__version__ == {version!r}, trl.__version__"
    assert with_trl(version, tmp_path, "-c", check).returncode == 0
    run = with_trl(version, tmp_path, "-m", "pytest", "tests/integrations/test_trl.py", "-q", "-k", "not Ranks")
    assert run.returncode == 0, run.stdout[-3000:]


def test_a_version_without_advantages_per_token_is_refused(tmp_path):
    code = "from srpo.integrations.trl import check_trl; check_trl()"
    run = with_trl("0.24.0", tmp_path, "-c", code)
    assert run.returncode != 0
    assert "IncompatibleVersionError" in run.stderr
    assert TESTED[-1] in run.stderr
