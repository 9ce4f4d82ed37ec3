"""Original WavTokenizer checkpoints to folders that Hugging Face loads. See convert.py."""
