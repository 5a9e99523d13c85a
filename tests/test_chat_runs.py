"""From rows to a model that answers: trained, talked to, exported, and the same conversation everywhere."""
import io
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import script

from mambino import chat, tokenizer
from mambino.weights import checkpoint, loading

pytestmark = pytest.mark.usefixtures('one_thread')
SOUNDS = dict(cow='moo', dog='woof', pig='oink', owl='hoo')
MODEL = ('--model=gpt --n_layer=2 --n_head=4 --n_embd=64 --block_size=32 --batch_size=24 --tokens_per_step=768 '
         '--learning_rate=8e-3 --warmup_iters=10 --device=cpu --dtype=float32 --log_interval=50')


def rows(n=500):
    """n conversations, each with a wrong word in what the user says, which nobody is to learn."""
    draw = np.random.default_rng(0)
    for _ in range(n):
        animal = str(draw.choice(list(SOUNDS)))
        wrong = 'xq' + ''.join(draw.choice(list('jkvwz'), 4))
        yield [{'role': 'user', 'content': f'{wrong} {animal}?'},
               {'role': 'assistant', 'content': f'{SOUNDS[animal]} {animal}.'}]


def write_dataset(folder, tok, talks):
    """The .bin files of conversations, as prepare.py writes them."""
    os.makedirs(folder)
    ids = [np.append(chat.encode_chat(tok, messages), -1 - tok.eot).astype('<i4') for messages in talks]
    splits = {'train': ids[len(ids) // 10:], 'val': ids[:len(ids) // 10]}
    for split, parts in splits.items():
        np.concatenate(parts).tofile(os.path.join(folder, f'{split}.bin'))
    tok.save(folder)
    meta = dict(dtype='int32', vocab_size=tok.vocab_size, eot=tok.eot, tokenizer_config=tok.config,
                tokenizer=dict(kind=tok.kind, file='tokenizer.json', sha256=tok.sha256()),
                splits={split: dict(tokens=sum(map(len, parts))) for split, parts in splits.items()})
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f)


@pytest.fixture(scope='module')
def talks(tmp_path_factory):
    """A folder with a model that was trained on conversations, out; the working directory of these tests."""
    folder, before = tmp_path_factory.mktemp('talks'), os.getcwd()
    os.chdir(folder)
    made = list(rows())
    texts = [message['content'] for messages in made for message in messages]
    tok = tokenizer.build_tokenizer('bpe', [text + '\nuser assistant' for text in texts], vocab_size=400)
    tok.config['chat_template'] = chat.template_of(tok)
    write_dataset('data/talks', tok, made)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert script('train.py', MODEL, '--dataset=talks --max_iters=200 --eval_interval=100') == 0
    torch.set_num_threads(threads)
    yield made
    os.chdir(before)


def opened():
    ckpt = checkpoint.load_checkpoint('out')
    return loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)


@pytest.mark.slow
def test_answers_are_learned_and_prompts_are_not(talks, monkeypatch, capsys):
    net, tok = opened()
    prompts, answers = [], []
    for messages in talks[:40]:                         # of val
        ids = chat.encode_chat(tok, messages)
        seen = torch.from_numpy(chat.visible(ids)).long()[None]
        with torch.no_grad():
            losses = F.cross_entropy(net(seen[:, :-1])[0][0], seen[0, 1:], reduction='none')
        learned = torch.from_numpy(ids[1:] >= 0)
        answers.append(losses[learned].mean().item())
        prompts.append(losses[~learned].mean().item())
    assert np.mean(answers) < 0.4 and np.mean(prompts) > 3, (np.mean(answers), np.mean(prompts))
    lines = [f'xqkvjz {animal}?' for animal in ('owl', 'cow')]
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines)))
    capsys.readouterr()
    assert script('sample.py', '--chat=True --interactive=True --temperature=0 --max_new_tokens=30 --device=cpu') == 0
    said, noted = capsys.readouterr()
    assert {'hoo owl.', 'moo cow.'} <= {*said.splitlines()} and 'xq' not in said
    assert 'not tuned' not in noted


@pytest.mark.slow
def test_exports_hold_the_same_conversation(talks, capsys):
    transformers = pytest.importorskip('transformers')
    gguf = pytest.importorskip('gguf')
    net, tok = opened()
    assert script('export.py', '--format=hf,gguf --to=both') == 0
    said = capsys.readouterr().out
    assert 'FAILED' not in said and 'a conversation has the same ids' in said
    theirs = transformers.AutoTokenizer.from_pretrained('both')
    model = transformers.AutoModelForCausalLM.from_pretrained('both', dtype=torch.float32)
    messages = [{'role': 'user', 'content': 'xqkvjz pig?'}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    assert prompt['input_ids'][0].tolist() == chat.encode_prompt_of(tok, messages)
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt['input_ids'].shape[1]:].tolist()
    assert theirs.decode(out, skip_special_tokens=True) == 'oink pig.' and out[-1] == chat.end_ids(tok)[0]
    reader = gguf.GGUFReader('both/model-f32.gguf')
    assert reader.fields['tokenizer.chat_template'].contents() == theirs.chat_template == tok.config['chat_template']
    with open('both/README.md', encoding='utf-8') as f:
        assert 'apply_chat_template' in f.read()


@pytest.mark.slow
def test_what_came_from_elsewhere_keeps_its_marks_and_its_template(talks):
    """hf: → train → export."""
    pytest.importorskip('transformers')
    assert script('export.py', '--format=hf --to=base --verify=False') == 0
    for name, more in (('tokenizer_config.json', {'unk_token': '<|im_start|>'}),
                       ('generation_config.json', {'eos_token_id': [397, 7]})):
        with open(f'base/{name}', encoding='utf-8') as f:
            said = json.load(f) | more
        with open(f'base/{name}', 'w', encoding='utf-8') as f:
            json.dump(said, f)
    base = tokenizer.load_tokenizer('base')
    template = base.config['chat_template'].replace("'\\n' }}{% endfor", "'\\n\\n' }}{% endfor")
    with open('base/chat_template.jinja', 'w', encoding='utf-8') as f:
        f.write(template)
    write_dataset('data/again', tokenizer.load_tokenizer('base'), list(rows(40)))
    with open('data/again/meta.json', encoding='utf-8') as f:
        meta = json.load(f)
    del meta['tokenizer_config']                        # a dataset of an older version has none
    with open('data/again/meta.json', 'w', encoding='utf-8') as f:
        json.dump(meta, f)
    assert script('train.py', '--init_from=hf:base --dataset=again --max_iters=2 --batch_size=2 --tokens_per_step=128 '
                  '--device=cpu --dtype=float32 --out_dir=tuned') == 0
    assert script('export.py', '--format=hf --out_dir=tuned --to=tuned-hf') == 0
    with open('tuned-hf/tokenizer_config.json', encoding='utf-8') as f:
        said = json.load(f)
    assert said['chat_template'] == template and said['unk_token'] == '<|im_start|>'
    with open('tuned-hf/generation_config.json', encoding='utf-8') as f:
        assert {7, 397} <= set(json.load(f)['eos_token_id'])
