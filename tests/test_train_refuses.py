"""Bad input of train.py: one line, exit status 2, and nothing is harmed."""
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from helpers.runs import cut, files, load, refused, train

pytestmark = pytest.mark.usefixtures('one_thread')


# --- bad input: one line, exit status 2, and nothing is harmed

class Bomb:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def foreign_ids():
    ids = np.fromfile('data/tiny/train.bin', '<i4')
    ids[len(ids) // 2] = 5000
    ids.tofile('data/tiny/train.bin')


BAD = {  # flags, words of the message, what breaks things beforehand
    'unknown setting': ('--learning_rat=1', 'learning_rat did you mean --learning_rate'),
    'missing config': ('config/nothing.py', 'config/nothing.py no such config'),
    'no dataset': ('--dataset=tinny --out_dir=new', 'data/tinny no such dataset --dataset=tiny'),
    'val too short': (
        '--block_size=1024 --tokens_per_step=1024 --out_dir=new',
        'val.bin block_size',
    ),
    'foreign ids': ('', 'train.bin 5000 vocabulary', foreign_ids),
    'cut .bin': ('', 'train.bin bytes', lambda: cut('data/tiny/train.bin')),
    'empty .bin': ('', 'val.bin', lambda: open('data/tiny/val.bin', 'w').close()),
    'broken meta': ('', 'meta.json', lambda: cut('data/tiny/meta.json')),
    'no tokenizer': ('', 'tokenizer.json', lambda: os.remove('data/tiny/tokenizer.json')),
    'other tokenizer': ('--init_from=resume --dataset=other', 'tokenizer tiny'),
    'other dataset': ('--dataset=other', 'dataset=tiny other'),
    'other mixture': ('--dataset=tiny:3,more:1', 'dataset=tiny, not more:0.25,tiny:0.75'),
    'mixed tokenizers': (
        '--dataset=tiny,other',
        'other tokenizer tiny --tokenizer=data/tiny --out=data/other',
    ),
    'one tokenizer missing': (
        '--dataset=more,tiny --vocab_size=40',
        'more tokenizer tiny --tokenizer=data/tiny --out=data/more',
        lambda: os.remove('data/more/meta.json'),
    ),
    'mixture too short': (
        '--dataset=tiny,more --block_size=256 --tokens_per_step=256 --out_dir=new',
        'data/more/val.bin block_size',
    ),
    'bad weight': ('--dataset=tiny:1,more:0', 'dataset=tiny:1,more:0 weight more'),
    'cut checkpoint': ('', 'out/ckpt.pt not a readable checkpoint', lambda: cut('out/ckpt.pt')),
    'empty checkpoint': (
        '',
        'out/ckpt.pt not a readable checkpoint',
        lambda: open('out/ckpt.pt', 'w').close(),
    ),
    'state dict': (
        '',
        'out/ckpt.pt not one of',
        lambda: torch.save({'w': torch.ones(2)}, 'out/ckpt.pt'),
    ),
    'only weights': (
        '',
        'out/ckpt.pt',
        lambda: torch.save(
            {k: load()[k] for k in ('format', 'kind', 'config', 'weights')}, 'out/ckpt.pt'
        ),
    ),
    'text file': (
        '',
        'out/ckpt.pt not a readable',
        lambda: open('out/ckpt.pt', 'w').write('hello\n' * 99),
    ),
    'code': (
        '',
        'out/ckpt.pt not a readable',
        lambda: torch.save({'format': 1, 'weights': Bomb()}, 'out/ckpt.pt'),
    ),
    'raw pickle': (
        '',
        'out/ckpt.pt not a readable',
        lambda: pickle.dump(Bomb(), open('out/ckpt.pt', 'wb')),
    ),
    'out_dir a file': (
        '--out_dir=file',
        'file cannot be written',
        lambda: open('file', 'w').close(),
    ),
    'resume nothing': ('--init_from=resume --out_dir=new', 'new/ckpt.pt no such checkpoint'),
    'eval nothing': ('--eval_only --out_dir=new', 'new no'),
    'changed n_layer': ('--n_layer=2', 'n_layer=1 not 2 --init_from=scratch'),
    'changed model': ('--model=mamba', 'model=gpt not mamba'),
    'changed embedding': ('--tie_embeddings=False', 'tie_embeddings'),
    'n_head': ('--out_dir=new --n_head=3', 'n_head n_embd'),
    'inner width': ('--out_dir=new --model=mamba --n_embd=33', 'n_embd multiple'),
    'not of this model': ('--out_dir=new --model=mamba --window=8', 'window mamba'),
    'tokens_per_step': ('--out_dir=new --tokens_per_step=100', 'tokens_per_step block_size'),
    'two sizes': ('--out_dir=new --gradient_accumulation_steps=3', 'tokens_per_step=64 96'),
    'bad wandb': (
        '--out_dir=new --wandb_log',
        'wandb not installed',
        lambda: sys.modules.__setitem__('wandb', None),
    ),
    **{
        f'{key} {value}': (f'--out_dir=new --{key}={value}', f'{key} {value}')
        for key, value in dict(
            model='mambo',
            dtype='float99',
            device='toaster',
            schedule='never',
            optimizer='sgdd',
            init_from='scrach',
        ).items()
    },
    'version': ('--out_dir=new --model=mamba --version=4', 'version=4'),
    'mimo_rank': ('--out_dir=new --model=mamba --mimo_rank=4', 'mimo_rank=4 version=3'),
    'mimo_rank of another': ('--out_dir=new --mimo_rank=4', 'mimo_rank gpt leave it out'),
    'no mimo_rank': ('--out_dir=new --model=mamba --version=3 --mimo_rank=0', 'mimo_rank=0 more than 0'),
    'hybrid of Mamba-1': ('--out_dir=new --model=hybrid --version=1', 'version=1 hybrid 2 3'),
    'mimo_rank of a hybrid': ('--out_dir=new --model=hybrid --mimo_rank=4', 'mimo_rank=4 version=3'),
    'half a channel': ('--out_dir=new --model=mamba --version=3 --state_size=15', 'state_size=15 even'),
    'rope_fraction': ('--out_dir=new --model=mamba --version=3 --rope_fraction=1.5', 'rope_fraction=1.5 all'),
    'DeltaNet': ('--out_dir=new --model=hybrid --delta_max=2', 'delta_max layers=b d leave it out'),
    'key_heads': ('--out_dir=new --model=hybrid --layers=ma --key_heads=1', 'key_heads layers=ma'),
    'no SSM': ('--out_dir=new --model=hybrid --layers=da --version=3', 'version layers=da m or b'),
    'no attention': ('--out_dir=new --model=hybrid --layers=d --window=8', 'window layers=d a or b'),
    'n_groups of Mamba-1': ('--out_dir=new --model=mamba --version=1 --n_groups=2', 'n_groups Mamba-1'),
    'layout': ('--out_dir=new --model=hybrid --layout=diagonal', 'layout diagonal'),
    'no vocab_size': (
        '--out_dir=new',
        'meta.json missing --vocab_size',
        lambda: os.remove('data/tiny/meta.json'),
    ),
    'data_dtype': (
        '--out_dir=new --vocab_size=99 --data_dtype=int7',
        'int7',
        lambda: os.remove('data/tiny/meta.json'),
    ),
    **{
        f'{flag} out of range': (f'--out_dir=new --{flag}', flag.partition('=')[0])
        for flag in (
            'n_layer=-1 n_embd=-32 n_head=-2 block_size=-8 batch_size=-1 tokens_per_step=-16 '
            'gradient_accumulation_steps=-1 learning_rate=-1 learning_rate=nan max_iters=-5 dropout=1 '
            'grad_clip=-1 eval_interval=0 log_interval=0 beta1=2 beta2=-1 weight_decay=-1 seed=-1 '
            'intermediate_size=-8 n_kv_head=-1 window=-3 eval_iters=-1 patience=-1 '
            'sample_interval=-1 min_lr=-1 lr_decay_iters=-1 decay_fraction=2'
        ).split()
    },
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(finished, capsys, monkeypatch, case):
    flags, words, *breaks = BAD[case]
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    for action in breaks:
        action()
    before = files('.')
    train('--model=gpt', flags, status=2)
    refused(capsys, *words.split())
    after = files('.')
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in set(after) - set(before) if path.endswith(('.pt', '.tmp'))]
    assert not os.path.exists('executed')
