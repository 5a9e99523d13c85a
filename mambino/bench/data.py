"""
Measures prepare.py: memory, speed beside bare tiktoken, and the training of a BPE.

    python bench_data.py                       # speed and BPE on 200 MB, memory on 2,000 MB; some minutes, 8 GB of disk
    python bench_data.py --memory_mb=4000      # the same memory?

The corpus is Python's standard library many times over, each copy with a number at its beginning, or dropping copies would
leave little of it: a third as text files, a third as jsonl, a third as parquet. Speeds are of whole runs of prepare.py,
processes started and files read and written, against tiktoken's encode_batch with as many threads on a list in memory.
Memory is what all processes of a run have resident together, summed ten times a second: pages they share count each time.
"""
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from mambino.prepare import sources
from mambino.configurator import configure, fail

speed_mb = 200      # size of the corpus for speed; 0 leaves that out
memory_mb = 2000    # size of the corpus for memory; 0 leaves that out
workers = 2
vocab_size = 16384
rounds = 3          # of the speeds; ratios are taken within a round
folder = ''         # where to work; '' is a new folder for temporary files, deleted at the end
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    configure(globals(), positional=None)

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

def texts_of(mb):
    """Numbered copies of the standard library's files, about so many MB."""
    originals = [open(source.path, encoding='utf-8', errors='replace').read() for source in sources.find_stdlib()[0]]
    size = 0
    for number, text in enumerate(itertools.cycle(originals)):
        if size >= mb * 1e6:
            return
        size += len(text)
        yield f'# {number}\n{text}'

def write_text(path, mb):
    for number, text in enumerate(texts_of(mb)):
        name = os.path.join(path, str(number // 500), f'{number}.py')
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, 'w', encoding='utf-8') as f:
            f.write(text)

def write_mixed(path, mb):
    import pyarrow as pa
    import pyarrow.parquet as pq
    write_text(os.path.join(path, 'text'), mb / 3)
    with open(os.path.join(path, 'rows.jsonl'), 'w', encoding='utf-8') as f:
        for text in texts_of(mb / 3):
            f.write(json.dumps({'text': 'j' + text}) + '\n')
    schema, rows = pa.schema([('text', pa.string())]), []
    with pq.ParquetWriter(os.path.join(path, 'rows.parquet'), schema) as f:
        for text in texts_of(mb / 3):
            rows.append({'text': 'p' + text})
            if len(rows) == 2000:
                f.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        f.write_table(pa.Table.from_pylist(rows, schema))

def prepare(*arguments):
    """Runs prepare.py; returns (seconds, peak MB of it and all below it)."""
    began, peak = time.time(), 0
    run = subprocess.Popen([sys.executable, os.path.join(HERE, 'prepare.py'), *arguments], stdout=subprocess.DEVNULL)
    while run.poll() is None:
        peak = max(peak, resident(run.pid))
        time.sleep(0.1)
    if run.returncode:
        fail(f'prepare.py ended with status {run.returncode}')
    return time.time() - began, peak

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

TIKTOKEN = '''
import sys, time
sys.argv, (here, tokenizer_path, mb, threads) = sys.argv[:1], sys.argv[1:]
sys.path.insert(0, here)
from mambino.bench import data as bench_data
from mambino import tokenizer
fast, texts = tokenizer.load_tokenizer(tokenizer_path).fast, list(bench_data.texts_of(float(mb)))
began = time.time()
fast.encode_batch(texts, num_threads=int(threads), disallowed_special=())
print(sum(len(text.encode()) for text in texts) / 1e6, time.time() - began)
'''

def measure_speed(work):
    corpus = os.path.join(work, 'text')
    write_text(corpus, speed_mb)
    arguments = ['--max_file_mb=100', '--tokenizer=' + os.path.join(work, 'tokenizer')]
    seconds, peak = prepare(corpus, f'--vocab_size={vocab_size}', f'--workers={workers}', f'--out={work}/tokenizer')
    print(f'\nwith a BPE of {vocab_size} trained on 100 MB of it, {workers} processes: {seconds:.1f} s, at most {peak:.0f} MB')
    table = []
    for _ in range(rounds):
        one, _ = prepare(corpus, *arguments, '--workers=1', f'--out={work}/one')
        many, _ = prepare(corpus, *arguments, f'--workers={workers}', f'--out={work}/many')
        done = subprocess.run([sys.executable, '-c', TIKTOKEN, HERE, f'{work}/tokenizer', str(speed_mb), str(workers)],
                              capture_output=True, text=True)
        if done.returncode:
            fail(f'tiktoken failed: {done.stderr.strip().splitlines()[-1]}')
        mb, bare = map(float, done.stdout.split())
        table.append((mb / one, mb / many, mb / bare, one / many, bare / many))
    print(f'{"":<34}{"MB/s":>8}{"lowest":>9}{"highest":>9}')
    for name, values in zip(['prepare.py, one process', f'prepare.py, {workers} processes', f'tiktoken, {workers} threads, in memory',
                             f'{workers} processes against one', f'{workers} processes against tiktoken'], zip(*table)):
        print(f'{name:<34}{statistics.median(values):>8.2f}{min(values):>9.2f}{max(values):>9.2f}')

def measure_memory(work):
    corpus = os.path.join(work, 'mixed')
    write_mixed(corpus, memory_mb)
    seconds, peak = prepare(corpus, f'--vocab_size={vocab_size}', f'--workers={workers}', f'--out={work}/mixed_data')
    print(f'\n{memory_mb:,} MB of text, jsonl and parquet, {workers} processes: {seconds:.0f} s, all processes together at most {peak:.0f} MB')

def main():
    work = tempfile.mkdtemp(prefix='bench_data', dir=folder or None)
    try:
        if speed_mb:
            measure_speed(work)
        if memory_mb:
            measure_memory(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)

if __name__ == '__main__':
    main()
