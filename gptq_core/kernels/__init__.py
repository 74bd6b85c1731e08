"""The innermost loops, where a GPU wants one fused kernel for what is many small operations in torch. columns, descent and
scales hold one loop each, in torch; fused holds the same three in Triton; dispatch picks."""
