"""What `import hlm` offers: every public name, lazily, with the phases as functions of plain arguments."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hlm
from hlm.step_table import STEPS

INIT = Path(hlm.__file__)
FUNCTIONS = {"teacher": "train_teacher", "prepare_logs": "prepare", "index": "tune_index"} | {
    name: name for name in ("embed", "prune", "align", "refine", "evaluate", "export", "publish")
}


def test_public_names_are_the_same_for_people_and_for_type_checkers():
    (checked,) = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    typed = {(alias.asname or alias.name): node.module for node in checked.body for alias in node.names}
    assert hlm.__all__ == sorted(hlm.__all__)
    assert set(hlm.__all__) == set(hlm._PLACES) == set(typed)
    for name in hlm.__all__:
        assert getattr(hlm, name) is not None and name in dir(hlm)
        assert typed[name] == f"hlm.{hlm._PLACES[name].split(':')[0]}"
    with pytest.raises(AttributeError, match="no attribute 'algin'"):
        hlm.algin  # noqa: B018


def test_importing_it_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import hlm; print(time.perf_counter() - start); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers', 'yaml')))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.05


@pytest.mark.parametrize("step", FUNCTIONS)
def test_each_step_takes_its_settings_as_plain_arguments(step):
    function = getattr(hlm, FUNCTIONS[step])
    parameters = inspect.signature(function).parameters
    for name, default in vars(STEPS[step].settings).items():
        if name in STEPS[step].settings.__dataclass_fields__:
            assert parameters[name].default == default, name
    assert ("TrainingArguments" in parameters) == STEPS[step].trains
    assert function.__doc__
    with pytest.raises(hlm.HlmError, match=f"{FUNCTIONS[step]}: unknown setting 'outputt'"):
        function(outputt="x")
    with pytest.raises(hlm.HlmError, match=f"{FUNCTIONS[step]}: missing required setting"):
        function()
