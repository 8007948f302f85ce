"""The state of one shell: settings, output paths, the resident model, the journal."""
