"""Original WavTokenizer checkpoints, published or not, to folders that Hugging Face loads, and back. See convert.py."""
