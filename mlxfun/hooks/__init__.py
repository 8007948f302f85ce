"""The one place that swaps classes of modules, to observe a forward or to intervene in it."""
