"""Makes what lies beside it, by the scripts of an older version, whose folder is the first argument; see README.md."""
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import torch

OLD = os.path.abspath(sys.argv[1])
SIZES = ('--n_layer=1 --n_embd=32 --block_size=32 --batch_size=4 --tokens_per_step=128 --max_iters=300 '
         '--eval_interval=150 --log_interval=150 --learning_rate=2e-2 --device=cpu --dtype=float32')
RUNS = {
    'gpt': '--model=gpt --dataset=char --n_embd=16 --n_head=4 --n_kv_head=2 --window=12 --qk_norm=True '
           '--intermediate_size=16',
    'gpt-muon': '--model=gpt --dataset=bpe --n_embd=16 --n_head=2 --intermediate_size=64 '
                '--optimizer=muon --schedule=wsd',
    'moe': '--model=gpt --dataset=char --n_embd=16 --n_head=2 --intermediate_size=8 --n_expert=4',
    'mamba1': '--model=mamba --dataset=char --n_embd=16 --version=1 --state_size=8',
    'mamba2': '--model=mamba --dataset=char --version=2 --state_size=8 --optimizer=muon',
    'hybrid': '--model=hybrid --dataset=char --n_head=2 --n_kv_head=1 --state_size=8 --intermediate_size=16 '
              '--optimizer=muon',
    'hybrid-parallel': '--model=hybrid --dataset=char --n_head=2 --state_size=8 --intermediate_size=16 --low_rank=4 '
                       '--layout=parallel',
    'bare': '--model=gpt --dataset=bare --vocab_size=40 --data_dtype=uint16 --n_embd=16 --n_head=2 '
            '--intermediate_size=16',
    'lora': '--adapter=lora --lora_rank=2 --init_from=gpt-muon --dataset=bpe',
    'prefix': '--adapter=prefix --prefix_length=4 --init_from=mamba2 --dataset=char',
}
MORE = '--max_iters=310 --schedule=wsd --decay_fraction=0 --learning_rate=2e-3 --log_interval=1 --device=cpu'
SAMPLE = '--device=cpu --max_new_tokens=60 --temperature=0 --repetition_penalty=1.1'


def script(name, *flags):
    """What a script of the old version writes to stdout."""
    sys.argv = [name, *shlex.split(' '.join(flags))]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_path(os.path.join(OLD, name), run_name='__main__')
    return said.getvalue()


def losses(folder):
    """A copy of a run goes on from step 300 to 310 → {'loss': {step: value}, 'val_loss': ...}."""
    shutil.copytree(folder, 'more', dirs_exist_ok=True)
    script('train.py', f'--out_dir=more {MORE}')
    with open('more/metrics.jsonl') as f:
        lines = [json.loads(line) for line in f]
    shutil.rmtree('more')
    lines = [line for line in lines if line['step'] > 300]
    return {name: {line['step']: line[name] for line in lines if name in line} for name in ('loss', 'val_loss')}


def exported(folder):
    """What export.py writes for transformers: the config, and the hash of the weights."""
    script('export.py', f'--out_dir={folder} --format=hf --to=hf --verify=False')
    with open('hf/config.json') as f:
        config = json.load(f)
    with open('hf/model.safetensors', 'rb') as f:
        weights = hashlib.sha256(f.read()).hexdigest()
    shutil.rmtree('hf')
    return dict(config=config, weights=weights)


sys.path.insert(0, OLD)
torch.set_num_threads(1)
os.chdir(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(OLD, 'README.md'), encoding='utf-8') as f:
    words = re.sub(r'[^a-z.,\n]+', ' ', f.read().lower())
for name, text in (('text.txt', words[:6000]), ('score.txt', words[6000:6500])):
    with open(name, 'w') as f:
        f.write(text)
script('prepare.py', 'text.txt --tokenizer=char --out=data/char')
script('prepare.py', 'text.txt --tokenizer=bpe --vocab_size=280 --out=data/bpe')
os.makedirs('data/bare', exist_ok=True)
for split, n in (('train', 1500), ('val', 150)):
    np.random.default_rng(n).integers(0, 40, n).astype('uint16').tofile(f'data/bare/{split}.bin')


expected = {}
for name, flags in RUNS.items():
    sizes = re.sub(r'--n_\w+=\d+', '', SIZES) if 'adapter' in flags else SIZES
    script('train.py', sizes, flags, f'--out_dir={name}')
    os.remove(f'{name}/best.pt')                            # ckpt.pt has the same, and the optimizer's state
    expected[name] = losses(name)
    if name != 'bare':
        expected[name]['greedy'] = script('sample.py', f'--out_dir={name} --start="the "', SAMPLE)
        expected[name]['score'] = script('sample.py', f'--out_dir={name} --device=cpu --score=score.txt')
    if name not in ('bare', 'prefix'):
        expected[name]['hf'] = exported(name)
for ways in ('int8', 'int4'):
    script('export.py', f'--out_dir=gpt-muon --format=native --quantize={ways} --to={ways} --verify=False')
    os.remove(f'{ways}/README.md')
    expected[ways] = dict(greedy=script('sample.py', f'--out_dir={ways} --start="the "', SAMPLE),
                          score=script('sample.py', f'--out_dir={ways} --device=cpu --score=score.txt'))
script('sample.py', '--out_dir=mamba2 --session=tale --start="the small model "', SAMPLE)
shutil.copytree('mamba2/sessions', 'sessions')
expected['session'] = dict(greedy=script('sample.py', '--out_dir=mamba2 --session=tale', SAMPLE))
shutil.rmtree('mamba2/sessions')
shutil.move('sessions', 'mamba2/sessions')
with open('expected.json', 'w') as f:
    json.dump(expected, f, indent=1)
