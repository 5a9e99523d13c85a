"""Our models that fill holes as transformers' of modeling_holes.py, for to_hf.py: their settings, their
weights, and the proof that the folder fills holes as we do.

    keys, weights = convert_holes(net, weights)         # ValueError if that file does not compute this model
    off, limit, equal, n = compare_holes(net, opened)
"""
import torch
import torch.nn.functional as F

from mambino.blocks import fills_holes
from mambino.cache import bounded
from mambino.export.classes import kind_of
from mambino.export.compare import difference, logits_of, some_ids, told
from mambino.tokenizer_config import MODEL_TYPE
from model_gpt import rope_frequencies

FILE = 'modeling_holes.py'
INSTEAD = 'a GPT, a Mamba-2 and a hybrid of Mamba-2 and attention have; --format=native and safetensors take any'
RENAMED = {                     # of a Mamba's tensors
    'backbone.embeddings.': 'model.embed_tokens.',
    'backbone.norm_f.': 'model.norm.',
    'backbone.': 'model.',
}
LONGEST = 48                    # tokens of a text that is filled


def has_holes(net):
    return fills_holes(vars(net.config))


# --- settings and weights -------------------------------------------------------------------------

def convert_holes(net, weights):
    """→ (config.json's keys, {name: tensor})."""
    c, body = net.config, kind_of(net)
    check_body(c, body)
    keys = {field: value for field, value in vars(c).items() if field not in ('tie_embeddings', 'dropout')}
    names = dict(AutoConfig='Config', AutoModel='Model', AutoModelForMaskedLM='ForMaskedLM')
    module = FILE.removesuffix('.py')
    keys |= dict(
        architectures=['MambinoHolesForMaskedLM'], model_type=MODEL_TYPE, body=body,
        mask_token_id=c.vocab_size - 1, text_size=c.vocab_size - 1,
        auto_map={auto: f'{module}.MambinoHoles{name}' for auto, name in names.items()})
    keys['rope_stretched'] = keys.pop('rope_scaling', '')       # whose name is transformers' own
    if body != 'mamba':
        keys['rope_frequencies'] = rope_frequencies(c if body == 'gpt' else net.attention).tolist()
    if body == 'hybrid' and not c.rope_theta:
        keys['rope_layers'] = '0'
    if body == 'mamba':
        weights = {renamed(name): tensor for name, tensor in weights.items()}
    return keys, weights


def renamed(name):
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def check_body(c, body):
    """ValueError if modeling_holes.py has no such layers."""
    has = ''
    if body != 'gpt' and c.version != 2:
        has = f'Mamba-{c.version}'
    elif body == 'hybrid' and 'd' in c.kinds:
        has = 'Gated DeltaNet'
    if has:
        raise ValueError(f'no {has} that fills holes has a modelling file for transformers, as {INSTEAD}')


def opening(name, net, tok):
    """The lines that open the folder of this name and fill a hole, for the card."""
    lines = [f'model = AutoModelForMaskedLM.from_pretrained({name!r}, trust_remote_code=True)']
    if not tok:
        lines += ['ids = torch.tensor([[1, 2, 3] + 5 * [model.config.mask_token_id]])    # five holes',
                  'print(model.generate(ids))']
        return '\n'.join(['import torch', 'from transformers import AutoModelForMaskedLM', *lines])
    before, after = example(tok)
    steps = max(1, (net.config.block_length or 40) // 2)        # two tokens at once
    lines += [
        f'tok = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)',
        f"before = tok({before!r})['input_ids']",
        f"after = tok({after!r}, add_special_tokens=False)['input_ids']",
        'ids = torch.tensor([before + 20 * [model.config.mask_token_id] + after])         # 20 tokens are to be found',
        'print(tok.decode(model.generate(ids)[0], skip_special_tokens=True))',
        f"more = model.generate(torch.tensor([before]), max_new_tokens=100, sampler='ancestral', steps={steps})",
        'print(tok.decode(more[0], skip_special_tokens=True))']
    return '\n'.join(['import torch', 'from transformers import AutoModelForMaskedLM, AutoTokenizer', *lines])


def example(tok):
    """Two pieces of text that this tokenizer knows."""
    try:
        tok.encode('To be question')
        return 'To be', ' question'
    except ValueError:              # characters that its training text did not have
        known = next(filter(str.strip, (tok.decode([i]) for i in range(tok.vocab_size))))
        return known, known


# --- proof ----------------------------------------------------------------------------------------

@torch.no_grad()
def compare_holes(net, opened):
    """(The largest difference of logits; its limit; how many tokens, by which holes are filled and a text goes on,
    are ours, up to the first other one of each; of how many)."""
    c = net.config
    K, window = c.block_length, min(getattr(c, 'window', 0), 1024)
    idx = some_ids(net, 2, -(-(100 + window) // K) * K if K else 100 + window)   # more than a chunk
    ours = logits_of(net, idx)
    limit = 1e-4 * max(1.0, ours.std().item())                  # of logits that spread by 1
    off = difference(opened(idx).logits, ours)
    opened.config.eos_token_id = None                           # it goes on after the end of a text
    if not K:
        opened.config.block_size = LONGEST                      # a window: one of training may take minutes
    text = some_ids(net, 1, LONGEST)[0] % opened.config.text_size
    place = torch.arange(LONGEST)
    texts = [text.masked_fill(hidden, c.vocab_size - 1) for hidden in (place % 4 >= 2, place >= LONGEST // 2)]
    equal = sum(same_filled(net, opened, ids, limit) for ids in texts)
    return off, limit, equal, sum(holes_of(net, ids) for ids in texts)


def holes_of(net, ids):
    return int((ids == net.config.vocab_size - 1).sum())


def same_filled(net, opened, ids, limit):
    """How many holes of ids (T,), a text in one window, both fill alike, one after another in the same random order.
    If the logits of two that differ were within `limit` of each other, both are right: so it counts as all."""
    n, before = 0, ids
    theirs = opened.fill(ids, len(ids), temperature=0, generator=torch.Generator().manual_seed(0))
    for their_ids, (our_ids, logits) in zip(theirs, filled(net, ids, opened.config.text_size)):
        place = (our_ids != before).nonzero()[0]
        theirs_there = int(their_ids[place])
        if not torch.equal(their_ids, our_ids.index_fill(0, place, theirs_there)) or theirs_there >= len(logits):
            return n                                            # another hole, or no text
        if logits.max() - logits[theirs_there] > limit:
            return n
        if theirs_there != our_ids[place]:
            return holes_of(net, ids)
        n, before = n + 1, our_ids
    return n


def filled(net, ids, text_size):
    """Yields ids (T,), read by blocks or as one window, with one hole less each time, filled by its likeliest token,
    and that hole's logits (V,)."""
    state, before, mask_id = None, None, net.config.vocab_size - 1
    K = net.config.block_length or len(ids)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(ids), K):
        n = len(ids[start:start + K])
        while True:
            hidden = (ids[start:start + K] == mask_id).nonzero()[:, 0]
            if not len(hidden):
                break
            z = F.pad(ids[start:start + K], (0, K - n), value=mask_id)
            copy = state and {name: value.clone() for name, value in state.items()}
            place = hidden[torch.randperm(len(hidden), generator=generator)[0]]
            copy, reach = bounded(net, copy, K)
            logits = told(net, net.step(z[None], copy, window=reach)[0], before)[0, place, :text_size]
            ids = ids.clone()
            ids[start + place] = logits.argmax()
            yield ids, logits
        state, reach = bounded(net, state, n)
        logits, state = net.step(ids[None, start:start + K], state, window=reach)
        before = logits[:, -1:]


def note_of_mask(net, folder):
    """What there is to say of how the folder's tokenizer calls a hole. ValueError if that is another id."""
    from transformers import AutoTokenizer
    opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    mask_id = net.config.vocab_size - 1
    if opened.mask_token_id is None:
        return f'a hole is the id {mask_id}, for which its tokenizer has no name'
    if opened.mask_token_id != mask_id:
        raise ValueError(f'mask_token_id is {opened.mask_token_id}, and should be {mask_id}')
    return f'a hole is {opened.mask_token}, the id {mask_id}'
