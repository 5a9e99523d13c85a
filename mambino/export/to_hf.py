"""Writes a model as a folder that Hugging Face's transformers opens, and proves it with transformers itself.

    python export.py --out_dir=out --format=hf                                # export.py calls write, then verify
    AutoModelForCausalLM.from_pretrained('out/hf'); AutoTokenizer.from_pretrained('out/hf')

Each model becomes the class of transformers that computes exactly the same:

    GPT                      Llama; with a window Mistral, with qk_norm Qwen3; with experts Mixtral, with both Qwen3Moe
    Mamba                    Mamba, Mamba2
    plain hybrid             FalconH1, into whose matrices goes what the class lacks: see to_falcon_h1
    any other hybrid         modeling_mambino.py, which is copied into the folder (trust_remote_code=True)

    config, state dict ──► describe ──► config.json         the class and its settings, all of them explicit
                                    └─► model.safetensors   fp32, in the class's names
    tokenizer          ──► tokenizer.json, tokenizer_config.json, generation_config.json

The tokenizer there takes text for text as ours does: "<|endoftext|>" in it is thirteen characters, never the end of a document; that id is
`eos_token_id`. Seen to hold with transformers 5.23 and 4.57, but for a Mamba-2 with n_groups > 1, whose norm only 5 has in groups.
vLLM reads the same folders; that is untried.
"""
import json
import os
import shutil

import torch

from mambino.export.compare import difference, greedy, silent, some_ids, some_texts
from mambino.weights.from_hf import EXPERTS, FLOATS

MODELING = 'modeling_mambino.py'


# --- which class, and what it is told ---------------------------------------------------------------------------------

def describe(net):
    """→ (config.json's keys, {name: tensor}) of the class of transformers that computes what net does."""
    c = net.config
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    if c.tie_embeddings:
        del weights['lm_head.weight']
    shared = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tie_embeddings)
    if hasattr(c, 'version'):
        keys = describe_mamba(c)
    elif not hasattr(c, 'layout'):
        keys, weights = describe_gpt(c), split_experts(c, weights)
    elif c.layout == 'sequential' and not (c.gate or c.branch_norm or c.window or c.qk_norm or c.low_rank):
        keys, weights = to_falcon_h1(c, weights)
    else:
        keys = {name: value for name, value in vars(c).items() if name not in ('tie_embeddings', 'dropout')}
        keys |= dict(architectures=['MambinoForCausalLM'], model_type='mambino_hybrid',
                     auto_map={'AutoConfig': 'modeling_mambino.MambinoConfig',
                               'AutoModelForCausalLM': 'modeling_mambino.MambinoForCausalLM'})
    return {**shared, **keys}, weights


def describe_attention(c):
    return dict(hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
                head_dim=c.head_dim, intermediate_size=c.intermediate_size, max_position_embeddings=c.block_size,
                rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, rope_parameters=dict(rope_type='default', rope_theta=c.rope_theta),
                hidden_act='silu', attention_bias=False, mlp_bias=False)


def describe_gpt(c):
    family = {(False, False): 'Mistral' if c.window else 'Llama', (False, True): 'Qwen3', (True, False): 'Mixtral',
              (True, True): 'Qwen3Moe'}[c.n_expert > 0, c.qk_norm]
    keys = describe_attention(c) | dict(architectures=[family + 'ForCausalLM'], model_type=family.lower().replace('moe', '_moe'))
    if family != 'Llama':
        keys.update(sliding_window=c.window or None)
    if c.qk_norm:
        keys.update(use_sliding_window=c.window > 0, max_window_layers=0,
                    layer_types=['sliding_attention' if c.window else 'full_attention'] * c.n_layer)
    if c.n_expert:
        keys.update(num_experts_per_tok=c.n_expert_active, num_local_experts=c.n_expert, router_aux_loss_coef=c.aux_loss)
    if family == 'Qwen3Moe':
        keys.update(num_experts=c.n_expert, moe_intermediate_size=c.intermediate_size, norm_topk_prob=True, decoder_sparse_step=1,
                    mlp_only_layers=[])
    return keys


def split_experts(c, weights):
    """Our stacks of experts as a matrix each, which is how transformers' classes have them on the disk."""
    if not c.n_expert:
        return weights
    block, gate, up, down = EXPERTS['qwen3_moe' if c.qk_norm else 'mixtral']
    out = {}
    for name, tensor in weights.items():
        start, _, what = name.partition('.mlp.')
        if what == 'experts.gate_up_proj':
            for e, both in enumerate(tensor):                                   # (2 I, D)
                out[f'{start}.{block}.experts.{e}.{gate}.weight'], out[f'{start}.{block}.experts.{e}.{up}.weight'] = both.chunk(2)
        elif what == 'experts.down_proj':
            out.update({f'{start}.{block}.experts.{e}.{down}.weight': matrix for e, matrix in enumerate(tensor)})
        else:
            out[f'{start}.{block}.{what}' if what else name] = tensor
    return out


def describe_mamba(c):
    keys = dict(hidden_size=c.n_embd, num_hidden_layers=c.n_layer, state_size=c.state_size, expand=c.expand, conv_kernel=c.conv_kernel,
                layer_norm_epsilon=c.norm_eps, use_bias=False, use_conv_bias=True, hidden_act='silu', residual_in_fp32=True)
    if c.version == 1:
        return keys | dict(architectures=['MambaForCausalLM'], model_type='mamba', intermediate_size=c.expand * c.n_embd,
                           time_step_rank=c.time_step_rank)
    return keys | dict(architectures=['Mamba2ForCausalLM'], model_type='mamba2', num_heads=c.expand * c.n_embd // c.head_dim,
                       head_dim=c.head_dim, n_groups=c.n_groups, chunk_size=c.chunk_size, rms_norm=True, norm_before_gate=False)


def to_falcon_h1(c, weights):
    """A hybrid without what FalconH1 lacks. Of two branches it takes the sum, not the scaled mean, and it norms no embeddings: the scales
    go into the rows of the matrices before them, the norm into the table of the embeddings, which is then no longer that of the head."""
    out = {}
    for name, tensor in weights.items():
        layer = name.rpartition('.layers.')[2].partition('.')[0]
        scale = weights.get(f'model.layers.{layer}.residual_scale')
        if name.endswith(('out_proj.weight', 'o_proj.weight')):
            tensor = tensor * (scale / 2)[:, None]
        elif name.endswith('down_proj.weight'):
            tensor = tensor * weights[f'model.layers.{layer}.mlp_residual_scale'][:, None]
        elif name == 'model.embed_tokens.weight':
            tensor = tensor * torch.rsqrt(tensor.square().mean(-1, keepdim=True) + c.norm_eps) * weights['model.embed_norm.weight']
        name = name.replace('.mlp.', '.feed_forward.').replace('pre_mlp_layernorm', 'pre_ff_layernorm')
        if not name.endswith(('residual_scale', 'embed_norm.weight')):
            out['model.final_layernorm.weight' if name == 'model.norm.weight' else name] = tensor
    if c.tie_embeddings:
        out['lm_head.weight'] = weights['model.embed_tokens.weight']
    inner = c.expand * c.n_embd
    return describe_attention(c) | dict(
        architectures=['FalconH1ForCausalLM'], model_type='falcon_h1', tie_word_embeddings=False, mamba_d_ssm=inner,
        mamba_expand=c.expand, mamba_n_heads=inner // c.ssm_head_dim, mamba_d_head=c.ssm_head_dim, mamba_n_groups=c.n_groups,
        mamba_d_state=c.state_size, mamba_d_conv=c.conv_kernel, mamba_chunk_size=c.chunk_size, mamba_conv_bias=True,
        mamba_proj_bias=False, projectors_bias=False, mamba_rms_norm=True, mamba_norm_before_gate=False, mlp_multipliers=[1.0, 1.0],
        ssm_multipliers=[1.0] * 5, **{f'{name}_multiplier': 1.0 for name in 'lm_head embedding key attention_in attention_out '
                                      'ssm_in ssm_out'.split()}), out


# --- files ------------------------------------------------------------------------------------------------------------

def save_safetensors(path, weights, metadata):
    """The tensors one after another behind a header that says where each lies, padded so that they are aligned. metadata: {str: str}."""
    names, header, end = {dtype: name for name, dtype in FLOATS.items()}, {'__metadata__': metadata}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for tensor in weights.values():
            f.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def write_json(folder, name, value):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write('\n')


def write_tokenizer(tok, folder, block_size):
    """tokenizer.json, without what would add tokens that our training never saw, and how transformers is to use it."""
    from tokenizers import Tokenizer
    spec, changes = json.loads(tok.text), dict(post_processor=None, truncation=None, padding=None)
    tok.save(folder)
    if any(spec.get(name) for name in changes):
        write_json(folder, 'tokenizer.json', spec | changes)
    eot = Tokenizer.from_str(tok.text).id_to_token(tok.eot)
    write_json(folder, 'tokenizer_config.json', dict(
        tokenizer_class='PreTrainedTokenizerFast', bos_token=eot, eos_token=eot, pad_token=eot, model_max_length=block_size,
        split_special_tokens=True, clean_up_tokenization_spaces=False, padding_side='left'))


def check(net, tok, quantize):
    """ValueError if the model cannot be written exactly."""
    if quantize:
        raise ValueError(f'quantize={quantize}: a Hugging Face folder is written in fp32; quantise it where it is loaded (bitsandbytes, '
                         'torchao), or choose --format=gguf or --format=native')
    if net.initial_state is not None:
        raise ValueError('a learned prefix has no place in the weights of a Hugging Face folder; keep it as an adapter, --format=peft')
    if tok is not None and tok.vocab_size > net.config.vocab_size:
        raise ValueError(f'the tokenizer has {tok.vocab_size} ids, the model only {net.config.vocab_size}')


def write(net, tok, folder, quantize=''):
    """Writes the files into an existing folder. ValueError says what cannot be exact there, and what comes nearest."""
    check(net, tok, quantize)
    config, weights = describe(net)
    eot = tok.eot if tok else None
    ids = dict(bos_token_id=eot, eos_token_id=eot)
    write_json(folder, 'config.json', {**config, **ids, 'pad_token_id': None, 'torch_dtype': 'float32', 'dtype': 'float32'})
    padding = list(range(tok.vocab_size, net.config.vocab_size)) if tok else []  # ids that stand for nothing are never drawn
    write_json(folder, 'generation_config.json', {**ids, 'pad_token_id': eot, **({'suppress_tokens': padding} if padding else {})})
    save_safetensors(os.path.join(folder, 'model.safetensors'), weights, {'format': 'pt'})
    if config['model_type'] == 'mambino_hybrid':
        shutil.copyfile(os.path.join(os.path.dirname(os.path.abspath(__file__)), MODELING), os.path.join(folder, MODELING))
    if tok:
        write_tokenizer(tok, folder, net.config.block_size)


# --- proof ------------------------------------------------------------------------------------------------------------

def same_ids(tok, folder, own):
    """→ how many of the texts have the ids they have here, and are the same text again; how many there are."""
    from transformers import AutoTokenizer
    theirs, texts = AutoTokenizer.from_pretrained(folder, trust_remote_code=own), some_texts(tok, 1000)
    ids = theirs(texts, padding=False, truncation=False)['input_ids']
    same = [got == want.tolist() and theirs.decode(got, skip_special_tokens=True) == tok.decode(got)
            for got, want in zip(ids, tok.encode_batch(texts))]
    return sum(same), len(texts)


def same_tokens(net, theirs, prompt, n, vocab_size, limit):
    """→ how many of the n likeliest tokens generate() finds too, up to the first other one. If the logits of the two were within `limit`
    of each other, both are right, and from there on the texts are different ones: so it counts as all."""
    ours = greedy(net, prompt.tolist(), n, vocab_size)
    theirs.generation_config.eos_token_id = None                                # it goes on after the end of a text, as we do
    got = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=n, do_sample=False)[0, len(prompt):]
    for i, (a, b) in enumerate(zip(ours, got.tolist())):
        if a != b:
            logits = net(torch.cat((prompt, got[:i]))[None])[0][0, -1]
            return n if logits[a] - logits[b] <= limit else i
    return len(got)


@torch.no_grad()
def verify(net, tok, folder, quantize=''):
    """Opens the folder with transformers: the same logits on random ids, the same greedy tokens, the same ids of varied texts."""
    import transformers
    from transformers import AutoModelForCausalLM
    c = net.config
    own = os.path.exists(os.path.join(folder, MODELING))
    transformers.utils.logging.disable_progress_bar()
    try:
        with silent():
            theirs, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own, dtype=torch.float32, output_loading_info=True)
            theirs.eval()
            wrong = sorted(map(str, {*info['missing_keys'], *info['unexpected_keys'], *info['mismatched_keys']}))
            n, vocab_size = 64, tok.vocab_size if tok else c.vocab_size
            idx = some_ids(net, 2, 64 + min(getattr(c, 'window', 0), 1024))     # a window must be seen to end
            ours = net(idx)[0]
            limit = 1e-4 * max(1.0, ours.std().item())                          # of logits that spread by 1
            off = difference(theirs(idx).logits, ours)
            equal = same_tokens(net, theirs, idx[0, :8], n, vocab_size, limit)
            same, texts = same_ids(tok, folder, own) if tok else (0, 0)
    finally:
        transformers.utils.logging.enable_progress_bar()
    result = dict(tool=f'transformers {transformers.__version__}', logits=off, limit=limit, greedy=f'{equal} of {n}',
                  note=f'opened as {type(theirs).__name__}', ok=not wrong and off <= limit and equal == n and same == texts)
    if wrong:
        result['note'] = f'tensors that do not fit {type(theirs).__name__}: {", ".join(wrong)}'
    return result | (dict(ids=f'{same} of {texts}') if tok else {})
