"""sample.py, and an evaluation alone, where memory does not suffice, or its card is gone: one line, and status 2."""
import atexit
import contextlib
import io
import os
import sys

import pytest
from helpers import card_scripts
from helpers.card import pretended
from helpers.card_process import on_card
from helpers.runs import script


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """A folder with a prepared text."""
    return card_scripts.prepare(tmp_path_factory.mktemp('text'))


class Ended(BaseException):
    """In the place of os._exit, which would end the test."""


def ended(*words):
    """(status, stderr) of a script whose errors end in its sys.excepthook, as in a process of its own."""
    def end(status):
        raise Ended(status)
    before, hook = os._exit, sys.excepthook
    err = io.StringIO()
    os._exit = end
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            try:
                return script(*words), err.getvalue()
            except Exception as error:
                try:
                    sys.excepthook(type(error), error, error.__traceback__)
                except Ended as end_of_it:
                    return end_of_it.args[0], err.getvalue()
                raise
    finally:
        os._exit, sys.excepthook = before, hook


@on_card
@pytest.mark.parametrize('what, says', [
    ('plant_out_of_memory', 'error: out of memory: lower --batch_size'),
    ('plant_loss', 'error: the card failed: CUDA error: unspecified launch failure. Look what nvidia-smi says'),
])
def test_sampling_ends_in_a_line(text, tmp_path, what, says):
    card_scripts.begin(text, tmp_path)
    score = f'--score={text}/tiny.txt'
    with pretended() as card:
        card_scripts.run('train.py', card_scripts.TRAIN, card_scripts.MODELS['gpt'], '--max_iters=2')
        for flags, nth in (('', 30), ('', 300), ('--beams=2', 150), (score, 60), ('--session=tale', 60)):
            card.is_lost = False
            getattr(card, what)(nth=nth)
            status, err = ended('sample.py', '--start=a --max_new_tokens=12' * (flags != score), flags)
            lines = [line for line in err.splitlines() if line]
            assert status == 2 and lines[-1].startswith(says) and 'Traceback' not in err, err
        card.is_lost = False
        assert ended('sample.py', '--start=a --max_new_tokens=2')[0] == 0


@on_card
def test_an_evaluation_alone_ends_in_a_line(text, tmp_path):
    card_scripts.begin(text, tmp_path)
    with pretended() as card:
        card_scripts.run('train.py', card_scripts.TRAIN, card_scripts.MODELS['gpt'], '--max_iters=2')
        card.plant_loss('embedding')
        run_all, atexit._run_exitfuncs = atexit._run_exitfuncs, lambda: None
        status, err = ended('train.py', '--eval_only=True')
        atexit._run_exitfuncs = run_all
    assert status == 2 and 'the card failed at step 2: CUDA error' in err and 'Traceback' not in err, err
