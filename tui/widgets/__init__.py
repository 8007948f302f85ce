"""The widgets: one file each, with its own styles. They show what they are given and post intents;
none knows the engine."""
