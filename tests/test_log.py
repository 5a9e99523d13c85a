"""log.py: each step stands once in the log, whatever became of the run or of the file."""
import json
import os
import sys
import types

import pytest

from mambino.train.log import logged_step, open_log


def steps_in(path='metrics.jsonl'):
    with open(path, encoding='utf-8') as f:
        return [json.loads(line)['step'] for line in f]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


DAMAGE = [b'{"step": null}', b'{"step": 4, "loss": \xff\xfe}', b'{"step": 5, "lo', b'17', b'[]', b'{"step": "6"}',
          b'{"step": true}', b'{"step": NaN}', b'[' * 100_000, b'\x00\x01', b'{"step": 1e999}']


@pytest.mark.parametrize('damage', DAMAGE, ids=lambda line: line[:20])
def test_a_damaged_line_goes_and_is_told_of(capsys, damage):
    good = [json.dumps(dict(step=step, loss=1.0)).encode() for step in range(1, 8)]
    with open('metrics.jsonl', 'wb') as f:
        f.write(b'\n'.join([*good[:3], damage, *good[3:]]))             # nor does the last one end
    log = open_log('.', 5)
    log(6, loss=float('nan'), other=None)
    assert steps_in() == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert 'metrics.jsonl: line 4 is damaged' in said and said.count('\n') == 1
    assert logged_step(damage) is None


def test_a_folder_in_the_place_of_the_log(capsys):
    os.mkdir('metrics.jsonl')
    with pytest.raises(SystemExit) as end:
        open_log('.', 5)
    assert end.value.code == 2 and 'metrics.jsonl: is a folder' in capsys.readouterr().err


def test_tensorboard_forgets_what_comes_again(monkeypatch):
    """By purge_step TensorBoard drops that step and all later ones; a run begun anew has no others beside it."""
    boards = []

    class Board:
        def __init__(self, folder, purge_step):
            boards.append(purge_step)
            open(os.path.join(folder, f'events.out.tfevents.{len(boards)}.host'), 'w').close()

        def add_scalar(self, name, value, step):
            pass

        def close(self):
            pass
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Board))
    for step in (0, 30, 0):
        open_log('.', step, tensorboard=True)(step + 1, loss=1.0)
    assert boards == [1, 31, 1]
    assert [name for name in os.listdir() if 'tfevents' in name] == ['events.out.tfevents.3.host']
    assert sorted(name for name in os.listdir() if name.endswith('.old')) == [
        'events.out.earlier.1.host.old', 'events.out.earlier.2.host.old']


@pytest.fixture
def wandb(monkeypatch):
    """A W&B that notes what it is asked."""
    fake = types.ModuleType('wandb')
    fake.begun, fake.logged, fake.error = [], [], None

    def log(values, step):
        if fake.error:
            raise fake.error
        fake.logged.append(step)

    def init(**arguments):
        fake.begun.append(arguments)
        return types.SimpleNamespace(log=log)
    fake.init = init
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    return fake


def test_wandb_goes_on_with_its_run(wandb):
    for step in (0, 30, 0):
        open_log('.', step, wandb=dict(project='p'))
    first, resumed, anew = (arguments['id'] for arguments in wandb.begun)
    assert first == resumed != anew and all(arguments['resume'] == 'allow' for arguments in wandb.begun)


def test_what_fails_later_does_not_end_the_run(wandb, capsys):
    log = open_log('.', wandb=dict(project='p'))
    wandb.error = ValueError('the network is gone')
    for step in (1, 2, 3):
        log(step, loss=1.0)
    assert steps_in() == [1, 2, 3] and capsys.readouterr().out.count('W&B takes no more') == 1
