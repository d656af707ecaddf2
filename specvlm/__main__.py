"""`python -m specvlm`: one run, or a sweep with -m.

Exit codes (`errors.ExitCode`):
0 done, and no check found a wrong output; 1 MISMATCH: an output differs from the target's own and rounding does not
explain it; 2 a user error or an error of the operating system, explained in one line; 3 a bug in specvlm or in a
plugin, with its traceback; 4 another rank died; 5 some samples failed (the table lists them); 130 Ctrl-C; 141 the
reader of a pipe is gone; 143 SIGTERM under torchrun.

A sweep exits with 1 if any output was wrong, else with the highest code of its jobs. torchrun itself exits with 1
whenever a rank exits with a code other than 0. HYDRA_FULL_ERROR=1 shows the traceback of user errors too.
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
from specvlm.process.collector import paused_for_imports
from specvlm.process.interrupts import INTERRUPTS
from specvlm.results import metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    full = full_errors()
    for name in ("stdout", "stderr"):  # the shell may have closed this stream
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if torchrun.rank_here():  # rank 0 prints for all
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
    """Answer --version, --help, --cfg and the like, or check all jobs and let Hydra run them; return the exit code.

    full: Print tracebacks of user errors too.
    """
    if "--version" in argv:
        print(f"specvlm {metrics.versions()['specvlm']}")
        return ExitCode.OK
    if {"-h", "--help"}.intersection(argv):
        manual.show([word for word in argv if not word.startswith("-")])
        return ExitCode.OK
    loading()
    with paused_for_imports():
        from hydra._internal.utils import get_args_parser

        from specvlm.app import compose
        from specvlm.app.launch import Call, answer, start
        from specvlm.app.quoting import quoted
        from specvlm.models.families import specvlm_families
        from specvlm.models.integrity import CODE
        from specvlm.models.plugins import BUILTINS

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        refuse("--experimental-rerun is not supported: repeat the command line instead")
    if not args.cfg and (args.package or args.resolve):
        refuse(f"{'--resolve' if args.resolve else '--package'} needs --cfg job, hydra or all")
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if sweep and torchrun.size_here() > 1:
        raise UserError("a sweep does not run under torchrun: start torchrun once per job")
    args.overrides = quoted(args.overrides, sweep)
    asks = any((args.hydra_help, args.cfg, args.info, args.shell_completion))
    if not asks:  # import specvlm's own modules before any plugin, so that CODE records their original definitions
        modules = (place.partition(":")[0] for place in specvlm_families().values())
        for module in ("specvlm.app.sweep", "specvlm.app.run", *BUILTINS, *modules):
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
