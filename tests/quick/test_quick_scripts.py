"""The scripts in this process, on a tiny dataset: prepare, train, go on, sample, export, and
refuse."""
import json
import os
import random
import shutil
import signal

import pytest
import torch
from helpers.runs import refused, same_run, script, write_text
from torch.optim.optimizer import register_optimizer_step_post_hook

from mambino.tokenizer import load_tokenizer
from mambino.weights import checkpoint, loading

TINY = ('--dataset=text --n_layer=1 --n_embd=32 --block_size=32 --batch_size=4 --tokens_per_step=128 '
        '--max_iters=6 --eval_interval=3 --log_interval=1 --device=cpu --dtype=float32')
MODELS = dict(gpt='--model=gpt --n_head=2 --n_kv_head=1 --qk_norm=True',
              moe='--model=gpt --n_head=2 --n_expert=4',
              mamba1='--model=mamba --version=1', mamba='--model=mamba --state_size=16',
              hybrid='--model=hybrid --n_head=2 --window=16 --state_size=16')
every_kind = pytest.mark.parametrize('kind', MODELS)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    """A folder with a dataset of mixed files and a run of each kind of model."""
    folder, before = tmp_path_factory.mktemp('quick'), os.getcwd()
    os.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.makedirs('files/code')
    write_text('files/words.txt')
    with open('files/code/a.py', 'w', encoding='utf-8') as f:
        f.write('def twice(x):\n    return 2 * x\n' * 20)
    with open('files/rows.jsonl', 'w', encoding='utf-8') as f:
        f.write('{"text": "a row"}\n{"text": "another row, é€😀"}\n')
    with open('files/broken.ipynb', 'w', encoding='utf-8') as f:
        f.write('{"cells": ')
    try:
        assert script('prepare.py', 'files --vocab_size=400 --workers=1 --out=data/text') == 0
        for kind, flags in MODELS.items():
            assert script('train.py', TINY, flags, f'--out_dir={kind}') == 0
        yield folder
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


@pytest.fixture
def work(ready, tmp_path, monkeypatch, capsys):
    """The working directory of a test, with data/ and the runs in it."""
    shutil.copytree(ready, tmp_path / 'work')
    monkeypatch.chdir(tmp_path / 'work')
    capsys.readouterr()


def test_prepare_accounts_for_every_file(work, capsys):
    assert script('prepare.py', '--inspect data/text') == 0
    assert 'sound: ' in capsys.readouterr().out
    with open('data/text/meta.json', encoding='utf-8') as f:
        meta = json.load(f)
    assert 'broken.ipynb' in json.dumps(meta['skipped'])
    assert sum(kind['files'] for kind in meta['kinds'].values()) == 3
    assert script('prepare.py', 'files --vocab_size=400 --workers=1 --out=data/again') == 0
    for name in ('train.bin', 'val.bin', 'train.idx', 'val.hash'):
        with open(f'data/text/{name}', 'rb') as a, open(f'data/again/{name}', 'rb') as b:
            assert a.read() == b.read(), name


def test_tokenizers_give_a_text_back(work):
    chance = ''.join(random.Random(1).choices('abc é\n€😀', k=300))
    texts = ['', ' a  b\n\tc ', 'é€😀 <|endoftext|>', chance]
    for name in ('char', 'byte', 'bpe'):
        write_text('all.txt', 3000, chars=''.join(sorted(set(''.join(texts)))))
        flags = f'--tokenizer={name} --vocab_size=300 --workers=1 --out=data/{name}'
        assert script('prepare.py', 'all.txt', flags) == 0
        tok = load_tokenizer(f'data/{name}')
        for text in texts:
            ids = tok.encode(text)
            assert tok.decode(ids) == text and tok.eot not in ids


@every_kind
def test_a_stopped_run_ends_with_the_same_bits(work, kind):
    steps = []

    def stop_at_2(optimizer, *_):
        if isinstance(optimizer, torch.optim.AdamW):            # Muon steps beside it
            steps.append(1)
        if steps == [1, 1]:
            steps.append('asked')
            signal.raise_signal(signal.SIGINT)
    hook = register_optimizer_step_post_hook(stop_at_2)
    try:
        script('train.py', TINY, MODELS[kind], '--out_dir=parts')
    finally:
        hook.remove()
    assert checkpoint.load_checkpoint('parts/ckpt.pt')['counters']['step'] == 2
    assert script('train.py', TINY, MODELS[kind], '--out_dir=parts') == 0
    same_run('parts', kind)


@every_kind
def test_sample_is_greedy(work, kind, capsys):
    flags = '--start=def --temperature=0 --max_new_tokens=8 --device=cpu --heal=False'
    assert script('sample.py', f'--out_dir={kind}', flags) == 0
    said = capsys.readouterr().out
    ckpt = checkpoint.load_checkpoint(kind)
    tok, net = checkpoint.tokenizer_of(ckpt), loading.model_of(ckpt)
    ids = list(tok.encode('def'))
    for _ in range(8):
        ids.append(int(net(torch.tensor([ids]))[0][0, -1].argmax()))
        if ids[-1] == tok.eot:
            break
    text = tok.decode([i for i in ids if i != tok.eot])
    assert text.strip() in said, said


@every_kind
def test_quantised_export_is_sampled(work, kind):
    assert script('export.py', f'--out_dir={kind} --format=native --quantize=int8') == 0
    folder = f'{kind}-native-int8'
    assert script('sample.py', f'--out_dir={folder} --start=def --max_new_tokens=4 --device=cpu') == 0
    a, b = (loading.model_of(checkpoint.load_checkpoint(name)) for name in (kind, folder))
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert (a(idx)[0] - b(idx)[0]).abs().max() < 0.1


def test_lora_is_trained_and_merged(work):
    flags = '--init_from=gpt --out_dir=lora --adapter=lora --learning_rate=1e-2'
    assert script('train.py', TINY, flags) == 0
    assert os.path.getsize('lora/ckpt.pt') < os.path.getsize('gpt/ckpt.pt')
    assert script('export.py', '--out_dir=lora --format=native') == 0
    a, b = (loading.model_of(checkpoint.load_checkpoint(name)) for name in ('lora', 'lora-native'))
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert (a(idx)[0] - b(idx)[0]).abs().max() < 1e-4


@pytest.mark.parametrize('name, flags, words', [
    ('train.py', '--lerning_rate=1', ['lerning_rate', 'did you mean --learning_rate?']),
    ('train.py', '--n_layer=two', ['whole number']),
    ('train.py', 'config/no_such_recipe.py', ['no such config file']),
    ('train.py', '--dataset=never_made', ['never_made']),
    ('prepare.py', 'no_such_file.txt', ['no_such_file.txt']),
    ('sample.py', '--out_dir=never_trained', ['never_trained']),
    ('export.py', '--out_dir=gpt --format=wav', ['wav']),
])
def test_what_a_user_can_cause_is_one_line(work, capsys, name, flags, words):
    assert script(name, flags) == 2
    refused(capsys, *words)
