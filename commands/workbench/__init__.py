"""The state of one shell: settings, where files go, the resident model, the journal."""
