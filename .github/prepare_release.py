"""Prepare a checkout for a release: check its tag, and write the repository's address into what PyPI shows.

    python .github/prepare_release.py v0.1.0 https://github.com/OWNER/NAME

The tag must name the version of the package, and CHANGELOG.md must have its section. pyproject.toml gets the addresses
of the project. Links of README.md that lead into the repository become absolute, as PyPI shows that file alone.
"""

import re
import sys
from pathlib import Path


def prepare(root: Path, tag: str, url: str) -> None:
    """Check and change the checkout in `root`. Raises SystemExit if the tag and the files disagree."""
    version = re.search(r'^__version__ = "(.+)"$', (root / "wavtokenizer_hf/__init__.py").read_text(), re.MULTILINE)[1]
    if tag != f"v{version}":
        raise SystemExit(
            f"Got the tag {tag}, expected v{version}: wavtokenizer_hf/__init__.py has the version {version}."
        )
    if not re.search(
        rf"^## {re.escape(version)}\b", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        raise SystemExit(f'CHANGELOG.md has no section "## {version}". Rename "## Unreleased".')
    addresses = {
        "Homepage": url,
        "Repository": url,
        "Documentation": f"{url}/blob/{tag}/docs/index.md",
        "Issues": f"{url}/issues",
        "Changelog": f"{url}/blob/{tag}/CHANGELOG.md",
    }
    lines = "".join(f'{name} = "{address}"\n' for name, address in addresses.items())
    _replace(root / "pyproject.toml", r"^\[project\.urls\]\n", lambda match: match[0] + lines)
    link = r"(!?)(\[[^\]]*\])\((?!https?://|#)([^)\s]+)\)"
    _replace(root / "README.md", link, lambda m: f"{m[1]}{m[2]}({url}/{'raw' if m[1] else 'blob'}/{tag}/{m[3]})")


def _replace(path: Path, pattern: str, replacement) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count, f"{path} has nothing like {pattern}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    prepare(Path(__file__).parent.parent, *sys.argv[1:])
