"""A text in the colours of how little each token was expected, in a file: who points at a token
sees what else the model thought of.

    heat = Heat(tok, ids, scores)           # scores: of score.token_scores, with top=5
    write_heatmap('book.html', 'book.txt', lines, heat)

    ids, scores ──► Heat: of each token its characters, its shade, its numbers ──► HTML, nothing but itself
"""
import math

from mambino import files, standalone
from mambino.configurator import fail, shown
from mambino.sample.text import token_text

TOP = 5                 # likeliest tokens in the place of each
TOKENS = 100_000        # that a file shows; each takes about 100 bytes
SHADES = 8
DEEPEST = 8.0           # nats, from which on a token has the deepest shade
CSS = '''
#text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font-family: ui-monospace, monospace;
        margin-bottom: 40vh; }
#text span { border-radius: 3px; cursor: default; } #text .here { outline: 2px solid var(--ink); }
#text .end::before { content: '↵'; color: var(--pale); } #text .none { padding: 0 .25em; }
#text:focus { outline: none; }
#said { position: fixed; left: 0; right: 0; bottom: 0; padding: .5rem 1rem; background: var(--paper); max-height: 38vh;
        overflow: auto; border-top: 1px solid var(--line); font-size: .9rem; }
#said div { max-width: 68rem; margin: 0 auto; } #said td { padding-right: 1.2rem; font-variant-numeric: tabular-nums; }
#said code, #scale span { padding: 0 .3em; } #said code { white-space: pre; } #scale span { color: var(--ink); }
''' + ''.join(f'.n{n} {{ background: rgb(226 88 34 / {n / SHADES * 0.78:.2f}); }}\n' for n in range(1, SHADES + 1))
SCRIPT = '''
const heat = JSON.parse(document.querySelector('#numbers').textContent)
const text = document.querySelector('#text'), said = document.querySelector('#said div')
const element = (name, content) => Object.assign(document.createElement(name), { textContent: content })
const chance = logprob => {
  const percent = 100 * Math.exp(logprob)
  return percent >= 0.01 || !percent ? percent.toFixed(2) + '%' : percent.toExponential(1) + '%'
}
let here = 0
const show = place => {
  text.children[here].classList.remove('here')
  here = place
  text.children[here].classList.add('here')
  const [id, logprob, ...others] = heat.tokens[here]
  const line = element('p', 'token ' + (here + 1).toLocaleString('en') + ': ')
  line.style.margin = 0
  line.append(element('code', heat.names[id]), ' ' + (-logprob).toFixed(3) + ' nats, ' + chance(logprob))
  const table = element('table', '')
  for (let i = 0; i < others.length; i += 2) {
    const row = table.insertRow()
    row.append(element('td', ''), element('td', (-others[i + 1]).toFixed(3)), element('td', chance(others[i + 1])))
    row.cells[0].append(element('code', heat.names[others[i]]))
    if (others[i] === id) row.style.fontWeight = 'bold'
  }
  said.replaceChildren(line, table)
}
const place_of = target => [...text.children].indexOf(target)
text.addEventListener('pointerover', event => { if (event.target !== text) show(place_of(event.target)) })
text.addEventListener('focus', () => show(here))
text.addEventListener('keydown', event => {
  const last = text.children.length - 1
  const place = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last }[event.key]
  if (place === undefined) return
  event.preventDefault()
  show(Math.max(0, Math.min(last, place)))
  text.children[here].scrollIntoView({ block: 'nearest' })
})
'''


class Heat:
    """A text token by token. Only its first tokens are kept, of a long one."""

    def __init__(self, tok, ids, scores):
        self.tok = tok
        self.ids = ids
        self.scores = scores                # [(logprob, [(id, logprob), …]), …], of the first ids

    def characters(self):
        """Yields what each token adds to the text. Of a character of several tokens it is the last
        that has it; the others have nothing."""
        stream = self.tok.stream()
        for i in self.ids[:len(self.scores)]:
            yield stream.feed(i)

    def spans(self):
        """Yields the HTML of each token."""
        for characters, (logprob, _) in zip(self.characters(), self.scores):
            classes = [f'n{shade}'] if (shade := shade_of(-logprob)) else []
            if characters.startswith('\n'):
                classes.append('end')
            elif not characters:
                classes.append('none')
            marked = f' class="{" ".join(classes)}"' if classes else ''
            yield f'<span{marked}>{standalone.escaped(characters)}</span>'

    def numbers(self):
        """What the page's script knows: {'tokens': [[id, logprob, id, logprob, …], …], 'names':
        {id: text}}; the first logprob of each to the last bit of a float32."""
        tokens = []
        known = set()
        for i, (logprob, likeliest) in zip(self.ids, self.scores):
            known.update((i, *(other for other, _ in likeliest)))
            row = [i, rounded(logprob, 9)]
            for other, value in likeliest:
                row += [other, rounded(value, 5)]
            tokens.append(row)
        return dict(tokens=tokens, names={i: token_text(self.tok, i) for i in sorted(known)})


def shade_of(nats):
    """A number from 0, what was expected, to SHADES."""
    return min(SHADES, int(SHADES * max(nats, 0) / DEEPEST + 0.5))


def rounded(logprob, digits):
    """A number as JSON has it: no infinity."""
    return float(f'{max(logprob, -1e9):.{digits}g}') if not math.isnan(logprob) else -1e9


def write_heatmap(path, name, lines, heat):
    """Writes the file. name: of the text; lines: what --score says of it."""
    most = len(heat.scores)

    def body():
        yield f'<h1>{standalone.escaped(name)}</h1>\n<pre>{standalone.escaped(lines)}</pre>\n'
        if most < len(heat.ids):
            yield f'<p>Below are the first {most:,} of its {len(heat.ids):,} tokens; the figures are of all.</p>\n'
        steps = ''.join(f'<span class="n{n}">{DEEPEST * n / SHADES:g}</span>' for n in range(SHADES + 1))
        yield f'<p id="scale" class="pale">nats: {steps} and more. Point at a token, or use the arrow keys.</p>\n'
        yield '<div id="text" tabindex="0" role="application" aria-label="the text, token by token" '
        yield 'aria-describedby="said">'
        yield from heat.spans()
        yield '</div>\n<div id="said" role="status"><div></div></div>\n'
        yield f'<script type="application/json" id="numbers">{standalone.data(heat.numbers())}</script>\n'
    try:
        with files.whole(path) as f:
            for piece in standalone.page(f'{name}: token by token', body(), CSS, SCRIPT):
                f.write(piece.encode())
    except OSError as error:
        fail(f'html={path}: cannot be written: {error.strerror}')
    print(f'\nwritten: {shown(path)}')
