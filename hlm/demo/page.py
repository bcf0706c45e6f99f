"""The demo's HTML. Ads and queries come from strangers: every text passes `shown`."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import Any

from hlm.artefacts import HlmError
from hlm.data.spelling import WORD, singular, words_of
from hlm.demo.comparison import DEPTH, Comparison, Hit, Side, clean

MAX_SHOWN = {"title": 120, "text": 240, "brand": 40, "price": 24, "url": 80}  # characters


def shown(text: str, limit: int, words: Sequence[str] = ()) -> str:
    """`text` for a page: cut, escaped, of its own reading direction, `words` (in the singular) marked."""
    text = unicodedata.normalize("NFC", clean(text))
    if len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    parts, end = [], 0
    for match in WORD.finditer(text):
        if words and any(singular(word) in words for word in words_of(match[0])):
            parts += [html.escape(text[end : match.start()]), f"<mark>{html.escape(match[0])}</mark>"]
            end = match.end()
    return f"<bdi>{''.join(parts)}{html.escape(text[end:])}</bdi>"


def results(found: Comparison) -> str:
    """Agreement and cost, then the two lists of ads."""
    said = f'<p class="hlm-note" role="status">{shown(found["message"], 400)}</p>' if found["message"] else ""
    if found["student"] is None:
        return f'<div class="hlm">{said}</div>'
    k = found["k"]
    # The student first, as it is what the page is about: on a phone one column stands below the other.
    columns = _column("Student", "teacher", found["student"], k) + _column("Teacher", "student", found["teacher"], k)
    asked = html.escape(found["query"])  # lets a script tell this answer from the one before
    return (
        f'<div class="hlm" data-query="{asked}">{said}{_figures(found)}<div class="hlm-columns">{columns}</div></div>'
    )


def notice(synthetic: bool) -> str:
    """What a visitor must know before reading an ad; nothing of a catalogue that no generator made."""
    if not synthetic:
        return ""
    said = "The ads are synthetic: a generator made the products, brands, prices and judgements. Nothing here is sold."
    return f'<div class="hlm"><p class="hlm-note">{said}</p></div>'


def failure(error: Exception) -> str:
    """What went wrong and what to do, without a stack trace."""
    told = str(error) if isinstance(error, HlmError) else f"{type(error).__name__}; the log of the app has the details"
    return f'<div class="hlm"><p class="hlm-error" role="alert"><b>This did not work.</b> {shown(told, 1200)}</p></div>'


def table(facts: Sequence[tuple[str, str]]) -> str:
    """Facts as a table of two columns."""
    rows = "".join(
        f'<tr><th scope="row">{shown(name, 80)}</th><td>{shown(value, 300)}</td></tr>' for name, value in facts
    )
    return f'<div class="hlm"><table class="hlm-facts">{rows}</table></div>'


def _figures(found: Comparison) -> str:
    tiles = []
    if found["overlap"] is not None and found["student"] is not None:
        of = len(found["student"]["hits"])
        tiles.append((f"{found['overlap']} of {of}", f"ads found by both (overlap@{found['k']})"))
    if found["ratio"] is not None:
        tiles.append((f"{found['ratio']['total']:.1f}×", "the teacher's time over the student's, for this query"))
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    return f'<div class="hlm-figures" role="status">{cells}</div>' if tiles else ""


def _column(name: str, other: str, side: Side | None, k: int) -> str:
    if side is None:
        return f'<section aria-label="{name}"><h2>{name}</h2><p>No stored vector for this query.</p></section>'
    encoded = "vector read, not timed" if side["encode_ms"] is None else f"encode {side['encode_ms']:.1f} ms"
    took = f"{encoded} · search {side['search_ms']:.1f} ms"
    if side["total_ms"] is not None:
        took += f" · <b>total {side['total_ms']:.1f} ms</b>"
    cards = "".join(_card(hit, other, k) for hit in side["hits"])
    return f'<section aria-label="{name}"><h2>{name}</h2><p class="hlm-took">{took}</p><ol>{cards}</ol></section>'


def _card(hit: Hit, other: str, k: int) -> str:
    texts: dict[str, Any] = {**hit}
    fields = {name: shown(texts[name], limit, hit["matched"]) for name, limit in MAX_SHOWN.items() if texts[name]}
    about = [fields[name] for name in ("brand", "price") if name in fields] + [f"score {hit['score']:.3f}"]
    if hit["matched"]:
        about.append(f"matches {shown(', '.join(hit['matched']), 80)}")
    url = f'<span class="hlm-url">{fields["url"]}</span>' if "url" in fields else ""
    text = f"<p>{fields['text']}</p>" if "text" in fields else ""
    return (
        f'<li><div class="hlm-top"><span class="hlm-ad">Ad</span>{url}{_change(hit, other, k)}</div>'
        f'<h3><span class="hlm-rank">{hit["rank"]}.</span> {fields.get("title") or shown(hit["id"], 80)}</h3>{text}'
        f'<p class="hlm-about">{" · ".join(about)}</p></li>'
    )


def _change(hit: Hit, other: str, k: int) -> str:
    rank = hit["other_rank"]
    if rank is None:
        return f'<span class="hlm-change hlm-out">not in the {other}’s {DEPTH}</span>'
    if rank == hit["rank"]:
        return f'<span class="hlm-change hlm-in">= same place with the {other}</span>'
    arrow = "▲" if rank > hit["rank"] else "▼"
    kind = "hlm-in" if rank <= k else "hlm-out"
    return f'<span class="hlm-change {kind}">{arrow}{abs(rank - hit["rank"])} · {other}’s no. {rank}</span>'


CSS = """
.hlm { font-size: 15px; line-height: 1.45; color: var(--body-text-color); }
.hlm-figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 4px 0 16px; }
.hlm-figures div { flex: 1 1 160px; padding: 12px 16px; border-radius: 10px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.hlm-figures b { display: block; font-size: 26px; line-height: 1.2; }
.hlm-figures span { color: var(--body-text-color); opacity: .85; }
.hlm-columns { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.hlm section { min-width: 0; }
.hlm h2 { font-size: 19px; font-weight: 650; margin: 0; color: inherit; }
.hlm-took { margin: 0 0 10px; }
.hlm ol { list-style: none; margin: 0; padding: 0; }
.hlm li { padding: 10px 14px 12px; margin: 0 0 10px; border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--background-fill-primary); overflow: hidden; overflow-wrap: anywhere; }
.hlm-top { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; font-size: 13px; }
.hlm-ad { font-weight: 700; }
.hlm-url { min-width: 0; }
.hlm-change { margin-left: auto; padding: 0 8px; border-radius: 999px; }
.hlm-in { background: #d9f2e1; color: #0b4a24; }
.hlm-out { background: #f6e7c8; color: #5a3b00; }
.dark .hlm-in { background: #123d24; color: #c5f0d5; }
.dark .hlm-out { background: #48350c; color: #f7e3b5; }
.hlm li h3, .hlm li h3 * { font-size: 16px; font-weight: 600; line-height: 1.3; color: var(--link-text-color); }
.hlm li h3 { margin: 2px 0; }
.hlm li p { display: block; margin: 2px 0; }
.hlm li .hlm-about { font-size: 13px; margin-top: 6px; }
.hlm mark { background: transparent; color: inherit; font-weight: 700; text-decoration: underline;
  text-underline-offset: 3px; text-decoration-thickness: 1px; }
.hlm-note, .hlm-error { padding: 10px 14px; border-radius: 10px; margin: 0 0 12px; overflow-wrap: anywhere; }
.hlm-note { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.hlm-error { background: #fbe3e1; color: #6b120b; }
.dark .hlm-error { background: #4a1713; color: #ffd9d5; }
.hlm-facts { border-collapse: collapse; width: 100%; }
.hlm .hlm-facts, .hlm .hlm-facts * { border: 0; }
.hlm .hlm-facts th, .hlm .hlm-facts td { text-align: left; vertical-align: top; padding: 8px 16px 8px 0;
  overflow-wrap: anywhere; border-bottom: 1px solid var(--border-color-primary); }
.hlm-facts th { font-weight: 600; width: 32%; }
.html-container:has(.hlm) { padding: 0 !important; }
/* Gradio's own greys and blue have too little contrast for small text. */
footer, footer *, button[role="tab"][aria-selected="true"] { color: var(--body-text-color) !important; }
@media (max-width: 640px) {
  .hlm-columns { grid-template-columns: 1fr; }
  .hlm .hlm-facts th, .hlm .hlm-facts td { display: block; width: auto; padding-right: 0; }
  .hlm .hlm-facts th { border-bottom: 0; padding-bottom: 0; }
  .hlm .hlm-facts td { padding-top: 0; }
}
"""
