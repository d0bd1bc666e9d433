"""What can go wrong with values."""


class NonFiniteError(ValueError):
    """A value is infinite or not a number."""
