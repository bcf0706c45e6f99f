"""Which files of the library a script depends on."""

from pathlib import Path

from hlm.imports import sources

FILES = {
    "__init__": "if TYPE_CHECKING:\n    from hlm.serving.encoder import Encoder as Encoder\n",
    "ground": "x = 1\n",
    "serving/__init__": "",
    "serving/encoder": "import os\n\ndef load():\n    import hlm.serving.lazy\n",
    "serving/lazy": "from hlm import ground, __version__\nfrom hlm.serving import encoder\n",
    "training/__init__": "",
    "training/losses": "import torch\nfrom hlm.ground import x\n",
}


def names(tmp_path: Path, text: str) -> set[str]:
    for name, content in FILES.items():
        path = tmp_path / "hlm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    script = tmp_path / "script.py"
    script.write_text(text)
    found = sources(script, tmp_path / "hlm")
    assert found == sorted(found) and script in found
    return {path.relative_to(tmp_path / "hlm").with_suffix("").as_posix() for path in found if path != script}


def test_imports_are_followed_through_others(tmp_path):
    assert names(tmp_path, "import numpy, hlm.training.losses\n") == {
        "__init__",
        "training/__init__",
        "training/losses",
        "ground",
    }
    assert names(tmp_path, "from hlm.training import losses, nothing\n") >= {"training/losses", "ground"}


def test_lazy_imports_count_and_circles_end(tmp_path):
    serving = {"__init__", "serving/__init__", "serving/encoder", "serving/lazy", "ground"}
    assert names(tmp_path, "def main():\n    from hlm.serving.encoder import load\n") == serving


def test_a_public_name_leads_to_its_own_module(tmp_path):
    assert "training/losses" not in names(tmp_path, "from hlm import Encoder\n")
    assert "serving/lazy" in names(tmp_path, "from hlm import Encoder\n")


def test_what_is_not_the_librarys_does_not_count(tmp_path):
    assert names(tmp_path, "import json\nfrom torch import nn\n") == set()


def test_a_docstring_of_publishing_reruns_no_training():
    root = Path(__file__).resolve().parent.parent
    align = {path.stem for path in sources(root / "recipes/align.py", root / "hlm")}
    assert {"align", "losses", "gradcache", "store", "steps"} <= align
    assert not align & {"cards", "release", "demo", "runtime", "micro_batches", "cli"}
