"""The models of a folder: which there are, loading, replacing, leaving."""
import asyncio
import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future

import pytest

pytest.importorskip('fastapi')

import torch
from helpers.runs import POSIX, cut
from helpers.served import wait_until

from mambino.configurator import fail
from mambino.serve import library as libraries
from mambino.serve.library import Library
from mambino.serve.told import NoModel, Refused, told
from mambino.serve.work import Done, Failed, Job, Room


@pytest.fixture
def folder(trained_runs, tmp_path):
    """With the runs bpe/ and char/, of which bpe/ is the latest."""
    for age, name in enumerate(('bpe', 'char')):
        shutil.copytree(trained_runs / name, tmp_path / name)
        for file in (tmp_path / name).glob('*.pt'):
            os.utime(file, (1e9 - age, 1e9 - age))
    return tmp_path


@pytest.fixture
def opened(folder):
    """opened(out_dir='', memory=0.0) → a Library of that folder."""
    libraries = []

    def opened(out_dir='', memory=0.0, adapters='', quantize=''):
        library = Library(str(folder), str(out_dir), 'cpu', 'float32', quantize, adapters, memory, Room(rows=2))
        library.lines = []
        library.says = library.lines.append
        libraries.append(library)
        return library
    yield opened
    for library in libraries:
        library.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """What takes seconds takes none."""
    monkeypatch.setattr(libraries, 'RECENT', 0)
    monkeypatch.setattr(libraries, 'TICK', 0.01)


def ids_of(library):
    return [run['id'] for run in library.names()]


def answer(served, max_tokens=3, gate=None):
    """The events of an answer, at its end. gate: waited for at the first one."""
    events = []
    ended = threading.Event()

    def send(event):
        events.append(event)
        if gate:
            gate.wait(20)
        if isinstance(event, (Done, Failed)):
            ended.set()
    served.scheduler.submit(Job(ids=[5, 6], max_tokens=max_tokens, ignore_eos=True), send)
    return events, ended


def replace(folder, name, by):
    """Puts another run's files in the place of one's, each whole, as train.py does."""
    for file in ('best.pt', 'ckpt.pt'):
        shutil.copy(folder / by / file, folder / name / 'new')
        os.replace(folder / name / 'new', folder / name / file)


# --- which there are ------------------------------------------------------------------------------

def test_the_latest_comes_first_and_answers(opened, folder):
    library = opened()
    assert ids_of(library) == ['bpe', 'char'] and library.get().id == 'bpe'
    os.utime(folder / 'char' / 'best.pt')
    assert ids_of(library) == ['char', 'bpe'] and library.get('').id == 'char'
    assert library.get('bpe').id == 'bpe'


def test_a_copy_is_not_the_one_that_answers(opened, folder):
    """As export.py writes them, rounded: it is newer than the run that it was made of."""
    (folder / 'char' / 'metrics.jsonl').touch()
    (folder / 'bpe' / 'metrics.jsonl').unlink()
    os.utime(folder / 'bpe' / 'best.pt')
    library = opened()
    assert ids_of(library) == ['char', 'bpe'] and library.default() == 'char' and library.get().id == 'char'
    assert ids_of(opened(folder / 'bpe')) == ['bpe', 'char']        # unless it was asked for


def test_out_dir_answers_wherever_it_is(opened, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere') / 'far'
    shutil.copytree(folder / 'char', elsewhere)
    library = opened(elsewhere)
    assert set(ids_of(library)) == {'far', 'bpe', 'char'} and library.default() == 'far'
    assert library.get().out_dir == str(elsewhere)
    library = opened(elsewhere / 'ckpt.pt')
    assert library.get().id == 'ckpt.pt'


def test_what_is_no_run_is_not_served(opened, folder):
    (folder / 'empty').mkdir()
    (folder / 'file').write_text('ckpt.pt')
    shutil.copytree(folder / 'char', folder / '.hidden')
    (folder / 'folders' / 'ckpt.pt').mkdir(parents=True)
    library = opened()
    assert set(ids_of(library)) == {'bpe', 'char'}
    outside = ('..', '.', '/', 'bpe/', '../bpe', str(folder / 'bpe'), 'bpe\0')
    for name in ('empty', 'file', '.hidden', 'folders', *outside):
        with pytest.raises(NoModel, match='there are: bpe, char') as caught:
            library.get(name)
        assert caught.value.status == 404


@POSIX
def test_no_link_leads_out_of_the_folder(opened, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    shutil.copytree(folder / 'char', elsewhere / 'secret')
    os.symlink(elsewhere / 'secret', folder / 'link')
    (folder / 'files').mkdir()
    os.symlink(elsewhere / 'secret' / 'ckpt.pt', folder / 'files' / 'ckpt.pt')
    os.symlink(folder / 'char', folder / 'inside')
    assert set(ids_of(opened())) == {'bpe', 'char', 'inside'}


def test_no_model_yet(tmp_path):
    library = Library(str(tmp_path), '', 'cpu', 'auto', '', '', 0.0, Room())
    with pytest.raises(NoModel, match='train one'):
        library.get()
    assert library.default() == '' and library.names() == []


# --- loading --------------------------------------------------------------------------------------

def slow_loading(monkeypatch):
    """From here on loading waits for the event that is returned; the list has each that began."""
    may_go, begun = threading.Event(), []
    load = libraries.contents_of

    def loaded(path):
        begun.append(os.path.basename(path))
        assert may_go.wait(20)
        return load(path)
    monkeypatch.setattr(libraries, 'contents_of', loaded)
    return may_go, begun


def test_who_come_together_load_it_once(opened, monkeypatch):
    library = opened()
    may_go, begun = slow_loading(monkeypatch)
    got = []
    threads = [threading.Thread(target=lambda: got.append(library.get('char'))) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: begun)
    may_go.set()
    for thread in threads:
        thread.join(20)
    assert begun == ['char'] and len(got) == 5 and len({id(served) for served in got}) == 1


def test_who_wait_for_a_model_take_no_thread_from_others(opened, monkeypatch):
    library = opened()
    library.get('bpe')
    may_go, begun = slow_loading(monkeypatch)

    async def ask():
        waiting = [asyncio.ensure_future(library.fetch('char')) for _ in range(200)]
        while not begun:
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(library.fetch('bpe'), 20)).id == 'bpe'
        for one in waiting[:100]:                       # they leave
            one.cancel()
        await asyncio.sleep(0)
        may_go.set()
        return await asyncio.gather(*waiting[100:])
    got = asyncio.run(ask())
    assert begun == ['char'] and {id(served) for served in got} == {id(library.get('char'))}


def test_a_model_that_loads_keeps_nobody_from_another(opened, monkeypatch):
    library = opened()
    library.get('bpe')
    may_go, begun = slow_loading(monkeypatch)
    waiting = threading.Thread(target=lambda: library.get('char'))
    waiting.start()
    wait_until(lambda: begun)
    assert answer(library.get('bpe'))[1].wait(20)
    assert ids_of(library) == ['bpe', 'char']
    may_go.set()
    waiting.join(20)
    assert set(library.schedulers()) == {'bpe', 'char'}


def test_who_waits_for_a_model_is_told_when_the_server_ends(opened, monkeypatch):
    library = opened()
    may_go, begun = slow_loading(monkeypatch)
    told = []

    def get():
        try:
            library.get('char')
        except NoModel as error:
            told.append((str(error), error.status))
    waiting = threading.Thread(target=get)
    waiting.start()
    wait_until(lambda: begun)
    library.close()
    waiting.join(20)
    assert told == [('the server is ending', 503)]
    may_go.set()
    with pytest.raises(NoModel, match='ending'):
        library.get('bpe')


def test_a_damaged_one_is_told_and_read_once(opened, folder, monkeypatch):
    for file in (folder / 'char').glob('*.pt'):
        cut(file)
    library = opened()
    may_go, begun = slow_loading(monkeypatch)
    may_go.set()
    for _ in range(3):
        with pytest.raises(NoModel, match='not a readable checkpoint') as caught:
            library.get('char')
        assert caught.value.status == 503
    assert begun == ['char']
    replace(folder, 'char', 'bpe')
    assert library.get('char').id == 'char'


def test_a_model_without_a_tokenizer_is_refused(opened, folder):
    for file in (folder / 'char').glob('*.pt'):
        ckpt = torch.load(file, weights_only=True)
        ckpt['tokenizer'] = None
        torch.save(ckpt, file)
    with pytest.raises(NoModel, match='without a tokenizer') as caught:
        opened().get('char')
    assert caught.value.status == 400


def test_a_bug_in_loading_is_told_to_who_asked(opened, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise ZeroDivisionError('a bug')
    library = opened()
    monkeypatch.setattr(libraries, 'tokenizer_of', broken)
    with pytest.raises(NoModel, match='cannot be loaded: ZeroDivisionError'):
        library.get('char')
    assert 'Traceback' in capsys.readouterr().err
    monkeypatch.undo()
    assert library.refused


@pytest.mark.parametrize('error', [
    MemoryError(), torch.OutOfMemoryError('CUDA out of memory'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])
def test_too_little_memory_is_told(opened, monkeypatch, error):
    def broken(*arguments, **options):
        raise error
    monkeypatch.setattr(libraries, 'prepare_model', broken)
    with pytest.raises(NoModel, match='not enough memory') as caught:
        opened().get('char')
    assert caught.value.status == 503


def test_the_fingerprint_is_that_of_sample_py(opened, folder, monkeypatch):
    from helpers.runs import script

    from mambino.sample.sessions import load_session
    monkeypatch.chdir(folder)
    assert script('sample.py', '--out_dir=char --session=tale --start=e --max_new_tokens=3 --device=cpu') == 0
    served = opened().get('char')
    session = load_session('char/sessions/tale.pt', served.fingerprint, 'cpu', served.tok.vocab_size)
    assert len(session.tokens) >= 3


def test_rounded_weights(opened):
    served = opened(quantize='int8').get('bpe')
    assert 'int8 on cpu' in served.about and answer(served)[1].wait(20)


# --- replacing ------------------------------------------------------------------------------------

def test_a_file_that_is_replaced_is_loaded_while_the_old_one_answers(opened, folder, monkeypatch):
    library = opened()
    before = library.get('char')
    may_go, begun = slow_loading(monkeypatch)
    replace(folder, 'char', 'bpe')
    assert library.get('char') is before                # nobody waits
    wait_until(lambda: begun)
    assert library.get('char') is before and begun == ['char']
    may_go.set()
    wait_until(lambda: library.get('char') is not before)
    assert library.get('char').tok.kind == 'bpe'
    wait_until(lambda: not before.scheduler.is_alive() and not library.leaving)
    assert any('in the place of what was there before' in line for line in library.lines)


def test_an_answer_that_is_given_ends_with_the_model_that_began_it(opened, folder):
    library = opened()
    before = library.get('char')
    gate = threading.Event()
    events, ended = answer(before, 30, gate)
    replace(folder, 'char', 'bpe')
    wait_until(lambda: library.get('char') is not before)
    assert before.scheduler.is_alive() and library.leaving == [before]
    gate.set()
    assert ended.wait(20) and events[-1].reason == 'length' and events[-1].tokens == 30
    wait_until(lambda: not before.scheduler.is_alive())


def test_a_damaged_file_in_its_place_leaves_the_old_one_and_is_said_once(opened, folder, monkeypatch):
    monkeypatch.setattr(libraries, 'AGAIN', 0)
    library = opened()
    before = library.get('char')
    shutil.copy(folder / 'char' / 'best.pt', folder / 'sound')
    cut(folder / 'char' / 'best.pt')
    for _ in range(3):
        assert library.get('char') is before
        wait_until(lambda: not library.loading)
    notes = [line for line in library.lines if line.startswith('note: ')]
    assert len(notes) == 1 and 'the model of before goes on' in notes[0]
    os.replace(folder / 'sound', folder / 'char' / 'best.pt')
    wait_until(lambda: library.get('char') is not before)


def test_a_folder_that_vanishes_is_served_as_long_as_it_is_loaded(opened, folder):
    library = opened()
    served = library.get('char')
    shutil.rmtree(folder / 'char')
    assert library.get('char') is served and 'char' in ids_of(library)
    assert answer(served)[1].wait(20)
    run = library.find('char')
    library.memory = 1e-9
    library.get('bpe')                                  # takes its place
    future = Future()
    library.load_for(run, future)                       # for somebody who has found it a moment before
    with pytest.raises(NoModel):
        future.result(20)
    with pytest.raises(NoModel) as caught:
        library.get('char')
    assert caught.value.status == 404 and ids_of(library) == ['bpe']


# --- leaving --------------------------------------------------------------------------------------

def test_the_one_used_longest_ago_leaves(opened, folder):
    shutil.copytree(folder / 'char', folder / 'third')
    library = opened(memory=100.0)
    first, second = library.get('bpe'), library.get('char')
    library.get('bpe')
    library.memory = (first.size + second.size + 1) / 1e9
    library.get('third')
    assert set(library.schedulers()) == {'bpe', 'third'}
    wait_until(lambda: not second.scheduler.is_alive())
    assert first.scheduler.is_alive()
    with pytest.raises(NoModel, match='left memory'):
        answer(second)


def test_one_that_answers_never_leaves(opened):
    library = opened(memory=1e-9)
    served = library.get('char')
    gate = threading.Event()
    events, ended = answer(served, 30, gate)
    library.get('bpe')
    assert set(library.schedulers()) == {'bpe', 'char'}
    gate.set()
    assert ended.wait(20) and events[-1].reason == 'length'


def test_nor_does_one_that_somebody_has_just_got(opened, monkeypatch):
    monkeypatch.setattr(libraries, 'RECENT', 60)
    library = opened(memory=1e-9)
    library.get('char')
    library.get('bpe')
    assert set(library.schedulers()) == {'bpe', 'char'}


def test_all_end_with_the_library(opened):
    library = opened()
    served = library.get('char')
    gate = threading.Event()
    events, ended = answer(served, 10**6, gate)
    gate.set()
    began = time.monotonic()
    library.close()
    assert ended.wait(5) and events[-1].reason == 'cancelled' and time.monotonic() - began < 10
    assert not served.scheduler.is_alive()


# --- what is said ---------------------------------------------------------------------------------

def test_each_thread_says_its_own(capsys):
    inside, done = threading.Event(), threading.Event()
    caught = []

    def other():
        try:
            with told():
                inside.set()
                done.wait(20)
                print('note: of mine', file=sys.stderr)
                fail('of mine')
        except Refused as error:
            caught.append((str(error), error.status))
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(20)
    print('of another', file=sys.stderr)
    assert capsys.readouterr().err == 'of another\n'
    done.set()
    thread.join(20)
    assert caught == [('of mine', 503)] and capsys.readouterr().err == 'note: of mine\n'
