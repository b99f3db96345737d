"""The same tests with an older TRL, and what a TRL that is too old says. Both are installed beside the environment."""

import subprocess
from pathlib import Path

import pytest
from processes import run_python

from srpo.integrations.trl import TESTED

pytestmark = pytest.mark.slow


def with_trl(version: str, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run Python with another TRL first on its path."""
    installed = run_python("-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"trl=={version}")
    if installed.returncode:
        pytest.skip(f"trl {version} cannot be installed here: {installed.stderr[-300:]}")
    return run_python(*command, paths=(folder,))


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
