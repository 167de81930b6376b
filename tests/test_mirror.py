"""Tests mirror the package: whoever knows where a function is knows where its tests are, and the reverse."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.runs import ROOT

# Modules without tests of their own, and why.
NOT_TESTED_ALONE = {
    "outer/base.py": "an interface; what holds for its subclasses is in contract/test_options.py",
    "pictures.py": "data alone; drawn in record/test_gallery.py",
}
# Folders of tests that are about something else than the package.
OTHER_FOLDERS = ("docs/", "scripts/")
# Tests that belong to no single module, and what they are about.
OF_NO_MODULE = {
    "algorithm/test_policy_curvature.py": "the curvature of a policy, across algorithms, domains and models",
    "cli/test_cli.py": "the first word of the command, in maml/cli/__init__.py",
    "contract/test_options.py": "what every option in conf/ has to fulfil",
    "contract/test_own_algorithms.py": "algorithms written against the documented interface alone",
    "contract/test_own_options.py": "the same of a user's own options",
    "contract/test_wrong_values.py": "wrong values for every key of every option",
    "test_experiments.py": "the files in conf/experiment/",
    "test_gpu.py": "what needs a CUDA device",
    "test_kills.py": "runs that are killed at every point of their last second",
    "test_mirror.py": "this",
    "test_package.py": "the wheel and the editable install",
    "training/test_seeds.py": "several seeds as one computation, from config to run folders",
    "training/test_survival.py": "runs that are killed, stopped or run out of disk",
}


def has_behaviour(path: Path) -> bool:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) for node in ast.parse(path.read_text()).body)


def mirrored(module: str) -> str:
    """Returns where the tests of a module are, ``a/b.py`` -> ``a/test_b.py``."""
    return str(Path(module).with_name(f"test_{Path(module).name}"))


MODULES = {
    str(path.relative_to(ROOT / "maml"))
    for path in (ROOT / "maml").rglob("*.py")
    if path.name != "__init__.py" and has_behaviour(path)
}
TESTS = {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_module_with_behaviour_has_tests_in_the_same_place() -> None:
    missing = {module for module in MODULES if mirrored(module) not in TESTS}
    assert missing == set(NOT_TESTED_ALONE), "write tests/<folder>/test_<module>.py, or mend the list above"


def test_tests_are_of_a_module_or_say_of_what() -> None:
    of_modules = {mirrored(module) for module in MODULES}
    others = {test for test in TESTS - of_modules if not test.startswith(OTHER_FOLDERS)}
    assert others == set(OF_NO_MODULE), "move the file to where its module is, or mend the list above"
