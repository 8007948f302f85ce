"""The commands: one declaration each, the engine that runs them, and the runners without a screen.

Typed lines, keys, the palette, help pages, replays and headless runs all come from `registry`.
Nothing here imports MLX, NumPy or Textual before a command needs the model.
"""
