"""Run the page of `wavtokenizer demo` as a Hugging Face Space."""

from wavtokenizer_hf.demo import build_page, launch


page = build_page(models=["bundled", "small-speech-75", "small-speech-40"], max_seconds=30)

if __name__ == "__main__":
    launch(page, host="0.0.0.0", port=7860)
