"""The sections data and inputs of mambino.bench: they run, and what they say can be read."""
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_small_measurement(tmp_path):
    command = [sys.executable, '-m', 'mambino.bench', '--sections=data', '--speed_mb=1',
               '--memory_mb=1', '--rounds=1', '--vocab_size=600', f'--folder={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r'.{34} +\d', line)]
    speeds = {line[:34].strip(): float(line[34:].split()[0]) for line in lines}
    assert list(speeds) == ['prepare.py, one process', 'prepare.py, 2 processes', 'tiktoken, 2 threads, in memory',
                            '2 processes against one', '2 processes against tiktoken']
    assert min(speeds.values()) > 0
    peak = int(re.search(r'all processes together at most (\d+) MB', done.stdout)[1])
    assert 100 < peak < 1500 or not os.path.isdir('/proc')
    assert os.listdir(tmp_path) == []


def test_inputs_are_counted(tmp_path):
    russian = 'Все счастливые семьи похожи друг на друга.\n'.encode('koi8-r')
    for name, data in ('koi8_r', russian), ('utf_8', b'\xff\0\1'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.txt').write_bytes(data)
    (tmp_path / 'a.pdf').write_bytes(b'%PDF-1.4 cut off')
    command = [sys.executable, '-m', 'mambino.bench', '--sections=inputs', f'--legacy={tmp_path}', f'--pdfs={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    assert 'legacy encodings: 1 of 2 texts decoded right' in done.stdout
    assert 'PDF: 0 of 1 read, pypdfium2 alone 0; 0 odd ones without a note' in done.stdout
