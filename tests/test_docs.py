"""The documentation: its code runs as it stands, its links and pictures are there, nothing public is missing."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import traced_once

import impact_optim

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
every_page = pytest.mark.parametrize("page", TEXTS)


def code_of(page):
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in TEXTS if code_of(page)])
def test_code_of_the_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with traced_once():
        for block in code_of(page):
            exec(compile(block, page, "exec"), namespace)
    for picture in tmp_path.glob("tutorial_*.png"):  # the page shows what it draws
        assert f"../images/{picture.name})" in TEXTS[page]
        assert (DOCS / "images" / picture.name).exists()


@every_page
def test_links_of_the_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(DOCS), str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:  # it needs no network
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', text), page


def test_every_public_name_is_in_the_reference():
    modules = ["", ".pruning", ".plots", ".integrations.lightning", ".integrations.transformers"]
    documented, current = set(), ""
    for line in TEXTS["docs/api.md"].splitlines():
        if found := re.match(r"\.\. currentmodule:: (\S+)", line):
            current = found[1]
        elif found := re.match(r"\.\. (?:auto\w+|py:data):: (\S+)", line):
            name = found[1] if "." in found[1] else f"{current}.{found[1]}"
            module, _, attribute = name.rpartition(".")
            documented.add(id(getattr(importlib.import_module(module), attribute)))
    for module in (importlib.import_module("impact_optim" + name) for name in modules):
        missing = [name for name in module.__all__ if id(getattr(module, name)) not in documented]
        assert not missing, module.__name__


def test_every_test_that_the_support_matrix_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXTS["docs/support.md"])
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
    for row in TEXTS["docs/support.md"].splitlines():
        if re.match(r"\|[^|]*\| *(works|refused)", row):
            assert "::test_" in row, row


def test_every_option_is_explained_to_those_who_come_from_elsewhere():
    for option in [*impact_optim.options.OPTIONS, "lr", "momentum", "betas", "weight_decay"]:
        assert f"`{option}`" in TEXTS["docs/coming_from.md"], option


def test_what_contributors_are_to_run_is_there():
    for name in re.findall(r"tests/(test_\w+\.py)", TEXTS["CONTRIBUTING.md"]):
        assert (ROOT / "tests" / name).exists(), name
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:`|^)make ([\w-]+)", TEXTS[page], re.MULTILINE)) <= set(targets)
    quick = re.search(r"^QUICK := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in quick[1].split())


def test_one_reads_the_readme_to_its_end():
    assert len(TEXTS["README.md"].split()) <= 1200


def test_the_figures_of_the_readme_are_those_of_the_pages():
    figures = re.findall(r"\d+\.\d+ ± \d+\.\d+", TEXTS["README.md"])
    assert len(figures) >= 6
    pages = "".join(TEXTS[f"docs/{name}.md"] for name in ("results", "tiny_sparse", "pruning"))
    assert all(figure in pages for figure in figures)


def test_the_version_is_the_same_everywhere():
    version = impact_optim.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in TEXTS["CHANGELOG.md"]
    assert (Path(impact_optim.__file__).parent / "py.typed").exists()
