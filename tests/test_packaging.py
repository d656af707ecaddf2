"""The wheel works from any folder, and a two-file third-party package adds a strategy and removes it again."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import naive
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from specvlm import config
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid

ROOT = Path(__file__).parents[1]
PAIR = config.model_folder(OmegaConf.load(ROOT / "conf" / "pair" / "embedded_qwen2_5_vl.yaml").target.path)
PLUGIN = ROOT / "plugins" / "specvlm-frame-diff"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")]


def python(*words, cwd, **env):
    """Run Python as a user of an installed specvlm would: elsewhere, without this checkout on the path."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def wheel_of(project, folder):
    """Build with the build back end alone: no network, no isolated environment."""
    done = python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=project)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel, site):
    done = python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=site.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return wheel_of(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Make a scratch environment with specvlm and the plugin, both installed from wheels."""
    folder = tmp_path_factory.mktemp("env")
    site = folder / "site"
    install(wheel, site)
    copy = shutil.copytree(PLUGIN, folder / "plugin", ignore=shutil.ignore_patterns("__pycache__"))
    install(wheel_of(copy, folder), site)
    return site


def specvlm(site, *words):
    """Run the command. `-P` keeps the working directory off the path, so that only `site` is imported."""
    env = {"PYTHONPATH": str(site), "SPECVLM_PLUGINS": "specvlm-frame-diff", "COLUMNS": "120"}
    folder = site.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    return python("-P", "-m", "specvlm", *words, cwd=folder, **env)


def test_wheel_carries_configuration_assets_types_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"specvlm/{file.relative_to(ROOT)}" in names
    for file in (ROOT / "specvlm").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert str(file.relative_to(ROOT)) in names, file
    assert "specvlm/py.typed" in names and "specvlm = specvlm.__main__:main" in entry_points
    assert not any(name.startswith(("tests/", "experiments/", "plugins/")) for name in names)


def test_wheel_says_whose_it_is_and_under_which_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = message_from_string(archive.read(files["METADATA"]).decode())
        for path in metadata.get_all("License-File"):
            assert archive.read(files[f"licenses/{path}"]) == (ROOT / path).read_bytes()
    assert metadata.get_all("License-File") == ["LICENSE", "specvlm/assets/README.md"]
    assert (metadata["License-Expression"], metadata["Author"]) == ("Apache-2.0", "the specvlm authors")
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(metadata.get_all("Classifier"))
    assert tuple(map(int, metadata["Metadata-Version"].split("."))) >= (2, 4)


def test_every_clip_and_every_folder_of_weights_has_a_license():
    assets = ROOT / "specvlm" / "assets"
    rows = [line.split("|")[1:-1] for line in (assets / "README.md").read_text().splitlines() if line.startswith("| `")]
    licensed = {pattern: license.strip() for files, _, license in rows for pattern in re.findall(r"`([^`]+)`", files)}
    assert all("Apache-2.0" in license or "CC BY 3.0" in license for license in licensed.values())
    for path in (*(assets / "clips").iterdir(), *(folder for folder in assets.iterdir() if folder.name != "clips")):
        name = f"{path.relative_to(assets)}{'/' * path.is_dir()}"
        assert path.suffix == ".md" or sum(fnmatch(name, pattern) for pattern in licensed) == 1, name


def test_the_citation_agrees_with_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["title"], cited["version"], cited["license"]) == (project["name"], project["version"], project["license"])
    assert (cited["authors"], cited["abstract"]) == (project["authors"], project["description"])
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pinned_versions_satisfy_what_the_package_asks_for():
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pins = dict(line.replace("_", "-").split("==") for line in lines if "==" in line)
    extras = project["optional-dependencies"]
    named = [text for name in ("report", "docs", "serve") for text in extras[name]]
    named += [text for name in ("ray", "test", "dev") for text in extras[name][1:]]
    for text in [*project["dependencies"], *named]:
        need = requirements.Requirement(text)
        pin = pins[need.name.replace("_", "-")]
        assert need.specifier.contains(pin), f"{need.name}: {pin} is not {need.specifier}"
    assert "torchvision" not in pins


def test_plugin_keeps_the_contract(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    from specvlm_frame_diff import FrameDiffPruner

    check_pruner(FrameDiffPruner)
    check_pruner(FrameDiffPruner, first_frame=0.0)


def test_plugin_keeps_what_changed_since_the_frame_before(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    from specvlm_frame_diff import FrameDiffPruner

    x_FPD = torch.eye(4).repeat(3, 1, 1)
    x_FPD[1, 2] = x_FPD[1, 3]  # cell 2 changes in frame 1 and back in frame 2
    for first, kept in ((0.0, [6, 10]), (2.0, [0, 1])):
        ctx = PruneContext((TokenGrid(3, 2, 2),), 2, {"features": x_FPD.flatten(0, 1)})
        assert FrameDiffPruner(first_frame=first).select(ctx).index.tolist() == kept


def test_plugin_equals_plain_loops(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    from specvlm_frame_diff import FrameDiffPruner

    for kind, x_FPD, _, budget in naive.videos():
        change = [1.0] * 16
        for before_PD, x_PD in pairwise(x_FPD):
            change += [1 - naive.cosine(x_PD[cell], before_PD[cell]) for cell in range(16)]
        best = sorted(range(len(change)), key=lambda i: (-round(change[i], 6), i))[:budget]
        ctx = PruneContext((TokenGrid(len(x_FPD), 4, 4),), budget, {"features": x_FPD.flatten(0, 1)})
        assert FrameDiffPruner().select(ctx).index.tolist() == sorted(best), kind


def test_plugin_is_two_files():
    assert sorted(path.name for path in PLUGIN.iterdir() if path.is_file()) == ["pyproject.toml", "specvlm_frame_diff.py"]


def test_installed_plugin_is_in_the_help_and_composes_from_any_folder(site):
    whole = specvlm(site, "--help")
    assert whole.returncode == 0 and "\n  specvlm-frame-diff 0.1.0" in whole.stdout, whole.stderr
    shown = specvlm(site, "--help", "pruner")
    assert shown.returncode == 0, shown.stderr
    assert "frame_diff" in shown.stdout and "[specvlm-frame-diff 0.1.0]" in " ".join(shown.stdout.split())
    assert "pruner.first_frame=1.0" in shown.stdout
    composed = specvlm(site, "--cfg", "job", "--package", "pruner", "pruner=frame_diff", "pruner.first_frame=0.5")
    assert composed.returncode == 0, composed.stderr
    assert "name: frame_diff\nfirst_frame: 0.5" in composed.stdout


@pytest.mark.skipif(not PAIR.is_dir(), reason="the embedded pair is not in this checkout")
def test_installed_plugin_decodes_losslessly_from_any_folder(site):
    done = specvlm(site, "pruner=frame_diff", "pruner.first_frame=0.5", "frames=4", "max_new_tokens=12", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((site.parent / "elsewhere" / "run" / "summary.json").read_text())
    assert summary["token_ids"] == summary["baseline_token_ids"] and len(summary["token_ids"]) == 12
    assert 0 < summary["kept_tokens"] <= summary["video_tokens"] // 10
    assert "FrameDiffPruner(first_frame=0.5)" in summary["strategies"]["pruner"]


def test_removing_the_plugin_removes_its_option(site, tmp_path):
    without = shutil.copytree(site, tmp_path / "site", ignore=shutil.ignore_patterns("specvlm_frame_diff*"))
    gone = specvlm(without, "pruner=frame_diff")
    assert gone.returncode == 2
    assert gone.stderr.splitlines()[-1].startswith(
        'specvlm: pruner=frame_diff: there is no pruner "frame_diff"; choose from fastv'
    )
    assert "specvlm-frame-diff of SPECVLM_PLUGINS is not installed" in gone.stderr.splitlines()[0]
    assert not list((tmp_path / "elsewhere").iterdir())
