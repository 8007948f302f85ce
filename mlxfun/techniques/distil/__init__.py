"""Distillation: routers, or routers and experts, are trained to predict what the checkpoint does."""
