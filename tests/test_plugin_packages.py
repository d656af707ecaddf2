"""Every folder under plugins/ is a package as a third party would write it: two files and a test, no core edits.

All but one extend specvlm. The other, specvlm-lmms-eval, extends lmms-eval by specvlm.
"""

import configparser
import inspect
import re
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from hatchling.builders.wheel import WheelBuilder
from packages import FOLDERS, PACKAGES, installed, module_of, project

from specvlm.models import families
from specvlm.strategies import plugins, registry

each_package = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture
def point(folder, monkeypatch):
    """Return the entry point that the folder declares, with its module importable without installation."""
    monkeypatch.syspath_prepend(str(folder))
    ((name, target),) = project(folder)["entry-points"]["specvlm"].items()
    declared = EntryPoint(name, target, "specvlm")
    return SimpleNamespace(name=name, load=declared.load, dist=SimpleNamespace(name=name, version=project(folder)["version"]))


@each_package
def test_the_entry_point_bears_the_name_of_the_distribution(folder):
    name, module = folder.name, folder.name.replace("-", "_")
    said = project(folder)
    assert said["name"] == name
    assert said["entry-points"] == {"specvlm": {name: module}}
    assert "specvlm" in {re.split(r"[^\w-]", needed)[0] for needed in said["dependencies"]}
    config = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    assert config["tool"]["hatch"]["build"]["targets"]["wheel"]["include"] == [f"{module}.py"]


PAPERS = ("authors", "license", "classifiers", "keywords", "requires-python", "version")


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_its_metadata_are_those_of_the_other_packages(folder):
    ours, all_of_specvlm = project(folder), project(FOLDERS[0].parents[1])
    assert {key: ours[key] for key in PAPERS} == {key: project(FOLDERS[0])[key] for key in PAPERS}
    assert (ours["authors"], ours["license"]) == (all_of_specvlm["authors"], all_of_specvlm["license"])
    assert set(ours["classifiers"]) <= set(all_of_specvlm["classifiers"])
    assert set(ours["keywords"]) <= set(all_of_specvlm["keywords"])


@pytest.mark.parametrize("page", ["docs/write/pruner.md", "docs/tutorial.md"])
def test_the_example_of_a_page_has_the_same_metadata(page):
    text = (FOLDERS[0].parents[1] / page).read_text(encoding="utf-8")
    (example,) = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.S) if "[project]" in block)
    assert {key: example["project"][key] for key in PAPERS} == {key: project(FOLDERS[0])[key] for key in PAPERS}


@each_package
def test_its_wheel_is_built_and_holds_its_module_alone(folder, tmp_path):
    """Built by the build back end in this process: no network, nothing installed."""
    module = folder.name.replace("-", "_")
    (built,) = WheelBuilder(str(folder)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        found = {name: wheel.read(name).decode() for name in wheel.namelist()}
    about = f"{module}-{project(folder)['version']}.dist-info"
    assert {name for name in found if not name.startswith(about)} == {f"{module}.py"}
    points, metadata = configparser.ConfigParser(), message_from_string(found[f"{about}/METADATA"])
    points.read_string(found[f"{about}/entry_points.txt"])
    assert dict(points["specvlm"]) == {folder.name: module}
    assert metadata["Name"] == folder.name and metadata["Summary"] == project(folder)["description"]
    assert "specvlm" in metadata.get_all("Requires-Dist") and metadata["Requires-Python"] == ">=3.11"
    assert (metadata["Author"], metadata["License-Expression"]) == ("the specvlm authors", "Apache-2.0")


STRATEGIES = [folder for folder in FOLDERS if plugins.strategies_of(module_of(folder))]


def test_a_package_brings_strategies_or_a_model_family():
    brought = {folder.name: plugins.families_of(module_of(folder)) for folder in FOLDERS if folder not in STRATEGIES}
    assert {model_type: name for name, found in brought.items() for model_type in found} == families.PACKAGES
    for name, found in brought.items():
        with installed(name):
            for model_type in found:
                cls = families.find(model_type)
                assert inspect.getfile(cls).startswith(str(FOLDERS[0].parent / name)) and cls.__doc__


@pytest.mark.parametrize("folder", STRATEGIES, ids=lambda folder: folder.name)
def test_its_strategies_load_through_the_plugin_machinery_and_are_built(folder, point, monkeypatch):
    monkeypatch.delenv("SPECVLM_PLUGINS", raising=False)
    monkeypatch.setenv("SPECVLM_STRICT_PLUGINS", "1")
    monkeypatch.setattr(plugins, "entry_points", lambda group: (point,))
    registry.collect.cache_clear()
    try:
        infos = [info for kind in registry.collect().values() for info in kind.values() if info.plugin != "specvlm"]
        assert infos and all(info.plugin == f"{folder.name} {project(folder)['version']}" for info in infos)
        for info in infos:
            assert registry.build(info.cls.kind, info.cls.name) == info.cls()
            assert inspect.getfile(info.cls) == str(folder / f"{folder.name.replace('-', '_')}.py")
            assert info.summary.strip(), info.cls
    finally:
        registry.collect.cache_clear()


@each_package
def test_its_own_tests_run_with_the_repositorys(folder, pytestconfig):
    assert "plugins" in pytestconfig.getini("testpaths")
    files = {path.name for path in folder.iterdir() if path.is_file()}
    module = folder.name.replace("-", "_")
    test = f"test_{module.removeprefix('specvlm_')}.py"
    # The model of a plugin is two files alone; tests/test_packaging.py has its test.
    assert files == {"pyproject.toml", f"{module}.py"} | ({test} if folder.name != "specvlm-frame-diff" else set())


def test_no_two_packages_bring_one_module_or_one_name():
    names = [(cls.kind, cls.name) for folder in STRATEGIES for cls in plugins.strategies_of(module_of(folder))]
    assert len(set(names)) == len(names) >= len(STRATEGIES)


def test_the_package_that_extends_lmms_eval_holds_its_model_and_its_task(tmp_path):
    (folder,) = (folder for folder in PACKAGES if folder not in FOLDERS)
    said = project(folder)
    assert said["name"] == folder.name == "specvlm-lmms-eval" and "specvlm" in said["dependencies"]
    assert said["entry-points"] == {"lmms_eval.models": {"specvlm": "specvlm_lmms_eval:manifest"}}
    (built,) = WheelBuilder(str(folder)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    there = {path for path in (folder / "specvlm_lmms_eval").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert found == {str(path.relative_to(folder)) for path in there}
    assert {f"specvlm_lmms_eval/{name}" for name in ("__init__.py", "model.py", "tasks/specvlm_synthetic.yaml")} < found
    assert (folder / "test_lmms_eval.py").is_file()
