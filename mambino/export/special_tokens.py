"""Which tokens begin, end and fill up a text of an exported model: said once, and so alike in every
file that says it.

    special = special_tokens(tok, net.config.vocab_size)
    special.bos, special.eos, special.turn, special.pad         # ids; turn and pad may be None
    special.ends()                                              # what ends a generated text

What ends an answer, `turn`, there is for models that know conversations: their tokenizer has a
template. A pad is never what ends a text, which a collator would take out of the loss with it. Where
a vocabulary has none, an id that the model's matrix has beyond it becomes one.
"""
import json
from typing import NamedTuple

from tokenizers import Tokenizer as HFTokenizer

from mambino import chat
from mambino.tokenizer_json import MASK, PAD, UNUSED

FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
PADS = (PAD, '<pad>', '[PAD]', '<|finetune_right_pad_id|>', '<|padding|>')      # as vocabularies call it


class SpecialTokens(NamedTuple):
    """Ids, and what each is called."""
    bos: int
    eos: int
    turn: int | None        # ends an answer, where that is not eos
    pad: int | None
    others: tuple           # what ends a text besides, as the model that came from elsewhere says
    names: dict             # 'bos_token' → its name, and so on, as tokenizer_config.json has them
    is_new: bool            # the pad is not in the tokenizer.json

    def ends(self):
        """list of the ids that end a generated text."""
        return list(dict.fromkeys(i for i in (self.eos, self.turn, *self.others) if i is not None))


def special_tokens(tok, vocab_size):
    """The SpecialTokens of a tokenizer whose model has so many ids."""
    ids = HFTokenizer.from_str(tok.text).get_vocab(with_added_tokens=True)
    names = {key: name for key, name in chat.names_of(tok).items() if name in ids}
    template = tok.config.get('chat_template', '')
    if 'bos_token' not in names and 'bos_token' not in template:    # where it writes none it has none
        names['bos_token'] = tok.name_of(tok.context()[0])
    eos = ids.get(names.get('eos_token'), tok.eot)
    names['eos_token'] = tok.name_of(eos)
    others = tuple(chat.end_ids(tok)) if template else tuple(tok.config.get('eos_token_id', ()))
    others = tuple(i for i in others if i < tok.vocab_size)
    turn = others[0] if template and others[0] != eos else None
    pad, is_new = pad_of(tok, names, ids, {eos, tok.eot, turn, *others}, vocab_size)
    names.pop('pad_token', None)
    if pad is not None:
        names['pad_token'] = PAD if is_new else tok.name_of(pad)
    return SpecialTokens(ids.get(names.get('bos_token'), tok.context()[0]), eos, turn, pad, others, names, is_new)


def pad_of(tok, names, ids, ends, vocab_size):
    """(the id that fills up a text, or None; whether it is one that the tokenizer does not have)."""
    for name in (names.get('pad_token'), *PADS):
        if name in ids and ids[name] not in ends:
            return ids[name], False
    if tok.vocab_size < vocab_size:
        new = tok.vocab_size
        if HFTokenizer.from_str(text_with(tok.text, {new: PAD})).token_to_id(PAD) == new:
            return new, True
    return None, False


def named_to_mask(tok, added, mask_id):
    """{id: name} of all ids behind the tokenizer's: those that are `added` already, and the last, mask_id, which
    stands for a hole. A vocabulary has no gaps, so what is between them has a name, too. {} where that cannot be."""
    names = {i: added.get(i, UNUSED.format(i)) for i in range(tok.vocab_size, mask_id)} | {mask_id: MASK}
    named = HFTokenizer.from_str(text_with(tok.text, names))
    return names if all(named.token_to_id(name) == i for i, name in names.items()) else {}


def text_with(text, names):
    """A tokenizer.json with more tokens, {id: name}."""
    spec = json.loads(text)
    more = [dict(id=i, content=name, **FLAGS) for i, name in names.items()]
    spec['added_tokens'] = [*(spec.get('added_tokens') or []), *more]
    return json.dumps(spec, ensure_ascii=False, indent=2)


def note_of(special):
    """What there is to say of them; '' for nothing."""
    if special.pad is None:
        return ('its vocabulary has no pad_token, nor room for one: batches of several texts need one that is not the '
                'end of a text')
    return ''
