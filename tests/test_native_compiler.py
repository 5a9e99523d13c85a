"""A compiler that fails, or whose library does not run here: a line, and the portable way."""
import os
import subprocess
import time

import pytest

from mambino.kernels import native

pytestmark = pytest.mark.skipif(native.compiler() is None, reason='no C++ compiler here')
SEVEN = 'extern "C" int seven() { return 7; }\n'
TRAP = '#ifdef BROKEN\n__attribute__((constructor)) static void trap() { __builtin_trap(); }\n#endif\n' + SEVEN
REAL = native.compiler()


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """f(source, compiler's shell script or '') → the library that native.py makes of it, or None."""
    def open_it(source=SEVEN, script=''):
        (tmp_path / 'native.cpp').write_text(source)
        monkeypatch.setattr(native, 'SOURCE', str(tmp_path / 'native.cpp'))
        if script:
            compiler = tmp_path / 'compiler'
            compiler.write_text('#!/bin/sh\n' + script)
            compiler.chmod(0o755)
            monkeypatch.setenv('CXX', str(compiler))
        return native.library.__wrapped__()
    return open_it


@pytest.mark.parametrize('script, words', {
    'garbage': ("printf '\\033[2J\\377\\000 error \\007'; exit 1", 'error'),
    'silence': ('exit 3', 'status 3'),
    'killed': ('kill -9 $$', 'SIGKILL'),
    'no library': ('for last; do :; done; echo text > "$last"', 'does not run here'),
    'nothing written': ('exit 0', 'does not run here'),
}.values())
def test_a_compiler_that_fails_is_told_in_a_line(opened, script, words):
    assert opened(script=script) is None
    assert words in native.trouble and native.trouble.isprintable() and len(native.trouble) < 500


def test_a_compiler_that_takes_forever_is_ended_with_all_it_started(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(native, 'SECONDS', 0.5)
    start = time.monotonic()
    assert opened(script=f'echo $$ > {tmp_path}/pid; sleep 97; exit 0') is None
    assert 'has not compiled it' in native.trouble and time.monotonic() - start < 20
    group = (tmp_path / 'pid').read_text().strip()
    assert subprocess.run(['ps', '-o', 'stat=', '-g', group], capture_output=True, text=True).stdout.strip('Z\n ') == ''


def test_what_crashes_at_load_is_compiled_for_any_processor(opened):
    """An instruction that this processor lacks, though the compiler believes that it has it."""
    script = f'case "$*" in *=native*) exec {REAL} -DBROKEN "$@";; esac; exec {REAL} "$@"'
    library = opened(TRAP, script)
    assert library.seven() == 7
    assert 'does not run here: killed by SIG' in native.trouble and 'slower than they could be' in native.trouble


def test_what_crashes_for_every_target_is_not_loaded(opened):
    assert opened(TRAP, f'exec {REAL} -DBROKEN "$@"') is None
    assert 'does not run here' in native.trouble


def test_another_processor_has_a_library_of_its_own(opened, monkeypatch, tmp_path):
    """A home folder that two machines share; or a hypervisor that hides a flag from today on."""
    assert opened().seven() == 7
    flags = native.processor()
    monkeypatch.setattr(native, 'processor', lambda: flags.replace(' avx512_bf16', '').replace('avx2', '') + ' less')
    assert opened().seven() == 7
    assert len(list(tmp_path.glob('__pycache__/native-*/*.so'))) == 2


WRONG = {
    'silu': ('void swiglu_forward(I, I, I, const float *, const float *, float *y) { y[0] = 2; }', 'silu(1) to be 2'),
    'products': ('void linear_step(I, I, const void *, const float *, float *y) { y[0] = 7; }', '128 to be 7'),
    'a crash': ('void tiles_product(I, I, const void *, const float *, float *) { __builtin_trap(); }\n'
                'extern "C" void linear_step(I, I, const void *, const float *, float *y) { y[0] = 128; }', 'SIG'),
    'no end': ('void linear_step(I, I, const void *, const float *, float *) { for (volatile int i = 0;;) i = i; }',
               'does not end'),
}


@pytest.mark.parametrize('function, words', WRONG.values(), ids=WRONG)
def test_a_library_that_computes_wrong_or_crashes_is_not_loaded(opened, monkeypatch, function, words):
    """By a compiler's defect, say. What has none of the functions that are tried is none the worse."""
    monkeypatch.setattr(native, 'TRIAL_SECONDS', 2)
    assert opened(f'#include <cstdint>\ntypedef int64_t I;\nextern "C" {function}\n') is None
    assert words in native.trouble


@pytest.mark.skipif('0' in (os.environ.get('MAMBINO_NATIVE'), os.environ.get('MAMBINO_KERNELS')), reason='unwanted')
def test_where_there_is_a_compiler_the_real_library_is_there_and_passes_its_trial():
    """Without it all tests of its operations are left out."""
    library = native.library()
    assert library is not None, native.trouble
    assert os.path.exists(library._name) and native.tried(library._name) == ''
