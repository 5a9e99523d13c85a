"""docs/train_on_colab.ipynb: run from its first to its last cell, with a tiny model on the CPU; what is in the file."""
import ast
import os
import re

import pytest
from helpers.runs import ROOT, write_text
from test_docs import settings_of

PATH = os.path.join(ROOT, 'docs', 'train_on_colab.ipynb')
nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
TINY = ('--n_layer=1 --n_embd=32 --block_size=32 --batch_size=2 --tokens_per_step=64 --max_iters=4 --device=cpu '
        '--dtype=float32')


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_of(notebook):
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == 'code'}


def said(notebook, name):
    """What a cell has said."""
    cell, = (cell for cell in notebook.cells if cell.id == name)
    return ''.join(output.get('text', '') for output in cell.outputs)


def run(notebook, folder, **choices):
    """Runs all cells in a folder; choices: in the place of those of its second cell."""
    cell, = (cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', ()))
    cell.source += '\n' + '\n'.join(f'{name} = {value!r}' for name, value in choices.items())
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources=dict(
        metadata=dict(path=str(folder))))
    client.execute(env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_what_is_in_the_file(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.accelerator == 'GPU'
    for cell in notebook.cells:
        assert cell.cell_type == 'markdown' or (cell.outputs == [] and cell.execution_count is None)
        assert max(map(len, cell.source.split('\n'))) <= 120
    known = set().union(*(settings_of(f'{name}.py') for name in ('prepare', 'train', 'sample', 'export')))
    for name, source in code_of(notebook).items():
        ast.parse(source)                       # no magic: it is the same in every Jupyter
        if name not in ('get', 'device'):
            assert set(re.findall(r'--(\w+)', source)) <= known, name


@pytest.mark.slow
def test_from_files_to_a_packed_model(notebook, tmp_path):
    write_text(tmp_path / 'my text.txt', 20000)
    run(notebook, tmp_path, repository=ROOT, files="'my text.txt'", settings=TINY, model='gpt', start='et',
        formats='safetensors')
    assert 'torch' in said(notebook, 'device') and '4 steps' in said(notebook, 'train')
    assert 'et' in said(notebook, 'sample') and 'model.zip' in said(notebook, 'export')
    curves, = (cell for cell in notebook.cells if cell.id == 'curves')
    assert any('image/png' in output.get('data', {}) for output in curves.outputs)
    assert {'data', 'out', 'model', 'model.zip', 'curves.png'} <= set(os.listdir(tmp_path))
    needed = (tmp_path / 'needed.txt').read_text()
    assert 'numpy' in needed and 'torch' not in needed          # the one that is there stays


def test_without_an_address_it_says_what_is_missing(notebook, tmp_path):
    (tmp_path / 'below').mkdir()
    with pytest.raises(nbclient.exceptions.CellExecutionError, match='where is Mambino'):
        run(notebook, tmp_path / 'below')


def test_a_command_that_fails_ends_it_with_what_it_said(notebook, tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match='ended with status 2'):
        run(notebook, tmp_path, repository=ROOT, files='none.txt')
    assert 'error: ' in said(notebook, 'prepare') and 'none.txt' in said(notebook, 'prepare')
