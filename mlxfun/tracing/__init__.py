"""Looking inside a model: traces, interventions, patching, lenses, attention, on its experts too."""
