"""Pictures of the page, for the README: a real browser looks at real runs.

    python tests/screenshots.py folder          # with the runs out-… and data/ → docs/page-*.png
    python tests/screenshots.py folder --to=/tmp/pictures

The folder is copied, so that nothing in it changes.
"""
import io
import os
import shutil
import sys
import tempfile

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

from helpers.browser import ROOT, Server, choose, open_browser  # noqa: E402

WIDTH, HEIGHT = 1280, 800
DOCS = os.path.join(ROOT, 'docs')
COLORS = 160            # of a picture, which is a third of its bytes then
PROMPT = 'def read_lines(path):\n    """'
TEXT = '''def parse(self, text):
    """Return the parts of text, or None if there are none."""
    if not isinstance(text, str):
        raise TypeError("text must be a string")
    parts = text.split(",")
    return [part.strip() for part in parts] or None
'''


def save(page, path):
    """The window as a PNG."""
    from PIL import Image
    picture = Image.open(io.BytesIO(page.screenshot())).convert('RGB')
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f'{path}  {os.path.getsize(path) / 1000:.0f} kB')


def train(page, server, run):
    """A run's curves, below its name."""
    page.goto(server.at(f'/train?run={run}').replace('?token', '&token'))
    page.get_by_test_id('run').locator('canvas, svg').first.wait_for()
    page.wait_for_timeout(2500)                                                 # two looks at its files
    page.get_by_test_id('run').evaluate('run => window.scrollBy(0, run.getBoundingClientRect().top - 20)')
    page.wait_for_timeout(300)


def generate(page, server, run, other):
    """Two models' answers to a prompt, and what else could have stood in a place."""
    page.goto(server.at('/generate'))
    choose(page, 'model', run)
    choose(page, 'second-model', other)
    page.get_by_test_id('prompt').fill(PROMPT)
    page.get_by_test_id('length').fill('110')
    page.get_by_test_id('start').click()
    page.wait_for_function('document.querySelectorAll(".token").length > 200')
    page.get_by_test_id('start').wait_for()
    page.locator('.token').filter(has_text='self').first.hover()


def perplexity(page, server, run):
    """A text in the colours of how little each token was expected."""
    page.goto(server.at('/perplexity'))
    choose(page, 'model', run)
    page.get_by_test_id('text').fill(TEXT)
    page.get_by_test_id('score').click()
    page.get_by_test_id('surprises').wait_for()
    page.get_by_test_id('figures').evaluate('part => window.scrollBy(0, part.getBoundingClientRect().top - 20)')
    page.locator('.token').filter(has_text='isinstance').first.hover()


def main(folder, to=DOCS):
    runs = sorted(name for name in os.listdir(folder) if name.startswith('out-'))
    with tempfile.TemporaryDirectory() as copy:
        for name in [*runs, 'data']:
            shutil.copytree(os.path.join(folder, name), os.path.join(copy, name))
        server = Server(copy).start()
        playwright, browser = open_browser()
        try:
            views = dict(train=lambda page: train(page, server, runs[-1]),
                         generate=lambda page: generate(page, server, runs[-1], runs[0]),
                         perplexity=lambda page: perplexity(page, server, runs[-1]))
            for name, view in views.items():
                context = browser.new_context(viewport=dict(width=WIDTH, height=HEIGHT), color_scheme='light')
                page = context.new_page()
                page.goto(server.at('/'))       # takes the cookie
                view(page)
                page.wait_for_timeout(300)
                save(page, os.path.join(to, f'page-{name}.png'))
                context.close()
        finally:
            browser.close()
            playwright.stop()
            server.stop()


if __name__ == '__main__':
    main(*[argument.removeprefix('--to=') for argument in sys.argv[1:]])
