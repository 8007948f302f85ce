"""The widgets: one file each, with its own styles. They show the state they are given and post
messages; none knows the engine.
"""
