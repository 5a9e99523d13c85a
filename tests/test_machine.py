"""machine.py: what it measures of a machine takes no longer where the machine is slow; a dtype for each."""
import platform
import subprocess
import sys
import types

import pytest
import torch

from mambino import machine


@pytest.mark.parametrize('cell, most', [(1.0, 5e4), (1e-3, 500), (1e-9, 2.0)])
def test_matmul_peak_is_soon_there(monkeypatch, cell, most):
    """By a clock that only products advance, by `cell` seconds for each number of a row: as slow as 16-bit numbers are
    in software, or slower, and as fast as a real processor."""
    clock = [0.0]

    def multiply(a, b, out):
        assert out.shape == (len(a), b.shape[1])
        clock[0] += cell * len(a) * b.numel()
    monkeypatch.setattr(machine.time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(machine.torch, 'mm', multiply)
    assert machine.matmul_peak('cpu', 'float32') == pytest.approx(2 / cell)
    assert clock[0] < most


def test_a_precision_in_software_is_told(monkeypatch):
    speeds = {'float32': 1e11, 'float16': 2e8}
    monkeypatch.setattr(machine, 'peak_flops', lambda device, dtype: speeds[dtype])
    assert machine.slowdown('cpu', 'float16') == pytest.approx(500)
    assert machine.slowdown('cpu', 'float32') == machine.slowdown('cuda', 'float16') == 1


def test_a_cpu_computes_in_32_bits_unless_told_otherwise():
    assert machine.choose_dtype('auto', 'cpu') == 'float32'
    assert machine.choose_dtype('bfloat16', 'cpu') == 'bfloat16'
    with pytest.raises(SystemExit):
        machine.choose_dtype('float99', 'cpu')


@pytest.mark.parametrize('has_it, dtype, expected', [
    (True, 'bfloat16', 'bfloat16'),
    (False, 'bfloat16', 'float32'),     # in software it would take ages
    (True, 'float32', 'float32'),
    (True, 'float16', 'float32'),       # of a GPU's run
    (True, None, 'float32'),            # of no run: weights that were exported
])
def test_a_run_is_evaluated_in_its_own_precision(monkeypatch, has_it, dtype, expected):
    monkeypatch.setattr(machine, 'has_bfloat16', lambda device: has_it)
    assert machine.dtype_of_run(dtype, 'cpu') == expected


def test_16_bits_in_hardware_are_known(monkeypatch):
    def capabilities():
        return names
    monkeypatch.setattr(machine.torch.cpu, 'get_capabilities', capabilities, raising=False)
    names = dict(avx2=True, avx512_bf16=False, amx_bf16=False)
    assert not machine.has_bfloat16('cpu')
    names = dict(avx2=True, avx512_bf16=True, amx_bf16=False)
    assert machine.has_bfloat16('cpu')


@pytest.mark.skipif(sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc', reason='glibc')
def test_freed_memory_is_kept_for_the_next_tensors():
    """In a process of its own: pages that it is given in rounds of six tensors of 12 MB."""
    code = """if True:
        import resource, torch
        from mambino import machine
        def pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                tensors = [torch.ones(3 << 20) for _ in range(6)]
                del tensors
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        machine.keep_freed_memory()
        print(min(pages() for _ in range(8)))    # once they are side by side
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


# --- cards

@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA GeForce RTX 3060', 25.5e12), ('NVIDIA GeForce RTX 3060 Ti', 32.4e12), ('NVIDIA L40S', 362e12),
    ('NVIDIA GeForce RTX 4070 Ti SUPER', 88e12), ('NVIDIA GeForce RTX 4070 Ti', 80e12),
    ('NVIDIA GeForce RTX 4070', 58e12), ('NVIDIA GeForce RTX 4080 SUPER', 104e12),
    ('NVIDIA GeForce RTX 4090 D', 147e12), ('NVIDIA GeForce RTX 4090', 165e12),
    ('NVIDIA GeForce RTX 5070 Ti', 88e12), ('NVIDIA GeForce RTX 5060', 38e12),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA GeForce RTX 2080 Super with Max-Q Design', None),
    ('NVIDIA A100-SXM4-40GB MIG 3g.20gb', None), ('NVIDIA Something 9000', None),
])
def test_the_speed_of_a_card_is_that_of_its_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(machine.torch.cuda, 'get_device_name', lambda device: name)
    assert machine.known_peak('cuda:0') == peak


def test_longer_names_come_first():
    names = list(machine.PEAKS)
    for i, name in enumerate(names):
        assert not [later for later in names[i + 1:] if later.startswith(f'{name} ')]


@pytest.fixture
def no_card(monkeypatch):
    """choose(stdout, status): choose_device('auto') where torch has no card, and nvidia-smi says that."""
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(machine.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(machine.torch.backends.mps, 'is_available', lambda: False)

    def smi(command, **_):
        assert command[0] == 'nvidia-smi'
        if said is None:
            raise FileNotFoundError
        return subprocess.CompletedProcess(command, status, said, '')
    said, status = None, 0
    monkeypatch.setattr(machine.subprocess, 'run', smi)

    def choose(stdout, returncode=0):
        nonlocal said, status
        said, status = stdout, returncode
        machine.unseen_card.cache_clear()
        machine.say_once.cache_clear()
        return machine.choose_device('auto')
    yield choose
    machine.unseen_card.cache_clear()
    machine.say_once.cache_clear()


GPU = 'GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)\n'


def test_why_a_card_is_not_used_is_said_once(no_card, monkeypatch, capsys):
    def too_old():
        raise RuntimeError('The NVIDIA driver on your system is too old (found version 11040).\nPlease update.')
    monkeypatch.setattr(machine.torch.version, 'cuda', '13.0')
    monkeypatch.setattr(machine.torch.cuda, 'init', too_old)
    assert no_card(GPU) == 'cpu' == machine.choose_device('auto')
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'the CPU computes: The NVIDIA driver on your system is too old' in said
    monkeypatch.setattr(machine.torch.version, 'cuda', None)
    assert no_card(GPU) == 'cpu'
    assert 'is made for CPUs' in capsys.readouterr().err
    assert no_card('Failed to initialize NVML: Driver/library version mismatch\n', 18) == 'cpu'
    assert 'nvidia-smi says: Failed to initialize NVML' in capsys.readouterr().err


def test_where_there_is_no_card_nothing_is_said(no_card, monkeypatch, capsys):
    assert no_card(None) == no_card('') == 'cpu'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')              # hidden on purpose
    assert no_card(GPU) == 'cpu'
    assert capsys.readouterr().err == ''


def test_a_card_without_kernels_is_told_in_a_line(monkeypatch, capsys):
    def ones(*_, device):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors …')
    monkeypatch.setattr(machine.torch, 'ones', ones)
    with pytest.raises(SystemExit) as end:
        machine.choose_device('cuda:0')
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count('\n') == 1
    assert 'device=cuda:0: CUDA error: no kernel image' in said and 'not made for so old' in said
    monkeypatch.setattr(machine.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(machine.torch.cuda, 'device_count', lambda: 1)
    machine.say_once.cache_clear()
    assert machine.choose_device('auto') == 'cpu' and 'no kernel image' in capsys.readouterr().err


@pytest.mark.parametrize('rank, n, expected', [
    ('0', 2, 'cuda:0'), ('1', 2, 'cuda:1'), ('3', 2, 'cuda'), ('x', 2, 'cuda')])
def test_each_process_tries_its_own_card(monkeypatch, rank, n, expected):
    monkeypatch.setenv('LOCAL_RANK', rank)
    monkeypatch.setattr(machine.torch.cuda, 'device_count', lambda: n)
    assert machine.own_card() == expected


@pytest.mark.parametrize('gigabytes, peak, width, max_iters', [
    (8, 25.5e12, 512, 5000), (12, None, 512, 5000), (16, 97e12, 768, 5000), (24, 71e12, 768, 5000),
    (48, 155e12, 768, 5000), (80, 989e12, 1024, 8000), (80, 312e12, 768, 5000)])
def test_a_models_size_is_by_the_memory_and_the_speed_of_a_card(monkeypatch, gigabytes, peak, width, max_iters):
    from mambino.train import begin
    card = types.SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(machine.torch.cuda, 'get_device_properties', lambda device: card)
    monkeypatch.setattr(machine.torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(machine, 'known_peak', lambda device: peak)
    sizes = begin.sizes_for('cuda:0', 'gpt')
    assert (sizes['n_embd'], sizes['max_iters']) == (width, max_iters)
    assert sizes['tokens_per_step'] % sizes['block_size'] == 0


def test_fp32_is_exact_on_a_card(monkeypatch):
    """PyTorch's default takes TF32 for convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    torch.set_float32_matmul_precision('high')
    machine.compute_exactly()
    assert torch.get_float32_matmul_precision() == 'highest' and not torch.backends.cudnn.allow_tf32
