"""Check that model cards state no number without a source.

    python -m model_cards.check [CARD.md …]    # default: every card in this folder

A paragraph, list item or table row with a number needs a link, or the next paragraph must begin with "Source: ". Code,
headings and metadata are not checked.
"""

import re
import sys
from pathlib import Path


NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*")  # float32 and v2 are names
LINK = re.compile(r"\[[^\]]*\]\([^)]*\)")


def unsourced(card: str) -> list[str]:
    """Return the statements of a card that have a number without a source, each as one line."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    found = []
    for block, following in zip(blocks, [*blocks, ""][1:], strict=True):
        if following.startswith("Source: ") or block.startswith("Source: "):
            continue
        for statement in re.split(r"\n(?=- |\|)", block):
            plain = re.sub(r"`[^`]*`|^#.*$", "", statement, flags=re.MULTILINE)
            if NUMBER.search(plain) and not LINK.search(plain):
                found.append(" ".join(statement.split()))
    return found


def main(paths: list[str]) -> int:
    cards = [Path(path) for path in paths] or sorted(Path(__file__).parent.glob("*.md"))
    problems = [
        f"{path}: a number without a source: {block}"
        for path in cards
        if path.name != "template.md"
        for block in unsourced(path.read_text(encoding="utf-8"))
    ]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
