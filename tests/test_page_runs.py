"""The panels Machine, Data, Train and Runs in a Chromium: a run is started, looked at from a second tab, outlives
its server, is stopped and goes on."""
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch

pytest.importorskip('playwright.sync_api')
pytest.importorskip('nicegui')

from helpers.browser import has_no_sideways_scroll, wait_for
from helpers.runs import POSIX
from playwright.sync_api import expect

from mambino.serve import curves

PATIENCE = 60_000       # milliseconds: train.py begins slowly where others are at work
TINY = '''# A model for a test.
dataset = 'char'
model = 'gpt'
n_layer = 1
n_embd = 32
block_size = 16
batch_size = 2
tokens_per_step = 32
max_iters = 30
eval_interval = 10
eval_iters = 4
log_interval = 1
sample_interval = 10
device = 'cpu'
dtype = 'float32'
'''
HOSTILE = '<img src=x onerror=document.title="broken">'

pytestmark = POSIX
expect.set_options(timeout=PATIENCE)         # not for a clock: a page that is right is so at once


@pytest.fixture(scope='module')
def folder(served_folder):
    """The server's folder, with a recipe for tiny runs."""
    os.mkdir(served_folder / 'config')
    (served_folder / 'config' / 'tiny.py').write_text(TINY)
    yield served_folder
    for name in os.listdir(served_folder):          # what a test that failed has left
        lock = served_folder / name / 'started.json'
        if lock.exists():
            try:
                os.kill(json.loads(lock.read_text())['pid'], signal.SIGKILL)
            except (OSError, KeyError):
                pass


def points_of(page, chart='chart-loss'):
    return int(page.get_by_test_id(chart).get_attribute('data-points') or 0)


def step_shown(page):
    text = page.get_by_test_id('figure-step').inner_text().partition(' ')[0].replace(',', '')
    return int(text) if text.isdigit() else 0


def steps_of(folder, name):
    path = folder / name / 'metrics.jsonl'
    if not path.exists():
        return []
    return [json.loads(line)['step'] for line in path.read_text().split('\n')[:-1] if '"loss"' in line]


def choose(page, test_id, text):
    """An entry of a select."""
    page.get_by_test_id(test_id).click()
    page.get_by_role('option', name=text, exact=True).click()


def write_run(folder, name, log='', metrics='', **files):
    """The folder of a run that somebody trained."""
    os.makedirs(folder / name, exist_ok=True)
    (folder / name / 'train.log').write_text(f'$ python train.py --out_dir={name}\n{log}')
    (folder / name / 'metrics.jsonl').write_text(metrics)


def of_steps(n, loss=5.0):
    usual = dict(lr=1e-3, grad_norm=1.0, tokens_per_s=9e3, memory=5e8)
    rows = []
    for step in range(1, n + 1):
        rows.append(dict(step=step, loss=loss - step / n, tokens=step * 64, seconds=step / 10, **usual))
    return ''.join(json.dumps(row) + '\n' for row in rows)


def fill(page, name, steps=''):
    """The form of a tiny run."""
    expect(page.get_by_test_id('recipe-about')).to_contain_text('A model for a test')
    if steps:
        page.get_by_test_id('max_iters').fill(steps)
    page.get_by_test_id('run-name-input').fill(name)
    expect(page.get_by_test_id('command')).to_contain_text(f'--out_dir=out-{name}')
    if steps:
        expect(page.get_by_test_id('command')).to_contain_text(f'--max_iters={steps}')


def test_which_mamba(page, server, folder):
    """A GPT has none, and a hybrid no Mamba-1: what was chosen before is not asked for then."""
    page.goto(server.at('/train?recipe=tiny'))
    kind, command = page.get_by_test_id('kind'), page.get_by_test_id('command')
    kind.get_by_role('button', name='GPT').click()
    expect(page.get_by_test_id('version')).to_be_hidden()
    kind.get_by_role('button', name='Hybrid').click()
    choose(page, 'version', 'Mamba-3')
    expect(command).to_contain_text('--version=3')
    kind.get_by_role('button', name='Mamba').click()
    expect(command).to_contain_text('--version=3')
    choose(page, 'version', 'Mamba-1')
    kind.get_by_role('button', name='Hybrid').click()
    expect(command).not_to_contain_text('--version')


def test_a_run_of_thirty_steps(page, server, folder):
    """Planned, started by the keyboard with a click too many, watched to its end."""
    page.goto(server.at('/train') + '&recipe=tiny' if '?' in server.at('/train') else server.at('/train?recipe=tiny'))
    expect(page.get_by_test_id('plan-words')).to_contain_text('one layer of width 32')
    assert page.get_by_test_id('memory-bar').locator('div').count() >= 3
    fill(page, 'thirty')
    page.get_by_test_id('start').focus()
    page.keyboard.press('Enter')
    page.keyboard.press('Enter')
    expect(page.get_by_test_id('run-name')).to_have_text('out-thirty')
    expect(page.get_by_test_id('state')).to_contain_text('Complete')
    expect(page.get_by_test_id('figure-step')).to_have_text('30 of 30')
    expect(page.get_by_test_id('figure-loss')).to_have_text(re.compile(r'\d\.\d{4}'))
    assert steps_of(folder, 'out-thirty') == list(range(1, 31))
    wait_for(lambda: points_of(page) == 30 + 30 + 3)            # each step, smoothed too, and three evaluations
    wait_for(lambda: points_of(page, 'chart-lr') == 30)
    expect(page.get_by_test_id('sample')).not_to_be_empty()
    assert (folder / 'out-thirty' / 'train.log').read_text().count('$ python train.py') == 1
    expect(page.get_by_test_id('start-trouble')).to_be_hidden()
    page.get_by_test_id('more-steps').fill('20')
    page.get_by_test_id('resume').click()
    expect(page.get_by_test_id('run-trouble')).to_contain_text('a whole number above 30')
    page.get_by_test_id('talk-to-it').click()
    expect(page.get_by_test_id('model')).to_have_value('out-thirty')


def test_a_run_outlives_its_server(page, watched, server, folder):
    """A reload and a second tab have all its points; kill -9 and a new server, and the page goes on; stop; go on at
    the same step."""
    page.goto(server.at('/train') + '&recipe=tiny')
    fill(page, 'long', '1000000')
    page.get_by_test_id('start').click()
    expect(page.get_by_test_id('state')).to_contain_text('Training since')
    wait_for(lambda: points_of(page) > 10, 60)
    before = points_of(page)
    page.reload()
    wait_for(lambda: points_of(page) >= min(before, curves.POINTS))
    expect(page.get_by_test_id('run-name')).to_have_text('out-long')
    second = page.context.new_page()
    second.goto(server.at('/train'))
    wait_for(lambda: points_of(second) >= min(before, curves.POINTS))
    expect(second.get_by_test_id('run-name')).to_have_text('out-long')
    second.close()

    page.get_by_test_id('run-name-input').fill('another')
    page.get_by_test_id('start').click()
    expect(page.get_by_test_id('start-trouble')).to_contain_text('out-long is training')

    step = steps_of(folder, 'out-long')[-1]
    server.kill()
    wait_for(lambda: steps_of(folder, 'out-long')[-1] > step + 3)
    server.start()
    watched.forgive_broken_connections()
    shown = steps_of(folder, 'out-long')[-1]
    wait_for(lambda: step_shown(page) > shown, 60)
    watched.forgive_broken_connections()

    page.get_by_test_id('stop').click()
    expect(page.get_by_test_id('state')).to_contain_text('It can go on')
    last = steps_of(folder, 'out-long')[-1]
    expect(page.get_by_test_id('state')).to_contain_text(f'Stopped at step {last}.')
    page.get_by_test_id('resume').click()
    expect(page.get_by_test_id('state')).to_contain_text('Training since')
    wait_for(lambda: steps_of(folder, 'out-long')[-1] > last, 60)
    page.get_by_test_id('stop').click()
    expect(page.get_by_test_id('state')).to_contain_text('It can go on')
    steps = steps_of(folder, 'out-long')
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > last
    assert f'going on from out-long/ckpt.pt at step {last}' in (folder / 'out-long' / 'train.log').read_text()


def test_a_folder_is_prepared(page, server, folder):
    """Found with the folder chooser; looked through without being read; prepared; a look inside."""
    os.makedirs(folder / 'books <b>')
    for i in range(30):
        (folder / 'books <b>' / f'{HOSTILE[:12]}{i}.txt').write_text(f'{HOSTILE} chapter {i} ' + 'of a book, ' * 40)
    os.makedirs(folder / 'pictures')
    (folder / 'pictures' / 'a.jpg').write_bytes(b'\xff\xd8\xff')
    page.goto(server.at('/data'))
    page.get_by_test_id('path-typed').fill('pictures')
    page.get_by_test_id('path-add').click()
    page.get_by_test_id('dry-run').click()
    expect(page.get_by_test_id('prepare-trouble')).to_contain_text('nothing in it to learn from')
    page.get_by_role('button', name='Leave out').click()
    page.get_by_test_id('path-typed').fill('pixtures')
    page.get_by_test_id('path-add').click()
    expect(page.get_by_test_id('path-trouble')).to_contain_text('no such file or folder')
    page.get_by_test_id('path-browse').click()
    here = page.get_by_test_id('browse-folder').input_value()
    page.get_by_test_id('browse-home').click()
    expect(page.get_by_test_id('browse-folder')).to_have_value(os.path.expanduser('~'))
    page.get_by_test_id('browse-folder').fill(here)
    page.get_by_test_id('browse-folder').press('Enter')
    page.get_by_role('button', name='Take books <b>', exact=True).click()
    page.get_by_test_id('browse-done').click()
    expect(page.get_by_test_id('paths')).to_contain_text('books <b>')
    expect(page.get_by_test_id('dataset-name')).to_have_value('books--b')
    page.get_by_test_id('dataset-name').fill('books')
    page.get_by_test_id('vocab_size').fill('300')
    expect(page.get_by_test_id('prepare-command')).to_contain_text('--vocab_size=300 --out=data/books')
    page.get_by_test_id('dry-run').click()
    expect(page.get_by_test_id('dry-run-text')).to_contain_text('nothing was read or written')
    expect(page.get_by_test_id('dry-run-text')).to_contain_text('<img src=x o')
    assert not (folder / 'data' / 'books').exists()
    expect(page.get_by_test_id('prepare-trouble')).to_be_hidden()
    page.get_by_test_id('prepare').click()
    expect(page.get_by_test_id('prepare-state')).to_have_text('The dataset is ready.')
    expect(page.get_by_test_id('datasets-table')).to_contain_text('books')
    choose(page, 'inside-which', 'books')
    expect(page.get_by_test_id('windows')).to_contain_text('of a book')
    wait_for(lambda: points_of(page, 'chart-lengths') > 0)
    choose(page, 'tokenizer', 'that of books')
    expect(page.get_by_test_id('prepare-command')).to_contain_text('--tokenizer=data/books --out')
    page.get_by_test_id('train-on-it').click()
    expect(page.get_by_test_id('command')).to_contain_text('--dataset=books')
    assert page.locator('img[src=x]').count() == 0 and 'broken' not in page.title()


def test_text_of_files_is_text(page, server, folder):
    """HTML in a run's name, in its samples, its log and its settings."""
    name = f'out-{HOSTILE}&a#b%2B+'.replace('/', '')       # of which an address has none as it is
    log = f'{HOSTILE}\n--- sample at step 1\n{HOSTILE} sampled\n---\nerror: {HOSTILE}\n'
    write_run(folder, name, log, of_steps(5))
    (folder / name / 'started.json').write_text(json.dumps(dict(command=[f'--dataset={HOSTILE}'])))
    write_run(folder, 'out-plain', '', of_steps(5))
    page.goto(server.at('/runs'))
    for run in (name, 'out-plain'):
        page.get_by_test_id(f'choose-{run}').click()
    expect(page.get_by_test_id('differences')).to_contain_text(HOSTILE)
    page.get_by_role('link', name=name).click()
    expect(page.get_by_test_id('sample')).to_contain_text(f'{HOSTILE} sampled')
    expect(page.get_by_test_id('state')).to_contain_text(HOSTILE)
    page.get_by_test_id('log-part').get_by_text('Log').click()
    expect(page.get_by_test_id('log')).to_contain_text(HOSTILE)
    page.get_by_test_id('chart-loss').hover(position=dict(x=200, y=150))
    assert page.locator('img[src=x]').count() == 0 and 'broken' not in page.title()


def test_what_went_wrong_is_said_plainly(page, server, folder):
    nan = 'error: the loss or its gradient is not a finite number any more at step 5; no checkpoint was made yet.\n'
    for name, log, words in (
            ('out-nan', nan, 'The loss became NaN'),
            ('out-memory', 'error: out of memory with 1 sequences at once; halve --block_size\n', 'Out of memory'),
            ('out-disk', 'error: out-disk: cannot be written to: No space left on device\n', 'The disk is full'),
            ('out-killed', '', 'It ended without a word')):
        write_run(folder, name, log, of_steps(5))
        page.goto(server.at('/train') + f'&run={name}')
        expect(page.get_by_test_id('state')).to_contain_text(words)


def test_a_hundred_thousand_lines(page, server, folder):
    """Few points of them are sent; and the server answers others within a second while it reads them."""
    write_run(folder, 'out-vast', '', of_steps(100_000))
    page.goto(server.at('/train') + '&run=out-vast')
    answers = []

    def asked():
        began = time.monotonic()
        assert page.context.request.get(f'{server.url}/health').ok
        return time.monotonic() - began

    def drawn():
        answers.append(asked())
        return points_of(page)
    points = wait_for(drawn)
    assert 100 < points <= 2 * curves.POINTS
    assert sorted(answers)[len(answers) // 2] < 1
    expect(page.get_by_test_id('figure-step')).to_contain_text('100,000')


def test_all_settings(page, server, folder):
    """Found, changed, refused, reset; the command says what is chosen, also after a reload."""
    page.goto(server.at('/train') + '&recipe=tiny')
    fill(page, 'settings')
    page.get_by_test_id('all-settings').get_by_text('All settings').click()
    page.get_by_test_id('settings-search').fill('learning rate end')
    expect(page.get_by_test_id('setting-min_lr')).to_be_visible()
    expect(page.get_by_test_id('setting-model')).to_be_hidden()
    page.get_by_test_id('setting-min_lr').fill('low')
    expect(page.get_by_test_id('wrong-min_lr')).to_have_text("min_lr=low: expected a number, not 'low'")
    page.get_by_test_id('start').click()
    expect(page.get_by_test_id('start-trouble')).to_contain_text('expected a number')
    page.get_by_test_id('setting-min_lr').fill('1e-5')
    expect(page.get_by_test_id('command')).to_contain_text('--min_lr=1e-5')
    expect(page.get_by_test_id('wrong-min_lr')).to_be_hidden()
    page.goto(server.at('/train'))                  # the browser keeps it
    expect(page.get_by_test_id('command')).to_contain_text('config/tiny.py --min_lr=1e-5')
    page.get_by_test_id('all-settings').get_by_text('All settings').click()
    page.get_by_test_id('settings-changed').click()
    expect(page.get_by_test_id('setting-min_lr')).to_be_visible()
    expect(page.get_by_test_id('setting-lr_decay_iters')).to_be_hidden()
    page.get_by_test_id('reset-min_lr').click()
    expect(page.get_by_test_id('command')).not_to_contain_text('min_lr')


def test_a_plan_that_does_not_fit_is_refused_in_words(page, server, folder):
    page.goto(server.at('/train') + '&recipe=tiny')
    fill(page, 'wide')
    page.get_by_test_id('n_embd').fill('1000000')
    expect(page.get_by_test_id('plan-words')).to_contain_text('GB are free: lower Layers, Width')
    page.get_by_test_id('n_embd').fill('many')
    expect(page.get_by_test_id('form-trouble')).to_contain_text('Width=many: expected a whole number')


def test_runs_are_compared_and_deleted(page, server, folder):
    for name, loss in (('out-x', 5.0), ('out-y', 6.0)):
        write_run(folder, name, '', of_steps(20, loss) + json.dumps(dict(step=20, val_loss=loss)) + '\n')
        (folder / name / 'started.json').write_text(json.dumps(dict(command=[f'--dropout={loss / 10}'])))
    page.goto(server.at('/runs'))
    page.get_by_test_id('choose-out-x').click()
    page.get_by_test_id('choose-out-y').click()
    wait_for(lambda: points_of(page, 'chart-train') == 40)
    assert points_of(page, 'chart-val') == 2
    expect(page.get_by_test_id('differences')).to_contain_text('dropout0.50.6')
    with page.expect_download() as download:
        page.get_by_test_id('csv-out-x').click()
    assert download.value.suggested_filename == 'out-x.csv'
    with open(download.value.path()) as f:
        assert f.read().count('\n') == 21
    page.get_by_test_id('delete-out-x').click()
    expect(page.get_by_test_id('delete-yes')).to_be_disabled()
    page.get_by_test_id('delete-typed').fill('out-x')
    page.get_by_test_id('delete-yes').click()
    expect(page.get_by_test_id('choose-out-x')).to_have_count(0)
    assert not (folder / 'out-x').exists() and (folder / 'out-y').exists()
    wait_for(lambda: points_of(page, 'chart-train') == 20)


def test_the_machine_and_its_profiles(page, server):
    page.goto(server.at('/machine'))
    expect(page.get_by_test_id('machine-facts')).to_contain_text('cores')
    choose(page, 'profile', '4 GB')
    choose(page, 'profile-kind', 'GPT')
    expect(page.get_by_test_id('profile-settings')).to_contain_text('50m')
    expect(page.get_by_test_id('profile-use')).to_have_attribute('href', re.compile('gpt_8gb'))
    page.get_by_test_id('profile-use').click()
    expect(page.get_by_test_id('command')).to_contain_text('gpt_8gb.py --vram=4')


NAMELESS = '''() => [...document.querySelectorAll('button, input, select, textarea, a, [role=slider], [tabindex="0"]')]
    .filter((e) => e.offsetParent && !e.closest('.q-field__native[readonly]'))
    .filter((e) => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')
        && !(e.labels && e.labels.length) && !e.closest('[aria-label]') && !e.getAttribute('title'))
    .map((e) => e.outerHTML.slice(0, 200))'''


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_a_narrow_window(page, server, folder, theme):
    """360 pixels: nothing to scroll to the side, and each control has a name."""
    write_run(folder, 'out-with-a-name-that-is-rather-long-for-a-window-so-narrow', 'word ' * 60, of_steps(20))
    page.set_viewport_size(dict(width=360, height=740))
    page.emulate_media(color_scheme=theme)
    for panel, part in (('machine', 'profiles'), ('data', 'files'), ('train', 'run'), ('runs', 'runs-table')):
        page.goto(server.at(f'/{panel}'))
        expect(page.get_by_test_id(part)).to_be_visible()
        if panel == 'train':
            page.get_by_test_id('all-settings').get_by_text('All settings').click()
            expect(page.get_by_test_id('setting-seed')).to_be_visible()
            wait_for(lambda: points_of(page) > 0)
        assert has_no_sideways_scroll(page), panel
        assert page.evaluate(NAMELESS) == []


def test_a_model_that_was_tuned_on_conversations_is_talked_to(page, server, served_folder):
    ckpt = torch.load(served_folder / 'bpe' / 'best.pt', weights_only=True)
    ckpt['tokenizer']['config'] = dict(chat_template="{{ messages[-1]['content'] }}")
    folder = served_folder / 'out-talks'
    folder.mkdir()
    torch.save(ckpt, folder / 'best.pt')
    page.goto(server.at())
    try:
        for name, label in (('out-talks', 'Message'), ('bpe', 'Prompt')):
            page.goto(f'{server.url}/generate?model={name}')
            page.get_by_role('textbox', name=label, exact=True).wait_for()
    finally:
        shutil.rmtree(folder)


def test_what_is_typed_before_the_browser_has_answered_stays(page, server):
    page.goto(server.at())
    page.evaluate("""localStorage.setItem('mambino-generate', '{"prompt": "of before", "length": 7}')""")
    page.add_init_script("""
        const get = Storage.prototype.getItem;
        Storage.prototype.getItem = function (key) {
            const value = get.call(this, key);
            const later = done => window.answer = () => done(value);
            return key === 'mambino-generate' ? new Promise(later) : value;
        };
    """)
    page.goto(f'{server.url}/generate')
    page.get_by_test_id('prompt').fill('typed at once')
    page.wait_for_function('typeof window.answer === "function"')
    page.evaluate('window.answer()')
    expect(page.get_by_test_id('length')).to_have_value('7')            # what the browser keeps has come
    expect(page.get_by_test_id('prompt')).to_have_value('typed at once')
