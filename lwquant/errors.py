"""The errors lwquant raises on purpose; each message names the thing and the limit it broke."""


class LwquantError(ValueError):
    """Base of every error that is the input's fault rather than a bug."""


class CheckpointError(LwquantError):
    """A model folder or file cannot be used: missing, truncated, lying, or holding NaN or Inf."""


class UnsupportedModelError(LwquantError):
    """The architecture is not a decoder-only causal LM with one list of blocks."""


class TransformError(LwquantError):
    """A transform would change what the model computes, so it is refused for this model."""


class BudgetError(LwquantError):
    """The budget lies below the floor or above the ceiling of what the menu can reach."""


class CalibrationError(LwquantError):
    """The text is empty, too short for one window, or of a kind we cannot read."""


class PlanError(LwquantError):
    """A plan or report names unknown layers, unknown widths, or belongs to another model."""


class RoundingError(LwquantError):
    """A linear's weights or statistics cannot be rounded: overflow, or an indefinite Hessian."""


class OutputError(LwquantError):
    """The output folder exists, cannot be written, or is not a complete result."""
