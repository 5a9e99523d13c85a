"""sample.py --score --html: a text token by token, in one file."""
import numpy as np
import pytest
from helpers.pages import Page
from helpers.runs import refused
from helpers.sampling import open_run

from mambino.sample import score
from mambino.sample.heatmap import SHADES, shade_of
from mambino.weights.loading import prepare_model

EVIL = '</script><img src=x onerror=alert(1)>&amp;<b>'


class Map(Page):
    """Also what stands in each token's span."""

    def __init__(self, path):
        self.spans = []
        self.inside = False
        super().__init__(path)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if dict(attributes).get('id') == 'text':
            self.inside = True
        elif tag == 'span' and self.inside:
            self.spans.append('')

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != 'div'

    def handle_data(self, data):
        super().handle_data(data)
        if self.inside and self.spans:
            self.spans[-1] += data


@pytest.fixture
def text(runs):
    """A text of the vocabulary; and with what is HTML, for the tokenizer that knows all characters."""
    with open('text.txt', encoding='utf-8') as f:
        text = f.read()[:900] + '\n\n é€😀'
    for name, more in (('char', ''), ('bpe', EVIL + '日\x1b\n')):
        with open(f'{name}.txt', 'w', encoding='utf-8', newline='') as f:
            f.write(text + more)


def test_every_token_with_what_was_thought_of(kind, run, text):
    out = run(kind, f'--score={kind}.txt --html=map.html --dtype=float32')
    page = Map('map.html')
    with open(f'{kind}.txt', encoding='utf-8', newline='') as f:
        want = f.read()
    net, tok = open_run(kind)
    ids = tok.encode(want).tolist()
    assert ''.join(page.spans) == want.replace('\x1b', '\\x1b') and len(page.spans) == len(ids)
    numbers, = page.data
    assert [row[0] for row in numbers['tokens']] == ids and all(len(row) == 2 + 2 * 5 for row in numbers['tokens'])
    net, _ = prepare_model(net, 'cpu', 'float32')       # as sample.py reads it
    # the very sum that --score prints
    assert score.total_nats(float(np.float32(row[1])) for row in numbers['tokens']) == score.surprises(net, tok, ids)[0]
    assert out.partition('\nwritten')[0].strip() in page.text
    assert set(numbers['names']) == {str(i) for row in numbers['tokens'] for i in (row[0], *row[2::2])}
    assert page.links == [] and '://' not in page.source and "default-src 'none'" in page.source
    assert 'img' not in page.tags and 'b' not in page.tags and page.source.count('</script>') == 2


def test_of_a_long_text_the_beginning_is_shown(run, text, monkeypatch):
    whole = run('char', '--score=char.txt')
    monkeypatch.setattr(score, 'TOKENS', 20)
    assert run('char', '--score=char.txt --html=map.html').startswith(whole.rstrip('\n'))
    page = Map('map.html')
    assert len(page.spans) == 20 == len(page.data[0]['tokens']) and 'the first 20 of its' in page.text


def test_shades():
    assert [shade_of(nats) for nats in (-1e-7, 0, 1, 4, 8, 1e9)] == [0, 0, 1, 4, SHADES, SHADES]


@pytest.mark.parametrize('flags, words', [
    ('--html=map.html', 'html=map.html --score'),
    ('--score=char.txt --html=map.txt', 'map.txt .html'),
    ('--score=char.txt --html=none/map.html', 'none/map.html folder'),
])
def test_what_is_refused(run, text, capsys, flags, words):
    with pytest.raises(AssertionError):
        run('char', flags)
    refused(capsys, *words.split())


def test_in_a_browser(run, text, open_file):
    """The numbers of the token that one points at, or where the arrow keys are; text is text."""
    run('bpe', '--score=bpe.txt --html=map.html')
    page = open_file('map.html')
    said = page.locator('#said')
    spans = page.locator('#text span')
    numbers = Map('map.html').data[0]
    spans.nth(3).hover()
    assert said.text_content().startswith('token 4: ' + numbers['names'][str(numbers['tokens'][3][0])])
    assert f'{-numbers["tokens"][3][1]:.3f} nats' in said.text_content() and said.locator('tr').count() == 5
    page.locator('#text').focus()
    page.keyboard.press('ArrowRight')
    assert said.text_content().startswith('token 5: ')
    page.keyboard.press('End')
    assert said.text_content().startswith(f'token {len(numbers["tokens"]):,}: ')
    assert EVIL in page.locator('#text').text_content() and page.locator('img').count() == 0
    page.set_viewport_size(dict(width=360, height=640))
    assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
