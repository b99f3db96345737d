"""What verl loads: importing this registers the trainer `srpo_sync` and repairs positions, or says aloud why not.

verl imports the entry points of `verl.plugins` in every process, calls nothing, and hides an exception in its debug
log. So nothing is raised here: an error is logged, and a placeholder that raises it takes the place of the trainer.
Both wait until verl imports its trainers, which takes seconds and happens in few of its processes.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from srpo.errors import ConfigError, IncompatibleVersionError, SRPOError, house_message, refuse
from srpo.integrations import verl_positions
from srpo.integrations.verl import CreditStages
from srpo.settings import CreditSettings, check_log_probs_alone
from srpo.vision.corruption import PixelLayout

NAME = "srpo_sync"
TRAINERS, POSITIONS = "verl.trainer.ppo.v1", "verl.utils.tensordict_utils"
TESTED = ("0.9.0", "0.9.1")
# What the trainer calls or overrides: of a module, the functions, or methods of a class, with their first parameters.
_NEEDED = {
    f"{TRAINERS}.trainer_base": {"register_trainer": ["name"]},
    f"{TRAINERS}.trainer_sync": {
        "PPOTrainerSync.__init__": ["self", "config"],
        "PPOTrainerSync._init_tokenizer": ["self"],
        "PPOTrainerSync._compute_old_log_prob": ["self", "batch", "metrics"],
        "PPOTrainerSync._compute_advantage": ["self", "batch", "metrics"],
    },
    "transfer_queue": {
        "kv_batch_get": ["keys", "partition_id", "select_fields"],
        "kv_batch_put": ["keys", "partition_id", "fields", "tags"],
        "kv_clear": ["keys", "partition_id"],
    },
}


def register() -> None:
    """Register the trainer, and refusals under the names of a policy loss and an advantage estimator.

    An estimator that is registered with verl sees rewards and masks, a policy loss sees advantages: neither is handed
    the streams. The names exist to say so.
    """
    fix = f"set trainer.v1.trainer_mode={NAME}, algorithm.adv_estimator=grpo and the policy loss 'vanilla'"
    hint: SRPOError = ConfigError(f"verl(): adv_estimator or loss_mode got 'srpo', expected a trainer; {fix}.")
    try:
        check_verl()
        importlib.import_module(f"{TRAINERS}.trainer_base").register_trainer(NAME)(trainer_class())
    except Exception as error:
        hint = error if isinstance(error, IncompatibleVersionError) else _incompatible("verl", repr(error), "its v1")
        logging.getLogger(__name__).error("srpo cannot be used in this verl: %s", hint)
        _try(_register_placeholder, hint)
    _try(_register_refusals, hint)


def check_verl() -> None:
    """Compare the verl that is installed with what the trainer builds on.

    Raises: IncompatibleVersionError, which names the tested versions.
    """
    for module, functions in _NEEDED.items():
        for path, parameters in functions.items():
            try:
                found: Any = importlib.import_module(module)
                for name in path.split("."):
                    found = getattr(found, name)
            except (ImportError, AttributeError) as error:
                raise _incompatible(f"{module}.{path}", str(error), f"parameters {parameters}") from error
            names = list(inspect.signature(inspect.unwrap(found)).parameters)
            if names[: len(parameters)] != parameters:
                raise _incompatible(f"{module}.{path}", f"parameters {names}", f"{parameters}")


def trainer_class() -> type:
    """Make the subclass of verl's `PPOTrainerSync`."""
    queue: Any = importlib.import_module("transfer_queue")
    tensordict: Any = importlib.import_module("tensordict")
    base: Any = importlib.import_module(f"{TRAINERS}.trainer_sync").PPOTrainerSync

    def pack(columns: dict[str, Any], n: int) -> Any:
        stacked = {name: tensordict.NonTensorStack(*x) if isinstance(x, list) else x for name, x in columns.items()}
        return tensordict.TensorDict(stacked, batch_size=[n])

    class SRPOTrainerSync(base):
        """Train with verl's synchronous trainer and token credit; settings come from `algorithm.srpo`."""

        def __init__(self, config: Any) -> None:
            self.credit_settings = settings_of(config)
            # Wherever verl asks for the mode, a name other than this means an asynchronous trainer.
            config.trainer.v1.trainer_mode = "sync"
            super().__init__(config)

        def _init_tokenizer(self) -> None:
            super()._init_tokenizer()
            sees = self.processor is not None and "corrupted" in self.credit_settings.streams_at(0)
            layout = PixelLayout.of_processor(self.processor) if sees else None
            self.credit_stages = CreditStages(self.credit_settings, self.tokenizer, layout, queue, pack)

        def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
            batch = super()._compute_old_log_prob(batch, metrics)
            temperature = self.config.actor_rollout_ref.rollout.temperature
            compute_log_prob = self.actor_rollout_wg.compute_log_prob
            return self.credit_stages.score(batch, compute_log_prob, temperature, self.global_steps - 1)

        def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
            batch = super()._compute_advantage(batch, metrics)
            batch, found = self.credit_stages.weigh(batch, self.global_steps - 1)
            metrics.update(found)
            return batch

    return SRPOTrainerSync


def settings_of(config: Any) -> CreditSettings:
    """Read `algorithm.srpo` of verl's config, and check what the streams need of the rest.

    Raises: ConfigError.
    """
    settings = CreditSettings.of(_at(config, "algorithm.srpo"))
    check_log_probs_alone(settings, "CreditStages")
    streams = settings.streams_at(0)
    if streams and _at(config, "algorithm.rollout_correction.bypass_mode"):
        fix = "switch it off: both sides of a contrast must come from the actor"
        _refuse("algorithm.rollout_correction.bypass_mode", "True", "False", fix)
    if streams and _at(config, "actor_rollout_ref.actor.policy_loss.loss_mode") == "geo_mean":
        fix = "use 'vanilla' or 'gspo'"
        _refuse("policy_loss.loss_mode", "'geo_mean'", "a loss per token: weights with mean 1 cancel in its mean", fix)
    strategy = str(_at(config, "actor_rollout_ref.actor.strategy"))
    replay = _at(config, f"actor_rollout_ref.actor.{strategy}.router_replay.mode")
    if streams and replay not in (None, "disabled"):
        _refuse("router_replay.mode", repr(replay), "'disabled'", "the experts of one context do not fit the others")
    if "ablated" in streams and settings.ablated_positions == "keep":
        fix = "set algorithm.srpo.ablated_positions=close"
        if strategy not in ("fsdp", "fsdp2"):
            _refuse("actor.strategy", repr(strategy), "fsdp or fsdp2, which pass positions on as given", fix)
        model = "actor_rollout_ref.model"
        attention = _at(config, f"{model}.override_config.attn_implementation") or "flash_attention_2"
        if _at(config, f"{model}.use_remove_padding") and not str(attention).startswith("flash"):
            expected = "flash attention: in packed rows others take a gap in the positions for another sequence"
            _refuse("attn_implementation", repr(attention), expected, fix)
    return settings


_refuse = functools.partial(refuse, ConfigError, "SRPOTrainerSync")


def _at(config: Any, path: str) -> Any:
    """Return a value of a nested config, None where a part of the path is missing."""
    for name in path.split("."):
        config = None if config is None else config.get(name, None)
    return config


def _register_placeholder(error: SRPOError) -> None:
    base = importlib.import_module(f"{TRAINERS}.trainer_base")
    placeholder = type("SRPOTrainerSync", (base.PPOTrainer,), {"__new__": _raising(error)})
    base.register_trainer(NAME)(placeholder)


def _register_refusals(error: SRPOError) -> None:
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    core.register_policy_loss("srpo")(_raising(error))
    core.register_adv_est("srpo")(_raising(error))


def _raising(error: SRPOError) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise error

    return refuse


def _try(function: Callable[[SRPOError], None], error: SRPOError) -> None:
    """Call what may be missing as well; the error has been logged."""
    try:
        function(error)
    except Exception as missing:
        logging.getLogger(__name__).error("srpo: there is no place in this verl to refuse from either: %r", missing)


def _incompatible(argument: str, got: str, expected: str) -> IncompatibleVersionError:
    fix = f"pip install 'verl=={TESTED[-1]}'; tested with {', '.join(TESTED)}"
    return IncompatibleVersionError(house_message("verl_plugin", argument, got, expected, fix))


class _AroundImport(importlib.abc.MetaPathFinder):
    """Call something before, and something after verl has imported a module."""

    def __init__(self, name: str, before: Callable[[], Any], after: Callable[[Any], Any]) -> None:
        self.name, self.before, self.after = name, before, after

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_between(module: Any) -> None:
            self.before()
            execute(module)
            self.after(module)

        spec.loader.exec_module = execute_between
        return spec


def _warn_of_the_environment() -> None:
    """Say what makes verl's own imports fail, or its actor die later, while its messages do not."""
    log = logging.getLogger(__name__)
    if not _exists("transfer_queue"):
        log.error(
            "srpo: verl's trainers need TransferQueue, which verl alone does not bring: pip install 'verl[verl-core]'"
        )
    with contextlib.suppress(PackageNotFoundError):
        if int((found := version("trl")).partition(".")[0]) >= 1:
            log.error("srpo: verl's actor dies beside trl %s: give verl an environment without trl 1.0 or later", found)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a parent
        return False


def _once_imported(name: str, before: Callable[[], Any], after: Callable[[Any], Any]) -> None:
    """Call `after` with a module when verl imports it, now where it has."""
    if name in sys.modules:
        after(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AroundImport(name, before, after))


if _exists(POSITIONS):
    _once_imported(POSITIONS, lambda: None, verl_positions.repair)
if _exists(TRAINERS):
    _once_imported(TRAINERS, _warn_of_the_environment, lambda _: register())
else:
    register()
