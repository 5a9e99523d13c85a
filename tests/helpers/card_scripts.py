"""Small runs of train.py and sample.py, in the process of a pretended card."""
import contextlib
import io
import os
import re
import shutil

from helpers.runs import script, write_text
from mambino import machine
from mambino.train import evaluation

MODELS = {
    'gpt': '--model=gpt --n_head=2 --window=8',
    'experts': '--model=gpt --n_head=2 --n_expert=4',
    'mamba1': '--model=mamba --version=1 --state_size=4',
    'mamba2': '--model=mamba --state_size=8',
    'hybrid': '--model=hybrid --n_head=2 --window=8 --state_size=8',
}
# two micro-batches a step
TRAIN = ('--dataset=tiny --n_layer=1 --n_embd=64 --block_size=16 --batch_size=2 --tokens_per_step=64 --eval_iters=2 '
         '--learning_rate=1e-3 --optimizer=adamw --schedule=cosine')


def prepare(folder):
    """Prepares a small text in a folder, and returns it."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        write_text('tiny.txt', 2000)
        assert script('prepare.py', 'tiny.txt --tokenizer=char --out=data/tiny') == 0
    finally:
        os.chdir(before)
    return folder


def begin(text, folder):
    """Goes to a folder, with the data of `text` in it; samples are short, and nothing measures how fast it is."""
    os.chdir(folder)
    shutil.copytree(text / 'data', 'data')
    evaluation.SAMPLE = 8
    machine.matmul_peak = lambda device, dtype: 1e13


def run(name, *flags):
    """What a script says below its settings."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = script(name, *flags)
    print(said.getvalue())
    assert status == 0, status
    return re.split('^[a-z_]+ += .*\n', said.getvalue(), flags=re.M)[-1]
