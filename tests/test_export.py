"""export.py: what it writes opens elsewhere with the same numbers, what cannot be written is
refused, and nothing is lost."""
import json
import os
import re
import shutil

import pytest
import torch
from helpers.runs import refused, script, write_text

from mambino.export import to_hf
from mambino.weights import checkpoint, loading

MODELS = dict(gpt='--model=gpt --n_head=2 --n_kv_head=1 --qk_norm=True',
              mamba='--model=mamba --state_size=16',
              hybrid='--model=hybrid --n_head=2 --window=16 --state_size=16')
TINY = ('--n_layer=1 --n_embd=64 --block_size=64 --batch_size=8 --tokens_per_step=512 --max_iters=10 '
        '--learning_rate=1e-2 --device=cpu --dtype=float32')


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    """A folder with three trained models and a LoRA; the working directory of these tests."""
    folder, before = tmp_path_factory.mktemp('runs'), os.getcwd()
    os.chdir(folder)
    write_text('text.txt')
    assert script('prepare.py', 'text.txt --tokenizer=bpe --vocab_size=400 --out=data/text') == 0
    for name, flags in MODELS.items():
        assert script('train.py', f'--dataset=text --out_dir={name}', flags, TINY) == 0
    assert script('train.py', '--adapter=lora --init_from=gpt --dataset=text --out_dir=lora', TINY) == 0
    yield folder
    os.chdir(before)


def export(*flags, status=0):
    assert script('export.py', *flags) == status


def files(folder):
    return sorted(os.listdir(folder))


def opened(folder, **options):
    """A folder's logits of some ids, by transformers."""
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def ours(out_dir):
    with torch.no_grad():
        return loading.model_of(checkpoint.load_checkpoint(out_dir))(IDS)[0]


IDS = torch.arange(60).view(2, 30) * 7 % 300


@pytest.mark.parametrize('name', MODELS)
def test_transformers_opens_what_was_trained(name, capsys):
    export(f'--out_dir={name} --format=hf')
    own = dict(trust_remote_code=True) if name == 'hybrid' else {}
    assert (opened(f'{name}-hf', **own) - ours(name)).abs().max() < 1e-4
    said = capsys.readouterr().out
    assert 'greedy tokens 64 of 64' in said and '1000 of 1000' in said
    assert 'model.safetensors' in said
    with open(f'{name}-hf/README.md', encoding='utf-8') as f:
        card = f.read()
    assert '| data | text |' in card and 'AutoModelForCausalLM' in card
    assert ('trust_remote_code' in card) == (name == 'hybrid')
    facts = checkpoint.load_checkpoint(name)['metadata']
    assert f'{facts["recent"][-1]["val_loss"]:.4f}' in card and os.getcwd() not in card
    assert not os.path.exists(f'{name}-hf.partial')


def test_several_formats_share_a_folder(capsys):
    for package in ('gguf', 'onnx', 'onnxruntime', 'onnxscript', 'safetensors'):
        pytest.importorskip(package)
    export('--out_dir=gpt --format=hf,gguf,onnx,safetensors,native --to=all')
    assert set(files('all')) >= {
        'README.md', 'config.json', 'model.safetensors', 'tokenizer.json', 'model-f32.gguf',
        'model.onnx', 'step.onnx', 'weights.safetensors', 'best.pt'}
    said = capsys.readouterr().out
    assert 'FAILED' not in said and len(re.findall('^\\w+: written', said, re.M)) == 5
    assert torch.equal(ours('all'), ours('gpt'))


def test_safetensors_say_what_they_are():
    library = pytest.importorskip('safetensors')
    export('--out_dir=gpt --format=safetensors')
    with library.safe_open('gpt-safetensors/weights.safetensors', 'pt') as f:
        facts, weights = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    net = checkpoint.build(facts['kind'], json.loads(facts['config']))
    assert net.load_state_dict(weights, strict=False).missing_keys == ['lm_head.weight']  # tied
    with torch.no_grad():
        assert torch.equal(net.eval()(IDS)[0], ours('gpt'))
    tokenizer = checkpoint.load_checkpoint('gpt')['tokenizer']
    assert json.loads(facts['tokenizer']) == json.loads(tokenizer['json'])


@pytest.mark.parametrize('precision', ['int8', 'int4'])
def test_native_quantised_generates(precision, capsys):
    export(f'--out_dir=hybrid --format=native --quantize={precision}')
    folder = f'hybrid-native-{precision}'
    whole, part = ours('hybrid'), ours(folder)
    assert 0 < (whole - part).abs().max() < (0.2 if precision == 'int8' else 3) and part.isfinite().all()
    assert os.path.getsize(f'{folder}/best.pt') < 0.5 * os.path.getsize('hybrid/best.pt')
    capsys.readouterr()
    assert script('sample.py', f'--out_dir={folder} --device=cpu --start=e --max_new_tokens=5') == 0
    capsys.readouterr()
    assert script('export.py', f'--out_dir={folder} --format=hf') == 2
    refused(capsys, folder, 'quantised')
    for flags in (f'--init_from={folder} --out_dir=more', f'--eval_only --out_dir={folder}'):
        assert script('train.py', '--dataset=text', flags) == 2
        refused(capsys, folder, precision)


def test_an_adapter_is_merged_or_stays_one(capsys):
    export('--out_dir=lora --format=hf,native --to=merged')
    assert (ours('lora') - ours('gpt')).abs().max() > 1e-3
    assert (opened('merged') - ours('lora')).abs().max() < 1e-4
    assert (ours('merged') - ours('lora')).abs().max() < 1e-5
    capsys.readouterr()
    for out_dir in ('lora', 'merged'):
        assert script('train.py', f'--eval_only --dataset=text --out_dir={out_dir} --device=cpu') == 0
    first, second = re.findall(r'val_loss ([\d.]+)', capsys.readouterr().out)
    assert abs(float(first) - float(second)) < 1e-3
    peft = pytest.importorskip('peft')
    export('--out_dir=gpt --format=hf --to=base')
    export('--out_dir=lora --format=peft --base=base')
    said = capsys.readouterr().out
    assert 'peft: peft' in said and 'FAILED' not in said
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained('base', dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, 'lora-peft').eval()
    with torch.no_grad():
        assert (model(IDS).logits - ours('lora')).abs().max() < 1e-4
    with open('lora-peft/adapter_config.json') as f:
        assert json.load(f)['base_model_name_or_path'] == 'base'


# --- nothing is overwritten, nothing half is left

def test_force_writes_over_its_own_files_only(capsys):
    os.makedirs('taken')
    for name in ('mine.txt', 'config.json'):
        with open(f'taken/{name}', 'w') as f:
            f.write('mine')
    export('--out_dir=gpt --format=hf --to=taken', status=2)
    refused(capsys, 'taken', 'not empty', '--force')
    assert files('taken') == ['config.json', 'mine.txt']
    assert open('taken/config.json').read() == 'mine'
    export('--out_dir=gpt --format=hf --to=taken --force --verify=False')
    assert open('taken/mine.txt').read() == 'mine'
    assert json.load(open('taken/config.json'))['model_type'] == 'qwen3'


def test_a_failed_check_is_seen(capsys, monkeypatch):
    write = to_hf.save_safetensors

    def write_wrong(path, weights, *more):
        weights = {name: tensor * (1.01 if 'down_proj' in name else 1) for name, tensor in weights.items()}
        write(path, weights, *more)
    monkeypatch.setattr(to_hf, 'save_safetensors', write_wrong)
    export('--out_dir=gpt --format=hf --to=wrong', status=1)
    found = capsys.readouterr()
    assert 'FAILED' in found.out and found.err.count('\n') == 1 and 'wrong.partial' in found.err
    assert os.path.exists('wrong.partial/config.json') and not os.path.exists('wrong')
    monkeypatch.undo()
    export('--out_dir=gpt --format=hf --to=wrong', status=2)
    refused(capsys, 'wrong.partial', 'in the way', 'remove')
    shutil.rmtree('wrong.partial')
    export('--out_dir=gpt --format=hf --to=wrong')
    assert not os.path.exists('wrong.partial')


def test_one_entry_of_the_vocabulary_is_seen(monkeypatch):
    write = to_hf.write_tokenizer

    def exchanged(tok, folder, *more):
        write(tok, folder, *more)
        with open(f'{folder}/tokenizer.json', encoding='utf-8') as f:
            spec = json.load(f)
        vocab = spec['model']['vocab']
        tokens = {i: token for token, i in vocab.items()}
        first, second = tokens[370], tokens[371]
        vocab[first], vocab[second] = 371, 370
        to_hf.write_json(folder, 'tokenizer.json', spec)
    monkeypatch.setattr(to_hf, 'write_tokenizer', exchanged)
    export('--out_dir=gpt --format=hf --to=exchanged', status=1)


def test_a_quantised_weight_that_is_another_is_seen(monkeypatch):
    save = checkpoint.save_checkpoint

    def other(path, contents):
        name = next(name for name, u in contents['weights'].items()
                    if u.dtype == torch.int8 and 'down_proj' in name)
        contents['weights'][name] = contents['weights'][name].flip(0)
        save(path, contents)
    monkeypatch.setattr(checkpoint, 'save_checkpoint', other)
    export('--out_dir=gpt --format=native --quantize=int8 --to=other', status=1)


def test_what_others_have_there_stays(capsys):
    os.makedirs('book.partial')
    with open('book.partial/chapter.txt', 'w') as f:
        f.write('mine')
    export('--out_dir=gpt --format=hf --to=book', status=2)
    refused(capsys, 'book.partial', 'in the way')
    assert files('book.partial') == ['chapter.txt'] and not os.path.exists('book')
    os.makedirs('empty')
    export('--out_dir=gpt --format=safetensors --to=empty')
    assert files('empty') == ['README.md', 'weights.safetensors']
    before = os.path.getsize('gpt/best.pt')
    export('--out_dir=gpt --format=native --quantize=int4 --to=gpt/ --force', status=2)
    refused(capsys, 'gpt', 'model itself')
    assert os.path.getsize('gpt/best.pt') == before


def test_a_folder_by_no_name_of_its_own(monkeypatch, runs):
    monkeypatch.chdir('mamba')
    export('--out_dir=. --format=safetensors')
    assert files(runs / 'mamba-safetensors') == ['README.md', 'weights.safetensors']
    assert not [name for name in files('.') if 'safetensors' in name]


def test_without_a_tokenizer_the_card_names_none():
    os.makedirs('bare')
    checkpoint.save_checkpoint('bare/best.pt', checkpoint.load_checkpoint('gpt') | dict(tokenizer=None))
    export('--out_dir=bare --format=hf')
    with open('bare-hf/README.md', encoding='utf-8') as f:
        card = f.read()
    assert "AutoModelForCausalLM.from_pretrained('bare-hf')" in card and 'AutoTokenizer' not in card


def test_a_full_disk_leaves_nothing(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(to_hf, 'save_safetensors', full)
    export('--out_dir=gpt --format=hf --to=full', status=2)
    refused(capsys, 'full', 'No space left')
    assert not os.path.exists('full') and not os.path.exists('full.partial')

    def torchs_full(*_):
        raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos\nframe #0')
    monkeypatch.setattr(checkpoint, 'save_checkpoint', torchs_full)
    export('--out_dir=gpt --format=native --to=full', status=2)
    refused(capsys, 'full', 'disk full')
    assert not os.path.exists('full.partial')


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    export('--out_dir=gpt --format=gguf', status=2)
    refused(capsys, 'gguf', 'pip install gguf')
    assert not os.path.exists('gpt-gguf')
    monkeypatch.setitem(__import__('sys').modules, 'transformers', None)
    export('--out_dir=gpt --format=hf --to=unchecked')
    assert 'pip install transformers' in capsys.readouterr().out
    assert os.path.exists('unchecked/config.json')


@pytest.mark.parametrize('flags, words', [
    ('--format=hff', 'hff gguf'),
    ('--format=', 'format empty'),
    ('--format=hf --quantize=int8', 'hf int8 gguf'),
    ('--format=torchscript --quantize=int4', 'torchscript'),
    ('--format=safetensors --quantize=int4', 'safetensors native'),
    ('--quantize=int3', 'int3 int8'),
    ('--format=hf,peft', 'hf,peft two folders'),
    ('--format=peft', 'peft whole model finetune_lora'),
    ('--to=text.txt', 'text.txt is a file'),
    ('--out_dir=nowhere', 'nowhere no such checkpoint'),
    ('--forma=hf', 'forma did you mean format'),
])
def test_unusable_input_is_one_line(capsys, flags, words):
    before = files('.')
    assert script('export.py', '--out_dir=gpt', flags) == 2
    refused(capsys, *words.split())
    assert files('.') == before
