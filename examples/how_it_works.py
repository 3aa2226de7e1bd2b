"""Draws the picture of the README: what a query attends to, and where the history lies.

    python examples/how_it_works.py [OUT.svg]

Writes examples/how_it_works.svg, or OUT.svg.
"""

import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BAR = 860, 330, 30, 12
GREY, BLUE, ORANGE, INK = "#d9d9d9", "#9ecae1", "#fd8d3c", "#333333"
CHUNKS, SINKS, LOCAL, PAGES = 16, 2, 3, 4
OPENED = {(4, 1), (7, 3), (8, 0), (10, 2)}


def text(x, y, words, size=13, anchor="start", weight="normal"):
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}">{words}</text>'


def title(y, words):
    return text(LEFT, y, words, weight="bold")


def box(x, y, width, height, fill, stroke="white"):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}"/>'


def arrow(x1, y1, x2, y2):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.2" marker-end="url(#head)"/>'


def picture():
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        f'<path d="M0,0 L7,3 L0,6 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    page = BAR
    chunk = PAGES * page + 2
    end = LEFT + CHUNKS * chunk

    parts.append(
        text(LEFT, 24, "1  Every closed chunk of 64 tokens leaves a summary; the query is scored against all of them", weight="bold")
    )
    for c in range(CHUNKS - 1):
        parts.append(box(LEFT + c * chunk, 36, chunk - 2, 14, BLUE))
    parts.append(text(LEFT, 68, "38 bytes a token and kv head: the chunk's mean key, and each key's residual in 2 bits a coordinate", 12))

    parts.append(
        text(LEFT, 112, "2  Pages of 16 tokens whose estimated share of the attention reaches a threshold are opened", weight="bold")
    )
    for c in range(CHUNKS):
        window = c < SINKS or c >= CHUNKS - 1 - LOCAL
        for p in range(PAGES):
            x = LEFT + c * chunk + p * page
            opened = (c, p) in OPENED
            parts.append(box(x, 124, page, 26, ORANGE if opened else BLUE if window else GREY))
    query = end - page
    parts.append(f'<rect x="{query}" y="120" width="{page - 2}" height="34" fill="none" stroke="{INK}" stroke-width="1.6"/>')
    parts.append(text(query - 2, 172, "query", 12, "middle"))
    local = CHUNKS - 1 - LOCAL
    for first, last, name in ((0, SINKS, "sinks"), (SINKS, local, "routed middle"), (local, CHUNKS - 1, "local window")):
        parts.append(text(LEFT + (first + last) / 2 * chunk, 172, name, 12, "middle"))

    parts.append(title(216, "3  Exact attention runs over the windows and the opened pages, and over nothing else"))
    x = LEFT
    for group, fill in ((SINKS * PAGES, BLUE), (len(OPENED), ORANGE), ((LOCAL + 1) * PAGES, BLUE)):
        for _ in range(group):
            parts.append(box(x, 228, page, 26, fill))
            x += page
        x += 8
    parts.append(arrow(x + 4, 241, x + 44, 241))
    parts.append(text(x + 54, 246, "softmax over the real keys and values"))

    parts.append(title(294, "Where things are"))
    for x, width, fill, name in (
        (LEFT + 130, 200, BLUE, "GPU: summaries, windows"),
        (LEFT + 345, 250, ORANGE, "fetched over PCIe: opened pages"),
        (LEFT + 610, 190, GREY, "host RAM: all the rest"),
    ):
        parts.append(box(x, 277, width, 26, fill))
        parts.append(text(x + width / 2, 295, name, 12, "middle"))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    out.write_text(picture())
