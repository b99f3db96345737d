"""The README and its guides: blocks run in order, links and commands lead somewhere, tables are complete."""

import pathlib
import re
import sys

import pytest

import srpo
from srpo import METHODS
from srpo.metrics import MetricSums

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
    "README.md",
    "srpo/README.md",
    "srpo/integrations/README.md",
    "benchmarks/README.md",
    "benchmarks/grounding/README.md",
)
README, GUIDE = ((ROOT / page).read_text() for page in PAGES[:2])
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The fragments under which a host shows the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks((ROOT / page).read_text(), "python")])
def test_python_blocks_run(page, capsys):
    namespace: dict = {}
    for block in blocks((ROOT / page).read_text(), "python"):
        exec(compile(block, page, "exec"), namespace)
    said = capsys.readouterr()
    assert said.err == ""
    if page == "srpo/README.md":
        assert namespace["per_token"].shape == (2, 6)
    if page == "srpo/integrations/README.md":
        assert namespace["loss"].requires_grad
    else:
        assert "tensor" in said.out
        assert namespace["out"].loss.requires_grad


@every_page
def test_shown_python_compiles(page):
    """Blocks that want weights or a data set are not run."""
    for block in blocks((ROOT / page).read_text(), "py"):
        compile(block, page, "exec")


@every_page
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        there = there / "README.md" if there.is_dir() and fragment else there
        assert not fragment or fragment in anchors(there.read_text()), target


@every_page
def test_commands_name_files_that_exist(page):
    for path in re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", (ROOT / page).read_text()):
        assert (ROOT / path).is_file(), path


def test_the_readme_is_short_and_begins_with_a_picture():
    assert len(README.encode()) <= 12 * 1024
    assert README.index("![") < 200


def test_ci_runs_the_lines_that_the_readme_shows():
    script = (ROOT / ".ci/run").read_text()
    for line in ("&& python -m srpo demo", "&& python -m pytest"):
        assert any(line in block for block in blocks(README, "bash"))
        assert f'"{line}"' in script


def test_the_extras_that_are_named_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"'\.\[([\w,]+)\]'", (ROOT / page).read_text()):
            assert set(names.split(",")) <= set(extras), names


def test_the_table_of_methods_is_that_of_the_library():
    for method in METHODS.values():
        needs = ", ".join(f"`{name}`" for name in method.needs) or "–"
        title, _, arxiv = method.source.rpartition(", ")
        assert f"| `{method.name}` | {needs} | {method.passes} | {method.changes} | {title}, arXiv {arxiv} |" in GUIDE


def test_every_public_name_is_in_the_guide():
    assert not [name for name in srpo.__all__ if f"`{name}" not in GUIDE]


def test_every_metric_is_in_the_guide():
    import torch

    groups = frozenset({"clip", "cispo", "ratio", "kl", "entropy", "rows", "credit"})
    names = MetricSums(torch.zeros(200, dtype=torch.float64), groups)
    table = GUIDE.partition("## Metrics")[2].partition("## Troubleshooting")[0]
    for name in names:
        shown = re.sub(r"/(perception|reasoning)/", "/<role>/", re.sub(r"/(positive|negative)/", "/<sign>/", name))
        assert f"`{shown}`" in table or f"`{shown.rpartition('/')[2]}`" in table, name


def test_the_patch_of_easyr1_is_one():
    """Its hunks have the lines that their headers count, and what they add is Python."""
    head, *hunks = re.split(r"^(?=@@ )", (ROOT / "srpo/integrations/easyr1.patch").read_text(), flags=re.MULTILINE)
    assert head == "--- a/verl/trainer/ray_trainer.py\n+++ b/verl/trainer/ray_trainer.py\n"
    for hunk in hunks:
        header, *lines = hunk.splitlines()
        before, after = map(int, re.match(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", header).groups())
        assert sum(line[:1] != "+" for line in lines) == before, header
        assert sum(line[:1] != "-" for line in lines) == after, header
    names = re.findall(r"^\+from (srpo\.[\w.]+) import (.+)$", "".join(hunks), re.MULTILINE)
    assert names
    for module, imported in names:
        __import__(module)
        assert all(hasattr(sys.modules[module], name.strip()) for name in imported.split(","))
