"""The command spine: one declaration per command, and the runners that need no screen.

Typed lines, keys, the palette, help pages, replays and headless runs all come from `registry`.
Nothing here imports MLX, NumPy or Textual before a command needs the model.
"""
