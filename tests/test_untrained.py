"""hf:folder, a model as transformers saved it, in the place of an out_dir: sampled, scored, exported, served,
evaluated, without a step of training."""
import json
import os

import pytest
import torch
from helpers.models import perturb
from helpers.runs import refused, script, write_text

from mambino import chat, tokenizer
from mambino.export import graphs, to_hf
from mambino.export.compare import greedy
from mambino.export.special_tokens import special_tokens
from mambino.weights import checkpoint, loading
from model_gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = '--device=cpu --dtype=float32 --block_size=32'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """(a model, its tokenizer), in the folder base; beside it a dataset. The working directory of these tests."""
    folder, before = tmp_path_factory.mktemp('untrained'), os.getcwd()
    os.chdir(folder)
    write_text('text.txt')
    assert script('prepare.py', 'text.txt --tokenizer=bpe --vocab_size=400 --out=data/text') == 0
    tok = tokenizer.load_tokenizer('data/text')
    tok.config['chat_template'] = chat.template_of(tok)
    torch.manual_seed(0)
    net = perturb(GPT(GPTConfig(vocab_size=448, n_layer=1, n_embd=32, n_head=2, block_size=64)).eval())
    os.mkdir('base')
    to_hf.write(net, tok, 'base')
    yield net, tok
    os.chdir(before)


def test_it_is_sampled_and_scored(base, capsys):
    net, tok = base
    flags = '--out_dir=hf:base --device=cpu --start=shrdlu --heal=False --temperature=0 --max_new_tokens=20'
    assert script('sample.py', flags) == 0
    ids = tok.encode('shrdlu').tolist()
    assert tok.decode([*ids, *greedy(net, ids, 20, tok.vocab_size)]) in capsys.readouterr().out
    assert script('sample.py', flags, '--session=tale') == 0
    assert os.path.exists('base/sessions/tale.pt')
    capsys.readouterr()
    assert script('sample.py', '--out_dir=hf:base --score=text.txt --device=cpu') == 0
    assert 'perplexity' in capsys.readouterr().out


def test_it_is_exported(base, capsys):
    net, tok = base
    ids = torch.arange(60).view(2, 30)
    assert script('export.py', '--out_dir=hf:base --format=native,hf') == 0
    said = capsys.readouterr().out
    assert 'FAILED' not in said and 'hf: transformers' in said
    ckpt = checkpoint.load_checkpoint('base-native-hf')
    assert torch.equal(loading.model_of(ckpt)(ids)[0], net(ids)[0])
    assert checkpoint.tokenizer_of(ckpt).config['chat_template'] == tok.config['chat_template']
    with open('base-native-hf/README.md', encoding='utf-8') as f:
        card = f.read()
    assert 'as it came from elsewhere' in card and '## Training' not in card and '## Checks' in card
    with open('base-native-hf/tokenizer_config.json', encoding='utf-8') as f:
        assert json.load(f)['chat_template'] == tok.config['chat_template']
    assert script('export.py', '--out_dir=hf:base --format=native --to=base --force') == 2
    refused(capsys, 'base', 'model itself')
    # and it can be tuned from there
    assert loading.load_base('base-native-hf')['tokenizer_path'] == 'base'


def test_no_format_loses_the_ends_and_the_template(base):
    net, tok = base
    facts = graphs.metadata(net, tok)
    ends = special_tokens(tok, net.config.vocab_size).ends()
    assert facts['chat_template'] == tok.config['chat_template'] and chat.end_ids(tok)[0] in ends
    assert facts['ends'].split() == [str(i) for i in ends] and str(tok.eot) in facts['ends'].split()
    assert script('export.py', '--out_dir=hf:base --format=safetensors --verify=False') == 0
    with open('base-safetensors/weights.safetensors', 'rb') as f:
        said = json.loads(f.read(int.from_bytes(f.read(8), 'little')))['__metadata__']
    assert json.loads(said['tokenizer_config'])['chat_template'] == tok.config['chat_template']
    plain = tokenizer.build_tokenizer('byte')
    assert not {'chat_template', 'ends'} & {*graphs.metadata(net, plain)}


def test_it_is_served(base):
    pytest.importorskip('fastapi')
    from mambino.serve.library import Library
    from mambino.serve.work import Room
    library = Library('.', 'hf:base', 'cpu', 'float32', '', '', 0.0, Room(rows=2))
    library.says = list
    try:
        assert library.default() == 'base' and library.names()[0]['out_dir'] == 'hf:base'
        served = library.get()
        ids = torch.arange(60).view(2, 30)
        assert torch.equal(served.net(ids)[0], base[0](ids)[0])
        assert served.about.endswith('as it came from elsewhere')
    finally:
        library.close()


def test_it_is_evaluated(base, capsys):
    assert script('train.py', '--eval_only --init_from=hf:base --dataset=text', TINY) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith('hf:base, step 0: val_loss ')
    train = f'train.py --init_from=hf:base --dataset=text --batch_size=2 --tokens_per_step=64 {TINY}'
    assert script(*train.split(' ', 1), '--max_iters=1') == 0
    assert script(*train.split(' ', 1), '--max_iters=2 --adapter=lora --out_dir=lora --learning_rate=0.1') == 0
    capsys.readouterr()
    for flags, about in (('', 'hf:base, step 0'), ('--out_dir=out', 'out, step 1'), ('--out_dir=lora', 'lora, step 2')):
        assert script('train.py', '--eval_only --init_from=hf:base --dataset=text', TINY, flags) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(about)


@pytest.mark.parametrize('command, words', [
    ('sample.py --out_dir=base', 'base no checkpoint transformers hf:base'),
    ('export.py --out_dir=base', 'base no checkpoint transformers hf:base'),
    ('sample.py --out_dir=hf:nowhere', 'nowhere/config.json save_pretrained'),
    ('export.py --out_dir=hf:nowhere', 'nowhere/config.json save_pretrained'),
    ('serve.py --page=False --out_dir=hf:nowhere', 'hf:nowhere no such folder'),
    ('sample.py --out_dir=hf:bare', 'hf:bare no tokenizer.json'),
    ('train.py --init_from=hf:base --dataset=text --max_iters=0 --out_dir=new',
     'max_iters=0 machine sample.py --out_dir=hf:base'),
])
def test_what_cannot_be_is_one_line(base, command, words, capsys):
    if not os.path.exists('bare'):
        os.mkdir('bare')
        to_hf.write(base[0], None, 'bare')
    assert script(*command.split(' ', 1)) == 2
    refused(capsys, *words.split())
    assert not os.path.exists('new')
