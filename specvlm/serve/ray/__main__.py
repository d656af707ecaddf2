"""`python -m specvlm.serve.ray`: serve a pair from several replicas, on Ray Serve; --help lists the keys."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from specvlm.app.cli import run_command
    from specvlm.serve.ray.command import command, show_help

    return run_command(argv, show_help, command)


if __name__ == "__main__":
    sys.exit(main())
