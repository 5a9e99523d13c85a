"""GPT-like families of transformers' models that our GPT does not compute, and what differs."""

LEARNED_POSITIONS = 'it adds learned positions to the embeddings; our GPT turns queries and keys'
LAYER_NORM = 'it norms by LayerNorm, our GPT by RMSNorm'
GELU = 'its MLP is two matrices and GELU, that of our GPT a SwiGLU of three'
SIDE_BY_SIDE = 'attention and MLP stand side by side; in our GPT the MLP reads what attention gave'
ALIBI = 'it adds slopes to the scores of attention; our GPT turns queries and keys'
NEIGHBOURS = 'its RoPE turns neighbouring numbers of a head, that of our GPT the two halves'
GEMMA = 'its MLP has GELU in the place of SiLU, its norms have 1 + weight, it scales embeddings'
LATENT = 'its keys and values are made of a smaller latent vector, ours of the hidden state'
SHARED_EXPERT = 'it has an expert that every token takes, beside those that its router chooses'
SOME_WINDOWS = 'some of its layers attend in a window and others to all; our layers are alike'

REFUSED = {     # {model_type: what differs}
    'apertus': 'its MLP has xIELU and no gate, that of our GPT is a SwiGLU',
    'arcee': 'its MLP has a squared ReLU and no gate, that of our GPT is a SwiGLU',
    'bert': 'it reads to both sides, and does not continue a text',
    'bitnet': 'its weights have three values, and its MLP a squared ReLU',
    'bloom': f'{ALIBI}; {LAYER_NORM}',
    'codegen': f'{SIDE_BY_SIDE}; {LAYER_NORM}',
    'cohere': f'{SIDE_BY_SIDE}; {LAYER_NORM}',
    'cohere2': f'{SIDE_BY_SIDE}; {LAYER_NORM}; {SOME_WINDOWS}',
    'dbrx': f'{LAYER_NORM}, and limits queries, keys and values',
    'deepseek_v2': f'{LATENT}; {SHARED_EXPERT}',
    'deepseek_v3': f'{LATENT}; {SHARED_EXPERT}',
    'ernie4_5': NEIGHBOURS,
    'exaone4': 'only its layers with a window know positions; the layers of our GPT are alike',
    'falcon': f'{SIDE_BY_SIDE}; {LAYER_NORM}',
    'gemma': GEMMA,
    'gemma2': f'{GEMMA}; its scores and logits are capped by tanh',
    'gemma3': f'{GEMMA}; {SOME_WINDOWS}, and have rotary positions of another base',
    'gemma3_text': f'{GEMMA}; {SOME_WINDOWS}, and have rotary positions of another base',
    'gemma3n': f'{GEMMA}; its layers have embeddings of their own',
    'gemma4': f'{GEMMA}; {SOME_WINDOWS}',
    'glm': NEIGHBOURS,
    'glm4': f'{NEIGHBOURS}; its norms stand before and behind attention and MLP',
    'gpt2': f'{LEARNED_POSITIONS}; {LAYER_NORM}; {GELU}',
    'gpt_bigcode': f'{LEARNED_POSITIONS}; {LAYER_NORM}; {GELU}',
    'gpt_neo': f'{LEARNED_POSITIONS}; {LAYER_NORM}; {GELU}',
    'gpt_neox': f'{SIDE_BY_SIDE}; {LAYER_NORM}; {GELU}',
    'gpt_oss': 'its heads attend to a learned sink, too, and its SwiGLU is limited; ours are not',
    'gptj': f'{SIDE_BY_SIDE}; {LAYER_NORM}; {GELU}',
    'helium': NEIGHBOURS,
    'hunyuan_v1_dense': 'it norms queries and keys after RoPE, our GPT before',
    'llama4': f'{SHARED_EXPERT}; it attends in chunks',
    'llama4_text': f'{SHARED_EXPERT}; it attends in chunks',
    'minicpm3': LATENT,
    'ministral': SOME_WINDOWS,
    'mpt': f'{ALIBI}; {LAYER_NORM}',
    'nemotron': 'its norms are LayerNorms with 1 + weight, its MLP has a squared ReLU and no gate',
    'olmo': 'its LayerNorm has no weights; our GPT norms by RMSNorm',
    'olmo3': SOME_WINDOWS,
    'opt': f'{LEARNED_POSITIONS}; {LAYER_NORM}',
    'phi': f'{SIDE_BY_SIDE}; {LAYER_NORM}',
    'phimoe': f'{LAYER_NORM}; its router draws experts one after another',
    'qwen2_moe': SHARED_EXPERT,
    'rwkv': 'it is a recurrence without attention, and another one than our Mamba',
    'stablelm': LAYER_NORM,
    'starcoder2': f'{LAYER_NORM}; {GELU}',
    't5': 'it is an encoder and a decoder, and our GPT a decoder alone',
}
