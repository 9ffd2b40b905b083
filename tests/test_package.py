"""The wheel, installed in an empty folder, trains, evaluates, indexes and searches."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import small

pytestmark = pytest.mark.whole

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds the installed wheel and nothing else of this project."""
    where = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, where / "source", ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(where), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = where.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"tcq/configs/base.py", "tcq/index/page/page.js", "tcq/py.typed"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "configs", "build"))]
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tcq").rglob("*.py")} <= set(names)
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(where / "site"),
        str(wheel),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return where / "site"


def test_train_evaluate_index_and_search_with_the_installed_wheel(site, images, tmp_path):
    environment = small.environment() | {"PYTHONPATH": str(site)}

    def tcq(*arguments):
        command = [sys.executable, str(site / "bin" / "tcq"), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = small.flags("data.image_size=8", "train.total_steps=4", "eval.k=0")
    tcq("train", f"--config=folder.py:{images}", "--workdir=run", *flags)
    assert "random order" in tcq("evaluate", "--workdir=run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["mAP"]["asymmetric"] > 0
    tcq("index", "--workdir=run", f"--images={images}", "--out=index")
    answers = tcq("search", "--index=index", f"--query={images / 'class 3' / '003.png'}", "--k=3")
    assert len(answers.splitlines()) == 3
    assert os.path.isfile(answers.splitlines()[0].split("\t")[2])
