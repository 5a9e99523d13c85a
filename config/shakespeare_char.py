# nanoGPT's character-level Shakespeare, in its baby GPT's size and its arithmetic:
#   64 sequences x 256 characters = 16,384 tokens a step; 1,003,854 tokens in the train split = 61 steps an epoch
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# It wants a GPU; config/shakespeare_cpu.py is the one for a laptop.
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

model = 'gpt'           # --model=mamba and --model=hybrid work as well
n_layer = 6
n_embd = 384
n_head = 6
qk_norm = False         # nanoGPT has none
block_size = 256
dropout = 0.2           # the text passes 80 times: without dropout it is learned by heart

batch_size = 64
tokens_per_step = 2**14 # --batch_size=16 makes the same steps with less memory
optimizer = 'adamw'
learning_rate = 1e-3
schedule = 'cosine'
max_iters = 5000
eval_interval = 250
patience = 8            # evaluations without progress: it overfits in the end
