# Characters of Shakespeare on a laptop's CPU, to the loss nanoGPT's CPU command reaches (1.88) in a fraction of its time.
#   12 sequences x 64 characters = 768 tokens a step; 480 steps see 369,000 characters, a third of the text
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# What made the difference, val loss of two layers of width 128 in some 14 s: AdamW 1.96, Muon 1.89, Muon and QK-norm 1.85; width
# 96 gets there in 12 s. Four layers, sequences of 128 or 256, wider MLPs, 8 heads, other rates and batches were no better.
out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

model = 'gpt'           # --model=mamba and --model=hybrid work as well
n_layer = 2
n_embd = 96
n_head = 3
qk_norm = True
state_size = 32
block_size = 64

batch_size = 12
tokens_per_step = 768
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 480
eval_interval = 480     # the whole val split, at the end
log_interval = 50
