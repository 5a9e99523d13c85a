"""Writes an adapter as the package peft has it, and opens it there, on the base as transformers has it, to compare."""
import json
import os
import tempfile

import torch

from mambino.export import to_hf
from mambino.export.to_hf import save_safetensors
from mambino.weights import adapters, loading
from mambino.weights.checkpoint import build


def write_peft(ckpt, folder, base_folder):
    """Writes an adapter's checkpoint as adapter_config.json and adapter_model.safetensors of peft, which finds the base, as transformers
    saves it, in base_folder. ValueError if peft cannot have it."""
    how, config = ckpt['adapter'], ckpt['config']
    if ckpt['kind'] == 'hybrid':
        raise ValueError('transformers has no model with a hybrid\'s names, so peft cannot load its adapter: export the merged model')
    common = dict(task_type='CAUSAL_LM', base_model_name_or_path=str(base_folder), inference_mode=True)
    if how['type'] == 'prefix':
        if ckpt['kind'] == 'mamba':
            raise ValueError('peft has no format for a Mamba\'s prefix, a learned first state: use it with sample.py, or tune with '
                             '--adapter=lora')
        width = config['n_kv_head'] * config['head_dim']
        common |= dict(peft_type='PREFIX_TUNING', num_virtual_tokens=how['length'], token_dim=width, num_transformer_submodules=1,
                       num_attention_heads=config['n_kv_head'], num_layers=config['n_layer'], encoder_hidden_size=width,
                       prefix_projection=False)
        layers = [ckpt['weights'][f'prefix.{kind}.{i}'][0] for i in range(config['n_layer']) for kind in 'kv']  # (K, n, P) each
        tensors = {'prompt_embeddings': torch.stack(layers).permute(2, 0, 1, 3).flatten(1)}                     # (n, 2 layers K P)
    else:
        paths = {key.rpartition('.lora_')[0] for key in ckpt['weights']}
        for name, why in (('out_proj', 'peft refuses a LoRA on'), ('dt_proj', 'transformers would not see a LoRA on')):
            if ckpt['kind'] == 'mamba' and any(path.endswith(name) for path in paths):
                raise ValueError(f'{why} the {name} of a Mamba: export the merged model, or leave it out of --lora_targets')
        targets = [name.strip() for name in how['targets'].split(',') if name.strip()] or sorted({adapters.short_name(path) for path in paths})
        common |= dict(peft_type='LORA', r=how['rank'], lora_alpha=how['alpha'], lora_dropout=how['dropout'], target_modules=targets,
                       bias='none', fan_in_fan_out=False)
        tensors = {'base_model.model.' + key: value for key, value in ckpt['weights'].items()}
    save_safetensors(os.path.join(folder, 'adapter_model.safetensors'), tensors, {'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(common, f, indent=2, sort_keys=True)


@torch.no_grad()
def verify_peft(ckpt, net, folder):
    """Opens what write_peft wrote by peft, on the base as transformers has it → {'tool', 'logits', 'limit', 'ok', 'note'}. net: the model
    with the adapter."""
    import peft
    import transformers
    transformers.utils.logging.disable_progress_bar()
    base = build(ckpt['kind'], ckpt['config']).eval()
    base.load_state_dict(loading.base_of(ckpt)['weights'])
    with tempfile.TemporaryDirectory() as place:
        to_hf.write(base, None, place)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    idx = torch.randint(base.config.vocab_size, (2, min(48, base.config.block_size)), generator=torch.Generator().manual_seed(0))
    found = (net(idx)[0] - theirs(idx).logits).abs().max().item()
    return dict(tool=f'peft {peft.__version__}', logits=found, limit=1e-4, ok=found <= 1e-4, note='')
