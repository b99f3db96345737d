"""The README's Python blocks run in order, in one namespace, and its two shell lines are what `.ci/run` runs."""

import pathlib
import re

from srpo import METHODS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(capsys):
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["per_token"].shape == (2, 6)
    assert "tensor" in capsys.readouterr().out


def test_ci_runs_the_lines_that_the_readme_shows():
    script = (ROOT / ".ci/run").read_text()
    for line in ("&& python -m srpo demo", "&& python -m pytest"):
        assert any(block.strip().endswith(line) for block in blocks("bash"))
        assert f'"{line}"' in script


def test_commands_name_files_that_exist():
    for path in re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", README):
        assert (ROOT / path).is_file(), path


def test_the_table_of_methods_is_that_of_the_library():
    for method in METHODS.values():
        needs = ", ".join(f"`{name}`" for name in method.needs) or "–"
        title, _, arxiv = method.source.rpartition(", ")
        assert f"| `{method.name}` | {needs} | {method.passes} | {method.changes} | {title}, arXiv {arxiv} |" in README
