"""Trebuchet: plan and start fine-tuning of language models."""
