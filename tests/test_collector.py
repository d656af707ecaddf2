"""The garbage collector rests while a command imports torch, and only then. Each in a process that has nothing imported."""

import subprocess
import sys

IMPORTS = """
import gc, sys
from specvlm.process.collector import paused_for_imports
with paused_for_imports():
    inside, sys.modules["torch"] = gc.isenabled(), sys
first = inside, gc.isenabled(), gc.get_freeze_count() > 1000
gc.unfreeze()
with paused_for_imports():
    inside = gc.isenabled()
print(first, (inside, gc.isenabled(), gc.get_freeze_count()))
"""


def test_imports_are_not_collected_and_another_call_of_main_freezes_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout == "(False, True, True) (True, True, 0)\n"


FAILS = """
import gc
from specvlm.process.collector import paused_for_imports
try:
    with paused_for_imports():
        import no_such
except ImportError:
    print(gc.isenabled())
"""


def test_an_import_that_fails_leaves_the_collector_running():
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
