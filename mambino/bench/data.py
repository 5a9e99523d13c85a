"""The section data: prepare.py's memory, its speed beside bare tiktoken, and the training of a BPE.

The corpus is Python's standard library many times over, each copy with a number at its beginning,
or dropping copies would leave little of it: a third as text files, a third as jsonl, a third as
parquet. Speeds are of whole runs of prepare.py, processes started and files read and written,
against tiktoken's encode_batch with as many threads on a list in memory. Memory is what all
processes of a run have resident together, summed ten times a second: pages they share count each
time.
"""
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from statistics import median

from mambino import tokenizer
from mambino.bench.turns import HERE, all_times, ratio, take_turns, with_before
from mambino.configurator import fail
from mambino.prepare import stdlib

# --- the corpus -----------------------------------------------------------------------------------

def texts_of(mb):
    """Numbered copies of the standard library's files, about so many MB."""
    originals = []
    for source in stdlib.find_stdlib()[0]:
        with open(source.path, encoding='utf-8', errors='replace') as f:
            originals.append(f.read())
    size = 0
    for number, text in enumerate(itertools.cycle(originals)):
        if size >= mb * 1e6:
            return
        size += len(text)
        yield f'# {number}\n{text}'


def write_text(folder, mb):
    """Files of text in a folder; returns their size in MB."""
    size = 0
    for number, text in enumerate(texts_of(mb)):
        path = os.path.join(folder, str(number // 500), f'{number}.py')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
        size += len(text.encode())
    return size / 1e6


def write_mixed(folder, mb):
    """A third as files of text, a third as jsonl, a third as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    write_text(os.path.join(folder, 'text'), mb / 3)
    with open(os.path.join(folder, 'rows.jsonl'), 'w', encoding='utf-8') as f:
        for text in texts_of(mb / 3):
            f.write(json.dumps({'text': 'j' + text}) + '\n')
    schema = pa.schema([('text', pa.string())])
    rows = []
    with pq.ParquetWriter(os.path.join(folder, 'rows.parquet'), schema) as f:
        for text in texts_of(mb / 3):
            rows.append({'text': 'p' + text})
            if len(rows) == 2000:
                f.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        f.write_table(pa.Table.from_pylist(rows, schema))


# --- one run --------------------------------------------------------------------------------------

def prepare(root, *arguments):
    """Runs the prepare.py of a checkout; returns (seconds, peak MB of it and all below it)."""
    start, peak = time.time(), 0
    command = [sys.executable, os.path.join(root, 'prepare.py'), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        fail(f'prepare.py ended with status {process.returncode}')
    return time.time() - start, peak


def resident(pid):
    """MB resident of a process and its descendants; 0 where there is no /proc."""
    children, sizes = {}, {}
    for name in filter(str.isdigit, os.listdir('/proc') if os.path.isdir('/proc') else []):
        try:
            with open(f'/proc/{name}/stat') as f:
                fields = f.read().rsplit(')', 1)[1].split()
            children.setdefault(int(fields[1]), []).append(int(name))
            sizes[int(name)] = int(fields[21]) * os.sysconf('SC_PAGE_SIZE') / 1e6
        except (OSError, IndexError):
            pass  # it has ended meanwhile
    todo, total = [pid], 0
    while todo:
        process = todo.pop()
        total += sizes.get(process, 0)
        todo += children.get(process, [])
    return total


def encode_in_memory(tokenizer_path, mb, threads):
    """Prints the seconds of bare tiktoken; a process of its own calls this, as prepare.py is
    one."""
    fast = tokenizer.load_tokenizer(tokenizer_path).fast
    texts = list(texts_of(mb))
    start = time.time()
    fast.encode_batch(texts, num_threads=threads, disallowed_special=())
    print(time.time() - start)


def tiktoken(tokenizer_path, settings):
    """Seconds of encode_in_memory."""
    code = (f'import sys; sys.path.insert(0, {HERE!r}); from mambino.bench import data; '
            f'data.encode_in_memory({tokenizer_path!r}, {settings.speed_mb}, {settings.workers})')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if done.returncode:
        fail(f'tiktoken failed: {done.stderr.strip().splitlines()[-1]}')
    return float(done.stdout)


# --- measurements ---------------------------------------------------------------------------------

def measure(settings):
    """Rows of the speeds, if they are measured; prints them, and the memory."""
    rows = []
    work = tempfile.mkdtemp(prefix='bench_data', dir=settings.folder or None)
    try:
        if settings.speed_mb:
            rows = measure_speed(work, settings)
        if settings.memory_mb:
            measure_memory(work, settings)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return rows


def measure_speed(work, settings):
    """Whole runs of prepare.py with a tokenizer given, in one process and in several, and tiktoken,
    by turns."""
    corpus = os.path.join(work, 'text')
    trained = os.path.join(work, 'tokenizer')
    workers, BPE = settings.workers, f'--vocab_size={settings.vocab_size}'
    mb = write_text(corpus, settings.speed_mb)
    seconds, peak = prepare(HERE, corpus, BPE, f'--workers={workers}', f'--out={trained}')
    print(f'\nwith a BPE of {settings.vocab_size} trained on 100 MB of it, {workers} processes: '
          f'{seconds:.1f} s, at most {peak:.0f} MB')

    def new_row(label, processes):
        return dict(section='data', name='prepare', label=label, dtype='', root=HERE, processes=processes, times=[])

    one = new_row('prepare.py, one process', 1)
    many = new_row(f'prepare.py, {workers} processes', workers)
    bare = new_row(f'tiktoken, {workers} threads, in memory', 0)
    rows = with_before([one, many], settings)
    if not settings.against:
        rows.append(bare)

    def turn(row):
        if row is bare:
            return dict(step=[tiktoken(trained, settings)])
        seconds, _ = prepare(row['root'], corpus, '--max_file_mb=100', f'--tokenizer={trained}',
                             f'--workers={row["processes"]}', f'--out={work}/out')
        shutil.rmtree(f'{work}/out')  # the next run finds nothing to go on with
        return dict(step=[seconds])
    take_turns(rows, settings.rounds, turn)

    print(f'{"":<34}{"MB/s":>8}{"lowest":>9}{"highest":>9}')
    for row in rows:
        speeds = [mb / seconds for seconds in all_times(row, 'step')]
        show(row['label'], median(speeds), min(speeds), max(speeds))
    show(f'{workers} processes against one', *ratio(many, one))
    if bare in rows:
        show(f'{workers} processes against tiktoken', *ratio(many, bare))
    return rows


def show(label, middle, lowest, highest):
    print(f'{label:<34}{middle:>8.2f}{lowest:>9.2f}{highest:>9.2f}', flush=True)


def measure_memory(work, settings):
    corpus = os.path.join(work, 'mixed')
    workers = settings.workers
    write_mixed(corpus, settings.memory_mb)
    seconds, peak = prepare(HERE, corpus, f'--vocab_size={settings.vocab_size}', f'--workers={workers}',
                            f'--out={work}/mixed_data')
    print(f'\n{settings.memory_mb:,} MB of text, jsonl and parquet, {workers} processes: {seconds:.0f} s, '
          f'all processes together at most {peak:.0f} MB')
