# A GPT of 154M parameters for a card of 16 GB: 20 layers of width 768.
#   at rest      154M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 2.3 GB
#   activations  40 KB a token and layer in bf16: 4 x 2048 tokens x 20 layers = 6.2 GB
#   at the peak  9.1 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 14.4 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       128 sequences x 2048 tokens = 262,144 tokens
#   the run      11,500 steps x 262,144 tokens = 3.0 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-gpt-16gb'

model = 'gpt'
size = '150m'
block_size = 2048
qk_norm = True

vram = '16'             # GB: as many sequences at once as fit
tokens_per_step = 128 * 2048
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 6e-4
max_iters = 11500
warmup_iters = 200
eval_interval = 500
eval_iters = 400        # sequences
