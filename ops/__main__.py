"""The command's start, as the script `vectorkeep` and as `python -m ops`."""

import gc

# What is imported here stays until the end. Looking through it for garbage, again and again and once more at the end,
# took two fifths of the time that a short command needs.
gc.disable()

from .main import app  # noqa: E402

gc.freeze()
gc.enable()


def main() -> None:
    app(prog_name="vectorkeep")


if __name__ == "__main__":
    main()
