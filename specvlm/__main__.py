"""`python -m specvlm`: one run, or with -m a sweep.

Exit codes (`errors.ExitCode`): 0 the output is the target's own, 1 MISMATCH, 2 the caller's mistake (one line says which), 3 a
fault of specvlm (with its traceback), 4 another rank died, 5 samples failed (the table says which; all others are done), 130
Ctrl-C. A sweep ends with 1 where any output was wrong, whatever else happened, else with the highest of its jobs'. Those are a
rank's: torchrun itself ends with 1 for any of them but 0.
HYDRA_FULL_ERROR=1 shows the traceback of mistakes too.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from specvlm.app import help as manual
from specvlm.app.cli import full_errors, guarded, leave, refuse, tell
from specvlm.app.terminal import loading
from specvlm.errors import ExitCode, UserError, visible
from specvlm.parallel import torchrun
from specvlm.process.interrupts import INTERRUPTS
from specvlm.results import metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    full = full_errors()
    for name in ("stdout", "stderr"):  # a shell may have closed them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if torchrun.rank_here():  # the first rank speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with INTERRUPTS.listening():
        try:
            return guarded(lambda: command(list(sys.argv[1:] if argv is None else argv), full))
        except KeyboardInterrupt as interrupt:
            if not torchrun.rank_here():
                where = next((f" {note}" for note in getattr(interrupt, "__notes__", []) if note), "")
                print(visible(f"specvlm: interrupted{where}"), file=sys.stderr)
            return ExitCode.INTERRUPTED


def command(argv: list[str], full: bool) -> int:
    """Check every job, then let Hydra run them."""
    if "--version" in argv:
        print(f"specvlm {metrics.versions()['specvlm']}")
        return ExitCode.OK
    if {"-h", "--help"}.intersection(argv):
        manual.show([word for word in argv if not word.startswith("-")])
        return ExitCode.OK
    loading()
    from hydra._internal.utils import get_args_parser

    from specvlm.app import compose
    from specvlm.app.launch import Call, answer, start
    from specvlm.models.integrity import CODE  # and torch with it
    from specvlm.strategies.plugins import BUILTINS

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        refuse("--experimental-rerun: a run is started again by its words")
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if sweep and torchrun.size_here() > 1:
        raise UserError("a sweep does not run under torchrun: start torchrun once a job")
    args.overrides = compose.quoted(args.overrides, sweep)
    asks = any((args.hydra_help, args.cfg, args.info, args.shell_completion))
    if not asks:  # all that is to stay as it is, before a plugin is imported
        for module in ("specvlm.app.sweep", "specvlm.app.run", *BUILTINS):
            importlib.import_module(module)
    more, main_folder = (Path(args.config_dir) if args.config_dir else None), Path(__file__).parent / (args.config_path or "")
    with CODE.watching(), compose.hydra(more, main_folder if args.config_path else None):
        args.overrides += compose.searchpath(more)
        if asks:
            return answer(args, parser)
        call_of = partial(Call, guarded=partial(guarded, full=full), tell=partial(tell, full=full))
        return start(args.overrides, sweep, call_of, args.config_name or "config")


if __name__ == "__main__":
    leave(main)
