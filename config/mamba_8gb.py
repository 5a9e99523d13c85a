# A Mamba-2 of 50M parameters for a card of 8 GB.
#   parameters   24 layers x (in_proj 512 x 2312 + out_proj 1024 x 512) = 41M, embedding 512 x vocabulary (16,384: 8M)
#   at rest      50M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.8 GB
#   activations  about 60 KB a token and layer in bf16: 2 x 1024 tokens x 24 layers = 3 GB (counted, not measured);
#                --batch_size=1 makes the same steps with half of that
#   a step       2 sequences x 1024 tokens x 64 micro-batches = 131,072 tokens
out_dir = 'out-mamba-8gb'
model = 'mamba'
n_layer = 24
n_embd = 512
block_size = 1024

batch_size = 2
tokens_per_step = 2**17
learning_rate = 1e-3
max_iters = 8000        # 1.05 billion tokens, 20 a parameter (Hoffmann et al. 2022)
warmup_iters = 200
eval_interval = 500
eval_iters = 100
