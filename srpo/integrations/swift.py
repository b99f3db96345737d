"""SRPO in ms-swift: its GRPO trainer with advantages per token, a plugin of `swift rlhf --rlhf_type grpo`.

    swift rlhf --rlhf_type grpo --external_plugins srpo/integrations/swift.py \\
        --model_kwargs '{"srpo": {"credit": "srpo", "corruption": {"name": "PatchMask", "probability": 0.6}}}' ...

A plugin of your own (rewards, data) may `import srpo.integrations.swift` instead. Loading it puts `SRPOTrainer` in the
place of ms-swift's trainer. Settings are the fields of `CreditSettings`, under `srpo` in `--model_kwargs`, or in the
variable `SRPO`, which is where ms-swift puts them.
"""

import os
import sys

# ms-swift puts the folder of a plugin first where modules are looked for; here `swift`, `trl` and `verl` are our own.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != _HERE]

from srpo.integrations.swift_trainer import TESTED, SRPOTrainer, check_swift, register, settings_of  # noqa: E402

__all__ = ["TESTED", "SRPOTrainer", "check_swift", "register", "settings_of"]

register()
