"""docs/architecture.md follows a request through the files in the order of a real run.

The run has no baseline, which would visit most of them before the request begins.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d+\. `([\w/]+\.py)` `(\w+)`: ", re.M)
MOST = 14

TRACE = """
import inspect, sys, threading
from pathlib import Path
import specvlm.app.run, specvlm.app.sweep, transformers.models.qwen2_5_vl  # a profiled import takes twice as long
from specvlm.__main__ import main

root, seen, kept = Path(sys.argv[1]), {}, set()

def note(frame, event, arg):
    code = frame.f_code
    if event == "call" and code not in kept:
        kept.add(code)
        if code.co_filename.startswith(str(root)) and code.co_flags & inspect.CO_OPTIMIZED:
            seen.setdefault(f"{Path(code.co_filename).relative_to(root).as_posix()} {code.co_name}")

threading.setprofile(note)
sys.setprofile(note)
main(["frames=4", "max_new_tokens=8", "baseline=false", f"hydra.run.dir={sys.argv[2]}"])
sys.setprofile(None)
print("CALLS", *seen, sep="\\n")
"""


def test_the_walk_is_short_and_names_what_is_there():
    steps = STEP.findall(PAGE)
    assert 8 <= len(steps) <= MOST and len(steps) == len(re.findall(r"^\d+\. ", PAGE, re.M))
    for file, function in steps:
        assert re.search(rf"^ *def {function}\(", (ROOT / "specvlm" / file).read_text(encoding="utf-8"), re.M), (file, function)


def test_every_file_of_the_table_is_there():
    table = PAGE.partition("## Where things are")[2]
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        for path in re.findall(r"`([^`]+)`", row):
            assert (ROOT / "specvlm" / path).exists(), path


def test_the_table_of_changes_names_what_is_there():
    rows = [line for line in PAGE.partition("## Where to change what")[2].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        _, _, where, *others, _ = row.split("|")
        path = None
        for word in re.findall(r"`([^`]+)`", where):
            if re.fullmatch(r"[\w/]+(\.(py|toml|yaml)|/)", word):
                (path,) = (found for found in (ROOT / "specvlm" / word, ROOT / word) if found.exists())
            elif path is not None and word.isidentifier():
                assert re.search(rf"^ *(def |class )?{word}\b", path.read_text(encoding="utf-8"), re.M), (path.name, word)
        for word in re.findall(r"`([\w/]+\.(?:md|py))`", " ".join(others)):
            assert (ROOT / word).exists(), word


@pytest.mark.slow
def test_a_run_goes_that_way(tmp_path):
    command = [sys.executable, "-c", TRACE, str(ROOT / "specvlm"), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    calls = done.stdout.partition("CALLS\n")[2].splitlines()
    places = [calls.index(f"{file} {function}") for file, function in STEP.findall(PAGE)]
    assert places == sorted(places), [calls[place] for place in places]
