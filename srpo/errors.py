"""The typed errors and warnings of `srpo`.

Each error is also the built-in exception it resembles, so `except ValueError` keeps working. A message says what was
called, which argument, what it got, what it expected, and one fix.
"""


class SRPOError(Exception):
    """Base of every error that `srpo` raises on purpose."""


class ShapeError(SRPOError, ValueError):
    """A tensor has the wrong rank or size."""


class DtypeError(SRPOError, TypeError):
    """An argument has the wrong dtype or type."""


class DeviceError(SRPOError, ValueError):
    """Tensors live on different devices, or are sharded over several."""


class ConfigError(SRPOError, ValueError):
    """A setting, or a combination of arguments, has no meaning."""


class KernelUnavailableError(SRPOError, RuntimeError):
    """The Triton kernels cannot run here."""


class RoleParseError(SRPOError, ValueError):
    """Role ids, masks or completion ids hold values that have no meaning."""


class NonFiniteError(SRPOError, ValueError):
    """A value that must be finite is not."""


class IncompatibleVersionError(SRPOError, ImportError):
    """Another library lacks what an integration builds on."""


class ConfigWarning(UserWarning):
    """A setting that is legal and known to go wrong."""
