"""What can go wrong between a data set's name and its tensors."""


class DataError(RuntimeError):
    """A data set cannot be had as asked: the message says what was found and what to try."""
