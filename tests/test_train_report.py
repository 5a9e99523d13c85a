"""train.py --report: what there is to see of a run, in one file."""
import json
import math
import os
import re
import shutil

import pytest
from helpers.pages import Page
from helpers.runs import POSIX, load, refused, script, train

from mambino import files
from mambino.train import report


def write_log(n, folder='out'):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/metrics.jsonl', 'w', encoding='utf-8') as f:
        for step in range(1, n + 1):
            line = dict(step=step, loss=3 + math.sin(step), lr=1e-3 / step, grad_norm=7.5 if step == n // 2 else 1.0,
                        tokens_per_s=1000.0, memory=2**31, tokens=64 * step, seconds=1.0 * step)
            f.write(json.dumps(line) + '\n')
            if step % 10 == 0:
                f.write(json.dumps(dict(step=step, val_loss=5 - step / n)) + '\n')


def test_a_run_in_one_file(finished, capsys):
    with files.whole('out/train.log') as f:
        f.write(b'step 1\n--- sample at step 5\n\nfive\n---\n--- sample at step 10\n\nten <b>\nand more\n---\ndone\n')
    train('--report')
    assert 'written: out/report.html' in capsys.readouterr().out.replace(os.sep, '/')
    page = Page('out/report.html')
    assert page.links == [] and '://' not in page.source and "default-src 'none'" in page.source
    titles = 'loss, nats a token', 'learning rate', 'norm of the gradient', 'tokens a second', 'memory, GB'
    assert all(title in page.text for title in titles) and page.tags.count('svg') == len(page.data) == 5
    curves = {curve['name']: curve['points'] for curve in page.data[0]['curves']}
    with open('out/metrics.jsonl', encoding='utf-8') as f:
        lines = [json.loads(line) for line in f]
    for label, name in (('train', 'loss'), ('val', 'val_loss')):
        assert [step for step, _ in curves[label]] == [line['step'] for line in lines if name in line]
        assert [y for _, y in curves[label]] == pytest.approx([line[name] for line in lines if name in line], rel=1e-5)
    counters = load()['counters']
    assert f'{counters["best_loss"]:.4f}, at step' in page.text and '10 of 10' in page.text
    changed, _, others = page.text.partition('the others')
    assert 'block_size 16 0' in ' '.join(changed.split()) and 'beta1' in others and 'beta1' not in changed
    assert page.text.index('ten <b>\nand more') < page.text.index('five')


def test_what_others_have_named_is_text(finished):
    evil = '</script><img src=x onerror=alert(1)>&<b>'
    folder = evil.replace('/', '~')
    shutil.copytree('out', folder)
    with open(f'{folder}/train.log', 'w', encoding='utf-8') as f:
        f.write(f'--- sample at step 5\n{evil}\x1b[2J\x00\n---\n')
    assert script('train.py', f"--report --out_dir='{folder}'") == 0
    page = Page(f'{folder}/report.html')
    assert 'img' not in page.tags and page.links == [] and page.tags.count('b') == 5      # of its own
    assert evil in page.text and folder in page.text and '\\x1b[2J\\x00' in page.text


def test_of_a_run_that_goes_on_or_has_only_begun(finished):
    files.hold('out')
    train('--report')                               # who only reads needs no leave
    files.release()
    for name in ('ckpt.pt', 'best.pt', 'report.html'):
        os.remove(f'out/{name}')
    with open('out/metrics.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"step": 11, "lo')
    train('--report')
    assert 'Settings' not in Page('out/report.html').text
    open('out/metrics.jsonl', 'w').close()
    train('--report', status=2)                     # there is nothing


def test_of_a_hundred_thousand_lines_few_points_are_kept(here):
    write_log(100_000)
    train('--report=all.html')
    page = Page('all.html')
    assert all(len(curve['points']) <= report.POINTS for chart in page.data for curve in chart['curves'])
    assert len(page.source) < 500_000 and '100,000' in page.text
    norms = page.data[2]['curves'][0]['points']
    assert max(value for _, value in norms) == 7.5              # a single leap is still to be seen
    assert os.listdir('out') == ['metrics.jsonl']


@pytest.mark.parametrize('step, loss', [(1, 3.0), (10**17, 1e299), (1, -1e299), (3, 1e-12), (0, 0.0)])
def test_a_single_point_whatever_it_is(here, step, loss):
    os.mkdir('out')
    with open('out/metrics.jsonl', 'w', encoding='utf-8') as f:
        f.write(json.dumps(dict(step=step, loss=loss, lr=loss, seconds=abs(loss))) + '\n')
    train('--report')
    assert 'nan' not in Page('out/report.html').source


def test_as_a_picture(finished):
    pytest.importorskip('matplotlib')
    train('--report=run.png')
    with open('run.png', 'rb') as f:
        assert f.read(8) == b'\x89PNG\r\n\x1a\n'


@pytest.mark.parametrize('flags, words', [
    ('--report --out_dir=none', 'none no run'),
    ('--report=run.txt', 'run.txt .html .png'),
    ('--report=7', '7 .html'),
    ('--report=none/run.html', 'none/run.html written'),
])
def test_what_is_refused(finished, capsys, flags, words):
    train(flags, status=2)
    refused(capsys, *words.split())


@POSIX
def test_a_folder_that_cannot_be_read(here, capsys):
    os.makedirs('out/metrics.jsonl')
    train('--report', status=2)
    refused(capsys, 'metrics.jsonl: cannot be read')


def test_in_a_browser(here, open_file):
    """The values where one points, and by the arrow keys."""
    write_log(40)
    train('--report')
    page = open_file('out/report.html')
    svg = page.locator('figure svg').first
    said = page.locator('figure output').first
    svg.focus()
    page.keyboard.press('ArrowLeft')
    assert said.text_content().startswith('step 39 · train 3.96') and said.text_content().endswith('val 4 at 40')
    box = svg.bounding_box()
    page.mouse.move(box['x'] + box['width'] * 0.5, box['y'] + 50)
    assert re.match(r'step (19|2\d) · train', said.text_content())
