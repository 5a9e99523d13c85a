# Characters of Shakespeare on two CPU cores, past the loss of nanoGPT's baby GPT on an A100
# (1.4697), well within 15 minutes.
#   8 sequences x 256 characters = 2,048 tokens a step; 1600 steps: the text 3.3 times
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# Measured, one seed: in bf16 val loss 1.444 after 6.5 minutes on two cores of a Zen 4 (1.493 at step
# 1200). In fp32 1.455; by the steps, before in_proj's rows were told apart: at the
# full rate 1.685 (400), 1.625 (600), as it falls 1.542 (1000), 1.500 (1200), 1.463 (1400), 1.457
# (1600). 6,100 tokens a second on two quiet cores: 9 minutes. The others in 1500 steps:
# --model=gpt --n_layer=4 --rope_theta=1000 --dropout=0 --decay_fraction=0.7: 1.723 (400), 1.573
#   (800), 1.485 (1200), 1.436 (1500); with dropout 0.1 it was at 1.575 in step 1200. 6,000 tokens a
#   second, 8.5 minutes
# --model=hybrid --n_layer=4 --n_embd=192 --n_head=3 --window=64 --dropout=0.05: 1.679 (400), 1.570
#   (800), 1.483 (1200), 1.440 (1500). 5,400 tokens a second, 9.5 minutes
out_dir = 'out-shakespeare-15min'
dataset = 'shakespeare_char'

model = 'mamba'         # 2.5M parameters
n_layer = 6
n_embd = 256
n_head = 4              # gpt and hybrid alone
qk_norm = True
state_size = 32         # 64 costs the same and was not tried to the end
block_size = 256
dropout = 0.1

batch_size = 8
tokens_per_step = 2048
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 1600
schedule = 'wsd'
decay_fraction = 0.6
warmup_iters = 50
eval_interval = 400
log_interval = 50
