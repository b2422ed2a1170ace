"""The error that is meant for users."""


class FastViTError(ValueError):
    """One line that says what is wrong and what to do; the tools print it and exit with code 2."""


def one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
