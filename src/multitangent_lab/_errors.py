"""What can go wrong in the laboratory: the message says what was found and what to try."""


class ConfigError(RuntimeError):
    """A run cannot be done as configured."""


class DataError(RuntimeError):
    """A data set cannot be had as asked."""


class NonFiniteLoss(RuntimeError):  # noqa: N818 (named after what it is)
    """The loss has become infinite or NaN."""
