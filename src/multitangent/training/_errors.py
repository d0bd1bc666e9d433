"""What can go wrong with a run."""


class ConfigError(RuntimeError):
    """A run cannot be done as configured: the message says what was found and what to try."""


class NonFiniteLoss(RuntimeError):  # noqa: N818 (named after what it is)
    """The loss has become infinite or NaN: the message says where, and what to try."""
