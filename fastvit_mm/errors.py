"""The one error that is meant for people."""


class FastViTError(ValueError):
    """One line that says what is wrong and what to do; the tools print it and exit with 2."""
