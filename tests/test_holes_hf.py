"""Models that fill holes in transformers, by our modelling file: the same logits, the same texts, and back again."""
import json
import os

import pytest
import torch
from helpers.holes import T, V, build, text
from helpers.models import assert_close
from helpers.runs import TINY, refused, script, write_text

from mambino import tokenizer
from mambino.export import hf_holes, special_tokens, to_hf
from mambino.export.compare import logits_of
from mambino.sample.uncover import Filler
from mambino.weights import checkpoint, from_hf, loading
from mambino.weights.tensor_files import read_safetensors

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

transformers = pytest.importorskip('transformers')
OTHER_GPT = dict(
    qkv_bias=True, o_bias=True, mlp_bias=True, norm_after=True, qk_norm=True, qk_norm_whole=True, attention_gate=True,
    rope_dim=4, rope_layers='10', rope_scaling='yarn', rope_factor=4.0, rope_length=8, rope_amplitude=1.2,
    tie_embeddings=False)
OTHER_HYBRID = dict(
    layout='parallel', layers='mab', n_layer=3, low_rank=8, share_projections=False, attention_gate=True, qk_norm=True,
    rope_theta=0.0, window=0, embed_norm=False, gate=False)
MODELS = {      # of helpers/holes.py, and what is changed
    'gpt': ('gpt', {}),
    'gpt-window': ('gpt-window', {}),
    'gpt-experts': ('gpt-experts', dict(norm_topk=False)),
    'gpt-other': ('gpt', OTHER_GPT),
    'mamba2': ('mamba2', dict(n_groups=2, intermediate_size=40)),
    'mamba2-apart': ('mamba2-apart', dict(gated_norm=False, tie_embeddings=False)),
    'hybrid': ('hybrid', {}),
    'hybrid-other': ('hybrid', OTHER_HYBRID),
    'mamba2-shifted': ('mamba2-apart', dict(shifted=True)),
    'gpt-shifted': ('gpt', dict(shifted=True)),
}
every_model = pytest.mark.parametrize('name', MODELS)
every_length = pytest.mark.parametrize('K', [0, 4])     # of a block; 0: masked
HOLE = V - 1


@pytest.fixture(autouse=True, scope='module')
def quiet(own_code):
    """No progress bars, and no modelling files in the cache of whoever runs this."""
    transformers.utils.logging.set_verbosity_error()


def built(name, K=0, **changes):
    base, others = MODELS[name]
    return build(base, objective='block' if K else 'masked', block_length=K, norm_eps=1e-3, **others | changes)


def opened(folder, auto='AutoModelForMaskedLM'):
    there = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    return there.eval() if auto != 'AutoTokenizer' else there


class Tok:
    """Ids from 10 on stand for no text."""
    vocab_size = 10

    def __init__(self, eot):
        self.eot = eot


def likely_end(model):
    """The model knows as the end of a text what it writes most often; a Tok of that."""
    model.config.text_size, model.config.pad_token_id = Tok.vocab_size, 10
    ids = model.generate(text(1, 5), max_new_tokens=40)
    model.config.eos_token_id = int(ids[0, 5:].mode().values)
    return Tok(model.config.eos_token_id)


def hidden(ids, places):
    """ids (B, T) with holes at these places."""
    ids = ids.clone()
    ids[:, places] = HOLE
    return ids


# --- the network ----------------------------------------------------------------------------------

@every_length
@every_model
def test_it_computes_the_same_and_comes_back(name, K, tmp_path):
    net = built(name, K)
    to_hf.write(net, None, tmp_path)
    check = to_hf.verify(net, None, tmp_path)
    assert check['ok'] and check['logits'] <= 1e-5 and check['greedy'] == '48 of 48', check
    assert check['note'] == 'opened as MambinoHolesForMaskedLM'
    assert sorted(os.listdir(tmp_path)) == [
        'config.json', 'generation_config.json', 'model.safetensors', 'modeling_holes.py']
    kind, config, weights, _ = from_hf.load_hf(tmp_path)
    assert (kind, config) == (MODELS[name][0].split('-')[0].rstrip('2'), vars(net.config))
    wanted = net.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)


@torch.no_grad()
@every_model
def test_padding_is_not_seen(name, tmp_path):
    """On either side of a text; of a text in blocks it would move them."""
    net = built(name)
    to_hf.write(net, None, tmp_path)
    model, ids = opened(tmp_path), text(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[0, 17:], mask[1, 12:] = 0, 0, 0
    logits = model(ids, attention_mask=mask).logits
    first = int(net.config.shifted)                             # of whose first token none speaks
    assert_close(logits[0, 5 + first:17], net(ids[:1, 5:17])[0][0, first:], 1e-5)
    assert_close(logits[1, :12], net(ids[1:, :12])[0][0], 1e-5)
    model.config.block_length = 4
    with pytest.raises(ValueError, match='attention_mask has padding'):
        model(ids, attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize('name', ['gpt', 'gpt-window', 'mamba2', 'hybrid', 'gpt-shifted'])
def test_the_state_of_the_blocks_so_far(name, tmp_path):
    """What is read after it is what it would be in one piece; it stays as it is."""
    net = built(name, 4)
    to_hf.write(net, None, tmp_path)
    model, ids = opened(tmp_path), text(2, 24)
    whole = model(ids).logits
    state = model(ids[:, :12]).past_key_values
    for _ in range(2):
        assert_close(model(ids[:, 12:], past_key_values=state).logits, whole[:, 12:], 1e-5)
    assert not torch.equal(model(hidden(ids, [13])).logits[:, 15], whole[:, 15])        # both sides of a block
    within = model(ids[:, :14]).past_key_values
    with pytest.raises(ValueError, match='past_key_values end after 14 tokens.*of 4'):
        model(ids[:, 14:], past_key_values=within)
    kept = [layer['k'].shape[1] for layer in state.layers if 'k' in layer]
    assert all(length == (min(12, net.config.window - 1) if net.config.window else 12) for length in kept)
    longer = text(2, 3 * T)                                     # beyond what it has learned it sees T tokens
    out = model(longer)
    kept = [layer['k'].shape[1] for layer in out.past_key_values.layers if 'k' in layer]
    assert all(length == (net.config.window or T) - 1 for length in kept)
    assert_close(out.logits, logits_of(net, longer), 1e-5)
    to_hf.write(built(name), None, tmp_path)
    with pytest.raises(ValueError, match='without a state'):
        opened(tmp_path)(ids, past_key_values=state)


@torch.no_grad()
def test_other_ways_to_open_it(tmp_path):
    """Without its head; in bf16; not as a model that goes on from token to token, which it is not."""
    net = built('hybrid')
    to_hf.write(net, None, tmp_path)
    ids = text()
    assert_close(opened(tmp_path, 'AutoModel')(ids).last_hidden_state, net.hidden_states(ids)[0], 1e-5)
    rounded = opened(tmp_path).to(torch.bfloat16)(ids).logits.float()
    assert (rounded - net(ids)[0]).norm() <= 0.05 * rounded.norm()
    with pytest.raises(ValueError, match='AutoModelForCausalLM'):
        opened(tmp_path, 'AutoModelForCausalLM')
    opened(tmp_path).save_pretrained(tmp_path / 'again')
    kind, config, weights, _ = from_hf.load_hf(tmp_path / 'again')
    assert config == vars(net.config) and all(torch.equal(weights[key], p) for key, p in net.state_dict().items())


# --- its texts ------------------------------------------------------------------------------------

def ours(net, tok, ids, new, seed, **settings):
    """What sample.py makes of ids (T,) with this seed, padded with 10 behind its end."""
    steps, sampler = settings.pop('steps', 0), settings.pop('sampler', 'first')
    filler = Filler(net, tok, 'cpu', sampler, steps, settings, ends=bool(new))
    begin = ids.tolist() + new * [HOLE]
    for whole in filler.fill(begin, torch.Generator().manual_seed(seed)):
        known = whole.index(HOLE) if HOLE in whole else len(whole)
        if new and tok.eot in whole[len(ids):known]:
            break
    end = whole.index(tok.eot, len(ids)) + 1 if new and tok.eot in whole[len(ids):] else len(whole)
    return whole[:end] + (len(whole) - end) * [10]


@every_length
@pytest.mark.parametrize('name', ['gpt', 'mamba2-apart', 'hybrid', 'mamba2-shifted'])
def test_its_texts_are_those_of_our_samplers(name, K, tmp_path):
    """With the same seed: texts longer than a window, with holes, and that go on to their end."""
    net = built(name, K)
    to_hf.write(net, None, tmp_path)
    model = opened(tmp_path)
    tok = likely_end(model)
    ids = text(1, 2 * T + 3) % 10
    ids = ids.masked_fill(ids == tok.eot, (tok.eot + 1) % 10)
    holes = hidden(ids, [1, 2, 3, 7, 9, *range(20, 31)])
    ended = 0
    for settings in (dict(), dict(sampler='confidence', temperature=0.0), dict(sampler='confidence', steps=2),
                     dict(sampler='ancestral', steps=3, temperature=0.7), dict(steps=2)):
        for seed, (given, new) in enumerate([(holes, 0), (ids[:, :5], 30), (ids[:, :8], 25), (holes[:, :11], 9)]):
            got = model.generate(given, max_new_tokens=new, generator=torch.Generator().manual_seed(seed), **settings)
            if seed < 3:                                        # sample.py does not fill and go on at once
                assert got[0].tolist() == ours(net, tok, given[0], new, seed, **settings), settings
            assert got.shape == (1, given.shape[1] + new) and got.max() <= 10       # never a hole
            is_given = given != HOLE
            assert torch.equal(got[:, :given.shape[1]][is_given], given[is_given])
            assert tok.eot not in got[:, :given.shape[1]]
            ended += 10 in got
    assert ended > 3


def test_texts_side_by_side(tmp_path):
    """Padded on either side, each is filled as it is alone."""
    net = built('gpt')
    to_hf.write(net, None, tmp_path)
    model, ids = opened(tmp_path), hidden(text(2, 12), [4, 5])
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 10:] = 0, 0
    got = model.generate(ids, attention_mask=mask, max_new_tokens=3, sampler='confidence', temperature=0.0)
    alone = [model.generate(row[is_real.bool()][None], max_new_tokens=3, sampler='confidence',
                            temperature=0.0)[0]
             for row, is_real in zip(ids, mask)]
    assert torch.equal(got[0, 3:], alone[0]) and torch.equal(got[0, :3], ids[0, :3])
    assert torch.equal(torch.cat((got[1, :10], got[1, 12:])), alone[1])


@pytest.mark.parametrize('settings, words', [
    (dict(sampler='best'), "sampler='best' must be"), (dict(steps=-1), 'steps=-1'),
    (dict(temperature=-0.5), '0 or more'), (dict(), 'no hole, 11, to be filled')])
def test_what_generate_cannot_do(settings, words, tmp_path):
    to_hf.write(built('gpt'), None, tmp_path)
    ids = hidden(text(), [3]) if settings else text()
    with pytest.raises(ValueError, match=words):
        opened(tmp_path).generate(ids, **settings)


# --- the proof can fail ---------------------------------------------------------------------------

@pytest.mark.parametrize('tensor', ['model.layers.1.back.D', 'model.layers.0.mixer.D'])
def test_verify_sees_other_numbers(tensor, tmp_path):
    net = built('mamba2', 4)
    to_hf.write(net, None, tmp_path)
    weights = dict(read_safetensors(tmp_path / 'model.safetensors'))
    weights[tensor] = weights[tensor] + 0.05
    to_hf.save_safetensors(tmp_path / 'model.safetensors', weights, {'format': 'pt'})
    check = to_hf.verify(net, None, tmp_path)
    assert not check['ok'] and check['logits'] > check['limit']


def test_verify_sees_other_texts(tmp_path, monkeypatch):
    """Logits that are the same, and a sampler that takes others."""
    net = built('gpt')
    to_hf.write(net, None, tmp_path)
    code = (tmp_path / 'modeling_holes.py').read_text()
    assert 'argmax' in code
    (tmp_path / 'modeling_holes.py').write_text(code.replace('argmax', 'argmin'))
    check = to_hf.verify(net, None, tmp_path)
    assert not check['ok'] and check['logits'] <= check['limit'] and check['greedy'] == '0 of 48'


def test_two_that_are_likely_alike_are_both_right():
    """A tie is no fault; where another place is filled, or a likelier token is there, it is one."""
    net, ids = built('gpt'), hidden(text(1), [3, 4, 5])[0]
    pictures = [(z.clone(), logits) for z, logits in hf_holes.filled(net, ids, V - 1)]

    class Opened:
        config = net.config
        config.text_size = V - 1

        def fill(self, *_, **__):
            yield other
    first, logits = pictures[0]
    place = int((first != ids).nonzero()[0])
    other = first.clone()
    other[place] = logits.argmin()
    off = float(logits.max() - logits.min())
    assert hf_holes.same_filled(net, Opened(), ids, off + 1e-3) == 3
    assert hf_holes.same_filled(net, Opened(), ids, off - 1e-3) == 0
    other = first.roll(1)
    assert hf_holes.same_filled(net, Opened(), ids, 1e-4) == 0


# --- tokenizers -----------------------------------------------------------------------------------

def bpe():
    return tokenizer.build_tokenizer('bpe', ['the quick brown fox jumps over the lazy dog. ' * 20], vocab_size=300)


@pytest.mark.parametrize('kind, more', [('bpe', 1), ('bpe', 20), ('byte', 2)])
def test_a_hole_has_a_name_and_no_text_is_one(kind, more, tmp_path):
    tok = bpe() if kind == 'bpe' else tokenizer.build_tokenizer('byte')
    net = built('gpt', vocab_size=tok.vocab_size + more)
    to_hf.write(net, tok, tmp_path)
    check = to_hf.verify(net, tok, tmp_path)
    assert check['ok'] and check['ids'] == '1000 of 1000', check
    assert f'a hole is <|mask|>, the id {net.config.vocab_size - 1}' in check['note']
    theirs, model = opened(tmp_path, 'AutoTokenizer'), opened(tmp_path)
    assert theirs.mask_token_id == model.config.mask_token_id == net.config.vocab_size - 1 == len(theirs) - 1
    assert theirs.pad_token_id == model.config.pad_token_id == (tok.vocab_size if more > 1 else None)
    for said in ('<|mask|>', 'the <|mask|> fox', '<|unused_301|>'):
        assert theirs(said)['input_ids'] == tok.encode(said).tolist()
    assert hf_holes.example(tok) == ('To be', ' question')
    ids = tok.encode('the fox').tolist()
    assert theirs.decode([*ids, theirs.mask_token_id], skip_special_tokens=True) == 'the fox'
    assert model.config.text_size == tok.vocab_size and model.config.eos_token_id == tok.eot
    assert from_hf.load_hf(tmp_path)[3].sha256() == tok.sha256()


@pytest.mark.parametrize('name', ['gpt', 'mamba2', 'hybrid'])
def test_a_config_that_leaves_out_that_the_head_is_tied(name, tmp_path):
    """As transformers 4 saves it, whose default that is."""
    net = built(name)
    to_hf.write(net, None, tmp_path)
    path = tmp_path / 'config.json'
    config = json.loads(path.read_text())
    assert config.pop('tie_word_embeddings')
    path.write_text(json.dumps(config))
    weights = from_hf.load_hf(tmp_path)[2]
    assert torch.equal(weights['lm_head.weight'], net.lm_head.weight)


@pytest.mark.parametrize('kind, more', [('bpe', 4), ('bpe', 1), ('byte', 3)])
def test_what_transformers_saves_anew_comes_back(kind, more, tmp_path):
    """It writes the names of what is behind the texts' ids into tokenizer.json: they are no text for it."""
    tok = bpe() if kind == 'bpe' else tokenizer.build_tokenizer('byte')
    net = built('gpt', vocab_size=tok.vocab_size + more)
    for folder in ('first', 'anew', 'again'):
        (tmp_path / folder).mkdir()
    to_hf.write(net, tok, tmp_path / 'first')
    for auto in ('AutoModelForMaskedLM', 'AutoTokenizer'):
        opened(tmp_path / 'first', auto).save_pretrained(tmp_path / 'anew')
    assert '<|mask|>' in (tmp_path / 'anew' / 'tokenizer.json').read_text()
    *_, read = from_hf.load_hf(tmp_path / 'anew')
    assert (read.kind, read.vocab_size, read.eot) == (tok.kind, tok.vocab_size, tok.eot)
    text = 'the <|mask|> fox<|unused_293|>'
    assert read.encode(text).tolist() == tok.encode(text).tolist()
    to_hf.write(net, read, tmp_path / 'again')
    check = to_hf.verify(net, read, tmp_path / 'again')
    assert check['ok'] and f'<|mask|>, the id {net.config.vocab_size - 1}' in check['note'], check
    first, again = (json.loads((tmp_path / folder / 'tokenizer.json').read_text()) for folder in ('first', 'again'))
    assert first['added_tokens'] == again['added_tokens']


def test_a_hole_is_no_text_of_any_tokenizer(tmp_path, capsys):
    """One with more ids than there are texts is refused, in a folder and in a checkpoint."""
    tok = bpe()
    net = built('gpt', vocab_size=tok.vocab_size + 1)
    to_hf.write(net, tok, tmp_path)
    (tmp_path / 'tokenizer.json').write_text(special_tokens.text_with(tok.text, {tok.vocab_size: '<|mine|>'}))
    with pytest.raises(SystemExit):
        from_hf.load_hf(tmp_path)
    n = tok.vocab_size
    refused(capsys, f"has {n + 1} ids, more than config.json's vocab_size={n + 1}, whose last one is a hole")
    with pytest.raises(SystemExit):
        checkpoint.tokenizer_of(dict(tokenizer=tok.state(), config=dict(vars(net.config), vocab_size=tok.vocab_size)))
    refused(capsys, f'has {tok.vocab_size} ids, more than its model, which has {tok.vocab_size - 1} for text')


def test_no_id_is_left_for_a_hole(tmp_path):
    tok = bpe()
    n = tok.vocab_size
    with pytest.raises(ValueError, match=f'{n} ids, the model only {n - 1}'):
        to_hf.write(built('gpt', vocab_size=n), tok, tmp_path)
    assert not os.listdir(tmp_path)


def test_where_names_in_a_text_are_tokens_a_hole_has_none(tmp_path):
    """Of a model with a template of conversations: else a text could have holes."""
    tok = bpe()
    tok.config = dict(chat_template='{% for m in messages %}{{ m.content }}{% endfor %}')
    net = built('gpt', vocab_size=320)
    to_hf.write(net, tok, tmp_path)
    theirs = opened(tmp_path, 'AutoTokenizer')
    assert theirs.mask_token_id is None and theirs('<|mask|>')['input_ids'] == tok.encode('<|mask|>').tolist()
    assert 'a hole is the id 319, for which its tokenizer has no name' in to_hf.verify(net, tok, tmp_path)['note']


# --- what cannot be -------------------------------------------------------------------------------

@pytest.mark.parametrize('name, changes, words', [
    ('mamba1', {}, 'no Mamba-1 that fills holes.*--format=native and safetensors'),
    ('mamba3', {}, 'no Mamba-3 that fills holes'),
    ('hybrid', dict(version=3), 'no Mamba-3 that fills holes'),
    ('hybrid-delta', {}, 'no Gated DeltaNet that fills holes')])
def test_what_has_no_modelling_file_is_said(name, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        to_hf.write(build(name, objective='masked', **changes), None, tmp_path)
    with pytest.raises(ValueError, match='quantize=int8.*or choose --format=native$'):
        to_hf.write(built('gpt'), None, tmp_path, 'int8')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('changes, words', [
    (dict(body='rnn'), 'model_type="mambino_holes, body=rnn"'),
    (dict(mask_token_id=3), 'mask_token_id=3: must be the last'),
    (dict(objective='next'), 'objective="next": must be'), (dict(block_length=3), 'objective=block has blocks'),
    (dict(window=1.5), 'window=1.5: must be a whole number')])
def test_a_config_that_cannot_be(changes, words, tmp_path, capsys):
    to_hf.write(built('gpt'), None, tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(SystemExit):
        from_hf.load_hf(tmp_path)
    refused(capsys, words)


# --- the scripts ----------------------------------------------------------------------------------

@pytest.fixture
def runs(tmp_path, monkeypatch, capsys):
    """masked/ and block/, trained on a text in data/tiny for a few steps."""
    monkeypatch.chdir(tmp_path)
    write_text('text.txt')
    assert script('prepare.py', 'text.txt --tokenizer=char --out=data/tiny') == 0
    for name, flags in (('masked', '--model=gpt --n_head=2 --objective=masked'),
                        ('block', '--model=mamba --objective=block --block_length=4')):
        assert script('train.py', TINY, f'--max_iters=4 --out_dir={name}', flags) == 0
    capsys.readouterr()


def test_a_run_goes_out_and_comes_back(runs, capsys):
    for name in ('masked', 'block'):
        assert script('export.py', f'--out_dir={name} --format=hf,safetensors') == 0
        folder = f'{name}-hf-safetensors'
        said = capsys.readouterr().out
        assert 'hf: transformers' in said and 'FAILED' not in said and '1000 of 1000' in said
        with open(f'{folder}/README.md', encoding='utf-8') as f:
            card = f.read()
        assert card.startswith('---\nlibrary_name: transformers\n---\n')       # no pipeline would find a hole
        assert 'fills holes' in card and 'upper bounds' in card
        opening = card.split('```python\n')[1].split('```')[0]
        assert 'AutoModelForMaskedLM' in opening and 'trust_remote_code=True' in opening
        exec(opening, {})                                       # as whoever reads it would type it
        begins = hf_holes.example(checkpoint.tokenizer_of(checkpoint.load_checkpoint(name)))[0]
        said = capsys.readouterr().out
        assert said.startswith(begins) and len(said) >= 2 * len(begins) + 20      # and what it goes on with
        texts = []
        for source in (name, f'hf:{folder}'):
            assert script('sample.py', f'--out_dir={source} --device=cpu --start="the [...6...]" --seed=5') == 0
            texts.append(capsys.readouterr().out.rpartition('seed')[2])
        assert texts[0] == texts[1]
        assert script('train.py', TINY, f'--init_from=hf:{folder} --out_dir=more --max_iters=2') == 0
        tuned = checkpoint.load_checkpoint('more')
        assert tuned['config']['objective'] == name and loading.model_of(tuned)
        assert script('export.py', f'--out_dir=hf:{folder} --format=hf --to={name}-again') == 0
        with open(f'{name}-again/model.safetensors', 'rb') as a, open(f'{folder}/model.safetensors', 'rb') as b:
            assert a.read() == b.read()
        for flags in ('--format=gguf', '--format=onnx,hf', '--format=torchscript'):
            capsys.readouterr()
            assert script('export.py', f'--out_dir={name}', flags) == 2
            refused(capsys, name, 'fills holes', 'hf, native or safetensors can hold it')
        for path in ('more', f'{name}-again', folder):
            for entry in os.listdir(path):
                os.remove(os.path.join(path, entry))
            os.rmdir(path)
