"""prepare.py as its user meets it: run as a program on made-up folders, its output read back."""
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def prepare(folder, *argv, code=0):
    """Runs prepare.py in `folder`; returns its stdout, or, where it must fail, the one line on stderr."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py'), *map(str, argv)], cwd=folder,
                          capture_output=True, text=True, encoding='utf-8', env={**os.environ, 'PYTHONUTF8': '1'})
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
        assert not any('.tmp-' in name for _, folders, _ in os.walk(folder) for name in folders)
    return done.stderr if code else done.stdout

def dataset(folder):
    """(meta, train ids, val ids, tokenizer) after checking what must hold of every dataset."""
    assert sorted(os.listdir(folder)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    tok = tokenizer.load(folder)
    assert meta['format'] == 1 and meta['dtype'] == 'int32'
    assert (meta['vocab_size'], meta['eot']) == (tok.vocab_size, tok.eot)
    assert meta['tokenizer'] == {'kind': tok.kind, 'file': 'tokenizer.json', 'sha256': tok.sha256()}
    train, val = (np.fromfile(folder / f'{name}.bin', dtype='<i4') for name in ('train', 'val'))
    for name, ids in (('train', train), ('val', val)):
        split = meta['splits'][name]
        assert split['tokens'] == len(ids) > 0 and 0 <= ids.min() and ids.max() < meta['vocab_size']
        assert split['bytes'] == len(tok.decode(ids).encode('utf-8'))
    return meta, train, val, tok

def documents(ids, tok):
    ends = np.flatnonzero(ids == tok.eot)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [tok.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))

@pytest.fixture
def corpus(tmp_path):
    """A folder of 60 short text files."""
    for i in range(60):
        write(tmp_path / 'mine' / f'{i % 7}' / f'{i}.txt', f'document {i}\n' + 'some words and more words\n' * (i % 5 + 1))
    return tmp_path

def test_one_file_has_the_counts_of_nanogpt(tmp_path):
    rng = random.Random(0)
    alphabet = [chr(c) for c in range(32, 97)]  # 65 characters, as tinyshakespeare
    text = ''.join(alphabet) + ''.join(rng.choices(alphabet, k=1_115_394 - 65))
    write(tmp_path / 'input.txt', text)
    said = prepare(tmp_path, 'input.txt', '--tokenizer=char', '--out=data/char')
    meta, train, val, tok = dataset(tmp_path / 'data' / 'char')
    assert (len(train), len(val), tok.vocab_size, tok.eot) == (1_003_854, 111_540, 66, 65)
    assert tok.decode(train) + tok.decode(val) == text
    assert said.splitlines()[-1] == 'now: python train.py --dataset=char'
    assert '1,003,854' in said and '111,540' in said

@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_a_file_of_5_kb(tmp_path, kind):
    text = ('The quick brown fox; naïve café — 日本. ' * 200)[:5000]
    write(tmp_path / 'small.md', text)
    prepare(tmp_path, 'small.md', f'--tokenizer={kind}')
    meta, train, val, tok = dataset(tmp_path / 'data' / 'small')
    assert tok.decode(train) == text[:4500] and tok.decode(val) == text[4500:] and tok.kind == kind
    assert meta['sources'] == ['small.md'] and meta['val_fraction'] == 0.1 and meta['split_seed'] == 1337

def test_documents_go_by_their_content(corpus):
    prepare(corpus, 'mine', '--vocab_size=300')
    meta, train, val, tok = dataset(corpus / 'data' / 'mine')
    train, val = documents(train, tok), documents(val, tok)
    assert len(train) == meta['splits']['train']['documents'] and 0 < len(val) < 20
    originals = {p.read_text() for p in (corpus / 'mine').rglob('*.txt')}
    assert set(train) | set(val) == originals and len(train) + len(val) == 60

    # other names and another order, with every document twice: the same sides, and no document on both
    names = list(range(120))
    random.Random(1).shuffle(names)
    for name, text in zip(names, sorted(originals) * 2):
        write(corpus / 'other' / f'{name}.py', text)
    prepare(corpus, 'other', '--vocab_size=300')
    _, train2, val2, tok = dataset(corpus / 'data' / 'other')
    assert sorted(documents(train2, tok)) == sorted(train * 2) and sorted(documents(val2, tok)) == sorted(val * 2)
    prepare(corpus, 'mine', '--vocab_size=300', '--split_seed=5')
    _, _, val5, tok = dataset(corpus / 'data' / 'mine')
    assert set(documents(val5, tok)) != set(val)

def test_same_bytes_whatever_the_order_of_arguments(corpus):
    prepare(corpus, 'mine/1', 'mine/2', 'mine/3/3.txt', '--out=data/a')
    prepare(corpus, 'mine/3/3.txt', 'mine/2', 'mine/1', 'mine/2/2.txt', '--out=data/b')
    for name in ('train.bin', 'val.bin', 'tokenizer.json'):
        assert (corpus / 'data/a' / name).read_bytes() == (corpus / 'data/b' / name).read_bytes()

def test_neither_split_is_empty(tmp_path):
    for fraction in ('1e-9', '0.999999999'):
        for i in range(3):
            write(tmp_path / 'few' / f'{i}.txt', f'document number {i}')
        prepare(tmp_path, 'few', f'--val_fraction={fraction}')
        meta, *_ = dataset(tmp_path / 'data' / 'few')
        assert sorted(meta['splits'][name]['documents'] for name in ('train', 'val')) == [1, 2]
    for i in range(3):
        write(tmp_path / 'few' / f'{i}.txt', 'the same in all of them')  # one document, three times
    prepare(tmp_path, 'few', '--val_fraction=0.5')
    _, train, val, tok = dataset(tmp_path / 'data' / 'few')
    assert tok.decode(train) + tok.decode(val) == 'the same in all of them'

def test_every_skipped_file_has_its_reason(tmp_path):
    good = {'a.txt': 'plain\r\ntext\r\n', 'Makefile': 'all:\n', 'src/b.PY': 'x = 1\n', 'bom.txt': b'\xef\xbb\xbfwith a mark',
            'utf16.txt': 'sixteen ä'.encode('utf-16'), 'old.txt': 'Der Bär trägt Käse.'.encode('cp1252')}
    bad = {'null.txt': (b'ab\0c', 'binary'), 'empty.txt': (b'', 'empty'), 'blank.md': (b' \n\n', 'empty'),
           'photo.jpg': (b'\xff\xd8\xff', 'unknown type .jpg'), '.secret': (b'x', 'hidden'), 'program': (b'\x7fELF\0', 'binary'),
           'noise.txt': (bytes(range(1, 256)), 'neither UTF-8 nor Western text'),
           'broken.txt': (b'\xff\xfea', 'neither UTF-8 nor Western text'),
           'big.csv': (b'1,2\n' * 30_000, 'larger than 0.1 MB')}
    for name, content in good.items():
        write(tmp_path / 'in' / name, content)
    for name, (content, _) in bad.items():
        write(tmp_path / 'in' / 'sub' / name, content)
    write(tmp_path / 'in' / '.git' / 'config', 'hidden')
    said = prepare(tmp_path, 'in', '--tokenizer=byte', '--max_file_mb=0.1')
    meta, train, val, tok = dataset(tmp_path / 'data' / 'in')
    assert sorted(documents(train, tok) + documents(val, tok)) == sorted(
        ['plain\ntext\n', 'all:\n', 'x = 1\n', 'with a mark', 'sixteen ä', 'Der Bär trägt Käse.'])
    reasons = {os.path.basename(entry['file']): entry['reason'] for entry in meta['skipped']}
    assert reasons == {**{name: reason for name, (_, reason) in bad.items()}, '.git': 'hidden'}
    assert [(os.path.basename(g['file']), g['encoding']) for g in meta['guessed']] == [('old.txt', 'cp1252')]
    assert 'skipped 10:' in said and '2 hidden' in said

def test_named_file_is_read_whatever_its_extension(tmp_path):
    write(tmp_path / 'story.xyz', 'once upon a time ' * 20)
    prepare(tmp_path, 'story.xyz', '--max_file_mb=0')
    assert dataset(tmp_path / 'data' / 'story')

@pytest.mark.skipif(os.name == 'nt', reason='links need rights on Windows')
def test_links_in_circles_and_pipes(corpus):
    os.symlink(corpus / 'mine', corpus / 'mine' / '1' / 'up')
    os.symlink('nowhere', corpus / 'mine' / 'dangling.txt')
    os.symlink(corpus / 'mine' / '1' / '1.txt', corpus / 'mine' / 'twice.txt')
    os.mkfifo(corpus / 'mine' / 'pipe.txt')
    prepare(corpus, 'mine')
    meta, *_ = dataset(corpus / 'data' / 'mine')
    assert sum(split['documents'] for split in meta['splits'].values()) == 60
    assert {os.path.basename(e['file']): e['reason'] for e in meta['skipped']} == \
        {'dangling.txt': 'no regular file', 'pipe.txt': 'no regular file'}

def test_never_reads_what_it_wrote(corpus):
    for _ in range(2):
        prepare(corpus, '.', '--out=mine/data')
        meta, *_ = dataset(corpus / 'mine' / 'data')
        assert sum(split['documents'] for split in meta['splits'].values()) == 60
    assert [entry['reason'] for entry in meta['skipped']] == ['a prepared dataset']

def test_a_given_tokenizer_is_kept(corpus):
    prepare(corpus, 'mine', '--vocab_size=280', '--out=data/a')
    prepare(corpus, 'mine/1', '--tokenizer=data/a', '--out=data/b')
    assert dataset(corpus / 'data' / 'a')[0]['tokenizer'] == dataset(corpus / 'data' / 'b')[0]['tokenizer']
    write(corpus / 'x.txt', 'abc ' * 10)
    prepare(corpus, 'x.txt', '--tokenizer=char')
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--tokenizer=data/x', code=2)

def test_bpe_learns_from_train_alone(tmp_path):
    write(tmp_path / 'x.txt', 'ab ' * 3000 + 'zq ' * 300)
    prepare(tmp_path, 'x.txt', '--val_fraction=0.1')
    tok = dataset(tmp_path / 'data' / 'x')[3]
    assert len(tok.encode(' ab')) == 1 and len(tok.encode(' zq')) == 3

def test_sample_is_bounded_and_even():
    module = importlib.import_module('prepare')
    texts = [str(i % 10) * 1_000_000 for i in range(10)]
    module.sample_mb = 2.0
    some = list(module.sample(texts, 10_000_000))
    assert 1_500_000 < sum(map(len, some)) < 2_500_000 and {text[0] for text in some} == set('0123456789')
    module.sample_mb = 100.0
    assert list(module.sample(texts, 10_000_000)) == texts

def test_errors_are_one_line_and_harm_nothing(corpus):
    prepare(corpus, 'mine', '--out=data/old', '--vocab_size=270')
    before = {p.name: p.read_bytes() for p in (corpus / 'data' / 'old').iterdir()}
    write(corpus / 'pictures' / 'a.png', b'\x89PNG')
    write(corpus / 'pictures' / 'b.png', b'\x89PNG')
    write(corpus / 'letters' / 'to_mother.txt', 'dear mother')
    write(corpus / 'one.txt', 'x')
    for words, *argv in (
        ('did you mean mine?', 'mime'),
        ('2 unknown type .png', 'pictures'),
        ('val_fraction=1.0', 'mine', '--val_fraction=1'), ('val_fraction=0.0', 'mine', '--val_fraction=0'),
        ('tokenizer=bpee', 'mine', '--tokenizer=bpee'), ('257', 'mine', '--vocab_size=100'),
        ('did you mean --vocab_size?', 'mine', '--vocab_sise=300'),
        ('will not be overwritten', 'mine', '--out=letters'), ('will not be overwritten', 'mine', '--out=one.txt'),
        ('one.txt/data', 'mine', '--out=one.txt/data'),
        ('too few to split', 'one.txt', '--out=data/old'),
    ):
        assert words in prepare(corpus, *(['--out=data/old'] if len(argv) == 1 else []), *argv, code=2).replace('\\', '/')
    assert {p.name: p.read_bytes() for p in (corpus / 'data' / 'old').iterdir()} == before
    assert (corpus / 'letters' / 'to_mother.txt').read_text() == 'dear mother'

    write(corpus / 'data' / 'old' / 'my_notes.txt', 'mine')  # now it is more than a dataset
    assert 'will not be overwritten' in prepare(corpus, 'mine', '--out=data/old', code=2)

@pytest.mark.parametrize('crash', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_stopped_while_writing(corpus, monkeypatch, capsys, crash):
    """Ctrl-C and a full disk in the middle of encoding, and at the very last step."""
    monkeypatch.chdir(corpus)
    prepare(corpus, 'mine', '--vocab_size=270')
    before = {p.name: p.read_bytes() for p in (corpus / 'data' / 'mine').iterdir()}
    module = importlib.import_module('prepare')
    monkeypatch.setattr(module, 'inputs', ['mine'])

    def stop(*args):
        raise crash
    rename = os.rename
    for target, name, replacement in (
            (tokenizer.BPETokenizer, 'encode_batch', stop), (module.struct, 'pack', stop),
            (os, 'rename', lambda a, b: stop() if b.endswith('mine') and not a.endswith('-old') else rename(a, b))):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(target, name, replacement)
            module.main()
        assert left.value.code == (130 if isinstance(crash, KeyboardInterrupt) else 2)
        err = capsys.readouterr().err.strip()
        assert err.count('\n') == 0 and 'nothing was changed' in err
        assert {p.name: p.read_bytes() for p in (corpus / 'data' / 'mine').iterdir()} == before
        assert os.listdir(corpus / 'data') == ['mine']

@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGTERM to catch')
@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_working(corpus, how):
    prepare(corpus, 'mine', '--vocab_size=270')
    before = {p.name: p.read_bytes() for p in (corpus / 'data' / 'mine').iterdir()}
    write(corpus / 'mine' / 'large.txt', 'many different words %d %d\n' * 400_000 % tuple(range(800_000)))
    run = subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare.py'), 'mine'], cwd=corpus,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(os.listdir(corpus / 'data')) == 1:
        time.sleep(0.005)
    run.send_signal(how)
    assert run.wait(30) != 0
    assert {p.name: p.read_bytes() for p in (corpus / 'data' / 'mine').iterdir()} == before
    assert len(os.listdir(corpus / 'data')) == (1 if how == signal.SIGTERM else 2)
    os.remove(corpus / 'mine' / 'large.txt')
    assert ('is from a run that was killed' in prepare(corpus, 'mine')) == (how == signal.SIGKILL)
    dataset(corpus / 'data' / 'mine')

def test_standard_library_by_default(tmp_path, monkeypatch):
    module = importlib.import_module('prepare')
    paths = [path.replace('\\', '/') for path, _ in module.find_stdlib()]
    assert any(path.endswith('/argparse.py') for path in paths) and paths == sorted(paths)
    assert not any(part in path for path in paths for part in ('/test/', '/site-packages/', '/idle_test/'))
    assert 5e6 < sum(map(os.path.getsize, paths)) < 40e6
    small = tmp_path / 'lib'  # a stand-in, for time
    for path in paths[:30]:
        write(small / os.path.basename(path), open(path, 'rb').read())
    write(small / 'test' / 'test_x.py', 'never read')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.sysconfig, 'get_path', lambda name: str(small))
    monkeypatch.setattr(module, 'inputs', [])
    monkeypatch.setattr(module, 'skipped', [])
    module.main()
    meta, *_ = dataset(tmp_path / 'data' / 'stdlib')
    assert 'standard library' in meta['sources'][0]
    shutil.rmtree(tmp_path / 'data')
