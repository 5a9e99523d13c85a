"""Writes an adapter as the package peft has it, and opens it there, on the base as transformers has
it, to compare.

    python export.py --out_dir=out-lora --format=peft --base=out-hf
    base = AutoModelForCausalLM.from_pretrained('out-hf')
    model = PeftModel.from_pretrained(base, 'out-lora-peft')

    the adapter's checkpoint ──► adapter_config.json         its type and settings, where the base is
                             └─► adapter_model.safetensors   its tensors, under peft's names

Letters of the shapes: B batch, K key/value heads, n length of a prefix, P head size.
"""
import json
import os
import tempfile

import torch

from mambino.export import to_hf
from mambino.export.classes import longest_text
from mambino.export.compare import difference
from mambino.export.special_tokens import special_tokens
from mambino.export.to_safetensors import save_safetensors
from mambino.weights import adapters, loading, peft_scales
from mambino.weights.checkpoint import build
from mambino.weights.families.gpt import turned_first
from mambino.weights.tensor_files import read_json

PACKAGES = 'peft'
LIMIT = 1e-4
# Kinds of model that have the names of transformers' class: {a matrix where a LoRA would not count: why}
NO_LORA = {
    'gpt': {},
    'mamba': {
        'out_proj': 'peft refuses a LoRA on',
        'dt_proj': 'transformers would not see a LoRA on',
    },
    'hybrid': {},                   # by its own modelling file
}


def lora(ckpt):
    """→ (peft's settings, {its name: tensor}) of a LoRA's checkpoint."""
    adapter = ckpt['adapter']
    paths = {name.rpartition('.lora_')[0] for name in ckpt['weights']}
    is_own = ckpt['kind'] == 'mamba' and ckpt['config'].get('version') == 3         # of a modelling file of ours
    for matrix, why in {} if is_own else NO_LORA[ckpt['kind']].items():
        if any(path.endswith(matrix) for path in paths):
            raise ValueError(f'{why} the {matrix} of a Mamba: export the merged model, or leave it '
                             'out of --lora_targets')
    targets = [name.strip() for name in adapter['targets'].split(',') if name.strip()]
    targets = targets or sorted({adapters.short_name(path) for path in paths})
    settings = dict(peft_type='LORA', r=adapter['rank'], lora_alpha=adapter['alpha'],
                    lora_dropout=adapter['dropout'], target_modules=targets, bias='none',
                    fan_in_fan_out=False)
    tensors = {'base_model.model.' + name: tensor for name, tensor in ckpt['weights'].items()}
    return settings, tensors


def prefix(ckpt):
    """→ (peft's settings, {its name: tensor}) of a prefix's checkpoint."""
    config = ckpt['config']
    if ckpt['kind'] != 'gpt':
        raise ValueError('peft has no format for the prefix of a Mamba or a hybrid, a learned first state: use '
                         'it with sample.py, or tune with --adapter=lora')
    width = config['n_kv_head'] * config['head_dim']
    settings = dict(peft_type='PREFIX_TUNING', num_virtual_tokens=ckpt['adapter']['length'],
                    token_dim=width, num_transformer_submodules=1,
                    num_attention_heads=config['n_kv_head'], num_layers=config['n_layer'],
                    encoder_hidden_size=width, prefix_projection=False)
    caches = [ckpt['weights'][f'prefix.{name}.{i}'][0]                          # (K, n, P) each
              for i in range(config['n_layer']) for name in 'kv']
    turned = config.get('rope_dim', 0)
    if turned:                                                                  # they come first there
        order = turned_first(config['head_dim'], turned).argsort()
        caches[::2] = [keys[..., order] for keys in caches[::2]]
    embeddings = torch.stack(caches).permute(2, 0, 1, 3).flatten(1)  # (n, 2 n_layer K P)
    return settings, {'prompt_embeddings': embeddings}


def refuse_fused(weights, names, architecture):
    """ValueError if the base has no matrix of its own, {name: tensor}, for one of the LoRAs."""
    for name in weights:
        path = name.rpartition('.lora_')[0]
        if f'{path}.weight' not in names:
            raise ValueError(f'{architecture} has {path.rpartition(".")[2]} as a part of another matrix: '
                             'export the merged model, or leave it out of --lora_targets')


def refuse_base(base, model_type):
    """ValueError if a base is of another family than the model that --format=hf writes, with other rows."""
    path = os.path.join(str(base).removeprefix('hf:'), 'config.json')
    family = read_json(path).get('model_type') if os.path.exists(path) else None
    if family in list(peft_scales.FACTORS) and family != model_type:
        raise ValueError(f'{base} is a {family}, whose matrices have other factors or another order of rows than our '
                         'model of it: name with --base the folder that --format=hf writes of this model')


ADAPTERS = {'lora': lora, 'prefix': prefix}


def write(net, tok, folder, quantize='', *, ckpt, base, **_):
    """Writes the adapter of a checkpoint; peft finds its base, as transformers saves it, by the
    name `base`. ValueError if peft cannot have it."""
    adapter = ckpt['adapter']
    if quantize:
        raise ValueError('an adapter is small as it is; leave out --quantize')
    if adapter['type'] not in ADAPTERS:
        raise ValueError(f'peft\'s {adapter["type"]} has not been taught here, only '
                         f'{", ".join(ADAPTERS)}')
    if ckpt['kind'] not in NO_LORA:
        raise ValueError(f'transformers has no model with a {ckpt["kind"]}\'s names, so peft cannot '
                         'load its adapter: export the merged model')
    with torch.device('meta'):
        # ValueError if transformers has no such base
        theirs, names = to_hf.to_transformers(build(ckpt['kind'], ckpt['config']))
    if ckpt['kind'] == 'hybrid' and theirs['model_type'] not in to_hf.MODELING:
        name = theirs['architectures'][0]
        raise ValueError(f'transformers has its base as {name}, into whose matrices our scales of the branches are '
                         'folded, so that its adapter would be another one there: export the merged model, '
                         '--format=hf')
    if adapter['type'] == 'lora':
        refuse_base(base, theirs['model_type'])
        refuse_fused(ckpt['weights'], names, theirs['architectures'][0])
    settings, tensors = ADAPTERS[adapter['type']](ckpt)
    settings |= dict(task_type='CAUSAL_LM', base_model_name_or_path=str(base), inference_mode=True)
    save_safetensors(os.path.join(folder, 'adapter_model.safetensors'), tensors, {'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(settings, f, indent=2, sort_keys=True)
    if tok and tok.config.get('chat_template'):     # which its base may not have
        special = special_tokens(tok, net.config.vocab_size)
        to_hf.write_tokenizer(tok, folder, longest_text(net.config), special)


@torch.no_grad()
def verify(net, tok, folder, quantize='', *, ckpt, **_):
    """Opens what `write` wrote by peft, on the base as transformers has it → a check, see
    compare.py. net: the model with the adapter."""
    import peft
    import transformers
    transformers.utils.logging.disable_progress_bar()
    base = build(ckpt['kind'], ckpt['config']).eval()
    base.load_state_dict(loading.base_of(ckpt)['weights'])
    with tempfile.TemporaryDirectory() as base_folder:
        to_hf.write(base, None, base_folder)
        own = to_hf.has_own_code(base_folder)
        opened = transformers.AutoModelForCausalLM.from_pretrained(
            base_folder, dtype=torch.float32, trust_remote_code=own)
        opened = peft.PeftModel.from_pretrained(opened, folder).eval()
    T = min(48, base.config.block_size)
    idx = torch.randint(base.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    off = difference(opened(idx).logits, net(idx)[0])
    return dict(tool=f'peft {peft.__version__}', logits=off, limit=LIMIT, ok=off <= LIMIT, note='')


def opening(name, **_):
    """The lines that open the folder of this name, for the card."""
    return f'from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, {name!r})'
