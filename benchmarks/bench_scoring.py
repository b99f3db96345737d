"""Show what scoring three streams costs: plain forwards of the model against `score_streams`, on both of its roads.

    python benchmarks/bench_scoring.py [--group 8] [--prompt 1100] [--completion 256] [--repeats 3]
    python benchmarks/bench_scoring.py --sweep [--json] [--plot]
    python benchmarks/bench_scoring.py --rounding
    python benchmarks/bench_scoring.py --readme

The model is a Qwen2.5-VL of four layers with random weights. A prompt, mostly picture, is answered by `group` rollouts;
half of a completion is perception, half reasoning. Columns, head rows and pictures are counted by hooks while a case
runs, and tell what to expect: time follows the columns that go through the decoder. Equality with plain forwards is
checked before anything is timed. `--rounding` shows instead what bf16 does: by how much roads differ, in log-probs,
contrasts and weights.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from bench_loss import environment
from measure import measure
from report import GUIDE, RESULTS, path_of, with_block
from tabulate import tabulate
from torch import Tensor
from trl.trainer.utils import selective_log_softmax

from srpo import PatchMask, PixelLayout, role_contrast, score_streams, token_weights
from srpo.vision import scorer
from srpo.vision.prefix import Proofs

IMAGE, VISION_START, VISION_END, VIDEO = 5, 6, 7, 8  # ids
PATCH, MERGE = 14, 2  # pixels per patch, patches per side of an image token
VOCABULARY, HIDDEN, PROMPTS = 8192, 384, 1
SWEEP = {"group": (1, 4, 8, 16), "prompt": (300, 1100, 2500), "completion": (128, 256, 512)}
BEGIN, END = "<!-- scoring: python benchmarks/bench_scoring.py --readme -->", "<!-- end of scoring -->"


def build() -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Build the model from a config."""
    vision = {
        "depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": HIDDEN,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4},
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def make_inputs(group: int, prompt: int, T: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of the model, one picture a prompt of about so many tokens, and the roles of completions."""
    generator = torch.Generator().manual_seed(0)
    side = 2 * int((0.95 * prompt) ** 0.5)  # patches per side of the picture
    n_image = (side // MERGE) ** 2
    image = torch.tensor([[VISION_START, *[IMAGE] * n_image, VISION_END]]).expand(PROMPTS, -1)
    text = torch.randint(10, VOCABULARY, (PROMPTS, prompt - n_image - 2), generator=generator)
    prompts = torch.cat([image, text], dim=1).repeat_interleave(group, 0)
    B = len(prompts)
    ids = torch.cat([prompts, torch.randint(10, VOCABULARY, (B, T), generator=generator)], dim=1)
    roles = torch.ones(B, T, dtype=torch.long)
    roles[:, T // 2 :] = 2
    pixels = torch.randn(PROMPTS, side**2, 3 * 2 * PATCH**2, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.repeat_interleave(group, 0).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * B),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }, roles


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Tensor], T: int, *, trl: bool = False) -> Tensor:
    """Return the log-probs of the completion from one forward of whole sequences."""
    logits = model(**inputs, use_cache=False, logits_to_keep=T + 1).logits[:, :-1]
    ids = inputs["input_ids"][:, -T:]
    if trl:
        return selective_log_softmax(logits, ids)
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def three_forwards(model: Any, inputs: dict[str, Tensor], roles: Tensor) -> None:
    """Run the three contexts through the model as it is."""
    T = roles.shape[1]
    corrupted = PatchMask().on_inputs(inputs, PixelLayout.of_model(model), generator=0)
    visible = torch.cat([inputs["attention_mask"][:, :-T], (roles != 1).long()], dim=1)
    for context in (inputs, corrupted, inputs | {"attention_mask": visible}):
        forward(model, context, T)


@contextmanager
def road(model: Any, shares: bool):
    """Have `score_streams` compute each prompt once, or whole sequences."""
    before, scorer.PROOFS = scorer.PROOFS, Proofs()
    scorer.PROOFS.keep(model, shares, "the benchmark")
    try:
        yield
    finally:
        scorer.PROOFS = before


def ours(model: Any, inputs: dict[str, Tensor], roles: Tensor, shares: bool, **settings: Any) -> Any:
    """Run `score_streams`."""
    rest = inputs | settings
    ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
    with road(model, shares):
        return score_streams(model, ids, mask, roles.shape[1], role_ids=roles, **rest)


def counted(model: Any, case: Callable[[], object]) -> tuple[int, int, int]:
    """Run a case; return columns through the decoder, rows through the head, and pictures through the tower."""
    from srpo_kernels import linear_head

    columns = rows = pictures = 0

    def decoder(_module, arguments, keywords):
        nonlocal columns
        columns += keywords["inputs_embeds"].shape[0] * keywords["inputs_embeds"].shape[1]

    inner_linear = torch.nn.Linear.forward

    def counting_linear(module, x):  # a hook on the head would make it another head
        nonlocal rows
        rows += x.shape[:-1].numel() if module is model.lm_head else 0
        return inner_linear(module, x)

    def tower(_module, arguments, keywords):
        nonlocal pictures
        pictures += len(keywords.get("grid_thw", arguments[1] if len(arguments) > 1 else ()))

    inner = linear_head.score

    def counting_score(*arguments):
        nonlocal rows
        rows += int(arguments[3].sum())
        return inner(*arguments)

    hooks = [
        model.model.language_model.register_forward_pre_hook(decoder, with_kwargs=True),
        model.model.visual.register_forward_pre_hook(tower, with_kwargs=True),
    ]
    linear_head.score, torch.nn.Linear.forward = counting_score, counting_linear
    try:
        case()
    finally:
        linear_head.score, torch.nn.Linear.forward = inner, inner_linear
        for hook in hooks:
            hook.remove()
    return columns, rows, pictures


def check(model: Any, inputs: dict[str, Tensor], roles: Tensor) -> float:
    """Compare both roads with plain forwards; return the largest difference in nats.

    Raises: SystemExit where it is no rounding.
    """
    T = roles.shape[1]
    own = forward(model, inputs, T)
    streams = [ours(model, inputs, roles, shares) for shares in (True, False)]
    gaps = [(x.logps - own).abs().max() for x in streams]
    gaps += [(a - b).abs().nan_to_num().max() for a, b in zip(*streams, strict=True)]
    largest = float(torch.stack(gaps).max())
    if largest > 1e-4:
        raise SystemExit(f"streams differ from plain forwards by {largest:.1e} nats: nothing is timed")
    return largest


def rounding(model: Any, inputs: dict[str, Tensor], roles: Tensor) -> str:
    """Return a table of what several ways to compute the same thing in bf16 differ by."""
    model, T = model.bfloat16(), roles.shape[1]
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    whole, shared = (ours(model, inputs, roles, shares) for shares in (False, True))
    others = {
        "shared prompts": shared,
        "whole sequences, one at a time": ours(model, inputs, roles, False, batch_size=1),
        "clean: TRL's log-probs": whole._replace(logps=forward(model, inputs, T, trl=True).float()),
        "clean: shared prompts, contrasts: whole": whole._replace(logps=shared.logps),
    }

    def contrast_and_weights(streams: Any) -> tuple[Tensor, Tensor]:
        c = role_contrast(
            streams.logps, corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps, role_ids=roles
        )
        return c, token_weights(c, roles)

    contrast, weights = contrast_and_weights(whole)
    lines: list[list[Any]] = []
    for name, streams in others.items():
        c, w = contrast_and_weights(streams)
        gaps = (streams.logps - whole.logps, c - contrast, w - weights)
        lines.append([name, *(float(f(gap.abs())) for gap in gaps for f in (torch.mean, torch.max))])
    headers = ["against whole sequences", "log-probs: mean", "max", "contrasts: mean", "max", "weights: mean", "max"]
    about = f"bf16, in nats; contrasts {contrast.abs().mean():.3f} on average, weights between .8 and 1.2"
    return f"{about}\n{tabulate(lines, headers, floatfmt='.4f')}\n"


def run(model: Any, group: int, prompt: int, T: int, repeats: int) -> dict[str, Any]:
    """Count, check and time the cases at one shape."""
    inputs, roles = make_inputs(group, prompt, T)
    gap = check(model, inputs, roles)
    cases: dict[str, Callable[[], object]] = {
        "three forwards": partial(three_forwards, model, inputs, roles),
        "one forward": partial(forward, model, inputs, T),
        "one forward, TRL's log-probs": partial(forward, model, inputs, T, trl=True),
        "whole sequences": partial(ours, model, inputs, roles, False),
        "shared prompts": partial(ours, model, inputs, roles, True),
    }
    counts = {name: counted(model, case) for name, case in cases.items()}
    results = measure(cases, torch.device("cpu"), repeats)
    rows = {
        name: {"ms": r.median, "p20": r.p20, "p80": r.p80, "peak MiB": r.peak, "columns": counts[name][0],
               "head rows": counts[name][1], "pictures": counts[name][2]}
        for name, r in results.items()
    }  # fmt: skip
    length = inputs["input_ids"].shape[1] - T
    return {"group": group, "prompt": length, "completion": T, "difference": gap, "cases": rows}


def table_of(found: dict[str, Any]) -> str:
    """Return a table of one shape: time and columns beside those of one plain forward."""
    rows, one = found["cases"], found["cases"]["one forward"]
    lines = [
        [name, r["ms"], r["ms"] / one["ms"], r["columns"] / one["columns"], r["head rows"], r["pictures"],
         r["peak MiB"], r["peak MiB"] / one["peak MiB"]]
        for name, r in rows.items()
    ]  # fmt: skip
    headers = ["case", "ms", "/ one", "columns / one", "head rows", "pictures", "peak MiB", "/ one"]
    about = f"a prompt of {found['prompt']} tokens x {found['group']} rollouts, T={found['completion']}"
    text = tabulate(lines, headers, floatfmt=("", ".0f", ".2f", ".2f", ".0f", ".0f", ".0f", ".2f"))
    return f"{about}; streams equal plain forwards to {found['difference']:.0e} nats\n{text}\n"


def readme_table() -> str:
    """Return the guide's table: the kept sweep, over one plain forward of the same sequences."""
    kept = json.loads(next(iter(sorted((RESULTS / "scoring").glob("*.json")))).read_text())
    lines = []
    for x in sorted(kept["shapes"], key=lambda x: (x["prompt"], x["completion"], x["group"])):
        one = x["cases"]["one forward"]
        times = [x["cases"][name]["ms"] / one["ms"] for name in ("three forwards", "whole sequences", "shared prompts")]
        ours = x["cases"]["shared prompts"]
        expected, memory = ours["columns"] / one["columns"], ours["peak MiB"] / one["peak MiB"]
        lines.append([x["prompt"], x["completion"], x["group"], *times, expected, memory])
    headers = [
        "prompt",
        "T",
        "rollouts",
        "three forwards",
        "whole sequences",
        "shared prompts",
        "columns",
        "peak memory",
    ]
    about = (
        f"{kept['environment']['device']}; time over that of one plain forward, columns and memory of shared prompts"
    )
    chart = "![Time over one plain forward, by size](results/scoring/cpu-2-threads.png)"
    return f"{about}\n\n{tabulate(lines, headers, tablefmt='github', floatfmt='.2f')}\n\n{chart}"


def shapes(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return the shapes to run: one, or a sweep of each size around it."""
    centre = {"group": options.group, "prompt": options.prompt, "completion": options.completion}
    if not options.sweep:
        return [tuple(centre.values())]
    swept = [tuple((centre | {name: x}).values()) for name, sizes in SWEEP.items() for x in sizes]
    return list(dict.fromkeys(swept))


def plot(found: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw time over that of one forward, and what the columns predict, for each swept size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.8), sharey=True, layout="constrained")
    centre = {name: max({x[name] for x in found}, key=[x[name] for x in found].count) for name in SWEEP}
    colours = dict(zip(("three forwards", "whole sequences", "shared prompts"), ("C7", "C0", "C2"), strict=True))
    for axis, name in zip(axes, SWEEP, strict=True):
        rest = [other for other in SWEEP if other != name]
        points = sorted((x for x in found if all(x[other] == centre[other] for other in rest)), key=lambda x: x[name])
        for case, colour in colours.items():
            for key, style in (("ms", "o-"), ("columns", ":")):
                ys = [x["cases"][case][key] / x["cases"]["one forward"][key] for x in points]
                label = case if key == "ms" else f"{case}: columns"
                axis.plot([x[name] for x in points], ys, style, color=colour, label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xlabel({"group": "rollouts per prompt", "prompt": "prompt tokens", "completion": "T"}[name])
        axis.set_xscale("log", base=2)
        axis.set_xticks([x[name] for x in points], [str(x[name]) for x in points])
        axis.set_ylim(0)
    axes[0].set_ylabel("time / one plain forward")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Time and count the cases, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--group", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--prompt", type=int, default=1100, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--sweep", action="store_true", help="vary each size around the others")
    parser.add_argument("--rounding", action="store_true", help="compare the roads in bf16, and time nothing")
    parser.add_argument("--readme", action="store_true", help="write the table of the kept sweep into the guide")
    parser.add_argument("--json", action="store_true", help="keep the results under benchmarks/results")
    parser.add_argument("--plot", action="store_true", help="draw the sweep that is kept there")
    options = parser.parse_args()
    if options.rounding:
        print(rounding(build(), *make_inputs(options.group, options.prompt, options.completion)))
        return
    if options.readme:
        GUIDE.write_text(with_block(GUIDE.read_text(), BEGIN, END, readme_table()))
        return
    where = environment(torch.device("cpu"))
    path = RESULTS / "scoring" / path_of(where["device"]).name
    found = []
    for shape in shapes(options):
        found.append(run(model := build(), *shape, options.repeats))
        print(table_of(found[-1]), flush=True)
        del model
    if options.json:
        path.parent.mkdir(exist_ok=True)
        rows = ",\n".join(json.dumps(x) for x in found)  # a line a shape
        path.write_text(f'{{"environment": {json.dumps(where)},\n"shapes": [\n{rows}\n]}}\n')
    if options.plot:
        plot(json.loads(path.read_text())["shapes"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
