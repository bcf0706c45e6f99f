"""A light install: what works without the extras, and which extra an error names."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hlm
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.extras import EXTRAS, OF_A_CLUSTER
from hlm.indexes.faiss_index import AdIndex
from hlm.serving.export import export_model

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMES_ALONG = {"fsspec": "huggingface_hub", "starlette": "gradio", "gradio_client": "gradio", "aiohttp": "fsspec"}
COMES_ALONG |= {"tqdm": "huggingface_hub", "httpx": "huggingface_hub"}
HIDDEN = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)})); "


def distributions(lines):
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_every_package_that_is_imported_is_a_dependency_or_has_its_extra():
    modules = set()
    for path in (ROOT / "hlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
    modules -= {*sys.stdlib_module_names, "hlm"}
    packages = metadata.packages_distributions()
    brought = {name: distributions(lines) for name, lines in PROJECT["optional-dependencies"].items()}
    for module in modules - set(COMES_ALONG):
        by = brought[EXTRAS[module]] if module in EXTRAS else distributions(PROJECT["dependencies"])
        assert {canonicalize_name(name) for name in packages.get(module, [module])} & by, module
    assert set(EXTRAS) <= modules | {"onnxscript", "gradio"}  # which torch and the demo import


def test_the_extra_of_all_has_every_package_that_an_error_may_name():
    extras, found = PROJECT["optional-dependencies"], set()
    waiting = ["all"]
    while waiting:
        found |= {name := waiting.pop()}
        waiting += [one for line in extras[name] for one in re.findall(r"\w+", line.partition("hlm[")[2])]
    assert {*EXTRAS.values(), "serve"} - OF_A_CLUSTER <= found


def test_what_hlm_offers_is_documented():
    for name in hlm.__all__:
        offered = getattr(hlm, name)
        assert offered.__doc__, name
        methods = vars(offered) if isinstance(offered, type) else {}
        for method, value in methods.items():
            assert method.startswith("_") or not callable(value) or value.__doc__, f"{name}.{method}"


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_bert):
    """A student that was exported, its vector of a query, one that was not, and an index."""
    folder = tmp_path_factory.mktemp("light")
    model = load_encoder(tiny_bert, device="cpu")
    teacher = fingerprint(model)
    save_encoder(model, folder / "student", "student", inputs={"teacher": teacher}, config={})
    shutil.copytree(folder / "student", folder / "online")
    export_model(load_encoder(str(folder / "online"), device="cpu"), folder / "online")
    vectors = encode(model, ["red shoe", "lamp"], prompt_name="query")
    np.save(folder / "vectors.npy", vectors)
    AdIndex.from_vectors(vectors, ["a1", "a2"], encoder=teacher).save(folder / "index")
    return folder


def light(house, code, *argv):
    """`code` where the packages of every extra are missing."""
    variables = os.environ | {"HLM_CACHE": str(house / "cache")}
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code, *argv],
        cwd=house,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_exported_student_encodes(house):
    code = (
        "import asyncio, hlm, numpy as np; expected = np.load('vectors.npy'); texts = ['red shoe', 'lamp']; "
        "encoder = hlm.QueryEncoder.from_pretrained('online', threads=1); assert encoder.teacher; "
        "np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)\n"
        "async def one():\n"
        "    async with hlm.AsyncQueryEncoder(encoder) as server:\n"
        "        return await server.encode('lamp')\n"
        "np.testing.assert_allclose(asyncio.run(one()), expected[1], atol=1e-5)"
    )
    done = light(house, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("from hlm import AdIndex", "faiss", "index"),
        ("hlm.align", "torch", "train"),
        ("hlm.QueryEncoder.from_pretrained('student')", "onnx_ir", "train"),
        ("hlm.QueryEncoder.from_pretrained('online', device='cuda')", "torch", "train"),
        ("hlm.QueryEncoder.from_pretrained('online', backend='openvino')", "openvino", "openvino"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(house, code, package, extra):
    done = light(house, f"import hlm\ntry: {code}\nexcept hlm.errors.HlmError as error: print(error)")
    assert f"expected the package '{package}' for " in done.stdout and done.stderr == "", done.stderr
    assert done.stdout.endswith(f"found none; pip install 'hlm[{extra}]'\n")


@pytest.mark.parametrize(
    ("argv", "extra"),
    [
        (["search", "red shoe", "--student", "online", "--index", "index"], "index"),
        (["verify", "online", "index"], "index"),
        (["card", "online"], "train"),
        (["align", "--help"], "train"),
        (["evaluate", "--help"], "eval"),
        (["prepare", "--help"], "logs"),
        (["plan", "--config", str(ROOT / "recipes/configs/qwen3-8b-190m")], "train"),
    ],
)
def test_a_command_names_the_extra(house, argv, extra):
    done = light(house, "from hlm.cli import main; sys.exit(main(sys.argv[1:]))", *argv)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.endswith(f"found none; pip install 'hlm[{extra}]'")


def test_another_missing_module_is_no_extra(house):
    done = light(house, "from hlm.extras import extras_named\nwith extras_named('x'): import no_such_module")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in done.stderr
