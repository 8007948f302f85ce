"""The experts heatmap without its widget: what to draw, where, in which colours, in which words."""
