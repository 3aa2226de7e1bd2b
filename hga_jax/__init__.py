"""Long context on one GPU, in JAX: Hierarchical Global Attention for stock GQA/RoPE checkpoints."""
