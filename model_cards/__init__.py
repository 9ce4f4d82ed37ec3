"""Model cards: template.md, which conversion fills in, a card per published checkpoint, and check.py to check them."""
