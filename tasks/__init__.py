"""Prefect tasks: thin typed adapters over gptq_core that pass paths and small records, never tensors."""
