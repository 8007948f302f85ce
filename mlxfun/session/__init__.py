"""The session: one resident model with its state, as front ends and library users open it."""
