"""The examples in the docstrings of the public functions run, and the functions that people start with have one."""

import doctest

import pytest
import torch

import srpo
import srpo.rollout
import srpo.viz

NAMES = {name: getattr(srpo, name) for name in srpo.__all__} | {"credit_rollout": srpo.rollout.credit_rollout}
NAMES |= {name: getattr(srpo.viz, name) for name in srpo.viz.__all__}
STARTED_WITH = (
    "role_weighted_grpo_loss", "role_weighted_grpo_loss_from_logps", "role_weighted_grpo_loss_from_hidden",
    "selected_logps", "selected_logps_from_hidden", "role_contrast", "token_weights", "token_advantages",
    "group_advantages", "role_ids_from_completions", "corrupt_images", "credit_rollout",
    "credit_records", "credit_html", "credit_table",
)  # fmt: skip


def examples_of(name: str) -> list[doctest.DocTest]:
    names = {"torch": torch, "srpo": srpo, **NAMES}
    finder = doctest.DocTestFinder(recurse=False)
    return [found for found in finder.find(NAMES[name], name, globs=names) if found.examples]


@pytest.mark.parametrize("name", [name for name in NAMES if callable(NAMES[name]) and examples_of(name)])
def test_the_example_runs(name):
    torch.manual_seed(0)
    said: list[str] = []
    for example in examples_of(name):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
        assert result.attempted > 0
        assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", STARTED_WITH)
def test_there_is_an_example(name):
    assert examples_of(name), name
