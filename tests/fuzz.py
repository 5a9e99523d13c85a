"""Breaks at random what the four scripts read, and looks whether each of them ends as it promises:
with status 0, or with status 2 and a line that says why; no traceback, no crash, no endless wait,
and nothing that a file brought is run.

    python tests/fuzz.py --cases=5000 --seed=1              # all kinds, in turns
    python tests/fuzz.py --cases=300 --kinds=checkpoints,sessions
    python tests/fuzz.py --seed=1 --only=checkpoints.17     # that one again, with all that it says

torch is imported once; every case is a fork of this process (Linux, macOS). Case n of a kind is the
same whatever the others are: its numbers come from (seed, kind, n). The runs that are broken are
those of tests/data/before.
"""
import gc
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback

os.environ.update(OMP_NUM_THREADS='1', GOMP_SPINCOUNT='0')
TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
sys.path[:0] = [ROOT, TESTS]

import torch  # noqa: E402
from helpers import mutations  # noqa: E402
from helpers.mutations import (  # noqa: E402
    damage_bytes,
    damage_checkpoint,
    damage_json,
    damage_values,
    damage_zip,
)

BEFORE = os.path.join(TESTS, 'data', 'before')
CPU_SECONDS = 25        # of computing that a case may take
SECONDS = 100           # on the clock, of a machine with other work
MEMORY = 4 << 30        # bytes more than this process has
TRAIN = '--max_iters=2 --eval_interval=1 --batch_size=2 --tokens_per_step=64 --device=cpu --log_interval=1'.split()
SMALL = '--model=gpt --n_layer=1 --n_embd=16 --block_size=16'.split()
SAMPLE = '--max_new_tokens=3 --device=cpu --stream=false'.split()


# --- what is broken -------------------------------------------------------------------------------

def make_template(folder):
    """A folder with runs, adapters, data, and what transformers and peft would have saved of them."""
    for name in ('gpt-muon', 'mamba2', 'hybrid', 'moe', 'lora', 'prefix', 'int8', 'int4', 'data'):
        shutil.copytree(os.path.join(BEFORE, name), os.path.join(folder, name))
    for name in ('text.txt', 'score.txt'):
        shutil.copy(os.path.join(BEFORE, name), folder)
    from mambino.export.to_safetensors import save_safetensors
    base = torch.load(os.path.join(folder, 'gpt-muon', 'ckpt.pt'), weights_only=True)
    config = base['config']
    os.mkdir(os.path.join(folder, 'hf'))
    weights = {name: tensor for name, tensor in base['weights'].items() if name != 'lm_head.weight'}
    save_safetensors(os.path.join(folder, 'hf', 'model.safetensors'), weights, {'format': 'pt'})
    theirs = dict(model_type='llama', vocab_size=config['vocab_size'], hidden_size=config['n_embd'],
                  num_hidden_layers=config['n_layer'], num_attention_heads=config['n_head'],
                  num_key_value_heads=config['n_kv_head'], intermediate_size=config['intermediate_size'],
                  max_position_embeddings=32, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True,
                  head_dim=config['head_dim'], hidden_act='silu')
    write(os.path.join(folder, 'hf', 'config.json'), json.dumps(theirs).encode())
    index = dict(metadata={}, weight_map=dict.fromkeys(weights, 'model.safetensors'))
    write(os.path.join(folder, 'hf', 'index'), json.dumps(index).encode())
    torch.save(weights, os.path.join(folder, 'hf', 'bin'))
    shutil.copy(os.path.join(folder, 'data', 'bpe', 'tokenizer.json'), os.path.join(folder, 'hf'))
    lora = torch.load(os.path.join(folder, 'lora', 'ckpt.pt'), weights_only=True)
    os.mkdir(os.path.join(folder, 'peft'))
    save_safetensors(os.path.join(folder, 'peft', 'adapter_model.safetensors'),
                     {'base_model.model.' + name: tensor for name, tensor in lora['weights'].items()}, {'format': 'pt'})
    write(os.path.join(folder, 'peft', 'adapter_config.json'), json.dumps(dict(
        peft_type='LORA', r=2, lora_alpha=16, lora_dropout=0.0, bias='none', target_modules=['q_proj'],
        base_model_name_or_path='gpt-muon', task_type='CAUSAL_LM', inference_mode=True)).encode())


def write(path, data):
    with open(path, 'wb') as f:
        f.write(data)


def change(path, rng, how):
    """Damages a file in its place by a function of its bytes."""
    with open(path, 'rb') as f:
        data = f.read()
    write(path, how(data, rng))


def commands(rng):
    """A command line of settings that cannot be, or hardly."""
    script = rng.choice(('train.py', 'sample.py', 'export.py', 'prepare.py'))
    values = ['', '0', '-1', '1', '2', '-0.0', '1e400', '-1e400', 'nan', 'inf', '0x10', '1_000', '1e-50', 'true',
              'None', 'a,b', 'a\\,b', ',', ':', '|', "'\"'", '\x1b[31mred', 'é', '\udcff', '../x', 'x' * 300, '9' * 30,
              '9' * 5000, '/dev/null', '.', 'hf', 'hf:hf', 'hf:.', 'gpt-muon', 'mamba2:0.5', 'text.txt', '1e9',
              'FILE:text.txt', '{}', '%s', 'config', 'char', 'int8', 'native', 'cpu', 'cuda:9', 'lora', '\\',
              '<|endoftext|>', '2147483648']
    settings = SETTINGS[script]
    flags = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(settings)
        if name not in ('max_iters', 'max_new_tokens', 'interactive', 'engine', 'workers'):
            flags.append(f'--{name}={rng.choice(values)}')
    if rng.random() < 0.1:
        flags.append(rng.choice(('--', '-x', '--=', '--nonsense=1', '--\x1b=2', '\udcff', 'text.txt', 'hf/config.json',
                                 '--out_dir', '.', '--' + 'y' * 2000, 'config/x.py')))
    return [script, *ARGUMENTS[script](rng), *flags]


def settings_of(script):
    """The names of a script's settings."""
    from mambino.configurator import find_settings
    path = os.path.join(ROOT, script)
    names = dict.fromkeys(line.partition(' = ')[0] for line in open(path, encoding='utf-8') if ' = ' in line)
    values = {'__file__': path, **{name: '' for name in names}}
    return sorted(find_settings(values))


ARGUMENTS = {
    'train.py': lambda rng: ['--dataset=bpe', '--out_dir=new', *SMALL, *TRAIN],
    'sample.py': lambda rng: ['--out_dir=' + rng.choice(('gpt-muon', 'mamba2', 'hybrid')), *SAMPLE],
    'export.py': lambda rng: ['--out_dir=gpt-muon', '--format=safetensors', '--verify=false'],
    'prepare.py': lambda rng: ['text.txt', '--out=new', '--tokenizer=byte', '--workers=1'],
}
SETTINGS = {}


def opened(name, rng):
    """A command line that opens the run of this name."""
    adapter = name in ('lora', 'prefix')
    ways = [['sample.py', f'--out_dir={name}', *SAMPLE],
            ['sample.py', f'--out_dir={name}', '--score=score.txt', '--html=score.html', '--device=cpu'],
            ['train.py', f'--out_dir={name}', '--init_from=resume', *TRAIN, '--max_iters=302'],
            ['train.py', f'--out_dir={name}', '--eval_only=true', '--device=cpu', '--eval_iters=1'],
            ['train.py', f'--out_dir={name}', '--report'],
            ['train.py', f'--init_from={name}', '--out_dir=new', '--dataset=bpe', *TRAIN],
            ['export.py', f'--out_dir={name}', '--verify=false',
             '--format=' + rng.choice(('safetensors', 'native', 'gguf', 'native,gguf', 'peft' if adapter else 'gguf'))]]
    return rng.choice(ways)


def checkpoints(rng):
    name = rng.choice(('gpt-muon', 'mamba2', 'hybrid', 'moe', 'lora', 'prefix', 'int8', 'int4'))
    path = os.path.join(name, 'best.pt' if name.startswith('int') else 'ckpt.pt')
    (damage_zip if rng.random() < 0.1 else damage_checkpoint)(path, rng)
    return opened(name, rng)


def sessions(rng):
    damage_checkpoint('mamba2/sessions/tale.pt', rng)
    return ['sample.py', '--out_dir=mamba2', '--session=' + rng.choice(('tale', 'tale', 'new')), *SAMPLE,
            *rng.choice(([], ['--start=the'], ['--fork=tale']))]


def adapters(rng):
    name = rng.choice(('lora', 'lora', 'prefix'))
    base = 'gpt-muon' if name == 'lora' else 'mamba2'
    damage_checkpoint(f'{name}/ckpt.pt', rng)
    weight = rng.choice(('', '', ':0.5', ':x', ':nan'))
    return ['sample.py', f'--out_dir={base}', f'--adapters={name}{weight}', *SAMPLE]


def safetensors(data, rng):
    """A safetensors file with another header, or other bytes."""
    size = int.from_bytes(data[:8], 'little')
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    header = damage_json(data[8:8 + size], rng)
    return len(header).to_bytes(8, 'little') + header + data[8 + size:]


def hf(rng):
    part = rng.choice(('config.json', 'config.json', 'model.safetensors', 'index', 'bin', 'tokenizer.json'))
    if part in ('index', 'bin'):
        os.remove('hf/model.safetensors') if part == 'bin' else os.rename('hf/model.safetensors', 'hf/a.safetensors')
        new = 'pytorch_model.bin' if part == 'bin' else 'model.safetensors.index.json'
        os.rename(f'hf/{part}', f'hf/{new}')
        part = new
    if part == 'pytorch_model.bin':
        damage_checkpoint('hf/' + part, rng)
    else:
        change('hf/' + part, rng, safetensors if part.endswith('.safetensors') else damage_json)
    return ['train.py', '--init_from=hf:hf', '--out_dir=new', '--dataset=bpe', '--block_size=16', *TRAIN]


def peft(rng):
    part = rng.choice(('adapter_config.json', 'adapter_model.safetensors'))
    change('peft/' + part, rng, damage_json if part.endswith('json') else safetensors)
    return ['sample.py', '--out_dir=gpt-muon', '--adapters=peft', *SAMPLE]


def with_dataset(rng):
    """A command line that opens data/char."""
    return rng.choice((
        ['train.py', '--dataset=char', '--out_dir=new', *SMALL, *TRAIN],
        ['prepare.py', '--inspect', 'data/char'],
        ['prepare.py', 'text.txt', '--append', '--out=data/char', '--workers=1'],
        ['train.py', '--init_from=resume', '--out_dir=mamba2', *TRAIN, '--max_iters=302']))


def meta(rng):
    change('data/char/meta.json', rng, damage_json)
    return with_dataset(rng)


def tokenizers(rng):
    name = rng.choice(('char', 'bpe'))
    change(f'data/{name}/tokenizer.json', rng, damage_json)
    if rng.random() < 0.5:
        os.remove(f'data/{name}/meta.json')
        return ['prepare.py', 'text.txt', f'--tokenizer=data/{name}', '--out=new', '--workers=1']
    return with_dataset(rng)


def datasets(rng):
    name = rng.choice(('train', 'val')) + rng.choice(('.bin', '.idx', '.hash'))
    change(f'data/char/{name}', rng, damage_bytes)
    return with_dataset(rng)


def chat(rng):
    lines = []
    for _ in range(20):
        row = {'messages': [{'role': 'user', 'content': 'hello there'}, {'role': 'assistant', 'content': 'good day'}]}
        if rng.random() < 0.3:
            try:
                row = damage_values(row, rng)
                lines.append(json.dumps(row).encode('utf-8', 'surrogatepass'))
            except RecursionError:
                lines.append(b'[' * 100_000)
        else:
            lines.append(json.dumps(row).encode())
    data = b'\n'.join(lines)
    write('chat.jsonl', damage_bytes(data, rng) if rng.random() < 0.3 else data)
    tokenizer = rng.choice(('byte', 'char', 'bpe'))
    return ['prepare.py', 'chat.jsonl', '--out=new', f'--tokenizer={tokenizer}', '--workers=1']


def metrics(rng):
    name = rng.choice(('gpt-muon', 'mamba2'))
    path = f'{name}/metrics.jsonl'
    with open(path, 'rb') as f:
        lines = f.read().split(b'\n')
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(lines))
        lines[at] = damage_json(lines[at] or b'{"step": 1}', rng)
    write(path, b'\n'.join(lines))
    if rng.random() < 0.3:
        return ['train.py', f'--out_dir={name}', '--report']
    return ['train.py', f'--out_dir={name}', '--init_from=resume', *TRAIN, '--max_iters=302']


KINDS = dict(
    commands=commands, checkpoints=checkpoints, sessions=sessions, adapters=adapters, hf=hf, peft=peft, meta=meta,
    tokenizers=tokenizers, datasets=datasets, chat=chat, metrics=metrics)


# what of the template a kind does not open
RUNS = 'hybrid', 'moe', 'int8', 'int4', 'prefix'
NOT_FOR = dict.fromkeys(('sessions', 'hf', 'peft', 'meta', 'tokenizers', 'datasets', 'chat', 'metrics'), RUNS)


# --- one case -------------------------------------------------------------------------------------

def run_case(kind, seed, n, folder, template):
    """In a process of its own: breaks, runs the script, and ends with its status."""
    gc.disable()
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == 'linux':
        pages = int(open('/proc/self/statm').read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf('SC_PAGE_SIZE') + MEMORY,) * 2)
    rng = random.Random(f'{seed} {kind} {n}')
    os.environ['MAMBINO_CANARY'] = os.path.join(folder, mutations.CANARY)
    work = os.path.join(folder, 'work')
    shutil.copytree(template, work, ignore=shutil.ignore_patterns(*NOT_FOR.get(kind, ())))
    os.chdir(work)
    argv = KINDS[kind](rng)
    write(os.path.join(folder, 'argv'), repr(argv).encode())
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding='utf-8', closefd=False)
    sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)
    sys.stderr = open(2, 'w', encoding='utf-8', errors='backslashreplace', closefd=False)
    sys.argv = argv
    status = 0
    try:
        runpy.run_path(os.path.join(ROOT, argv[0]), run_name='__main__')
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        status = 1
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def read(folder, name):
    """The text of a file of a case; '' if there is none."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8', errors='replace', newline='') as f:
        return f.read()


def verdict(folder, status):
    """What is wrong with how a case has ended; '' if nothing is."""
    said, text = read(folder, 'stdout'), read(folder, 'stderr')
    said += text
    if os.path.exists(os.path.join(folder, mutations.CANARY)):
        return 'something that a file brought was run'
    if status < 0:
        return f'ended by {signal.Signals(-status).name}'
    if 'Traceback (most recent call last)' in said:
        return 'a traceback: ' + said.strip().split('\n')[-1][:200]
    if status not in (0, 2):
        return f'status {status}: {said.strip()[-200:]}'
    if status == 2 and text.count('error: ') != 1:
        return f'status 2 and no line, or several: {text[-200:]!r}'
    if '\x1b' in text:
        return f'control characters: {text[-200:]!r}'
    return ''


def run_cases(cases, jobs=2, keep='', report=print):
    """Runs [(kind, seed, n), …], so many at once. Returns {kind: [cases, refused]} and [(case, fault), …]."""
    for script in ARGUMENTS:
        SETTINGS[script] = settings_of(script)
    torch.set_num_threads(1)
    import_all()
    gc.freeze()             # a child that collects garbage would copy all memory
    counts = {}
    faults = []
    with tempfile.TemporaryDirectory(prefix='fuzz-') as root:
        template = os.path.join(root, 'template')
        os.mkdir(template)
        make_template(template)
        running = {}
        waiting = list(reversed(cases))
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop()
                folder = os.path.join(root, f'{case[0]}.{case[2]}')
                os.mkdir(folder)
                sys.stdout.flush()
                child = os.fork()
                if not child:
                    try:
                        run_case(*case, folder, template)
                    except BaseException:               # of this file, none of a script's
                        traceback.print_exc()
                    finally:
                        os._exit(99)
                running[child] = case, folder
            child, ended = os.waitpid(-1, 0)
            if child not in running:
                continue
            case, folder = running.pop(child)
            status = os.waitstatus_to_exitcode(ended)
            count = counts.setdefault(case[0], [0, 0])
            count[0] += 1
            count[1] += status == 2
            fault = verdict(folder, status)
            if fault:
                faults.append((case, fault))
                report(f'{case[0]}.{case[2]} {read(folder, "argv")}\n    {fault}', flush=True)
                if keep:
                    shutil.copytree(folder, os.path.join(keep, f'{case[0]}.{case[2]}'), dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    return counts, faults


def import_all():
    """What the scripts import, once for all cases."""
    import torch._dynamo  # noqa: F401, of torch's optimizers, three seconds

    import mambino.export.compare
    import mambino.export.to_gguf
    import mambino.export.to_native
    import mambino.export.to_onnx
    import mambino.export.to_peft
    import mambino.export.to_torchscript
    import mambino.prepare.output
    import mambino.prepare.vocabulary
    import mambino.sample.score
    import mambino.sample.terminal
    import mambino.train.begin
    import mambino.train.evaluation
    import mambino.train.loader
    import mambino.train.memory
    import mambino.train.metrics  # noqa: F401
    from mambino.kernels import native
    native.library()


def cases_of(cases, seed, kinds):
    """[(kind, seed, n), …]: the kinds in turns."""
    return [(kinds[i % len(kinds)], seed, i // len(kinds)) for i in range(cases)]


def main():
    options = dict(cases='1000', seed='1', kinds=','.join(KINDS), only='', jobs='2', keep='')
    for arg in sys.argv[1:]:
        name, _, value = arg.removeprefix('--').partition('=')
        if name not in options:
            sys.exit(f'{arg}: no such option; there are ' + ', '.join('--' + name for name in options))
        options[name] = value
    kinds = options['kinds'].split(',')
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        sys.exit(f'kinds={unknown[0]}: one of {", ".join(KINDS)}')
    cases = cases_of(int(options['cases']), int(options['seed']), kinds)
    if options['only']:
        cases = [(part.rpartition('.')[0], int(options['seed']), int(part.rpartition('.')[2]))
                 for part in options['only'].split(',')]
    began = time.monotonic()
    counts, faults = run_cases(cases, int(options['jobs']), options['keep'])
    width = max(map(len, counts))
    print(f'{"kind":<{width}}  {"cases":>6}  {"refused":>7}  {"faults":>6}')
    for kind, (n, refused) in counts.items():
        print(f'{kind:<{width}}  {n:>6}  {refused:>7}  {sum(case[0] == kind for case, _ in faults):>6}')
    print(f'{len(cases)} cases in {time.monotonic() - began:.0f} s, {len(faults)} faults')
    sys.exit(bool(faults))


if __name__ == '__main__':
    main()
