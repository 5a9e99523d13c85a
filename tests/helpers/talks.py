"""A conversation, and small tokenizers with templates of the kinds that other people's models bring."""
import json

from tokenizers import AddedToken

from helpers import foreign
from mambino import chat, tokenizer

TALK = [{'role': 'user', 'content': 'the cat?'}, {'role': 'assistant', 'content': 'sat on the mat.'},
        {'role': 'user', 'content': 'and the dog\n\nran?'}, {'role': 'assistant', 'content': 'home, then 中文'}]
SYSTEM = [{'role': 'system', 'content': 'the mat is a dog.'}]

# in the spirit of those in use:
# (the tokenizer, its special tokens, its configuration, the template, what ends an answer)
CHATML = ('gpt2', ['<|im_start|>', '<|im_end|>'], {}, chat.CHATML, '<|im_end|>')
LLAMA2 = ('llama', [], dict(bos_token='<s>', eos_token='</s>'), (
    "{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set talk = messages %}{% set system = false %}{% endif %}"
    "{% for message in talk %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"),
    '</s>')
LLAMA3 = ('llama3', ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'], dict(bos_token='<|begin_of_text|>'), (
    "{%- set ns = namespace(first=true) -%}{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' +"
    " message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"), '<|eot_id|>')
GEMMA = ('gemma', ['<start_of_turn>', '<end_of_turn>'], dict(bos_token='<s>'), (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"), '<end_of_turn>')
MISTRAL = ('mistral', ['[INST]', '[/INST]'], dict(bos_token='<s>', eos_token='</s>'), (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% else %}"
    "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"), '</s>')
ZEPHYR = ('mistral', [], dict(bos_token='<s>', eos_token='</s>'), (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"), '</s>')
PHI3_MARKS = [f'<|{name}|>' for name in ('user', 'assistant', 'system', 'end')]
PHI3 = ('llama', [AddedToken(mark, rstrip=True, special=True) for mark in PHI3_MARKS],
        dict(bos_token='<s>', eos_token='</s>'), (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"), '<|end|>')
UNIGRAM = ('unigram_bytes', ['<|im_start|>', '<|im_end|>'], {}, chat.CHATML, '<|im_end|>')
GENERATION = ('gpt2', ['<|im_start|>', '<|im_end|>'], {}, (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"), '<|im_end|>')
# Qwen's kind: what was thought is left out of all answers but the last
FORGETS = ('gpt2', ['<|im_start|>', '<|im_end|>'], {}, (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"), '<|im_end|>')
FAMILIES = dict(chatml=CHATML, llama2=LLAMA2, llama3=LLAMA3, gemma=GEMMA, mistral=MISTRAL, zephyr=ZEPHYR, phi3=PHI3,
                unigram=UNIGRAM, generation=GENERATION, forgets=FORGETS)


def write_family(folder, name):
    """The folder of a tokenizer with a template, as transformers has it."""
    kind, special, config, template, _ = FAMILIES[name]
    hf = foreign.KINDS[kind]()
    hf.add_special_tokens(special)
    foreign.save(hf, folder)
    tok = tokenizer.load_tokenizer(folder)
    config = dict(eos_token=tok.name_of(tok.eot)) | config
    said = dict(tokenizer_class='PreTrainedTokenizerFast', chat_template=template, **config)
    (folder / 'tokenizer_config.json').write_text(json.dumps(said))
    return folder
