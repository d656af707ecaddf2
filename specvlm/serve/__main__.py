"""`python -m specvlm.serve`: answer OpenAI's chat completions with a pair; --help lists its keys."""

# Nothing heavy is imported here: processes that read videos import this module again.
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from specvlm.app.cli import run_command
    from specvlm.serve.command import command, show_help

    return run_command(argv, show_help, command)


if __name__ == "__main__":
    sys.exit(main())
