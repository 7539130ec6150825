"""The site's files: what the repository shows of itself at the same relative paths, and an API page for each package.

A source file is shown as a page of its own, a folder that something links to as the list of what is in it.
"""

import ast
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SHOWN = (
    "*.md",
    "docs/*.md",
    "docs/site.css",
    "docs/demo/**/*",
    "examples/*",
    "benchmarks/results/**/*",
    "wgan_fast/reference.py",
)
FOLDERS = ("examples", "benchmarks/results/forms")
PACKAGES = ("wgan_fast", "wgan_fast.training", "wgan_fast.tables")
LINK = re.compile(r"\]\(([^)#:\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by those of the repository."""
    site = [file for file in files if file.src_dir != config.docs_dir]  # the theme's
    for path in sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in SOURCES:
            site.append(File.generated(config, f"{name}.md", content=SOURCES[path.suffix](path)))
        else:
            site.append(File.generated(config, name, abs_src_path=str(path)))
    pages = {f"{folder}/index.md": contents(ROOT / folder) for folder in FOLDERS}
    pages |= {f"api/{package}.md": api(package) for package in PACKAGES}
    return Files([*site, *(File.generated(config, name, content=page) for name, page in pages.items())])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to sources and folders at the pages that show them."""
    folder = (ROOT / page.file.src_uri).parent

    def pointed(link: re.Match[str]) -> str:
        target = folder / link[1]
        if target.is_dir():
            return f"]({link[1].rstrip('/')}/index.md)"
        return f"]({link[1]}.md)" if target.suffix in SOURCES else link[0]

    return LINK.sub(pointed, markdown)


def code(path: Path) -> str:
    """Show a Python file."""
    return f"# {path.name}\n\n```python\n{path.read_text()}```"


def notebook(path: Path) -> str:
    """Show a notebook: its words, its code, and the text and pictures that came out."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{data['image/png'].strip()})")
            else:
                text = "".join(output.get("text", data.get("text/plain", ())))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


SOURCES = {".py": code, ".ipynb": notebook}


def contents(folder: Path) -> str:
    """List a folder's files, with what each Python file says of itself."""
    lines = [f"# {folder.name}", ""]
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        said = ast.get_docstring(ast.parse(path.read_text())) if path.suffix == ".py" else None
        lines.append(f"- [{path.name}]({path.name})" + (f": {said.splitlines()[0]}" if said else ""))
    return "\n".join(lines)


def api(package: str) -> str:
    """Ask for the docstrings of a package's public names, which its __init__.py imports for type checkers."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    lines = [f"# {package}", "", str(ast.get_docstring(tree)), ""]
    for node in sorted(imports, key=lambda node: node.module is None):  # whole modules last
        home = f"{package}.{node.module}" if node.module else package
        for name in node.names:
            lines += [f"::: {home}.{name.name}", ""]
    return "\n".join(lines)
