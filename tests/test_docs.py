"""The docs agree with the code, with each other, and with the rules of CONTRIBUTING.md about lines and sentences."""

import doctest
import importlib
import importlib.util
import re
import shlex

import jax
import pytest
import yaml

import small
import tcq

GENERATED = ("api.md", "commands.md")
PAGES = sorted(p for p in small.ROOT.rglob("*.md") if not {".venv", "runs"} & set(p.parts))
PAGES = [p for p in PAGES if not any(part.startswith(".") for part in p.relative_to(small.ROOT).parts)]
FOLDERS = ("tcq", "configs", "tests", "benchmarks", "docs", "launch", "colab")


def prose(text):
    """The paragraphs and list items of a page, without code, tables, headings and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "    ", "![", "[!["))]
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n|\n\s*[-*] ", "\n".join(lines)) if p.strip()]


def generator():
    spec = importlib.util.spec_from_file_location("generate", small.ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_up_to_date(name):
    assert generator().PAGES[name]() == (small.ROOT / "docs" / name).read_text(), "run `make docs`"


def test_the_address_of_the_repository_stands_in_one_place():
    module = generator()
    for name in module.ADDRESSED:
        text = (small.ROOT / name).read_text()
        assert module.addressed(text) == text, "run `make docs`"
        assert module.addressed(text.replace("OWNER/tcq", "some-one/other")) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(small.ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in GENERATED], ids=lambda p: p.name)
def test_lines_and_sentences_are_short(page):
    text = page.read_text()
    for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        if not line.startswith(("|", "    ", "![", "[![")):
            assert len(line) < 100, line
    for paragraph in prose(text):
        plain = re.sub(r"`[^`]*`", "x", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph))
        for sentence in re.split(r"(?<=[.!?:;])\s+", plain):
            assert len(sentence.split()) <= 25, sentence


def test_the_readme_is_short():
    assert len((small.ROOT / "README.md").read_text().splitlines()) < 180


def test_files_that_pages_name_exist():
    names = {path.name for folder in FOLDERS for path in (small.ROOT / folder).rglob("*.*")}
    names |= {path.name for path in small.ROOT.glob("*.*")}
    for page in PAGES:
        for name in re.findall(r"`([\w/]+\.(?:py|md|sh|ipynb|cfg|txt|json))\b", page.read_text()):
            own = name.startswith(tuple(f"{folder}/" for folder in FOLDERS))
            written = {"results.json", "config.json", "data.json", "preprocessor_config.json", "mine.py", "meta.json"}
            known = (small.ROOT / name).exists() if own else name.rpartition("/")[2] in names | written
            assert known, f"{page.name}: {name}"


def test_commands_in_pages_parse():
    """Every `tcq ...` line of a code block has known commands and flags."""
    from tcq import cli

    parser, seen = cli.make_parser(), set()
    for page in PAGES:
        blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE)
        for line in re.sub(r"\\\n", " ", "".join(blocks)).splitlines():
            try:
                words = shlex.split(line.partition(" | ")[0], comments=True)
            except ValueError:  # no command
                continue
            if words[:1] == ["tcq"] and "..." not in words and "=..." not in line:
                _, overrides = parser.parse_known_args(words[1:])
                assert all(o.startswith("--config.") or "=" in o for o in overrides), line
                seen.add(words[1])
    assert {"train", "evaluate", "index", "search", "serve", "sweep", "prepare", "doctor"} <= seen


def test_python_in_the_readme_is_the_api():
    for module, name in re.findall(r"\b(losses|index|encode|metrics|ranking|quantizer)\.(\w+)\(", readme()):
        assert hasattr(getattr(tcq, module), name), name


def readme():
    return (small.ROOT / "README.md").read_text()


def test_examples_in_docstrings_work():
    attempted = 0
    with jax.numpy_rank_promotion("allow"):
        for name in tcq.PUBLIC:
            result = doctest.testmod(importlib.import_module(f"tcq.{name}"), verbose=False)
            assert result.failed == 0
            attempted += result.attempted
    assert attempted >= 4


def test_the_citation_has_what_it_needs():
    citation = yaml.safe_load((small.ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tcq.__version__ and citation["license"] == "Apache-2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2401.15362"
