"""A conversation as token ids: what a model reads, and what it learns to say.

    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    ids = encode_chat(tok, messages)                # (N,) int32; −1 − id: read, and not to be learned
    ids = encode_prompt_of(tok, messages)           # … and the beginning of the next answer

    messages ──► template (ChatML, or the tokenizer's own) ──► text, marks ──► ids

A template is Jinja, as transformers has it. Only the marks that it writes become mark ids: a mark
written in a message is ordinary text.
"""
import numpy as np

CHATML = ("{% for message in messages %}"
          "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
          "{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def encode_chat(tok, messages):
    """(N,) int32 ids of a whole conversation. The answers, each with the mark that ends it, are
    learned; all else is stored as −1 − id. ValueError says what this tokenizer or its template cannot
    do with it."""
    raise NotImplementedError


def encode_prompt_of(tok, messages):
    """list of ids of a conversation that waits for an answer, the beginning of that included."""
    raise NotImplementedError


def visible(ids):
    """The ids as a model reads them: of those that are not to be learned, too."""
    return np.where(ids < 0, -1 - ids, ids)
