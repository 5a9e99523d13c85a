"""The page in a real browser: its shell, and the panels on which a model is used."""
import math
import os
import re
import shutil
import time
import urllib.request

import pytest
import torch
from helpers.browser import ROOT, Server, Watched, choose, has_no_sideways_scroll, wait_for
from helpers.runs import script

FREE = 3        # seconds until a row is free, of a server that may share its core; a second else
PLACES = ('start', 'machine', 'data', 'train', 'runs', 'generate', 'perplexity', 'export', 'server')


def address_of(place):
    return '/' if place == 'start' else f'/{place}'


# --- the shell ------------------------------------------------------------------------------------

def test_panels_have_addresses(page, server):
    """A link leads to each, a reload keeps it, and each has a title of its own."""
    page.goto(server.at())
    titles = set()
    for place in PLACES:
        page.get_by_test_id(f'go-{place}').click()
        page.wait_for_url(f'{server.url}{address_of(place)}')
        if place == 'generate':
            page.reload()
        assert page.get_by_test_id(f'go-{place}').get_attribute('aria-current') == 'page'
        titles.add(page.title())
    assert len(titles) == len(PLACES)


def first_paint(page):
    """Seconds from the request to when something is seen."""
    entries = 'performance.getEntriesByName("first-contentful-paint")'
    page.wait_for_function(f'{entries}.length')
    return page.evaluate(f'{entries}[0].startTime') / 1000


def test_first_paint(page, server):
    """Within two seconds, twice that on a machine that does other things besides."""
    page.goto(server.at())
    paints = [first_paint(page)]
    page.reload()
    paints.append(first_paint(page))
    assert min(paints) < 2 and max(paints) < 4, paints


def test_theme_is_remembered(page, server):
    page.emulate_media(color_scheme='dark')
    page.goto(server.at())
    theme = 'document.documentElement.dataset.theme'
    assert page.evaluate(theme) == 'dark'
    page.get_by_test_id('theme').click()
    assert page.evaluate(theme) == 'light'
    page.reload()
    page.get_by_test_id('theme').wait_for()
    assert page.evaluate(theme) == 'light'
    page.wait_for_function('document.body.classList.contains("body--light")')


def test_a_narrow_window(page, server):
    page.set_viewport_size(dict(width=360, height=700))
    for place in PLACES:
        page.goto(server.at(address_of(place)))
        page.get_by_test_id('theme').wait_for()
        assert has_no_sideways_scroll(page), place


def test_the_keyboard_skips_to_the_content(page, server):
    page.goto(server.at())
    page.get_by_test_id('theme').wait_for()
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    page.keyboard.press('Enter')
    page.wait_for_function('document.activeElement.id === "content"')


# --- generate -------------------------------------------------------------------------------------

def rows_used(server):
    """How many answers the server is at work on."""
    with urllib.request.urlopen(f'{server.url}/metrics', timeout=10) as response:
        text = response.read().decode()
    return sum(float(number) for number in re.findall(r'^mambino_model_rows_used\S* (\S+)$', text, re.M))


def open_panel(page, server, name, model='bpe'):
    """Goes to a panel, and chooses a model there."""
    page.goto(server.at(f'/{name}'))
    choose(page, 'model', model)


def fill(page, **values):
    for name, value in values.items():
        page.get_by_test_id(name).fill(str(value))


def answer_text(page, number=0):
    """What an answer says, with its prompt."""
    return page.get_by_test_id('answer-text').nth(number).evaluate('element => element.textContent')


def start(page):
    """Begins, and waits for the end of all answers."""
    page.evaluate('document.querySelectorAll("[data-testid=answer]").forEach(answer => answer.dataset.old = 1)')
    page.get_by_test_id('start').click()
    states = '[...document.querySelectorAll("[data-testid=answer]:not([data-old]) [data-testid=answer-state]")]'
    ends = '/finished|full length|stopped|no answer/'
    page.wait_for_function(f'{states}.length && {states}.every(state => {ends}.test(state.textContent))')


def sampled(served_folder, capsys, *flags):
    """What sample.py writes in the served folder, without the settings it repeats."""
    before = os.getcwd()
    os.chdir(served_folder)
    try:
        capsys.readouterr()
        assert script('sample.py', '--device=cpu', *flags) == 0
        return re.sub(r'\A(\w+ +=.*\n)+', '', capsys.readouterr().out)
    finally:
        os.chdir(before)


def test_generate_is_what_sample_writes(page, server, served_folder, capsys, one_thread):
    """Token by token, with the same seeds; the likeliest in a token's place are told."""
    open_panel(page, server, 'generate')
    fill(page, prompt='e', length=40, answers=2)
    start(page)
    texts = sampled(served_folder, capsys, '--out_dir=bpe --start=e --max_new_tokens=40 --num_samples=2 --stream=false')
    for number in range(2):
        assert answer_text(page, number) in texts
    assert '40 tokens' in page.get_by_test_id('answer-state').first.text_content()
    token = page.locator('.token').filter(has_text=re.compile(r'\w')).first
    token.hover()
    others = page.locator('.pop:visible .other')
    assert others.count() == 5
    assert 'nats' in page.locator('.pop:visible .head').text_content()
    token.focus()
    page.keyboard.press('ArrowRight')
    assert token.evaluate('token => token.nextElementSibling === document.activeElement')


def begin_a_long_answer(page, server):
    open_panel(page, server, 'generate')
    # the likeliest ids go round in a circle, none ends the text; one answer alone may be written before it is stopped
    fill(page, prompt='e', length=4096, answers=8, temperature=0)
    page.get_by_test_id('start').click()
    page.wait_for_function('document.querySelectorAll(".token").length > 5')
    assert rows_used(server) == 8


def test_stop_frees_the_row(page, server):
    """Within a second; the text so far stays."""
    begin_a_long_answer(page, server)
    page.get_by_test_id('stop').click()
    began = time.monotonic()
    wait_for(lambda: rows_used(server) == 0)
    assert time.monotonic() - began < FREE
    page.get_by_test_id('start').wait_for()
    assert 'stopped' in page.get_by_test_id('answer-state').first.text_content()
    assert len(answer_text(page)) > 5


def test_a_closed_tab_frees_the_row(page, server):
    begin_a_long_answer(page, server)
    page.close()
    began = time.monotonic()
    wait_for(lambda: rows_used(server) == 0)
    assert time.monotonic() - began < FREE


def test_two_strokes_begin_once(page, server):
    """The second one while the model is still loaded for the first."""
    def generated():
        with urllib.request.urlopen(f'{server.url}/metrics') as response:
            return int(re.search(r'^mambino_generated_tokens_total (\d+)', response.read().decode(), re.MULTILINE)[1])
    open_panel(page, server, 'generate')
    fill(page, prompt='e', length=10)
    before = generated()
    page.get_by_test_id('prompt').evaluate("""prompt => [1, 2].forEach(() => prompt.dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true, bubbles: true})))""")
    count = page.get_by_test_id('answer-state').filter(has_text=re.compile('finished|full length')).text_content()
    assert generated() - before == int(count.split()[0])


def test_two_models_side_by_side(page, server):
    open_panel(page, server, 'generate')
    choose(page, 'second-model', 'char')
    fill(page, prompt='e', length=10)
    start(page)
    assert page.get_by_test_id('answer-model').all_text_contents() == ['bpe', 'char']
    assert all(len(answer_text(page, number)) > 1 for number in range(2))


def test_chat(page, server):
    """Messages and answers stand one below the other."""
    open_panel(page, server, 'generate')
    page.get_by_test_id('mode').get_by_text('Chat').click()
    for number, line in enumerate(('ann', 'ett'), 1):
        fill(page, prompt=line, length=8)
        page.get_by_test_id('prompt').press('Enter')
        page.locator('.message').nth(2 * number - 1).wait_for()
        page.get_by_test_id('start').wait_for()
    assert page.locator('.message.user .said').all_text_contents() == ['ann', 'ett']
    assert page.get_by_test_id('answer-text').count() == 2
    page.get_by_test_id('base-note').wait_for()
    page.get_by_test_id('forget').click()
    page.locator('.message').first.wait_for(state='detached')


def test_what_cannot_be_is_said(page, server):
    """And the next answer comes all the same."""
    open_panel(page, server, 'generate', 'char')
    fill(page, prompt='漢', length=5)
    page.get_by_test_id('start').click()
    page.get_by_test_id('trouble').wait_for()
    assert '漢' in page.get_by_test_id('trouble').text_content()
    fill(page, prompt='e')
    start(page)
    page.get_by_test_id('trouble').wait_for(state='hidden')


def test_what_was_typed_stays(page, server):
    open_panel(page, server, 'generate')
    fill(page, prompt='typed before', temperature='0.5')
    page.wait_for_function('(localStorage.getItem("mambino-generate") || "").includes("0.5")')
    page.reload()
    page.wait_for_function('document.querySelector("[data-testid=prompt]").value === "typed before"')
    assert page.get_by_test_id('temperature').input_value() == '0.5'


# --- perplexity -----------------------------------------------------------------------------------

TEXT = 'Dies ist ein Text,\n\tmit Umlauten: äöü, 漢字 und <b>Zeichen</b>.\n' * 3


def score(page, text):
    fill(page, text=text)
    page.get_by_test_id('score').click()
    page.get_by_test_id('surprises').wait_for()


def figures(page):
    return [sheet.locator('.value').all_text_contents() for sheet in page.get_by_test_id('figures').all()]


def test_heat_map_is_the_score_of_sample(page, server, served_folder, capsys, one_thread):
    """As many tokens as the text has, their sum is the figure, and the figures are --score's."""
    open_panel(page, server, 'perplexity')
    score(page, TEXT)
    (served_folder / 'scored.txt').write_text(TEXT, encoding='utf-8')
    told = sampled(served_folder, capsys, '--out_dir=bpe --score=scored.txt')
    tokens, nats, loss, perplexity, bits = figures(page)[0]
    assert f'loss {loss}, perplexity {perplexity}, bits/byte {bits}' in told
    shown = page.locator('.token').evaluate_all('all => all.map(token => Number(token.dataset.nats))')
    assert f'{len(shown):,}' == tokens and f'tokens      {tokens}' in told
    assert f'{math.fsum(shown):,.4f}' == nats
    text = page.get_by_test_id('heat-map').evaluate('element => element.textContent')
    assert text.replace('↵\n', '\n').replace('⇥', '\t') == TEXT
    page.locator('.token').nth(7).hover()
    assert page.locator('.pop:visible .other').count() == 5


def test_two_models_compared(page, server, served_folder):
    """Of one tokenizer token by token; of two the figures alone."""
    shutil.copytree(served_folder / 'bpe', served_folder / 'again')
    open_panel(page, server, 'perplexity')
    choose(page, 'second-model', 'again')
    score(page, 'eta oin')
    assert len(figures(page)) == 2 and figures(page)[0] == figures(page)[1]
    page.get_by_test_id('view').get_by_text('Difference').click()
    apart = '[...document.querySelectorAll(".token")].map(token => token.style.getPropertyValue("--h"))'
    page.wait_for_function(f'{apart}.every(heat => heat === "0.000")')
    shutil.rmtree(served_folder / 'again')
    choose(page, 'second-model', 'char')
    score(page, 'eta oin')
    page.get_by_text('have different tokens').wait_for()


# --- sessions, export -----------------------------------------------------------------------------

def test_a_session_goes_on(page, server, served_folder):
    """It is kept, listed, gone on with, copied and deleted."""
    open_panel(page, server, 'generate')
    page.get_by_test_id('sessions').click()
    fill(page, prompt='eta', length=5, session='tale')
    start(page)
    page.get_by_test_id('session-row').wait_for()
    size = len(torch.load(served_folder / 'bpe/sessions/tale.pt', weights_only=True)['tokens'])
    page.get_by_test_id('go-on').click()
    wait_for(lambda: len(torch.load(served_folder / 'bpe/sessions/tale.pt', weights_only=True)['tokens']) == size + 5)
    page.get_by_role('button', name='Fork tale').click()
    page.get_by_role('button', name='Delete tale-2').click()
    page.get_by_role('button', name='Delete', exact=True).click()
    page.get_by_role('button', name='Delete tale-2').wait_for(state='detached')
    assert os.listdir(served_folder / 'bpe/sessions') == ['tale.pt']
    fill(page, session='../tale')
    page.get_by_test_id('start').click()
    page.get_by_test_id('trouble').get_by_text('a name of letters').wait_for()


def test_export_shows_its_check(page, server):
    """And a reload shows the same; why another one is not written is said."""
    open_panel(page, server, 'export', 'char')
    page.get_by_test_id('format-peft').wait_for(state='hidden')        # it is no adapter
    page.get_by_test_id('format-hf').click()
    page.get_by_test_id('format-safetensors').click()
    page.get_by_text('--out_dir=char --format=safetensors').wait_for()
    page.get_by_test_id('export').click()
    page.get_by_test_id('check').get_by_text('equal bit for bit').wait_for()
    page.get_by_test_id('files').get_by_text('char-safetensors/weights.safetensors').wait_for()
    open_panel(page, server, 'export', 'char')
    page.get_by_test_id('check').get_by_text('equal bit for bit').wait_for()
    page.get_by_test_id('format-hf').click()
    page.get_by_test_id('format-safetensors').click()
    page.get_by_text('--out_dir=char --format=safetensors').first.wait_for()
    page.get_by_test_id('export').click()
    page.get_by_test_id('export-trouble').get_by_text('is not empty').wait_for()


# --- server, and all of them ----------------------------------------------------------------------

def test_server_panel(page, server):
    page.goto(server.at('/server'))
    assert page.get_by_test_id('address').text_content() == f'{server.url}/v1'
    page.get_by_test_id('models').get_by_text('bpe').wait_for()
    page.wait_for_function('!document.querySelector("[data-testid=activity]").textContent.includes("…")')


def test_html_is_text(page, server, served_folder):
    """In the name of a model, in a prompt, and in what comes of a text."""
    trap = '<img src=x onerror=window.caught=1>'
    folder = served_folder / f'x{trap}'
    shutil.copytree(served_folder / 'bpe', folder)
    try:
        open_panel(page, server, 'generate', folder.name)
        fill(page, prompt=trap, length=5)
        start(page)
        assert trap in answer_text(page)
        open_panel(page, server, 'perplexity', folder.name)
        score(page, trap)
        page.locator('.token').first.hover()
        page.goto(server.at('/server'))
        page.get_by_test_id('models').get_by_text(folder.name, exact=True).wait_for()
        page.goto(server.at())
        page.get_by_test_id('step-2').wait_for()
        assert page.evaluate('window.caught') is None and page.locator('img').count() == 0
    finally:
        shutil.rmtree(folder)


def test_the_keyboard_reaches_all(page, server):
    """Every control of a panel, each of which has a name."""
    for name in ('generate', 'perplexity', 'export', 'server'):
        page.goto(server.at(f'/{name}'))
        page.wait_for_function('window.did_handshake')
        controls = 'main :is(input, textarea, button, a[href], [role=combobox]):not([type=file])'
        controls = f'[...document.querySelectorAll("{controls}")].filter(one => one.checkVisibility())'
        name_of = 'one => one.ariaLabel || one.innerText || (one.labels || [])[0]?.innerText'
        names = page.evaluate(f'{controls}.map({name_of})')
        assert len(names) > 2 and all(names), names
        page.evaluate(f'{controls}.forEach(one => one.dataset.waits = 1)')
        page.evaluate('document.addEventListener("focusin", event => delete event.target.dataset.waits)')
        for _ in range(80):
            page.keyboard.press('Tab')
        left = page.evaluate('[...document.querySelectorAll("[data-waits]")].map(one => one.outerHTML)')
        assert not left


def test_narrow_with_answers(page, server):
    page.set_viewport_size(dict(width=360, height=700))
    open_panel(page, server, 'generate')
    fill(page, prompt='e' * 100, length=30)
    start(page)
    assert has_no_sideways_scroll(page)
    open_panel(page, server, 'perplexity')
    score(page, 'averylongword' * 20)
    assert has_no_sideways_scroll(page)


def test_where_there_is_nothing_yet(browser, tmp_path):
    """Each panel says so, and where to begin."""
    server = Server(tmp_path)
    context = browser.new_context()
    watched = Watched(context)
    try:
        server.start()
        page = context.new_page()
        page.goto(server.at())
        assert 'No model yet' in page.get_by_test_id('step-2').text_content()
        for name in ('generate', 'perplexity', 'export', 'runs', 'server'):
            page.goto(server.at(f'/{name}'))
            link = page.locator('#content').get_by_role('link')
            link.wait_for()
            assert link.get_attribute('href') == '/train'
        watched.check()
    finally:
        context.close()
        server.stop()
    assert 'Traceback' not in server.said()


def colors(theme):
    """{name: (red, green, blue)} of look.css."""
    with open(os.path.join(ROOT, 'mambino/serve/page/look.css'), encoding='utf-8') as f:
        style = f.read()
    block = re.search(fr'html\[data-theme={theme}\] {{(.*?)}}', style, re.S)[1]
    found = {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r'--([\w-]+): #(\w{6})', block)}
    return found | {'heat': tuple(map(int, re.search(r'--heat: ([\d ]+)', block)[1].split()))}


def contrast(one, other):
    """As WCAG 2 has it."""
    def light(color):
        parts = [part / 255 for part in color]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    darker, lighter = sorted((light(one), light(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_colors_can_be_read(theme):
    """4.5 to 1 at least, of the hottest token too."""
    color = colors(theme)
    pairs = ('ink ground', 'ink sheet', 'muted ground', 'muted sunk', 'accent sheet', 'accent accent-soft',
             'on-accent accent', 'warn warn-soft', 'bad bad-soft')
    for text, under in map(str.split, pairs):
        assert contrast(color[text], color[under]) >= 4.5, (text, under)
    for tint, share in (('heat', 0.62), ('second', 0.55)):
        mixed = [share * one + (1 - share) * other for one, other in zip(color[tint], color['sheet'])]
        assert contrast(color['ink'], mixed) >= 4.5, tint


def test_a_server_that_was_killed(page, server, watched):
    """The page comes back by itself, at its place."""
    page.goto(server.at('/generate'))
    page.wait_for_function('window.did_handshake')
    page.evaluate('window.before = true')
    server.kill()
    server.start()
    page.wait_for_function('!window.before && window.did_handshake')
    page.get_by_test_id('start').wait_for()
    watched.forgive_broken_connections()
