"""The screen in a browser: one session, shown in every tab."""
