"""Attacks that do not come back: they hang, or end the process. Each writes the file that HOSTILE_SIGN names, first."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from pathlib import Path

from .makers import decides, proposes, select, strategy, weighs

HANGS, KILLS = "hangs", "kills"


def sign():
    Path(os.environ["HOSTILE_SIGN"]).touch()


def turn():
    """For ever, in Python."""
    sign()
    while True:
        pass


def swallow(kinds):
    """For ever, whatever of these kinds is raised meanwhile."""
    sign()
    while True:
        try:
            while True:
                time.sleep(0.01)
        except kinds:
            pass


@proposes(HANGS)
def turns_for_ever(self, ctx, last, tree):
    turn()


@select(HANGS)
def pruner_turns_for_ever(self, ctx):
    turn()


@weighs(HANGS, "verifier_attention_weighted")
def weighs_for_ever(self, text_TD, features_ND):
    turn()


@decides(HANGS)
def verifies_for_ever(self, ctx, verdict):
    turn()


@proposes(HANGS)
def sleeps(self, ctx, last, tree):
    sign()
    time.sleep(10**6)


@proposes(HANGS)
def waits_for_itself(self, ctx, last, tree):
    lock = threading.Lock()
    sign()
    lock.acquire(), lock.acquire()


@proposes(HANGS)
def swallows_interrupts(self, ctx, last, tree):
    swallow(KeyboardInterrupt)


@select(HANGS)
def swallows_everything(self, ctx):
    swallow(BaseException)


@proposes(HANGS)
def turns_an_interrupt_into_an_error(self, ctx, last, tree):
    try:
        turn()
    except KeyboardInterrupt:
        raise RuntimeError("nothing was interrupted") from None


@proposes(HANGS)
def turns_an_interrupt_into_a_tree(self, ctx, last, tree):
    try:
        turn()
    except KeyboardInterrupt:
        return tree


@proposes(HANGS)
def ignores_signals_and_hangs_later(self, ctx, last, tree):
    """In the next request."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN and "HOSTILE_SET" not in os.environ:
        os.environ["HOSTILE_SET"] = str(id(ctx))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif os.environ.get("HOSTILE_SET") != str(id(ctx)):
        turn()
    return tree


@proposes(HANGS)
def parents_without_end(self, ctx, last, tree):
    """In the type of what it proposes."""

    class Parents(tuple):
        __slots__ = ()

        def __iter__(self):
            turn()

    return type(tree)(tree.tokens, Parents(tree.parents))


def killing(name, end):
    def answer(self, ctx, last, tree):
        sign()
        end()

    strategy("drafter", name, KILLS, answer=answer)


killing("ends_the_process_well", lambda: os._exit(0))
killing("aborts", os.abort)
killing("kills_itself", lambda: os.kill(os.getpid(), signal.SIGKILL))
killing("sets_an_alarm", lambda: (signal.setitimer(signal.ITIMER_REAL, 0.01), time.sleep(1)))
killing("closes_all_files", lambda: os.closerange(3, 60))
killing("interrupts_the_main_thread", lambda: (threading.Timer(0.05, _thread.interrupt_main).start(), time.sleep(1)))
