"""The innermost loops, where a GPU wants one fused kernel for what is many small operations in torch. Each file holds one loop."""
