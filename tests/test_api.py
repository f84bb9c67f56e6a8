"""The names of `weft`: lazy, and the same things in whatever order the package is used."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import weft

HEAVY = {"numpy", "torch", "transformers", "msgspec", "click"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_weft_imports_nothing_heavy() -> None:
    loaded = set(python("import sys, weft; dir(weft); weft.__all__; print(*sys.modules)").split())
    assert "weft" in loaded and not HEAVY & {name.partition(".")[0] for name in loaded}
    assert {name for name in loaded if name.startswith("weft.")} == set()


def test_light_names_stay_light() -> None:
    loaded = set(python("import sys, weft; weft.Base, weft.Delta, weft.Builder, weft.fold, weft.diff, weft.evaluate; print(*sys.modules)").split())
    assert not {"torch", "transformers"} & loaded


def kinds() -> dict[str, str]:
    return {name: type(getattr(weft, name)).__name__ for name in weft.__all__}


def test_every_name_is_a_class_or_a_function_that_says_what_it_does() -> None:
    assert set(weft.__all__) == set(weft._WHERE) and set(weft.__all__) < set(dir(weft))
    for name, kind in kinds().items():
        thing: Any = getattr(weft, name)
        assert kind == ("type" if name[0].isupper() else "function"), name
        assert thing.__name__ == name and thing.__doc__ and thing.__module__.startswith("weft."), name
    with pytest.raises(AttributeError, match="'nothing'"):
        weft.nothing  # noqa: B018
    star: dict[str, Any] = {}
    exec("from weft import *", star)
    assert {name: star[name] for name in weft.__all__} == {name: getattr(weft, name) for name in weft.__all__}


@pytest.mark.parametrize("backwards", [False, True])
def test_importing_modules_never_hides_a_name(backwards: bool) -> None:
    """No module is called like a function, so a name means the same before and after any import."""
    code = f"""
import pkgutil, weft
from importlib import import_module
before = {{name: getattr(weft, name) for name in sorted(weft.__all__, reverse={backwards})}}
for found in sorted((m.name for m in pkgutil.walk_packages(weft.__path__, "weft.")), reverse={backwards}):
    if not found.endswith("__main__"):
        import_module(found)
assert before == {{name: getattr(weft, name) for name in weft.__all__}}
print(len(before))
"""
    assert int(python(code)) == len(weft.__all__)
