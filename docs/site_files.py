"""Files of the documentation site (mkdocs.yml).

Markdown, notebooks and images have the same paths as in the repository, so links between them hold on a Git host and on
the site. Pages of the Python interface are made from docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

SOURCES = (
    *("*.md", "*.cff", "shards/*.md", "slurm/*", "docs/*.md", "docs/*.ipynb", "docs/images/*", "docs/clusters/*"),
    "benchmarks/results/**/*",
)
"""Patterns of the pages and of what they link to, from the repository's root."""

INTERFACE = {
    "model": ("Trained models", "iwm.load", "iwm.export.model.PretrainedModel"),
    "configuration": (
        "Configuration",
        *("iwm.config", "iwm.model_config", "dali_pipelines.views", "dali_pipelines.augmentations"),
    ),
    "loaders": ("Loaders", "dali_pipelines.loader", "dali_pipelines.validation_loader"),
    "shards": ("Shards", "shards.format", "shards.make", "shards.verify"),
}
"""Pages api/NAME.md: the title, then what is documented."""


@event_priority(100)  # Before the plugins that convert files.
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs_dir by those of SOURCES and INTERFACE; keep those of the theme."""
    pages = Files([file for file in files if not (file.abs_src_path or "").startswith(config.docs_dir)])
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        pages.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    for name, (title, *objects) in INTERFACE.items():
        content = "\n\n".join([f"# {title}", *(f"::: {name}" for name in objects)])
        pages.append(File.generated(config, f"api/{name}.md", content=content))
    return pages


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a notebook, which is converted to HTML before links are, lead to the site's pages."""
    return re.sub(r'href="([\w-]+)\.md', r'href="\1.html', html) if page.file.src_uri.endswith(".ipynb") else html
