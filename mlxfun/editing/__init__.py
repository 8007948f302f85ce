"""The editable model: staged plan, history of states, save."""
