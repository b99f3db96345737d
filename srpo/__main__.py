"""The command line: `python -m srpo demo`, `check`, `report` and `env`."""

import argparse
import importlib
import io
import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from srpo import checks
from srpo.errors import IncompatibleVersionError, SRPOError

MODELS = ("idefics3", "qwen2_5_vl", "qwen3_vl", "llava")
DEMO_PACKAGES = {  # module: distribution
    "transformers": "transformers",
    "tokenizers": "transformers",
    "sklearn": "scikit-learn",
    "rich": "rich",
    "PIL": "pillow",
}
DEMO_STEPS = {"loop": 5, "trl": 100}
REPORTED_PACKAGES = ("srpo", "torch", "triton", "numpy", "transformers", "trl", "liger-kernel")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "env":
        print(environment())
        return 0
    if options.command == "report":
        return _report(options)
    if options.command == "check":
        return _check(options)
    return _run_demo(options)


def environment() -> str:
    """Describe what srpo runs on, one `name value` pair a line: what a bug report needs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    call = checks.Call("environment", torch.empty(0, device=device), "device")
    lines = {"python": platform.python_version()}
    lines |= {package: _version(package) for package in REPORTED_PACKAGES}
    lines["torch"] = str(torch.__version__)  # with the build, which its metadata may lack
    lines |= {"device": f"{device.type} ({name})"}
    lines |= {'backend="auto"': checks.backend_of(call, "auto", torch.float32)}
    width = max(map(len, lines)) + 2
    return "\n".join(f"{key:<{width}}{value}" for key, value in lines.items())


def _report(options: argparse.Namespace) -> int:
    """Write the page of a run and print its summary: 0, also where warnings apply; 2 where there is no run."""
    from srpo.viz.report import run_report, summary_text

    try:
        report = run_report(options.run_dir)
        page = report.page.save(options.page or Path(options.run_dir, "srpo_report.html"))
    except (SRPOError, OSError) as error:
        print(f"python -m srpo report: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report.summary | {"page": str(page.resolve())}, indent=1, allow_nan=False))
    else:
        print(f"{summary_text(report.summary)}\n\npage  {page.resolve()}")
    return 0


def _check(options: argparse.Namespace) -> int:
    """Print what was found of a model: 0 where it is ready, 1 where something is wrong, 2 where it cannot be loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from srpo.check import check_model, loading
    from srpo.roles import RoleGrammar

    def progress(step: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{step} ...", end="", file=sys.stderr, flush=True)

    try:
        grammar = RoleGrammar(**options.role_grammar)
        images = loading.pictures(options.images, 2)
        progress(f"loading {options.model}")
        model, processor = loading.load(options.model, options.dtype, options.device)
        found = check_model(
            model, processor, images, grammar=grammar, rollouts=options.rollouts, length=options.length,
            progress=progress,
        )  # fmt: skip
    except SRPOError as error:
        progress("")
        print(f"python -m srpo check: {error}", file=sys.stderr)
        return 2
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    width = shutil.get_terminal_size().columns
    print(json.dumps(found.to_json(), indent=1) if options.json else found.text(width))
    return 0 if found.is_good else 1


def _run_demo(options: argparse.Namespace) -> int:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[variable] = "1"  # the model is built here: nothing to ask the hub for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    extras = "demo" if options.trainer == "loop" else "demo,trl"
    try:
        demo = importlib.import_module("srpo.demo.loop" if options.trainer == "loop" else "srpo.demo.trainer")
    except (ModuleNotFoundError, IncompatibleVersionError) as error:
        missing = (error.name or "trl").partition(".")[0]
        package = "trl" if missing in ("trl", "datasets") else DEMO_PACKAGES.get(missing)
        if package is None:
            raise
        fix = f"pip install -e '.[{extras}]' in a checkout of srpo"
        print(f"python -m srpo demo needs {package}: {fix}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the tables use block characters
    demo.run(options.model, options.steps or DEMO_STEPS[options.trainer], options.seed, Path(options.page))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m srpo", description="Role-aware token credit for GRPO.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="update a small vision-language model with SRPO, on a CPU, in about half a minute",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", choices=MODELS, default="idefics3", help="architecture, built from a config")
    demo.add_argument("--trainer", choices=tuple(DEMO_STEPS), default="loop", help="a plain loop, or TRL's trainer")
    demo.add_argument("--steps", type=_positive, help="SRPO updates after the warm start; 5 in the loop, 100 with trl")
    demo.add_argument("--seed", type=_not_negative, default=0, help="seed of weights, pictures, sampling and masks")
    demo.add_argument("--page", metavar="PATH", default="srpo_demo.html", help="where the page of token credit goes")
    report = commands.add_parser("report", help="say what a training run did: curves, warnings, rollouts with credit")
    report.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run, also of one that was killed")
    report.add_argument("--page", metavar="PATH", help="where the page goes; RUN_DIR/srpo_report.html if not said")
    report.add_argument("--json", action="store_true", help="print the summary as JSON")
    check = commands.add_parser(
        "check", help="say whether a model, its processor and a response format work, before a cluster is spent",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    check.add_argument("model", metavar="MODEL_OR_PATH", help="a folder of save_pretrained, or a name on the hub")
    check.add_argument("--images", metavar="DIR", help="pictures of the task; drawn ones if not said")
    check.add_argument("--role-grammar", metavar="JSON", type=_object, default={}, help="as SRPOConfig(role_grammar=)")
    check.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    check.add_argument("--rollouts", type=_positive, default=64, help="of the step whose cost is estimated")
    check.add_argument("--length", type=_positive, default=512, help="tokens of their completions")
    check.add_argument("--json", action="store_true", help="print findings and figures as JSON")
    commands.add_parser("env", help="print versions, the device and the backend that would be chosen")
    return parser


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not an object such as \'{{"opens_with": "think"}}\'')
    return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}


def _positive(text: str) -> int:
    return _int_from(1, text)


def _not_negative(text: str) -> int:
    return _int_from(0, text)


def _int_from(lowest: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {lowest}")
    return int(text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
