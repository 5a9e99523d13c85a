"""Writes a model as a folder that Hugging Face's transformers opens, and proves it with
transformers itself.

    python export.py --out_dir=out --format=hf
    AutoModelForCausalLM.from_pretrained('out-hf'); AutoTokenizer.from_pretrained('out-hf')

Each model becomes the class of transformers that computes exactly the same:

    GPT                 Llama; with a window Mistral, with qk_norm Qwen3; with experts Mixtral,
                        with both Qwen3Moe; Qwen2, SmolLM3, Olmo2, Phi3, Olmoe: see hf_gpt.py
    Mamba               Mamba, with part_norm_eps FalconMamba, Mamba2; Mamba-3, of which it has no
                        class, modeling_mamba3.py
    plain hybrid        FalconH1; of SSM or attention layer by layer GraniteMoeHybrid, of Gated
                        DeltaNet or attention Qwen3_5: what these lack goes into the matrices
    any other hybrid    modeling_mambino.py
    what fills holes    modeling_holes.py: see hf_holes.py

A modelling file of ours is copied into the folder, and opened with trust_remote_code=True.

    net ──► to_transformers ──► config.json         the class and its settings, all of them explicit
                            └─► model.safetensors   fp32, in the class's names
    tok ──► tokenizer.json, tokenizer_config.json, generation_config.json

The tokenizer there takes text for text as ours does: "<|endoftext|>" in it is thirteen characters,
never the end of a document; that id is `eos_token_id`. Of a model that knows conversations it is as
transformers' always are: the name of a special token in a text is that token, and
apply_chat_template(messages, add_generation_prompt=True) gives the ids it was tuned on.

Seen to hold with transformers 5.23 and 4.57, but for a Mamba-2 with n_groups > 1, whose norm only 5
has in groups, and for conversations, tried with 5.23. vLLM reads the same folders; that is untried.
"""
import json
import os
import shutil

import torch

from mambino import chat
from mambino.export import hf_holes, hf_hybrid
from mambino.export.classes import check_classes, check_modules, longest_text, look_up, look_up_alike
from mambino.export.compare import difference, greedy, silent, some_ids, some_texts
from mambino.export.hf_gpt import attention_keys, convert_gpt
from mambino.export.hf_holes import has_holes
from mambino.export.special_tokens import FLAGS, MASK, PAD, named_to_mask, note_of, special_tokens
from mambino.export.to_safetensors import save_safetensors
from mambino.tokenizer_json import beginning_only, marks_of, names_in_reach
from mambino.weights.checkpoint import ids_of_texts
from model_gpt import GPT
from model_hybrid import DeltaMixer, Hybrid
from model_mamba import Mamba, Mamba1Mixer, Mamba2Mixer, Mamba3Mixer

PACKAGES = 'transformers'
TOOL = 'transformers'
WEIGHTS = 'model.safetensors'
MAMBA3 = 'modeling_mamba3.py'
DELTA = 'modeling_delta.py'
MODELING = {    # {a model_type of ours: the file of its classes, what their names begin with}
    'mambino_hybrid': ('modeling_mambino.py', 'Mambino'),
    'mambino_mamba': (MAMBA3, 'MambinoMamba'),
    hf_holes.MODEL_TYPE: (hf_holes.FILE, 'MambinoHoles'),
}
ALONE = MAMBA3, hf_holes.FILE   # modelling files that import no other


# --- which class, and what it is told -------------------------------------------------------------

def to_transformers(net):
    """→ (config.json's keys, {name: tensor}) of the class of transformers that computes what net
    does. ValueError if there is none."""
    check_modules(net, TOOL)
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    if net.config.tie_embeddings:
        del weights['lm_head.weight']
    convert = hf_holes.convert_holes if has_holes(net) else look_up(CONVERT, net, TOOL)
    keys, weights = convert(net, weights)
    shared = dict(vocab_size=net.config.vocab_size, tie_word_embeddings=net.config.tie_embeddings)
    return {**shared, **keys}, weights


def convert_mamba(net, weights):
    c = net.config
    mixer_keys = look_up_alike(MAMBA_KEYS, [block.mixer for block in net.backbone.layers], TOOL)
    if c.inner_size != c.expand * c.n_embd:
        raise ValueError(f'{TOOL} has no Mamba of inner_size={c.inner_size}, only of expand * n_embd')
    return mixer_keys(c), weights


def mamba_keys(c):
    """What transformers' Mamba and Mamba2 have in common."""
    if c.intermediate_size:
        raise ValueError(f'{TOOL}\' Mamba-1 and -2 have no MLP after the mixers, this one has, of '
                         f'intermediate_size={c.intermediate_size}: --format=onnx and torchscript take it, and a '
                         'Mamba-3 with one has a modelling file of its own')
    return dict(hidden_size=c.n_embd, num_hidden_layers=c.n_layer, state_size=c.state_size,
                expand=c.expand, conv_kernel=c.conv_kernel, layer_norm_epsilon=c.norm_eps,
                use_bias=False, use_conv_bias=True, hidden_act='silu', residual_in_fp32=True)


def mamba1_keys(c):
    keys = mamba_keys(c) | dict(intermediate_size=c.inner_size, time_step_rank=c.time_step_rank)
    if not c.part_norm_eps:
        return keys | dict(architectures=['MambaForCausalLM'], model_type='mamba')
    return keys | dict(
        architectures=['FalconMambaForCausalLM'], model_type='falcon_mamba', mixer_rms_eps=c.part_norm_eps)


def mamba2_keys(c):
    if not c.gated_norm:
        raise ValueError(f'{TOOL} has no Mamba-2 without the norm after its gate')
    return mamba_keys(c) | dict(
        architectures=['Mamba2ForCausalLM'], model_type='mamba2',
        num_heads=c.inner_size // c.head_dim, head_dim=c.head_dim, n_groups=c.n_groups,
        chunk_size=c.chunk_size, rms_norm=True, norm_before_gate=False)


def mamba3_keys(c):
    of_others = ('conv_kernel', 'time_step_rank', 'inner_size', 'part_norm_eps', 'gated_norm')
    return own_keys(c, 'mambino_mamba', of_others)


def own_keys(c, model_type, left_out=()):
    """Of a model with a modelling file of ours: its config, but for the fields left out."""
    file, name = MODELING[model_type]
    module = file.removesuffix('.py')
    left_out = ('tie_embeddings', 'dropout', *left_out)
    keys = {field: value for field, value in vars(c).items() if field not in left_out}
    keys |= dict(architectures=[name + 'ForCausalLM'], model_type=model_type)
    keys['auto_map'] = {'AutoConfig': f'{module}.{name}Config',
                        'AutoModel': f'{module}.{name}Model',
                        'AutoModelForCausalLM': f'{module}.{name}ForCausalLM'}
    return keys


def convert_hybrid(net, weights):
    c = net.config
    mixers = [layer.mamba for layer in net.model.layers if layer.mamba is not None]
    check_classes(mixers, {Mamba2Mixer, Mamba3Mixer, DeltaMixer}, TOOL)
    convert = hf_hybrid.class_of(c)
    if convert:
        return convert(c, weights, attention_keys(c))
    return own_keys(c, 'mambino_hybrid'), weights


CONVERT = {GPT: convert_gpt, Mamba: convert_mamba, Hybrid: convert_hybrid}
MAMBA_KEYS = {Mamba1Mixer: mamba1_keys, Mamba2Mixer: mamba2_keys, Mamba3Mixer: mamba3_keys}


# --- files ----------------------------------------------------------------------------------------

def write_json(folder, name, value):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write('\n')


def write_tokenizer(tok, folder, longest, special, mask_id=None):
    """tokenizer.json, without what would add tokens that our training never saw, and how
    transformers is to use it. longest: tokens of a text, None: any number. mask_id: of what stands for a hole."""
    spec = json.loads(tok.text)
    processor = spec.get('post_processor')
    if not tok.bos:
        processor = None
    elif marks_of(spec)[1]:             # an end behind every prompt
        processor = beginning_only(processor)
    changed = dict(post_processor=processor, truncation=None, padding=None)
    tok.save(folder)
    if any(spec.get(name) != value for name, value in changed.items()):
        write_json(folder, 'tokenizer.json', spec | changed)
    template = tok.config.get('chat_template')
    said = dict(special.names, tokenizer_class='PreTrainedTokenizerFast',
                split_special_tokens=not template, clean_up_tokenization_spaces=False, padding_side='left',
                model_input_names=['input_ids', 'attention_mask'])      # no token_type_ids, which generate() refuses
    if longest:
        said['model_max_length'] = longest
    added = {special.pad: PAD} if special.is_new else {}
    said.pop('mask_token', None)
    if mask_id is not None and not template:    # with one its name in a text would be a hole
        added = named_to_mask(tok, added, mask_id) or added
    if mask_id in added:
        said['mask_token'] = MASK
    if added:                           # the tokenizer.json stays what it was, and so do those who know it by that
        said['added_tokens_decoder'] = {str(i): {'content': name, **FLAGS} for i, name in added.items()}
    if tok.config.get('additional_special_tokens'):
        said['additional_special_tokens'] = tok.config['additional_special_tokens']
    if template:
        said['chat_template'] = template
    write_json(folder, 'tokenizer_config.json', said)


def check_exact(net, tok, quantize):
    """ValueError if the model cannot be written exactly."""
    if quantize:
        raise ValueError(f'quantize={quantize}: a Hugging Face folder is written in fp32; quantise it '
                         'where it is loaded (bitsandbytes, torchao), or choose '
                         + ('--format=native' if has_holes(net) else '--format=gguf or --format=native'))
    if net.initial_state is not None:
        raise ValueError('a learned prefix has no place in the weights of a Hugging Face folder; keep '
                         'it as an adapter, --format=peft')
    most = ids_of_texts(vars(net.config))
    if tok is not None and tok.vocab_size > most:
        raise ValueError(f'the tokenizer has {tok.vocab_size} ids, the model only {most}')


def write(net, tok, folder, quantize='', **_):
    """Writes the files into an existing folder. ValueError says what cannot be exact there, and
    what comes nearest."""
    check_exact(net, tok, quantize)
    keys, weights = to_transformers(net)
    special = special_tokens(tok, ids_of_texts(vars(net.config))) if tok else None
    if tok and has_holes(net):
        keys['text_size'] = tok.vocab_size
    ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
    if tok:
        ends = special.ends()
        eos = ends if len(ends) > 1 else ends[0]
        ids = dict(bos_token_id=special.bos, eos_token_id=eos, pad_token_id=special.pad)
    dtypes = dict(torch_dtype='float32', dtype='float32')                       # transformers 4 and 5
    write_json(folder, 'config.json', {**keys, **ids, **dtypes})
    generation = dict(ids)
    if tok and tok.vocab_size < net.config.vocab_size:  # ids that stand for nothing are never drawn
        generation['suppress_tokens'] = list(range(tok.vocab_size, net.config.vocab_size))
    write_json(folder, 'generation_config.json', generation)
    save_safetensors(os.path.join(folder, WEIGHTS), weights, {'format': 'pt'})
    if keys['model_type'] in MODELING:
        here = os.path.dirname(os.path.abspath(__file__))
        own, _ = MODELING[keys['model_type']]
        for file in [own] if own in ALONE else [own, MAMBA3, DELTA]:
            shutil.copyfile(os.path.join(here, file), os.path.join(folder, file))
    if tok:
        write_tokenizer(tok, folder, longest_text(net.config), special, keys.get('mask_token_id'))


def has_own_code(folder):
    """Whether a modelling file of ours lies there."""
    return any(os.path.exists(os.path.join(folder, file)) for file, _ in MODELING.values())


def opening(name, net, tok, folder, **_):
    """The lines that open the folder of this name, for the card; `folder` is where its files lie
    now."""
    if has_holes(net):
        return hf_holes.opening(name, net, tok)
    trust = ', trust_remote_code=True' if has_own_code(folder) else ''
    if not tok:
        return ('from transformers import AutoModelForCausalLM\n'
                f'model = AutoModelForCausalLM.from_pretrained({name!r}{trust})')
    lines = ['from transformers import AutoModelForCausalLM, AutoTokenizer',
             f'model, tok = AutoModelForCausalLM.from_pretrained({name!r}{trust}), '
             f'AutoTokenizer.from_pretrained({name!r}{trust})']
    if tok.config.get('chat_template'):
        lines += ["messages = [{'role': 'user', 'content': 'Hello!'}]",
                  "prompt = tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', "
                  'return_dict=True)',
                  "answer = model.generate(**prompt, max_new_tokens=200)[0, prompt['input_ids'].shape[1]:]",
                  'print(tok.decode(answer, skip_special_tokens=True))']
    return '\n'.join(lines)


# --- proof ----------------------------------------------------------------------------------------

def marks_in_texts(tok):
    """The names that are special tokens to transformers wherever a text says them, and text to us."""
    if tok.config.get('chat_template'):
        return {token['content'] for token in json.loads(tok.text)['added_tokens'] if token['special']}
    return names_in_reach(json.loads(tok.text), {tok.eot, *tok.bos})


def same_ids(tok, folder, trust_remote_code):
    """→ how many of the texts have the ids they have here, and are the same text again; how many
    there are, without those that name a special token where that makes a difference."""
    from transformers import AutoTokenizer
    opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    marks = marks_in_texts(tok)
    texts = [text for text in some_texts(tok, 1000) if not any(mark in text for mark in marks)]
    theirs = opened(texts, padding=False, truncation=False)['input_ids']
    same = 0
    for their_ids, our_ids in zip(theirs, tok.encode_batch(texts)):
        their_text = opened.decode(their_ids, skip_special_tokens=True)
        same_text = their_text.strip(' ') == tok.decode(their_ids).strip(' ')   # one may be the tokenizer's own
        same += their_ids == [*tok.bos, *our_ids.tolist()] and same_text
    return same, len(texts)


def same_chat(tok, folder, trust_remote_code):
    """→ whether a conversation has the ids it has here; True where the model knows none."""
    from transformers import AutoTokenizer
    if not tok or not tok.config.get('chat_template'):
        return True
    opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for messages in (chat.PROBE[:1], chat.PROBE[:3]):
        try:
            ours = chat.encode_prompt_of(tok, messages)
        except ValueError:              # it takes no such conversation; nor will transformers
            continue
        if opened.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) != ours:
            return False
    return True


def same_tokens(net, opened, prompt, n, vocab_size, limit):
    """→ how many of the n likeliest tokens generate() finds too, up to the first other one. If the
    logits of the two were within `limit` of each other, both are right, and from there on the texts
    are different ones: so it counts as all."""
    ours = greedy(net, prompt.tolist(), n, vocab_size)
    opened.generation_config.eos_token_id = None  # it goes on after the end of a text, as we do
    theirs = opened.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]),
                             max_new_tokens=n, do_sample=False)
    theirs = theirs[0, len(prompt):]
    for i, (our_token, their_token) in enumerate(zip(ours, theirs.tolist())):
        if our_token != their_token:
            logits = net(torch.cat((prompt, theirs[:i]))[None])[0][0, -1]
            return n if logits[our_token] - logits[their_token] <= limit else i
    return len(theirs)


def compare(net, opened, vocab_size):
    """(The largest difference of logits on random ids; its limit; how many of n greedy tokens are the same; n)."""
    n = 64
    window = min(getattr(net.config, 'window', 0), 1024)
    idx = some_ids(net, 2, 64 + window)  # a window must be seen to end
    ours = net(idx)[0]
    limit = 1e-4 * max(1.0, ours.std().item())  # of logits that spread by 1
    off = difference(opened(idx).logits, ours)
    return off, limit, same_tokens(net, opened, idx[0, :8], n, vocab_size, limit), n


@torch.no_grad()
def verify(net, tok, folder, quantize='', **_):
    """Opens the folder with transformers: the same logits on random ids, the same greedy tokens,
    the same ids of varied texts. → a check, see compare.py."""
    import transformers
    vocab_size = tok.vocab_size if tok else net.config.vocab_size
    trust_remote_code = has_own_code(folder)
    auto = transformers.AutoModelForMaskedLM if has_holes(net) else transformers.AutoModelForCausalLM
    transformers.utils.logging.disable_progress_bar()
    try:
        with silent():
            opened, loading = auto.from_pretrained(
                folder, trust_remote_code=trust_remote_code, dtype=torch.float32,
                output_loading_info=True)
            opened.eval()
            compared = hf_holes.compare_holes(net, opened) if has_holes(net) else compare(net, opened, vocab_size)
            off, limit, equal, n = compared
            same, texts = same_ids(tok, folder, trust_remote_code) if tok else (0, 0)
            is_same_chat = same_chat(tok, folder, trust_remote_code)
            mask_note = hf_holes.note_of_mask(net, folder) if tok and has_holes(net) else ''
    finally:
        transformers.utils.logging.enable_progress_bar()
    misfits = {*loading['missing_keys'], *loading['unexpected_keys'], *loading['mismatched_keys']}
    misfits = sorted(map(str, misfits))
    name = type(opened).__name__
    note = f'opened as {name}'
    if tok and tok.kind == 'char':
        note += '; a character that its training text did not have is an error there, "Missing [UNK] token"'
    if tok and marks_in_texts(tok):
        note += '; it takes the name of a special token in a text for that token'
    if tok and tok.config.get('chat_template'):
        note += '; a conversation has ' + ('the same ids' if is_same_chat else 'OTHER ids')
    if tok:
        note = '; '.join(filter(None, (note, mask_note, note_of(special_tokens(tok, ids_of_texts(vars(net.config)))))))
    if misfits:
        note = f'tensors that do not fit {name}: {", ".join(misfits)}'
    ok = not misfits and off <= limit and equal == n and same == texts and is_same_chat
    check = dict(tool=f'transformers {transformers.__version__}', logits=off, limit=limit,
                 greedy=f'{equal} of {n}', note=note, ok=ok)
    if tok:
        check['ids'] = f'{same} of {texts}'
    return check
