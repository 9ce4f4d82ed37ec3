"""Take the screenshot of the page in the documentation: python tests/screenshot_page.py [docs/images/page.png]

This needs the extra `demo`, chromedriver and Chromium. It uses the bundled model and the clip examples/speech.flac.
"""

import sys
import tempfile
from pathlib import Path

from browser import Browser

from wavtokenizer_hf.demo import build_page, launch


ROOT = Path(__file__).parent.parent


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images" / "page.png"
    address = launch(build_page(), block=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(Path(profile))
        try:
            browser.resize(1000, 1480)
            browser.open(address)
            browser.wait("document.querySelector('#wt-clip input[type=file]') && document.querySelector('#wt-encode')")
            browser.upload("#wt-clip input[type=file]", ROOT / "examples" / "speech.flac")
            browser.wait("document.querySelector('#wt-clip .waveform-container, #wt-clip [data-testid^=waveform]')")
            browser.click("#wt-encode")
            browser.wait("document.querySelector('#wt-result .wt-tokens')", seconds=120)
            player = "document.querySelector('#wt-result audio.wt-reconstruction')"
            browser.evaluate(f"{player}.currentTime = 2.5")
            browser.wait("document.querySelector('#wt-result .wt-now')")
            browser.evaluate("window.scrollTo(0, 0)")
            browser.settle()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(browser.screenshot())
        finally:
            browser.close()
    print(target)


if __name__ == "__main__":
    main()
