"""`python -m ops`: the command where no script is installed, as in a cron job of a checkout."""

from .main import app

if __name__ == "__main__":
    app(prog_name="vectorkeep")
