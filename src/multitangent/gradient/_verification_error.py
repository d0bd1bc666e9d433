"""The error of a gradient that would be wrong."""


class VerificationError(RuntimeError):
    """The forward gradient of a model would not be that of backpropagation."""
