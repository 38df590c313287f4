"""Rooms and who may import whom: every arrow points downward, and what a run learns knows nothing of what it shows."""

import ast
import dataclasses
import inspect
import pkgutil
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest

import ditlit

PACKAGE = Path(ditlit.__file__).parent
BASE = {"errors", "settings", "pictures", "precision", "hub"}
MAY_IMPORT = {
    "errors": set(),
    "hub": set(),
    "quiet": set(),
    "watchdog": set(),
    "precision": set(),
    "pictures": {"errors"},
    "settings": {"errors"},
    "mistakes": {"errors", "settings"},
    "parser": {"errors", "mistakes"},
    "run_help": {"settings", "parser"},
    "models": {"errors"},
    "diffusion": {"errors", "settings"},
    "data": {"errors", "settings"},
    "images": BASE | {"data"},
    "checkpoints": BASE | {"models", "diffusion"},
    "generation": BASE | {"models", "diffusion", "data", "images", "checkpoints"},
    "evaluation": BASE | {"data", "images"},
    "parallel": {"errors", "models"},
    "resilience": {"errors", "watchdog", "models", "data", "checkpoints", "parallel"},
    "training": BASE | {"models", "diffusion", "data", "checkpoints", "parallel", "resilience"},
    "callbacks": BASE
    | {"models", "diffusion", "data", "images", "checkpoints", "evaluation", "parallel", "resilience"},
    "analysis": BASE | {"models", "diffusion", "data", "images", "checkpoints", "generation", "evaluation"},
    "benchmarking": BASE
    | {"models", "diffusion", "data", "checkpoints", "generation", "parallel", "resilience", "training", "callbacks"}
    | {"cli", "run_help"},
    "commands": BASE
    | {"models", "diffusion", "data", "images", "checkpoints", "generation", "evaluation", "analysis", "watchdog"},
}
TOP = {"cli", "__main__", "__init__"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ditlit" and len(parts) > 1:
                yield parts[1]


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_rooms_have_an_order():
    """Each room imports earlier ones only, so that there are no circles."""
    rooms = list(MAY_IMPORT)
    for number, name in enumerate(rooms):
        assert MAY_IMPORT[name] - TOP <= set(rooms[:number]), name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    if room(path) in TOP:
        return
    assert set(imports(path)) <= MAY_IMPORT[room(path)] | {room(path)}


def test_lightning_is_known_to_data_and_training_only():
    for path in (*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "diffusion").glob("*.py")):
        assert "lightning" not in path.read_text().lower().replace("no lightning", "")


def signatures():
    """Every parameter of the package's functions and classes that has a default."""
    for info in pkgutil.walk_packages(ditlit.__path__, "ditlit."):
        if info.name.endswith("__main__"):
            continue
        for name, thing in vars(import_module(info.name)).items():
            if getattr(thing, "__module__", None) != info.name:
                continue
            methods = vars(thing).values() if inspect.isclass(thing) else ()
            for function in filter(inspect.isfunction, (thing, *methods)):
                for parameter in inspect.signature(function).parameters.values():
                    if parameter.default is not parameter.empty:
                        yield f"{info.name}.{name}", parameter


def test_no_default_is_an_object_that_calls_could_change_for_each_other():
    kinds = (type(None), bool, int, float, str, tuple, Path, timedelta, type)
    for where, parameter in signatures():
        value = parameter.default
        frozen = dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen
        lazy = hasattr(value, "lazy_get_init_args")  # a description, from which DiTModule makes its own
        factory = "factory" in repr(value)  # of a dataclass's field
        assert isinstance(value, kinds) or inspect.isfunction(value) or frozen or lazy or factory, (where, parameter)
