"""The plugin in a verl of a few lines, and, slow, in verl itself."""

import pathlib
import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from processes import run_python

from srpo import ConfigError
from srpo.settings import CreditSettings

ROOT = pathlib.Path(__file__).parents[2]
# What verl 0.9 imports beside torch, transformers and what TRL brings; installed --no-deps, as its own pins conflict.
PACKAGES = (
    "aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 antlr4_python3_runtime==4.9.3 attrs==26.1.0 "
    "cachetools==8.0.1 certifi==2026.10.18 charset_normalizer==3.5.2 click==8.5.1 codetiming==1.4.0 fastapi==0.165.0 "
    "filelock==4.2.11 frozenlist==1.8.0 hydra_core==1.3.8 idna==3.20 jsonschema==4.26.0 "
    "jsonschema_specifications==2025.9.1 msgpack==1.2.4 msgspec==0.22.0 multidict==7.2.1 omegaconf==2.4.0 "
    "opentelemetry_api==1.45.2 opentelemetry_sdk==1.45.2 orjson==3.13.0 peft==0.21.2 propcache==0.5.4 "
    "protobuf==7.36.2 pyvers==0.2.3 pyyaml==6.0.3 pyzmq==27.3.0 ray==2.60.0 referencing==0.37.0 requests==2.34.2 "
    "rpds_py==2026.9.1 starlette==1.10.0 tensordict==0.10.0 torchdata==0.11.0 transferqueue==0.1.11 urllib3==2.8.0 "
    "uvicorn==0.54.0 yarl==1.25.1"
)

# A verl of a few lines: it loads plugins as verl/__init__.py does, and has what the plugin looks for.
VERL = {
    "verl/__init__.py": """
        from importlib.metadata import entry_points
        for entry in entry_points(group="verl.plugins"):
            try:
                entry.load()
            except Exception:
                pass
    """,
    "verl/trainer/__init__.py": "",
    "verl/trainer/ppo/__init__.py": "",
    "verl/trainer/ppo/core_algos.py": """
        estimators, losses = {}, {}
        def register_adv_est(name):
            return lambda function: estimators.setdefault(name, function)
        def register_policy_loss(name):
            return lambda function: losses.setdefault(name, function)
    """,
    "verl/trainer/ppo/v1/__init__.py": "from . import trainer_base, trainer_sync",
    "verl/trainer/ppo/v1/trainer_base.py": """
        import abc
        trainers = {}
        class PPOTrainer(abc.ABC):
            @abc.abstractmethod
            def fit(self): ...
        def register_trainer(name):
            return lambda cls: trainers.setdefault(name, cls)
    """,
    "verl/trainer/ppo/v1/trainer_sync.py": """
        from .trainer_base import PPOTrainer
        class PPOTrainerSync(PPOTrainer):
            def __init__(self, config):
                self.config, self.mode = config, config.trainer.v1.trainer_mode
            def fit(self): ...
            def _init_tokenizer(self): ...
            def _compute_old_log_prob(self, batch, metrics): ...
            def _compute_advantage(self, batch, metrics): ...
    """,
    "transfer_queue.py": """
        def kv_batch_get(keys, partition_id, select_fields=None): ...
        def kv_batch_put(keys, partition_id, fields=None, tags=None): ...
        def kv_clear(keys, partition_id): ...
    """,
    "tensordict.py": "",
    "verl/utils/__init__.py": "",
    "verl/utils/tensordict_utils.py": """
        def maybe_fix_3d_position_ids(data):
            if "position_ids" in data.keys() and data["position_ids"].dim() == 3 and data["position_ids"].is_nested:
                data["position_ids"]._ragged_idx = 2
    """,
    "verl/workers.py": "from verl.utils.tensordict_utils import maybe_fix_3d_position_ids",
}
EQUAL_ROWS = """
import torch, verl
from verl.workers import maybe_fix_3d_position_ids
for lengths in ((7, 7, 7), (12, 12, 12), (4, 4), (7, 3), (4,)):
    rows = [torch.randint(99, (4, length)) for length in lengths]
    data = {"position_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged), "input_ids": None}
    maybe_fix_3d_position_ids(data)
    found = data["position_ids"].unbind()
    print(lengths, len(found) == len(rows) and all(torch.equal(a, b) for a, b in zip(found, rows)))
maybe_fix_3d_position_ids({"input_ids": None})
"""
USE = """
import sys, types
import verl
print("waits", "verl.trainer.ppo.v1" not in sys.modules)
import verl.trainer.ppo.v1 as v1
from verl.trainer.ppo import core_algos
class Config(types.SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)
actor = Config(actor=Config(strategy="fsdp"), model=Config(use_remove_padding=True))
config = Config(algorithm=Config(), actor_rollout_ref=actor, trainer=Config(v1=Config(trainer_mode="srpo_sync")))
for make in (lambda: v1.trainer_base.trainers["srpo_sync"](config), core_algos.estimators["srpo"]):
    try:
        print("made", make().mode)
    except Exception as error:
        print(type(error).__name__, error)
"""


def entry_points() -> str:
    """Return the entry points of pyproject.toml, as an installed package lists them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    return "[verl.plugins]\n" + "".join(f"{name} = {value}\n" for name, value in declared.items())


def write_site(site: pathlib.Path, files: dict[str, str]) -> None:
    """Write modules into a directory, and beside them a distribution that declares the plugin of srpo."""
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: srpo-plugin\nVersion: 0\n",
        "entry_points.txt": entry_points(),
    }
    files = files | {f"srpo_plugin-0.dist-info/{name}": text for name, text in metadata.items()}
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.split("\n")
        indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
        path.write_text("\n".join(x[indent:] for x in lines))


def python(site: pathlib.Path, *arguments: str, more: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    paths = (site, more) if more else (site,)
    return run_python(*arguments, paths=paths, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")


class TestPlugin:
    def test_the_trainer_waits_for_verl_and_keeps_it_synchronous(self, tmp_path):
        write_site(tmp_path, VERL)
        done = python(tmp_path, "-c", USE)
        waits, made, refused = done.stdout.splitlines()
        assert (waits, made) == ("waits True", "made sync"), done.stderr
        assert refused.startswith("ConfigError")
        assert "srpo_sync" in refused
        assert "srpo cannot" not in done.stderr

    @pytest.mark.parametrize(
        ("file", "old", "new", "named"),
        [
            ("verl/trainer/ppo/v1/trainer_sync.py", "_compute_advantage(self, batch,", "_compute_advantage(self, data,",
             "_compute_advantage"),
            ("verl/trainer/ppo/v1/trainer_sync.py", "class PPOTrainerSync", "class Other", "PPOTrainerSync"),
            ("transfer_queue.py", "kv_batch_put", "put", "kv_batch_put"),
            ("tensordict.py", "", "raise RuntimeError('broken')", "broken"),
        ],
    )  # fmt: skip
    def test_another_verl_fails_aloud(self, tmp_path, file, old, new, named):
        text = VERL[file]
        assert old in text
        write_site(tmp_path, {**VERL, file: text.replace(old, new) if old else new})
        done = python(tmp_path, "-c", USE)
        waits, *refused = done.stdout.splitlines()
        assert waits == "waits True", done.stderr
        assert len(refused) == 2
        for line in (*refused, done.stderr):
            assert named in line
            assert "0.9.0, 0.9.1" in line
        assert all(line.startswith("IncompatibleVersionError") for line in refused)
        assert "srpo cannot be used in this verl" in done.stderr

    def test_a_verl_without_the_trainers_fails_aloud_at_once(self, tmp_path):
        write_site(tmp_path, {"verl/__init__.py": VERL["verl/__init__.py"]})
        done = python(tmp_path, "-c", "import verl")
        assert "srpo cannot be used in this verl" in done.stderr
        assert "0.9.0, 0.9.1" in done.stderr

    def test_positions_of_rows_of_one_length(self, tmp_path):
        """verl's workers import the function by name: it is repaired before, in whatever process."""
        write_site(tmp_path, VERL)
        done = python(tmp_path, "-c", EQUAL_ROWS)
        assert done.stdout.count("True") == 5, done.stdout + done.stderr

    def test_without_the_repair_rows_are_others(self, tmp_path):
        write_site(tmp_path, {**VERL, "verl/__init__.py": ""})
        done = python(tmp_path, "-c", EQUAL_ROWS)
        assert "(7, 7, 7) True" not in done.stdout

    def test_a_verl_that_is_sound_is_left_alone(self, tmp_path):
        sound = """
            def maybe_fix_3d_position_ids(data):
                pass
        """
        write_site(tmp_path, {**VERL, "verl/utils/tensordict_utils.py": sound})
        check = "import verl; from verl.utils.tensordict_utils import maybe_fix_3d_position_ids as f"
        done = python(tmp_path, "-c", f"{check}; print(hasattr(f, '__wrapped__'))")
        assert done.stdout == "False\n", done.stderr

    def test_what_breaks_verl_is_said(self, tmp_path):
        write_site(tmp_path, {name: text for name, text in VERL.items() if name != "transfer_queue.py"} | {
            "trl-1.2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: trl\nVersion: 1.2.0\n"
        })  # fmt: skip
        done = python(tmp_path, "-c", "import verl, verl.trainer.ppo.v1")
        assert "pip install 'verl[verl-core]'" in done.stderr
        assert "verl's actor dies beside trl 1.2.0" in done.stderr


class TestVerlConfig:
    """`settings_of` on configs of dicts; the real one is composed in the slow test."""

    @pytest.fixture
    def settings_of(self, monkeypatch, tmp_path):
        write_site(tmp_path, VERL)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("verl", "transfer_queue", "tensordict"):
            assert name not in sys.modules
        from srpo.integrations.verl_plugin import settings_of

        yield settings_of
        loaded = [x for x in sys.modules if x.split(".")[0] in ("verl", "transfer_queue", "tensordict")]
        for name in [*loaded, "srpo.integrations.verl_plugin"]:
            del sys.modules[name]
        sys.meta_path[:] = [x for x in sys.meta_path if type(x).__name__ != "_AfterImport"]

    @staticmethod
    def config(**changes: Any) -> dict[str, Any]:
        actor = {"strategy": changes.pop("strategy", "fsdp2"), **changes.pop("actor", {})}
        model = {"use_remove_padding": True, **changes.pop("model", {})}
        algorithm = {"srpo": changes.pop("srpo", {}), "rollout_correction": changes}
        return {"algorithm": algorithm, "actor_rollout_ref": {"actor": actor, "model": model}}

    def test_good_ones(self, settings_of):
        assert settings_of(self.config()) == CreditSettings()
        close = {"ablated_positions": "close"}
        sdpa = {"override_config": {"attn_implementation": "sdpa"}}
        assert settings_of(self.config(strategy="megatron", srpo=close)).ablated_positions == "close"
        settings_of(self.config(model=sdpa, srpo=close))
        settings_of(self.config(model={**sdpa, "use_remove_padding": False}))
        settings_of(self.config(bypass_mode=True, strategy="megatron", srpo={"credit": "grpo"}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"bypass_mode": True}, "bypass_mode"),
            ({"strategy": "megatron"}, "ablated_positions=close"),
            ({"model": {"override_config": {"attn_implementation": "sdpa"}}}, "ablated_positions=close"),
            ({"actor": {"policy_loss": {"loss_mode": "geo_mean"}}}, "geo_mean"),
            ({"actor": {"fsdp2": {"router_replay": {"mode": "R3"}}}}, "router_replay"),
            ({"srpo": {"credit": "x"}}, "credit"),
        ],
    )
    def test_bad_ones(self, settings_of, changes, message):
        with pytest.raises(ConfigError, match=message):
            settings_of(self.config(**changes))


def install(site: pathlib.Path, *packages: str) -> None:
    """Install packages as they are, or skip the test."""
    done = python(site, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(site), *packages)
    if done.returncode:
        pytest.skip(f"verl cannot be installed here: {re.sub(r'[a-z]+://[^ ]+', '<address>', done.stderr)[-300:]}")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> pathlib.Path:
    """Install what verl imports."""
    site = tmp_path_factory.mktemp("packages")
    install(site, *PACKAGES.split())
    return site


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_in_verl(version, packages, tmp_path):
    """Install verl, run both stages in its trainer and its transfer queue, then take away what they build on."""
    install(tmp_path, f"verl=={version}")
    write_site(tmp_path, {})
    script = str(pathlib.Path(__file__).with_name("real_verl.py"))
    done = python(tmp_path, script, "run", more=packages)
    assert f"verl {version}: both stages agree" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    assert "positions of rows of one length are right" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    base = tmp_path / "verl/trainer/ppo/v1/trainer_base.py"
    base.write_text(base.read_text().replace("_compute_advantage(", "_compute_token_advantage("))
    done = python(tmp_path, script, "refuse", more=packages)
    assert done.stdout.count("refused: IncompatibleVersionError") == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert "tested with 0.9.0, 0.9.1" in done.stdout
    assert "srpo cannot be used in this verl" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_losses_of_verl(version, packages, tmp_path):
    """Every row of the table of losses, value and gradient, through the three entries and both backends."""
    install(tmp_path, f"verl=={version}")
    done = python(tmp_path, str(pathlib.Path(__file__).with_name("real_verl_losses.py")), more=packages)
    assert f"verl {version}: 13 losses agree" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
