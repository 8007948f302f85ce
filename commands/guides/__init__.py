"""The guides: chapters of the manual in Markdown, read in the shell by `help NAME`."""
