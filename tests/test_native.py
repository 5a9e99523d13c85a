"""native.cpp as a library: how it is compiled, kept and called."""
import math
import os
import re
import signal

import pytest
import torch

from mambino import kernels
from mambino.kernels import cpu, cpu_mamba, cpu_mamba3, native

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """A user without a cache folder that can be written."""
    (tmp_path / "no-cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-cache"))


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    native.library.cache_clear()
    try:
        monkeypatch.setattr(native, "compiler", lambda: None)
        assert native.library() is None and "no working C++ compiler" in kernels.describe_kernels("cpu")
        native.library.cache_clear()
        monkeypatch.setenv("MAMBINO_NATIVE", "0")
        assert native.library() is None and "MAMBINO_NATIVE=0" in kernels.describe_kernels("cpu")
    finally:
        native.library.cache_clear()


def test_compiles_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    source = tmp_path / "native.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    (tmp_path / "__pycache__").write_text("a file in the folder's place")
    monkeypatch.setattr(native, "SOURCE", str(source))
    library = native.library.__wrapped__()
    if library is None and native.compiler() is None:
        pytest.skip("no C++ compiler here")
    assert library.seven() == 7


def test_a_target_outside_the_vocabulary_is_refused():
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    logits = torch.zeros(4, 64)
    with pytest.raises(IndexError, match="64"):
        cpu.cross_entropy_(logits[:2], torch.tensor([3, 64]))
    assert logits[2:].count_nonzero() == 0
    assert cpu.cross_entropy_(
        torch.zeros(2, 64), torch.tensor([3, 63], dtype=torch.int32)
    ).sum().item() == pytest.approx(2 * math.log(64))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(1)
    native.pool().submit(int).result()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(native.pool().submit(lambda: 7).result())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.fixture
def seven(tmp_path, monkeypatch):
    """A source of one function, compiled in a folder of its own; how often, is counted."""
    if native.compiler() is None:
        pytest.skip("no C++ compiler here")
    (tmp_path / "native.cpp").write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.setattr(native, "SOURCE", str(tmp_path / "native.cpp"))
    runs = []
    compile_and_try = native.compile_and_try
    monkeypatch.setattr(native, "compile_and_try", lambda path: runs.append(path) or compile_and_try(path))
    return runs


def open_seven():
    library = native.library.__wrapped__()
    assert library is None or library.seven() == 7
    return library


@pytest.mark.parametrize("damage", [b"", b"cut", b"of another make"])
def test_a_damaged_library_is_compiled_anew_once(tmp_path, seven, damage):
    assert open_seven() and open_seven() and len(seven) == 1
    file, = (tmp_path / "__pycache__").glob("native-*/*.so")
    whole = file.read_bytes()
    file.unlink()                               # another file: this one is loaded
    file.write_bytes(whole[:len(whole) // 2] if damage == b"cut" else damage)
    assert open_seven() and open_seven() and len(seven) == 2
    assert len(list((tmp_path / "__pycache__").glob("native-*/*.so"))) == 1


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_library_that_others_can_write_is_not_loaded(tmp_path, seven):
    assert open_seven()
    file, = (tmp_path / "__pycache__").glob("native-*/*.so")
    file.chmod(0o777)
    assert open_seven() and len(seven) == 2
    file.parent.chmod(0o777)
    assert open_seven() and len(seven) == 3 and "others can write to it" in native.trouble
    assert "at every start" in kernels.describe_kernels("cpu") or native.library() is None


def test_where_another_user_has_installed_it_it_is_kept_in_the_own_cache(tmp_path, seven, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "__pycache__").write_text("a file in the folder's place")
    assert open_seven() and open_seven() and len(seven) == 1 and native.trouble == ""
    file, = (tmp_path / "cache" / "mambino").glob("native-*/*.so")
    assert file.parent.parent.stat().st_mode & 0o077 == file.parent.stat().st_mode & 0o077 == 0
    file.parent.chmod(0o777)
    assert open_seven() and len(seven) == 2 and "at every start" in native.trouble


def test_a_full_disk_is_told_as_it_is(tmp_path, seven, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(native, "try_room", full)
    assert open_seven() is None and not seven
    assert "No space left on device" in native.trouble and str(tmp_path) in native.trouble


def test_a_source_that_does_not_compile_is_told(tmp_path, seven):
    (tmp_path / "native.cpp").write_text("no C++\n")
    assert open_seven() is None and len(seven) == 1
    assert "does not compile it" in native.trouble and "error" in native.trouble


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_of_several_processes_one_compiles(tmp_path, seven):
    children = []
    for _ in range(3):
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(60)
            os._exit(0 if open_seven() and len(seven) <= 1 else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert open_seven() and not seven           # by one of them


def test_a_changed_header_is_compiled_anew(tmp_path, monkeypatch):
    if native.compiler() is None:
        pytest.skip("no C++ compiler here")
    (tmp_path / 'cpp').mkdir()
    source = '#include "cpp/number.h"\nextern "C" int number() { return NUMBER; }\n'
    (tmp_path / 'native.cpp').write_text(source)
    monkeypatch.setattr(native, 'SOURCE', str(tmp_path / 'native.cpp'))
    for number in (7, 8):
        (tmp_path / 'cpp' / 'number.h').write_text(f'#define NUMBER {number}\n')
        assert native.library.__wrapped__().number() == number


# Of each operation its tensors, by the letters of their sizes, and itself. A size in brackets may be any.
SIZES = dict(B=2, T=5, E=32, H=2, G=1, P=16, N=16, W=64, V=24, R=8, A=4, M=32)
OPERATIONS = {
    "rms_norm": ("(B)(T)E E", lambda x, weight: cpu.rms_norm(x, weight, 1e-5)),
    "gated_rms_norm": ("BTE BTE E", lambda y, z, weight: cpu.gated_rms_norm(y, z, weight, 1e-5, 2)),
    "swiglu": ("BTE BTE", cpu.swiglu),
    "apply_rope": ("(B)(T)(H)P BT1R BT1R", lambda x, cos, sin: cpu.apply_rope(x, (cos, sin))),
    "attention": ("BT(H)P BTGP BTGP", cpu.attention),
    "mamba1_scan": ("BTE BTE E EN BTN BTN E BTE BNE", cpu_mamba.mamba1_scan),
    "mamba2_scan": ("BTW BTH H H H BHPN",
                    lambda xBC, dt, bias, A, D, state: cpu_mamba.mamba2_scan(xBC, dt, bias, A, D, 1, 16, 16, state)),
    "mamba3_scan": ("BT(A) BTHP BTRGM BTRGM BTH BTH BTH HRM HRM H HRP BHPM BHA BRHM BHP",
                    lambda rate, x, B, C, dt, decay, trap, *rest: cpu_mamba3.mamba3_scan(
                        x, B, C, dt, decay, trap, rate, *rest[:4], True, 16, rest[4:])),
    "gated_heads": ("(B)(T)RHP BTHP HRP HRP E", cpu_mamba3.gated_heads),
    "cross_entropy_": ("T(V) T", lambda logits, targets: cpu.cross_entropy_(logits, (targets * 0).long())),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_refuses_tensors_of_other_sizes(name):
    """In a process of its own, which lives: nothing is written where it does not belong."""
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    letters, operation = OPERATIONS[name]
    free = re.findall(r"\((\w)\)", letters)
    named = [list(shape) for shape in re.sub("[()]", "", letters).split()]
    shapes = [[SIZES.get(letter, 1) for letter in shape] for shape in named]
    child = os.fork()
    if not child:
        signal.alarm(60)
        accepted = []
        assert operation(*[torch.rand(shape) for shape in shapes]) is not NotImplemented
        for i, shape in enumerate(shapes):
            for j in range(len(shape)):
                for size in (0, 1, 3, shape[j] - 1, shape[j] + 16, 640):
                    if size == shape[j] or (i == 0 and named[i][j] in free):
                        continue
                    other = [list(s) for s in shapes]
                    other[i][j] = size
                    try:
                        if operation(*[torch.rand(s) for s in other]) is not NotImplemented:
                            accepted.append((other[i], shape))
                    except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
                        pass
        print(accepted, flush=True)
        os._exit(min(len(accepted), 100))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
