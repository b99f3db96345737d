"""What the metrics of a run warn of: each rule says what was seen, the likely causes, and a fix."""

import math
from collections.abc import Callable
from typing import NamedTuple

from srpo.viz.run_log import RunLog

_ROLES, _SIGNS = ("perception", "reasoning"), ("positive", "negative")


class Warned(NamedTuple):
    """Say what is wrong with a run.

    Args:
        name: of the rule.
        seen: with the numbers.
        causes: the likely ones.
        fix: what to try first.
    """

    name: str
    seen: str
    causes: str
    fix: str


def warnings_of(run: RunLog) -> list[Warned]:
    """Return the warnings that apply to a run, the gravest first."""
    return [found for rule in _RULES for found in [rule(run)] if found is not None]


def late(run: RunLog, name: str) -> float:
    """Return the mean of a metric over the last third of the steps that logged it, NaN for none."""
    values = [y for _, y in run.series(name)]
    values = values[-max(1, len(values) // 3) :]
    return sum(values) / len(values) if values else math.nan


def early(run: RunLog, name: str) -> float:
    """Return the mean of a metric over the first third of the steps that logged it, NaN for none."""
    values = [y for _, y in run.series(name)]
    values = values[: max(1, len(values) // 3)]
    return sum(values) / len(values) if values else math.nan


def _not_finite(run: RunLog) -> Warned | None:
    for row in run.rows:
        bad = [name for name in ("loss", "grad_norm") if name in row and not math.isfinite(row[name])]
        if bad:
            return Warned(
                "not_finite",
                f"{' and '.join(bad)} stopped being a number at step {row['step']:.0f}",
                "a learning rate that is too high, half precision that overflowed, or a batch without a valid token",
                "lower learning_rate, train in bf16 instead of fp16, and resume from a checkpoint before that step",
            )
    return None


def _no_credit(run: RunLog) -> Warned | None:
    if not run.rows or any(name.startswith("srpo/") for row in run.rows for name in row):
        return None
    return Warned(
        "no_credit",
        "no srpo/... metric was logged",
        "a run of plain GRPO: credit='grpo', or a trainer that is no SRPOTrainer",
        "train with SRPOTrainer and SRPOConfig(credit='srpo')",
    )


def _parse_failures(run: RunLog) -> Warned | None:
    share = late(run, "srpo/parse_failures")
    if not share > 0.2:
        return None
    return Warned(
        "parse_failures",
        f"{share:.0%} of the completions lack perception or reasoning; they are trained with plain GRPO",
        "the prompt does not ask for the format, no reward pays for it, or the tags have other names than the grammar "
        "looks for",
        "look at the examples below; ask for the format in the system prompt, reward it, or pass the names to "
        "SRPOConfig(role_grammar=)",
    )


def _unclosed(run: RunLog) -> Warned | None:
    unclosed, clipped = late(run, "srpo/unclosed"), late(run, "completions/clipped_ratio")
    if not (unclosed > 0.2 or clipped > 0.3):
        return None
    parts = [f"{x:.0%} {what}" for x, what in ((unclosed, "leave a tag open"), (clipped, "are cut")) if x == x]
    return Warned(
        "unclosed",
        "of the completions " + " and ".join(parts),
        "completions reach max_completion_length before they end",
        "raise max_completion_length, or set mask_truncated_completions=True",
    )


def _stray(run: RunLog) -> Warned | None:
    share = late(run, "srpo/stray")
    if not share > 0.1:
        return None
    return Warned(
        "stray",
        f"{share:.0%} of the completions close a tag that nothing opened",
        "the chat template opens the first tag in the prompt",
        "pass SRPOConfig(role_grammar={'opens_with': 'think'}), with the name that the template opens",
    )


def _no_signal(run: RunLog) -> Warned | None:
    share = late(run, "frac_reward_zero_std")
    share = late(run, "srpo/zero_advantage_fraction") if share != share else share
    if not share > 0.6:
        return None
    return Warned(
        "no_signal",
        f"{share:.0%} of the groups have rewards that are all alike: nothing is learned from them",
        "the task is too easy or too hard for this model, or the reward does not depend on the answer",
        "choose examples that the model solves sometimes, raise num_generations, or mend the reward",
    )


def _weak_picture(run: RunLog) -> Warned | None:
    means = [late(run, f"srpo/perception/{sign}/contrast_mean") for sign in _SIGNS]
    means = [x for x in means if x == x]
    if not means or max(map(abs, means)) > 0.02:
        return None
    return Warned(
        "weak_picture",
        f"the contrast of perception tokens is {' and '.join(f'{x:+.3f}' for x in means)} nats: corrupting the picture "
        "changes next to nothing",
        "the corruption is too weak for these pictures, the model does not look at them, or the answer stands in the "
        "text",
        "compare the corrupted picture with the clean one on a page; raise PatchMask(probability=) or take Blank(); "
        "check that pixel_values reach the model",
    )


def _no_evidence(run: RunLog) -> Warned | None:
    share, failures = late(run, "srpo/uniform_fraction"), late(run, "srpo/parse_failures")
    if not share - (failures if failures == failures else 0.0) > 0.3:
        return None
    return Warned(
        "no_evidence",
        f"{share:.0%} of the trajectories have weights of exactly 1, more than cannot be parsed",
        "examples without a picture, or contrasts that are all alike",
        "look at srpo/perception/evidence_fraction; take examples without pictures out, or leave them to plain GRPO",
    )


def _bounds(run: RunLog) -> Warned | None:
    hit = {
        f"{role}, A{'>' if sign == 'positive' else '<'}0": late(run, f"srpo/{role}/{sign}/clip_fraction")
        for role in _ROLES
        for sign in _SIGNS
    }
    worst = max(hit, key=lambda name: hit[name] if hit[name] == hit[name] else -1.0)
    if not hit[worst] > 0.7:
        return None
    return Warned(
        "bounds",
        f"{hit[worst]:.0%} of the weights of {worst} are at a bound: they are nearly two numbers",
        "contrasts are large beside tau, so that weights cannot tell strong evidence from weak",
        "raise CreditConfig(tau=) to about the standard deviation of the contrasts",
    )


def _few_tokens(run: RunLog) -> Warned | None:
    share = late(run, "srpo/effective_sample_size")
    if not share < 0.5:
        return None
    return Warned(
        "effective_sample_size",
        f"the weights count like {share:.0%} of the tokens",
        "a few tokens have most of the weight: wide bounds, or a method that drops tokens",
        "stay within weight_min=0.8, weight_max=1.2, or raise tau",
    )


def _unscored(run: RunLog) -> Warned | None:
    for name, what in (
        ("srpo/cells_not_scored", "cells of a stream were read that nobody had scored"),
        ("srpo/contrasts_without_value", "contrasts had no value (both log-probs infinite, or NaN)"),
    ):
        if late(run, name) > 0:
            return Warned(
                name.removeprefix("srpo/"),
                f"{late(run, name):.3g} {what}",
                "streams scored for another credit, other roles or another mask, or logits that are not finite",
                "score and weigh with the same credit= and role_ids; look for NaN in the model's logits",
            )
    return None


def _far_ratios(run: RunLog) -> Warned | None:
    share = late(run, "srpo/far_ratio_fraction")
    if not share > 1 / 3:
        return None
    return Warned(
        "far_ratios",
        f"{share:.0%} of the ratios to the old policy lie beyond [0.5, 2]",
        "log-probs shifted by one token, another temperature, or old log-probs of another engine or precision",
        "compare old log-probs with new ones before the first update: they must be equal",
    )


def _reward_fell(run: RunLog) -> Warned | None:
    first, last, spread = early(run, "reward"), late(run, "reward"), late(run, "reward_std")
    if len(run.series("reward")) < 6 or not first - last > max(0.05, spread if spread == spread else 0.0):
        return None
    return Warned(
        "reward_fell",
        f"the mean reward fell from {first:.3g} to {last:.3g}",
        "a learning rate that is too high, or a policy that drifted from its start",
        "lower learning_rate, set beta above 0, and compare with credit='grpo' from the same seed",
    )


def _entropy_fell(run: RunLog) -> Warned | None:
    first, last = early(run, "entropy"), late(run, "entropy")
    if len(run.series("entropy")) < 6 or not last < 0.1 * first:
        return None
    return Warned(
        "entropy_fell",
        f"the entropy fell from {first:.3g} to {last:.3g} nats: rollouts of a prompt become alike",
        "the policy has collapsed on few answers",
        "raise epsilon_high, lower learning_rate, or sample at a higher temperature",
    )


def _stopped(run: RunLog) -> Warned | None:
    if run.max_steps is None or run.step >= run.max_steps:
        return None
    return Warned(
        "stopped",
        f"the run ends at step {run.step} of {run.max_steps}",
        "it is still going on, or it was killed",
        "resume it with trainer.train(resume_from_checkpoint=True)",
    )


_RULES: tuple[Callable[[RunLog], Warned | None], ...] = (
    _not_finite, _no_credit, _unscored, _far_ratios, _parse_failures, _unclosed, _stray, _weak_picture, _no_evidence,
    _no_signal, _bounds, _few_tokens, _reward_fell, _entropy_fell, _stopped,
)  # fmt: skip
