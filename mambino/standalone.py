"""An HTML file that needs nothing but itself: no network, no other file; in the light or dark of
its reader.

    with files.whole('out/report.html') as f:
        for piece in standalone.page('out', body=pieces, style=CSS, script=JAVASCRIPT):
            f.write(piece.encode())

What it shows of others, names and texts, must come through `escaped`. Beside that its own policy
allows neither a request nor any script but this one.
"""
import base64
import hashlib
import html
import json

from mambino.configurator import shown

STYLE = '''
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --pale: #68707a; --line: #dfe3e8; --accent: #1f6feb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14171b; --pale: #98a1ac; --line: #2e343c; --accent: #6cb2ff; }
}
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
table { border-collapse: collapse; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; font-weight: normal;
         overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.pale { color: var(--pale); }
'''


def escaped(text):
    """A text from outside as HTML shows it, letter by letter; control characters are named, but for
    ends of lines and tabs."""
    lines = str(text).split('\n')
    return '\n'.join(html.escape('\t'.join(map(shown, line.split('\t')))) for line in lines)


def data(value):
    """Plain values as an inline script reads them: no text in them ends it."""
    return json.dumps(value, separators=(',', ':')).replace('<', '\\u003c')


def page(title, body, style='', script=''):
    """Yields the text of the file. body: pieces of HTML; script: JavaScript that runs behind it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    yield f'''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<title>{escaped(title)}</title>
<style>{STYLE}{style}</style>
<body>
'''
    yield from body
    if script:
        yield f'<script>{script}</script>\n'
    yield '</body>\n</html>\n'
