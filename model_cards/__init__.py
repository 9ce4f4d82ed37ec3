"""
Model cards: template.md, which conversion fills in, one card for each published checkpoint, and check.py, which reads
them.
"""
