# A GPT of 396M parameters for a card of 32 GB: 30 layers of width 1024.
#   at rest      396M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.9 GB
#   activations  55 KB a token and layer in bf16: 4 x 2048 tokens x 30 layers = 12.5 GB
#   at the peak  19.4 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 29.9 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       256 sequences x 2048 tokens = 524,288 tokens
#   the run      15,000 steps x 524,288 tokens = 7.9 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-gpt-32gb'

model = 'gpt'
size = '400m'
block_size = 2048
qk_norm = True

vram = '32'             # GB: as many sequences at once as fit
tokens_per_step = 256 * 2048
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 3e-4
max_iters = 15000
warmup_iters = 200
eval_interval = 500
eval_iters = 400        # sequences
