"""Before a cluster is spent: do this model, its processor and this response format work with token credit?

python -m srpo check MODEL_OR_PATH [--images DIR]

or, with a model at hand, `check_model(model, processor, images)`.
"""

from srpo.check.findings import Check, Finding
from srpo.check.run import check_model

__all__ = ["Check", "Finding", "check_model"]
