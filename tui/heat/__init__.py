"""The experts heatmap without its widget: cells, layout, colours and descriptions."""
