"""Model cards: template.md, which conversion fills in."""
