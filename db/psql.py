"""SQL as a command that a person can paste into a shell."""

import shlex


def psql(*statements: str) -> str:
    """The command that runs `statements`, each by itself: some run in no transaction block."""
    return " ".join(["psql", *(f"-c {_quoted(statement)}" for statement in statements)])


def _quoted(statement: str) -> str:
    if "'" in statement and not any(character in statement for character in '"$`\\!'):
        return f'"{statement}"'  # easier to read than quotes within quotes
    return shlex.quote(statement)
