"""The fixtures of many tests; puts the project root and this folder on sys.path, so that they
import the scripts as they lie.
"""
import os
import re
import shutil
import sys

import pytest

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py: two processes share the cores

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]
pytest.register_assert_rewrite('helpers')         # its asserts, too, show the values they compared

# Those that take longest, which are begun first: where processes share the files, none is left with a long one at the
# end while the others have nothing to do.
LONGEST = (
    'test_fsdp.py', 'test_page_runs.py', 'test_train.py', 'test_page_use.py', 'test_prepare_stopped.py',
    'test_command.py', 'test_notebook.py', 'test_serve.py', 'test_library.py', 'test_scheduler.py', 'test_bench.py',
    'test_decode.py', 'test_export.py',
    'test_to_onnx.py', 'test_train_results.py', 'test_to_hf.py', 'test_from_hf.py', 'test_kernels.py',
    'test_isolate.py', 'test_generation.py', 'test_prepare.py', 'test_memory.py', 'test_prepare_parts.py',
    'test_scarce_memory.py', 'test_serve.py', 'test_before.py',
)


def pytest_configure(config):
    config.option.loadscopereorder = False        # else xdist begins with those that have most tests


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


# Torch is imported by the fixtures that need it: the tests of prepare.py do without.

@pytest.fixture
def one_thread():
    """As in the processes of `launch`: sums in another order have other bits."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def own_code(tmp_path_factory):
    """The modelling files that transformers opens lie in no cache of whoever runs this, and no other file's
    tests find the folder of these.
    """
    transformers = pytest.importorskip('transformers')

    def forget():
        for name in [name for name in sys.modules if name.split('.')[0] == 'transformers_modules']:
            del sys.modules[name]
    patch = pytest.MonkeyPatch()
    patch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
    # without the folders of others' files, where theirs would be found first
    others = [path for path in sys.path if os.path.isdir(os.path.join(path, 'transformers_modules'))]
    patch.setattr(sys, 'path', [path for path in sys.path if path not in others])
    forget()
    yield
    forget()
    patch.undo()


@pytest.fixture
def quiet_and_seeded(one_thread):
    """One thread, since tensors this small only lose by more; random numbers that are the same each
    time.
    """
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    """A folder with three datasets, of which `more` has the tokenizer of `tiny`, and a finished
    run, to copy from.
    """
    from helpers.runs import script, train, write_text
    folder = tmp_path_factory.mktemp('template')
    before = os.getcwd()
    os.chdir(folder)
    try:
        write_text('tiny.txt')
        write_text('other.txt', chars='xyz \n', seed=2)
        write_text('more.txt', 2000, seed=3)
        for name, tokenizer in (('tiny', 'char'), ('other', 'char'), ('more', 'data/tiny')):
            assert (
                script('prepare.py', f'{name}.txt --tokenizer={tokenizer} --out=data/{name}') == 0
            )
        train('--model=gpt --max_iters=10')
        os.rename('out', 'done')
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(template, tmp_path, monkeypatch, capsys):
    """The working directory of a test, with data/ in it."""
    shutil.copytree(template / 'data', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def finished(here, template):
    """… and in out/ a run of 10 steps."""
    shutil.copytree(template / 'done', here / 'out')


@pytest.fixture
def corpus(tmp_path):
    """A folder with 60 short text files in mine/, to be prepared."""
    from helpers.prepare import write
    for i in range(60):
        text = f'document {i}\n' + 'some words and more words\n' * (i % 5 + 1)
        write(tmp_path / 'mine' / f'{i % 7}' / f'{i}.txt', text)
    return tmp_path


# --- to read files: test_readers.py, test_pdf.py, ...

@pytest.fixture(scope='module')
def no_reader_left():
    """The reader process of a file's tests ends with them."""
    from mambino.prepare import isolate
    yield
    isolate.stop_reader()


@pytest.fixture(params=['pypdf', 'pypdfium2'])
def engine(request):
    """Each of the packages that read PDFs."""
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope='session')
def foreign_tokenizers(tmp_path_factory):
    """A folder with a tokenizer.json of each kind that others make, to read from."""
    from helpers import foreign
    folder = tmp_path_factory.mktemp('tokenizers')
    for kind, make in foreign.KINDS.items():
        foreign.save(make(), folder / kind)
    return folder


# --- to sample from: test_sample.py, test_sessions.py, test_generation.py, test_text.py

@pytest.fixture(scope='session')
def trained_runs(tmp_path_factory):
    """A folder with two trained models, char/ and bpe/, to copy from."""
    from helpers.sampling import train_runs
    folder = tmp_path_factory.mktemp('trained')
    train_runs(folder)
    return folder


@pytest.fixture(scope='module')
def runs(trained_runs, tmp_path_factory):
    """A copy of it, the working directory of a file's tests."""
    folder = tmp_path_factory.mktemp('runs')
    shutil.copytree(trained_runs, folder, dirs_exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def run(runs, capsys):
    """run(kind, flags) → the text sample.py wrote."""
    from helpers.runs import script

    def run(kind, flags=''):
        capsys.readouterr()
        assert script('sample.py', f'--out_dir={kind} --device=cpu --max_new_tokens=60 --start=e', flags) == 0
        return re.sub(r'\A(\w+ +=.*\n)+', '', capsys.readouterr().out)  # without the settings it repeats
    return run


@pytest.fixture(params=['char', 'bpe'])
def kind(request):
    """Each of the runs."""
    return request.param


@pytest.fixture(params=['gpt', 'window', 'mamba1', 'mamba2', 'hybrid'])
def net(request):
    """A small model of each kind."""
    from helpers.sampling import small_net
    return small_net(request.param)


@pytest.fixture(params=['compiled', 'anywhere', 'defined'])
def way(request, monkeypatch):
    """How operations are computed: by native.cpp; by PyTorch, where there is no compiler; by the definitions alone, as
    with MAMBINO_KERNELS=0."""
    import torch

    from mambino.kernels import cpu, cpu_mamba, cpu_mamba3, native, registry

    def as_many_as_items(n, work):
        """Threads are used however small the work."""
        return max(1, min(torch.get_num_threads(), n))

    if request.param == 'anywhere':
        monkeypatch.setattr(native, 'library', lambda: None)
    if request.param == 'defined':
        monkeypatch.setattr(registry, 'ENABLED', False)
    monkeypatch.setattr(cpu, 'thread_count', as_many_as_items)
    monkeypatch.setattr(cpu_mamba, 'thread_count', as_many_as_items)
    monkeypatch.setattr(cpu_mamba3, 'thread_count', as_many_as_items)
    monkeypatch.setattr(native, 'thread_count', as_many_as_items)
    if request.param == 'compiled' and native.library() is None:
        pytest.skip('no C++ compiler here: native.cpp is not tested')
    return request.param


# --- to look at the page: test_page_use.py, test_page_runs.py, see helpers/browser.py

@pytest.fixture(scope='module')
def served_folder(trained_runs, tmp_path_factory):
    """A copy of the two small runs and their datasets, for a server."""
    copy = tmp_path_factory.mktemp('served')
    shutil.copytree(trained_runs, copy, dirs_exist_ok=True)
    return copy


@pytest.fixture(scope='module')
def server(served_folder):
    """serve.py in that folder, a process of its own."""
    for package in ('fastapi', 'uvicorn', 'nicegui'):
        pytest.importorskip(package)
    from helpers.browser import Server
    server = Server(served_folder)
    try:
        yield server.start()
    finally:
        server.stop()
    assert 'Traceback' not in server.said(), server.said()


@pytest.fixture(scope='module')
def browser():
    """A Chromium."""
    from helpers.browser import open_browser
    playwright, chromium = open_browser()
    yield chromium
    chromium.close()
    playwright.stop()


@pytest.fixture
def open_file(browser):
    """open_file(path) → a page with this file, which asks for nothing else and has nothing to complain of."""
    from pathlib import Path

    from helpers.browser import Watched
    context = browser.new_context(color_scheme='dark')
    watched = Watched(context)
    opened = []

    def open_file(path):
        page = context.new_page()
        opened.append(Path(path).resolve().as_uri())
        page.goto(opened[-1])
        return page
    yield open_file
    context.close()
    assert watched.elsewhere == opened and not watched.errors


@pytest.fixture
def watched_context(browser, server):
    """A browser's profile in which the page's secret is known, and its Watched."""
    from helpers.browser import PATIENCE, Watched
    context = browser.new_context(viewport=dict(width=1280, height=800))
    context.set_default_timeout(PATIENCE * 1000)
    watched = Watched(context)
    context.request.get(server.at('/'))         # takes the cookie
    yield context, watched
    context.close()


@pytest.fixture
def watched(watched_context):
    """The Watched of page."""
    return watched_context[1]


@pytest.fixture
def page(watched_context):
    """A tab; when the test is over it has asked for nothing elsewhere and complained of nothing."""
    context, watched = watched_context
    yield context.new_page()
    watched.check()


# --- to ask the API: test_openai*.py

@pytest.fixture(scope='module')
def api(runs):
    """A Server of the runs char and bpe, and of tuned, the latter with a chat template."""
    from helpers.served import serving, write_tuned
    write_tuned()
    with serving(runs, out_dir='bpe') as server:
        yield server


@pytest.fixture
def ask(api):
    """ask(prompt, **parameters) → the completion of a model, bpe."""
    client = api.client()

    def ask(prompt, model='bpe', **parameters):
        return client.completions.create(model=model, prompt=prompt, **parameters)
    return ask


@pytest.fixture
def talk(api):
    """talk(messages, **parameters) → the answer of a model, bpe."""
    from helpers.served import HELLO
    client = api.client()

    def talk(messages=HELLO, model='bpe', **parameters):
        return client.chat.completions.create(model=model, messages=messages, **parameters)
    return talk


@pytest.fixture
def jobs(api, monkeypatch):
    """A list of the jobs that come to the models' schedulers."""
    seen = []
    for name in ('bpe', 'tuned', 'char'):
        scheduler = api.scheduler(name)

        def submit(job, send, before=scheduler.submit):
            seen.append(job)
            return before(job, send)
        monkeypatch.setattr(scheduler, 'submit', submit)
    return seen
