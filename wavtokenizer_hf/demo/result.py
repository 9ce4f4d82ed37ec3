"""Render a result as HTML: players, spectrograms and tokens with one cursor."""

import base64
import html
import io

import numpy as np

from ..plots import spectrogram_png
from .codec import Result


STYLE = """
.wt-result { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.wt-result h3, .wt-result p { margin: 0 0 .3rem; }
.wt-result audio { width: 100%; height: 2.5rem; }
.wt-wide { grid-column: 1 / -1; }
.wt-picture { position: relative; cursor: crosshair; }
.wt-picture img { width: 100%; height: 10rem; display: block; border-radius: 6px; }
.wt-line { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #fff; }
.wt-tokens { position: relative; max-height: 9rem; overflow-y: auto; overflow-wrap: anywhere; cursor: pointer;
  font: 12px/1.7 ui-monospace, monospace; border: 1px solid #8884; border-radius: 6px; padding: .4rem; }
.wt-tokens span { padding: 0 .2rem; border-radius: 3px; }
.wt-tokens .wt-now { background: #e8590c; color: #fff; }
.wt-facts { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin: 0; }
.wt-facts div { display: flex; gap: .4rem; }
.wt-facts dt { opacity: .7; }
.wt-facts dd { margin: 0; font-weight: 600; }
.wt-message { border-left: 4px solid #e03131; padding: .4rem .8rem; margin: 0; }
.wt-note { border-left: 4px solid #f08c00; padding: .4rem .8rem; margin: 0; }
"""

# Media events do not bubble, so the listeners use the capture phase. One listener of each serves all results.
SCRIPT = """
() => {
  if (window.wavtokenizer) return;
  window.wavtokenizer = true;
  const show = (player) => {
    const result = player.closest('.wt-result');
    if (!result) return;
    const seconds = Number(result.dataset.seconds), rate = Number(result.dataset.rate);
    for (const line of result.querySelectorAll('.wt-line'))
      line.style.left = 100 * Math.min(1, player.currentTime / seconds) + '%';
    const tokens = result.querySelector('.wt-tokens');
    const now = tokens.children[Math.min(Math.floor(player.currentTime * rate), tokens.children.length - 1)];
    const previous = tokens.querySelector('.wt-now');
    if (now === previous) return;
    if (previous) previous.classList.remove('wt-now');
    now.classList.add('wt-now');
    tokens.scrollTop = now.offsetTop - tokens.clientHeight / 2;
  };
  const follow = (player) => {
    show(player);
    if (!player.paused) requestAnimationFrame(() => follow(player));
  };
  document.addEventListener('play', (event) => {
    for (const other of document.querySelectorAll('.wt-result audio')) if (other !== event.target) other.pause();
    follow(event.target);
  }, true);
  document.addEventListener('seeked', (event) => show(event.target), true);
  document.addEventListener('click', (event) => {
    const result = event.target.closest('.wt-result');
    const picture = event.target.closest('.wt-picture'), token = event.target.closest('.wt-tokens span');
    if (!result || !(picture || token)) return;
    const players = [...result.querySelectorAll('audio')];
    const player = players.find((one) => !one.paused) || players[players.length - 1];
    if (token) player.currentTime = [...token.parentNode.children].indexOf(token) / Number(result.dataset.rate);
    else {
      const box = picture.getBoundingClientRect();
      player.currentTime = Number(result.dataset.seconds) * (event.clientX - box.left) / box.width;
    }
  });
  const hint = document.getElementById('wt-record-hint');
  if (hint && !(navigator.mediaDevices && navigator.mediaDevices.getUserMedia))
    hint.textContent = 'The browser cannot record here. Open the page on localhost or over https. Uploads work.';
}
"""


def render(result: Result, name: str) -> str:
    """Return the HTML of a result. The token file to download is called `name`.tokens.json."""
    rate = result.tokens.sampling_rate / result.tokens.hop_length
    seconds = result.tokens.num_samples / result.tokens.sampling_rate
    clips = [("original", result.original), ("reconstruction", result.reconstruction)]
    parts = [_player(title, clip, result.tokens.sampling_rate) for title, clip in clips if clip is not None]
    facts = "".join(
        f"<div><dt>{html.escape(fact)}</dt><dd>{html.escape(value)}</dd></div>" for fact, value in result.facts.items()
    )
    notes = "".join(f'<p class="wt-note">{html.escape(warning)}</p>' for warning in result.warnings)
    tokens = "".join(f"<span>{code}</span> " for code in result.tokens.audio_codes.tolist())
    json = base64.b64encode(result.tokens.to_bytes("json")).decode()
    file = html.escape(f"{name}.tokens.json", quote=True)
    return (
        f'<div class="wt-result" data-seconds="{seconds}" data-rate="{rate}">'
        f'<div class="wt-wide"><dl class="wt-facts">{facts}</dl>{notes}</div>{"".join(parts)}'
        f'<div class="wt-wide"><h3>tokens</h3><div class="wt-tokens">{tokens}</div>'
        f'<p><a download="{file}" href="data:application/json;base64,{json}">Download {file}</a></p></div></div>'
    )


def message(text: str) -> str:
    """Return the HTML of an error message, or an empty string for an empty text."""
    return f'<p class="wt-message" role="alert">{html.escape(text)}</p>' if text else ""


def _player(title: str, clip: np.ndarray, sampling_rate: int) -> str:
    """Return the HTML of one player, with a spectrogram below it."""
    picture = base64.b64encode(spectrogram_png(clip)).decode()
    wav = base64.b64encode(wav_bytes(clip, sampling_rate)).decode()
    return (
        f'<div><h3>{title}</h3><audio controls class="wt-{title}" src="data:audio/wav;base64,{wav}"></audio>'
        f'<div class="wt-picture"><img alt="Spectrogram of the {title}, 0 to {sampling_rate / 2000:g} kHz" '
        f'src="data:image/png;base64,{picture}"><div class="wt-line"></div></div></div>'
    )


def wav_bytes(clip: np.ndarray, sampling_rate: int) -> bytes:
    """Return a WAV file of 16-bit samples. `clip`: float (T,), clipped to [-1, 1]."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(clip, -1, 1), sampling_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()
