"""
Pages that MkDocs makes of other files: the command-line reference, the benchmarks and pictures of the repository.
"""

import argparse
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
PAGES = {"benchmarks/README.md": "benchmarks.md"}  # files of the repository that become pages
PICTURES = ("examples/speech.png",)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")  # a link or picture, upwards


def on_files(files, config):
    """Add the pages and pictures that lie elsewhere in the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in PICTURES:
        files.append(File.generated(config, f"images/{source}", abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Insert what is generated, and point links that leave docs/ to pages of the site."""
    for marker, text in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, text())
    return LINK.sub(lambda match: _link(match, posixpath.dirname(page.file.src_uri), config.repo_url), markdown)


def _link(match: re.Match, folder: str, repository: str | None) -> str:
    """Return a link of a page in `folder` with a target that the site has."""
    mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
    path = posixpath.normpath(posixpath.join("docs", folder, target))  # below the root of the repository
    if path.startswith("docs/"):
        return match[0]
    up = "../" * (folder.count("/") + 1) if folder else ""
    if mark:
        return f"![{text}]({up}images/{path})"
    if path in PAGES:
        return f"[{text}]({up}{PAGES[path]}{anchor})"
    # the site has no such page: link to the repository if its address is known
    return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor})" if repository else text


def command_line_reference() -> str:
    """Return Markdown with the help text of every command, as `wavtokenizer COMMAND --help` prints it."""
    from wavtokenizer_hf.cli import _parser

    (subparsers,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    sections = []
    for name, command in subparsers.choices.items():
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100)
        sections.append(f"### wavtokenizer {name}\n\n```text\n{command.format_help().rstrip()}\n```\n")
    return "\n".join(sections)


def published_checkpoints() -> str:
    """Return a Markdown table of the published checkpoints."""
    from wavtokenizer_hf.conversion.published import table

    rows = ["| name | codes/s | trained on | corpus | on the Hub |", "|---|---|---|---|---|"]
    for published in table().values():
        where = f"`{published.repository}`" if published.repository else "no longer"
        rows.append(
            f"| `{published.name}` | {published.frame_rate} | {published.domain} | {published.corpus} | {where} |"
        )
    return "\n".join(rows)


MARKERS = {
    "<!-- command-line reference -->": command_line_reference,
    "<!-- published checkpoints -->": published_checkpoints,
}
